"""The ingest of scores: stored rollouts read again, teacher-forced, under any model and policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.prompts import read_prompts, render
from canopy_store.ingest.sample import Sampling
from canopy_store.ingest.teacher_forcing import score_tokens
from canopy_store.store.rollouts import stop_entropy

_POLICY = ("temperature", "top_k", "top_p")
_FULL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def ingest_scores(
    root: str | Path,
    scorer: str,
    *,
    name: str | None = None,
    runs: tuple[str, ...] = (),
    policy: str = "run",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    template: str = "run",
    prompts: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    chunk_tokens: int = 512,
    progress: Progress | None = None,
) -> str:
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
    policy : run, each run's own, or full: temperature 1, no top-k, no top-p
    temperature, top_k, top_p : instead of that part of the policy
    template : run, each prompt as the run had it, to the token; or chat or plain, which is another
        context where the run's was not that
    prompts : JSONL file of the prompts, for runs whose prompts the store has no text of
    batch_size : rollouts read side by side
    chunk_tokens : steps whose logits are held at once, about five times their number x vocabulary x
        4 bytes

    Raises
    ------
    ConflictError
        The name is stored with other settings; names each difference.
    DataError
        A run without token ids, of another tokenizer or of an unknown policy; logits that are NaN.
    """
    progress = progress or Progress()
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    _check_settings(policy, given, template, batch_size, chunk_tokens)
    root = store.require(root)
    with store.using_runs(root, runs) as chosen:
        model, tokenizer, path = models.load_model(scorer, device, dtype)
        weights = models.weights_sha256(path)
        known = _read_store(root, prompts)
        same = sorted(m for m, row in known.models.items() if row["weights_sha256"] == weights)
        name = store.check_name("--name", name or (same[0] if same else models.short_name(scorer)))
        theirs = known.models.get(name, {}).get("weights_sha256")
        if theirs and theirs != weights:
            raise UsageError(f"--name {name}: {name} is stored with other weights than {path} has")
        jobs = [
            _job(run, known, model, tokenizer, path, weights, policy, given, template) for run in chosen
        ]
        store.plan(
            root,
            "scorer",
            name,
            {
                "scorer_id": name,
                "weights_sha256": weights,
                "tokenizer_sha256": models.tokenizer_sha256(tokenizer),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": model.device.type,
                "template": template,
                "batch_size": batch_size,
                "chunk_tokens": chunk_tokens,
            },
        )
        by_run = {job.run_id: job for job in jobs}
        for job in jobs:
            job.where = store.folder(root, "scores", scorer_id=name, run=job.run_id)
        todo, done = store.shards_to_do(chosen, lambda run, number: by_run[run["run_id"]].target(number))
        progress.start(sum(s.rows for s in (*todo, *done)), sum(s.rows for s in done))
        for shard in todo:
            job = by_run[shard.run["run_id"]]
            _score_shard(model, tokenizer, job, shard, batch_size, chunk_tokens, progress)
            progress.rollouts(shard.rows)
        for job in jobs:
            if job.own:
                progress.say(_compared(job, str(model.dtype).removeprefix("torch.")))
        sql.write_database(root)
        return name


# ---------------------------------------------------------------- what is scored, and whether it may be


