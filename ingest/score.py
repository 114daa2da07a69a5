"""The ingest of scores: stored rollouts read again, teacher-forced, under any model and policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.draw import ADDED, Sampling, added, named_record
from canopy_store.ingest.jobs import Columns, Group, Job, Unit, rollout_groups, run_job
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.prompts import read_prompts
from canopy_store.ingest.rendering import context_of, render
from canopy_store.ingest.settings import check_policy
from canopy_store.ingest.sources import short_name
from canopy_store.ingest.teacher_forcing import score_tokens
from canopy_store.store.rollouts import stop_entropy

_POLICY = ("temperature", "top_k", "top_p")
_FULL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **ADDED}


def ingest_scores(root: str | Path, scorer: str, **options: Any) -> str:
    """The scorer_id under which the scores of the runs' rollouts are now stored.

    Each stored token gets its log-probability under the scorer, and each step the exact entropy and
    the log-probability of ending there, as the sampler logs them. A token outside the policy's
    support has logprob -inf. Shards already scored are skipped, so it resumes, and picks up runs
    added since. A run scored by its own model under its own policy is compared with what was logged.

    Parameters
    ----------
    root : path of the store
    scorer : local folder, GGUF file, hub id, or package:NAME; it must share the runs' tokenizer
    name : the scorer_id; by default the model_id of the stored checkpoint with these weights, else
        the folder's or hub id's last part
    runs : run ids; by default every complete run
    policy : run, each run's own, or full: temperature 1, nothing cut, no penalty
    temperature, top_k, top_p, min_p, typical_p, repetition_penalty : instead of that part of the policy.
        A repetition penalty is of the prompt's tokens, as they are read here, and those before each step
    template : run, each prompt as the run had it, to the token; or chat or plain, which is another
        context where the run's was not that
    prompts : JSONL file of the prompts, for runs whose prompts the store has no text of
    device, dtype : of the scorer
    batch_size : rollouts read side by side
    chunk_tokens : steps whose logits are held at once, about five times their number x vocabulary x
        4 bytes
    shard, executor, workers, progress : as of `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    ConflictError
        The name is stored with other settings; names each difference.
    DataError
        A run without token ids, of another tokenizer or of an unknown policy; logits that are NaN.
    """
    return run_job(root, open_scores, {"scorer": scorer, **options})


def open_scores(
    root: str | Path,
    scorer: str,
    *,
    name: str | None = None,
    runs: tuple[str, ...] = (),
    policy: str = "run",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float | None = None,
    template: str = "run",
    prompts: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    chunk_tokens: int = 512,
    progress: Progress,
) -> Job:
    """The job of `ingest_scores`, its model loaded and every run found fit to be scored."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given |= {"typical_p": typical_p, "repetition_penalty": repetition_penalty}
    _check_settings(policy, given, template, batch_size, chunk_tokens)
    root = store.writable(root)
    model, tokenizer, path = models.load_model(scorer, device, dtype)
    weights = models.weights_sha256(path)
    known = _read_store(root, prompts)
    same = sorted(m for m, row in known.models.items() if row["weights_sha256"] == weights)
    name = name or (same[0] if same else short_name(scorer))
    theirs = known.models.get(name, {}).get("weights_sha256")
    if theirs and theirs != weights:
        raise UsageError(f"--name {name}: {name} is stored with other weights than {path} has")
    read = {
        run["run_id"]: _read_run(run, known, model, tokenizer, path, weights, policy, given, template)
        for run in store.complete_runs(root, runs)
    }
    settings = {
        "scorer_id": name,
        "weights_sha256": weights,
        "tokenizer_sha256": models.tokenizer_sha256(tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "template": template,
        "batch_size": batch_size,
        "chunk_tokens": chunk_tokens,
    }

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        return _score(
            model, tokenizer, read[unit.group.run_id], unit, batch_size, chunk_tokens, progress
        )

    def compare(group: Group, progress: Progress) -> None:
        if read[group.run_id].own:
            progress.say(_compared(root, group, read[group.run_id], settings["dtype"]))

    groups = rollout_groups(
        root, "scores", name, read, policy=lambda run_id: store.content_id(read[run_id].policy)
    )
    return Job(root, "scores", name, settings, groups, rows, after=compare, device=settings["device"])


# ---------------------------------------------------------------- what is scored, and whether it may be


@dataclass
class _Known:
    """What the store says of its checkpoints, runs and prompts."""

    models: dict[str, dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    prompts: dict[tuple[str, str], dict[str, Any]]
    given: dict[str, dict[str, Any]]  # prompts of the file that was named


@dataclass(frozen=True)
class _Read:
    """One run as the scorer reads it: its policy, its prompts' token ids and what ends a rollout."""

    policy: dict[str, Any]
    end_ids: tuple[int, ...]
    prompts: dict[str, list[int]]
    own: bool  # the run's own weights, policy and prompts: must agree with the log
    tokenizer_known: bool
    dtype: str | None


def _check_settings(
    policy: str, given: dict[str, Any], template: str, batch_size: int, chunk_tokens: int
) -> None:
    if policy not in ("run", "full"):
        raise UsageError(f"--policy {policy}: one of run, full")
    if template not in ("run", "chat", "plain"):
        raise UsageError(f"--template {template}: one of run, chat, plain")
    for option, value in (("--batch-size", batch_size), ("--chunk-tokens", chunk_tokens)):
        if value < 1:
            raise UsageError(f"{option} {value}: needs at least 1")
    check_policy(**given)


def _read_store(root: Path, prompts: str | Path | None) -> _Known:
    with sql.connect(root) as con:
        checkpoints = con.sql("select * from models").pl().to_dicts()
        runs = con.sql("select * from runs").pl().to_dicts()
    return _Known(
        {row["model_id"]: row for row in checkpoints},
        {row["run_id"]: row for row in runs},
        {k: row for k, row in sql.prompts(root).items() if row["text"] or row["messages"]},
        {row["prompt_id"]: row for row in read_prompts(prompts)} if prompts else {},
    )


def _read_run(
    run: dict[str, Any],
    known: _Known,
    model: Any,
    tokenizer: Any,
    path: Path,
    weights: str,
    policy: str,
    given: dict[str, Any],
    template: str,
) -> _Read:
    """The run as the scorer reads it, or the reason why it cannot be read."""
    row = known.runs[run["run_id"]]
    sampler = known.models.get(row["model_id"], {})
    where = f"run {row['run_id']}"
    if any(store.read_rows(s, ["token_ids"])["token_ids"].null_count for s in run["shards"][:1]):
        raise DataError(_no_tokens(where))
    theirs = sampler.get("tokenizer_sha256")
    if theirs and theirs != models.tokenizer_sha256(tokenizer):
        raise DataError(
            f"{where}: sampled with another tokenizer than that of {path}: the token ids mean other "
            "text to it; choose other runs with --run"
        )
    own = {key: row[key] for key in (*_POLICY, *ADDED)}
    base = _FULL if policy == "full" else own
    used = {key: base[key] if given[key] is None else given[key] for key in own}
    unknown = [key for key in _POLICY if used[key] is None]
    if unknown:
        raise DataError(
            f"{where}: its {', '.join(unknown)} is not recorded; pass --policy full, or each of "
            "--temperature, --top-k and --top-p"
        )
    used = {
        "temperature": float(used["temperature"]),
        "top_k": int(used["top_k"]),
        "top_p": float(used["top_p"]),
        **added(used),
    }
    own = {**{key: row[key] for key in _POLICY}, **added(row)}
    ends = run.get("end_token_ids")
    return _Read(
        policy=used,
        end_ids=tuple(models.end_token_ids(model, tokenizer) if ends is None else ends),
        prompts=_prompt_ids(run, row, known, tokenizer, template, where),
        own=sampler.get("weights_sha256") == weights
        and used == own
        and template in ("run", row["rendering"]),
        tokenizer_known=bool(theirs),
        dtype=row["dtype"],
    )


def _prompt_ids(
    run: dict[str, Any], row: dict[str, Any], known: _Known, tokenizer: Any, template: str, where: str
) -> dict[str, list[int]]:
    """The token ids of each of the run's prompts, the same that were sampled from."""
    rendering = row["rendering"] if template == "run" else template
    if rendering not in ("chat", "plain"):
        raise DataError(
            f"{where}: how its prompts became tokens is not recorded; pass --template chat or plain"
        )
    if rendering == "chat" and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: its prompts went through a chat template and the scorer's tokenizer has none; "
            "put the sampled model's chat_template.jinja in the scorer's folder"
        )
    listed = dict.fromkeys(
        prompt
        for shard in run["shards"]
        for prompt in store.read_rows(shard, ["prompt_id"])["prompt_id"].to_pylist()
    )
    rendered = {}
    for prompt_id in listed:
        prompt = known.prompts.get((row["task"], prompt_id)) or known.given.get(prompt_id)
        if prompt is None:
            raise DataError(
                f"{where}: prompt {prompt_id}: the store has no text of it to score after; name the "
                "file of the prompts with --prompts"
            )
        place = f"{where}: prompt {prompt_id}"
        rendered[prompt_id] = render(prompt, tokenizer, rendering, place, context_of(run))
    asked = run.get("prompts_sha256")
    if template == "run" and asked and store.content_id([[*p] for p in rendered.items()]) != asked:
        raise DataError(
            f"{where}: the scorer's tokenizer or chat template makes other tokens of the prompts than "
            "were sampled from; use the sampled model's chat_template.jinja, or pass --template "
            f"{rendering} to score after the scorer's own rendering"
        )
    return rendered


def _no_tokens(where: str) -> str:
    return (
        f"{where}: no token ids are stored, so there is nothing to score; choose other runs with --run"
    )


# ---------------------------------------------------------------- a shard


def _score(
    model: Any,
    tokenizer: Any,
    read: _Read,
    unit: Unit,
    batch_size: int,
    chunk_tokens: int,
    progress: Progress,
) -> tuple[Columns, int]:
    names_read = ["run_id", "prompt_id", "sample", "text", "token_ids"]
    part = store.read_rows(unit.source, names_read).to_pydict()
    names = [
        f"run {unit.group.run_id}: prompt {p}, sample {s}"
        for p, s in zip(part["prompt_id"], part["sample"], strict=True)
    ]
    if None in part["token_ids"]:
        raise DataError(_no_tokens(names[part["token_ids"].index(None)]))
    if not read.tokenizer_known:
        _check_texts(tokenizer, part, names)
    prompts = [read.prompts[prompt_id] for prompt_id in part["prompt_id"]]
    _check_ids(model, prompts, part["token_ids"], names)
    sampling = Sampling(**read.policy, end_ids=read.end_ids, width=batch_size)
    scores = score_tokens(
        model,
        prompts,
        part["token_ids"],
        sampling,
        chunk_tokens,
        progress.tokens,
        names,
    )
    named = [named_record(sampling, row) for row in scores]
    lists = {name: [row[name] for row in named] for name in sampling.record}
    logprob, entropy, eos = (
        [np.minimum(row, 0) for row in lists["logprob"]],
        [np.maximum(row, 0) for row in lists["entropy"]],
        [np.minimum(row, 0) for row in lists["eos_logprob"]],
    )
    columns = {
        **{key: part[key] for key in ("run_id", "prompt_id", "sample")},
        "policy": [store.canonical(read.policy)] * len(names),
        **lists,
        "logprob": logprob,
        "entropy": entropy,
        "eos_logprob": eos,
        "entropy_sum": [row.sum(dtype=np.float64) for row in entropy],
        "surprisal_sum": [-row.sum(dtype=np.float64) for row in logprob],
        "stop_entropy_sum": [stop_entropy(row).sum() for row in eos],
    }
    if sampling.cuts:
        columns["log_mass_sum"] = [row.sum(dtype=np.float64) for row in columns["log_mass"]]
    return columns, sum(map(len, part["token_ids"]))


def _check_texts(tokenizer: Any, part: dict[str, list[Any]], names: list[str]) -> None:
    """For runs whose tokenizer is not recorded: their texts tell whether it is this one."""
    decoded = tokenizer.batch_decode(part["token_ids"], skip_special_tokens=True)
    for name, text, mine in zip(names, part["text"], decoded, strict=True):
        if text is None or text.strip() != mine.strip():
            reason = "no text is stored to tell" if text is None else "its token ids spell other text"
            raise DataError(
                f"{name}: the run's tokenizer is not recorded and {reason}, so it may not be the "
                "scorer's; choose other runs with --run"
            )


def _check_ids(
    model: Any, prompts: list[list[int]], rollouts: list[list[int]], names: list[str]
) -> None:
    size, window = model.get_input_embeddings().weight.shape[0], models.context_window(model)
    for name, prompt, rollout in zip(names, prompts, rollouts, strict=True):
        if not rollout or min(rollout) < 0 or max(*prompt, *rollout) >= size:
            raise DataError(f"{name}: token ids need to be there and from 0 to {size - 1}")
        if window and len(prompt) + len(rollout) - 1 > window:
            raise DataError(
                f"{name}: {len(prompt)} prompt tokens and {len(rollout)} more exceed the scorer's "
                f"context window of {window}; choose other runs with --run"
            )


def _compared(root: Path, group: Group, read: _Read, dtype: str) -> str:
    """One line: how far the scores are from what was logged of the same rollouts, and what was not."""
    measures = {"logprob": "logprob", "entropy": "entropy", "eos_logprob": "stop probability"}
    largest: dict[str, float] = {}
    steps = outside = 0
    for logged, scored in _pairs(root, group, list(measures)):
        for column in measures:
            b = scored[column].combine_chunks().flatten().to_numpy().astype(np.float64)
            if column == "logprob":
                steps, outside = steps + len(b), outside + int(np.isinf(b).sum())
            if logged[column].null_count:
                continue
            a = logged[column].combine_chunks().flatten().to_numpy().astype(np.float64)
            if column == "eos_logprob":
                a, b = np.exp(a), np.exp(b)
            # rounding may move a token across the edge of top-k or top-p: counted, not measured
            inside = np.isfinite(a) & np.isfinite(b)
            largest[column] = max(largest.get(column, 0.0), np.abs(a - b)[inside].max(initial=0))
    told = []
    if largest:
        told.append(
            "largest difference "
            + ", ".join(
                f"{value:.2g} {'' if column == 'eos_logprob' else 'nats '}in {measures[column]}"
                for column, value in largest.items()
            )
        )
    missing = [word for column, word in measures.items() if column not in largest]
    if missing:
        told.append(f"{', '.join(missing)} not logged, and now completed")
    if outside:
        told.append(f"{outside} of {steps} steps fell outside the policy's support")
    sampled = f", sampled in {read.dtype}" if read.dtype else ""
    return f"run {group.run_id}{sampled}, scored by its own model in {dtype}: {'; '.join(told)}"


def _pairs(root: Path, group: Group, columns: list[str]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The run's rollouts and their scores, shard by shard where both are cut alike, else at once."""
    done = [store.record(root, "rollouts", run=group.run_id), store.record(root, "scores", **group.keys)]
    logged, scored = ([root / name for name in each.of(each.kind)] for each in done if each is not None)
    if [*map(store.shard_number, logged)] == [*map(store.shard_number, scored)]:
        pairs = zip(logged, scored, strict=True)
        yield from ((store.read_rows(a, columns), store.read_rows(b, columns)) for a, b in pairs)
    else:
        yield tuple(
            pa.concat_tables([store.read_rows(f, columns) for f in side]) for side in (logged, scored)
        )