@dataclass
class _Known:
    """What the store says of its checkpoints, runs and prompts."""

    models: dict[str, dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    prompts: dict[tuple[str, str], dict[str, Any]]
    given: dict[str, dict[str, Any]]  # prompts of the file that was named


@dataclass
class _Job:
    """One run under one policy: its shards, its prompts' token ids and what ends a rollout."""

    run_id: str
    shards: list[Path]
    policy: dict[str, Any]
    end_ids: tuple[int, ...]
    prompts: dict[str, list[int]]
    own: bool  # the run's own weights, policy and prompts: must agree with the log
    tokenizer_known: bool
    dtype: str | None
    where: Path = Path()

    def target(self, number: int) -> Path:
        """The file of a shard's scores; the policy is in its name, for one scorer may use several."""
        policy = store.content_id(self.policy)
        return self.where / f"part-{number:05d}.{policy}.parquet"


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
    temperature, top_k, top_p = (given[key] for key in _POLICY)
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature {temperature}: needs 0 (greedy) or more")
    if top_k is not None and top_k < 0:
        raise UsageError(f"--top-k {top_k}: needs at least 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p}: needs more than 0 and at most 1")


def _read_store(root: Path, prompts: str | Path | None) -> _Known:
    with sql.connect(root) as con:
        checkpoints = con.sql("select * from models").pl().to_dicts()
        runs = con.sql("select * from runs").pl().to_dicts()
    texts = {}
    # not the view: of a prompt's rows it shows one, which may be an import's, without its text
    for file in store.files(root, "prompts"):
        task = store.unquoted(file.parent.name.removeprefix("task="))
        for row in store.read_rows(file).to_pylist():
            if row["text"] or row["messages"]:
                texts[task, row["prompt_id"]] = row
    return _Known(
        {row["model_id"]: row for row in checkpoints},
        {row["run_id"]: row for row in runs},
        texts,
        {row["prompt_id"]: row for row in read_prompts(prompts)} if prompts else {},
    )


def _job(
    run: dict[str, Any],
    known: _Known,
    model: Any,
    tokenizer: Any,
    path: Path,
    weights: str,
    policy: str,
    given: dict[str, Any],
    template: str,
) -> _Job:
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
    own = {key: row[key] for key in _POLICY}
    base = _FULL if policy == "full" else own
    used = {key: base[key] if given[key] is None else given[key] for key in _POLICY}
    unknown = [key for key, value in used.items() if value is None]
    if unknown:
        raise DataError(
            f"{where}: its {', '.join(unknown)} is not recorded; say --policy full, or each of "
            "--temperature, --top-k and --top-p"
        )
    used = {
        "temperature": float(used["temperature"]),
        "top_k": int(used["top_k"]),
        "top_p": float(used["top_p"]),
    }
    ends = run.get("end_token_ids")
    return _Job(
        run_id=row["run_id"],
        shards=run["shards"],
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
            f"{where}: how its prompts became tokens is not recorded; say --template chat or plain"
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
        rendered[prompt_id] = render(prompt, tokenizer, rendering, f"{where}: prompt {prompt_id}")
    asked = run.get("prompts_sha256")
    if template == "run" and asked and store.content_id([[*p] for p in rendered.items()]) != asked:
        raise DataError(
            f"{where}: the scorer's tokenizer or chat template makes other tokens of the prompts than "
            "were sampled from; use the sampled model's chat_template.jinja, or say --template "
            f"{rendering} to score after the scorer's own rendering"
        )
    return rendered


def _no_tokens(where: str) -> str:
    return (
        f"{where}: no token ids are stored, so there is nothing to score; choose other runs with --run"
    )


# ---------------------------------------------------------------- a shard


def _score_shard(
    model: Any,
    tokenizer: Any,
    job: _Job,
    shard: store.Shard,
    batch_size: int,
    chunk_tokens: int,
    progress: Progress,
) -> None:
    columns = ["run_id", "prompt_id", "sample", "text", "token_ids"]
    part = store.read_rows(shard.source, columns).to_pydict()
    names = [
        f"run {job.run_id}: prompt {p}, sample {s}"
        for p, s in zip(part["prompt_id"], part["sample"], strict=True)
    ]
    if None in part["token_ids"]:
        raise DataError(_no_tokens(names[part["token_ids"].index(None)]))
    if not job.tokenizer_known:
        _check_texts(tokenizer, part, names)
    prompts = [job.prompts[prompt_id] for prompt_id in part["prompt_id"]]
    _check_ids(model, prompts, part["token_ids"], names)
    scores = score_tokens(
        model,
        prompts,
        part["token_ids"],
        Sampling(**job.policy, end_ids=job.end_ids, width=batch_size),
        chunk_tokens,
        progress.tokens,
        names,
    )
    logprob, entropy, eos = (
        [np.minimum(row[0], 0) for row in scores],
        [np.maximum(row[1], 0) for row in scores],
        [np.minimum(row[2], 0) for row in scores],
    )
    store.write_rows(
        shard.target,
        "scores",
        {
            **{key: part[key] for key in ("run_id", "prompt_id", "sample")},
            "policy": [store.canonical(job.policy)] * len(names),
            "logprob": logprob,
            "entropy": entropy,
            "eos_logprob": eos,
            "entropy_sum": [row.sum(dtype=np.float64) for row in entropy],
            "surprisal_sum": [-row.sum(dtype=np.float64) for row in logprob],
            "stop_entropy_sum": [stop_entropy(row).sum() for row in eos],
        },
    )


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


def _compared(job: _Job, dtype: str) -> str:
    """One line: how far the scores are from what was logged of the same rollouts, and what was not."""
    measures = {"logprob": "logprob", "entropy": "entropy", "eos_logprob": "stop probability"}
    largest: dict[str, float] = {}
    steps = outside = 0
    for shard in job.shards:
        target = job.target(store.shard_number(shard))
        logged, scored = (store.read_rows(file, list(measures)) for file in (shard, target))
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
    sampled = f", sampled in {job.dtype}" if job.dtype else ""
    return f"run {job.run_id}{sampled}, scored by its own model in {dtype}: {'; '.join(told)}"
