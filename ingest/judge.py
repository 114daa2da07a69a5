"""The ingest of judgments: of the pairs of a prompt's rollouts, which mean the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.clusters import judged_samples
from canopy_store.ingest.jobs import (
    Columns,
    Job,
    Unit,
    part_of,
    rollout_groups,
    run_job,
    text_of,
    units_to_do,
)
from canopy_store.ingest.judge_prompts import JudgePrompts, read_judge_prompts
from canopy_store.ingest.judges import (
    Judge,
    Pair,
    Verdict,
    chat_judge,
    cosine_judge,
    grades_judge,
    nli_judge,
)
from canopy_store.ingest.progress import Progress

SUBSAMPLE, SEED = 24, 42  # of the code of arXiv 2605.30844
MAX_TOKENS, CONCURRENCY, BATCH_SIZE = 16, 32, 32
_MOST_FAILED = 0.05  # of a prompt's calls
_CHARACTERS = 4  # a token, about
# What each method takes, and what of it must be given.
OPTIONS: dict[str, tuple[str, ...]] = {
    "chat": ("base_url", "served_model", "instruction", "concurrency", "max_tokens"),
    "nli": ("model", "device", "dtype", "batch_size"),
    "cosine": ("embedder", "threshold"),
    "grades": ("grader",),
}
_NEEDED = {"chat": ("base_url",), "nli": ("model",), **{k: OPTIONS[k] for k in ("cosine", "grades")}}


def ingest_judgments(root: str | Path, judge: str, method: str, **options: Any) -> str:
    """The name under which the judgments of all complete runs' rollouts are now stored.

    Of each prompt ``subsample`` rollouts are judged, drawn by a seeded permutation, or all where there
    are no more: every pair once, and the reverse only where the first said similar (by an entailment
    model always both). A judge that reads texts is tried on two identical ones first. Where it says
    nothing that is a verdict in more than 5% of a prompt's calls, nothing of the shard is stored.
    Before the first call the number of calls and tokens to come is told to ``progress``. Shards already
    judged are skipped, so it resumes, and picks up runs added since.

    Parameters
    ----------
    root : path of the store
    judge : name in the store
    method : chat, nli, cosine or grades
    base_url, served_model : of chat: the server's address, and the model there, by default the only one
    instruction : of chat: a name of `PROMPTS`, or a file that has {first}, {second}, maybe {prompt};
        by default each task's own
    concurrency, max_tokens : of chat: requests at once, 32; the longest reply in tokens, 16
    model, device, dtype, batch_size : of nli: a folder, or package:NAME
    embedder, threshold : of cosine: a stored embedder; similar is a cosine of the threshold or more
    grader : of grades: a stored grader; similar are equal answers
    subsample, seed : how many rollouts of a prompt are judged, 24, and what draws them, 42
    runs : run ids; by default every complete run
    shard, executor, workers, progress : as of `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    ConflictError
        The name is stored with another judge.
    DataError
        A judge that tells identical texts apart, or gives no verdict in more than 5% of a prompt's
        calls; a rollout without text; what is to be compared is not stored.
    UsageError
        An unknown method, or an option of another one.
    CanopyError
        The server does not answer.
    """
    progress = options.get("progress") or Progress()
    own = {
        key: options[key]
        for key in ("runs", "shard", "subsample", "seed", "instruction")
        if key in options
    }
    progress.say(foretold(root, judge, method, **own).in_words())
    return run_job(root, open_judgments, {"judge": judge, "method": method, **options})


# ---------------------------------------------------------------- what it will take


@dataclass(frozen=True)
class Foretold:
    """What a judge's job has still to do: prompts, pairs, and of calls and tokens least and most."""

    method: str
    prompts: int = 0
    pairs: int = 0
    calls: tuple[int, int] = (0, 0)
    tokens: tuple[int, int] = (0, 0)

    def in_words(self) -> str:
        """One line."""
        work = f"to judge: {self.pairs:,} pairs of {self.prompts:,} prompts"
        if self.method not in ("chat", "nli"):
            return f"{work}, by what is stored"
        calls, tokens = (
            f"{least:,}" if least == most else f"{least:,} to {most:,}"
            for least, most in (self.calls, self.tokens)
        )
        return f"{work}, {calls} calls, about {tokens} tokens to read"


def foretold(
    root: str | Path,
    judge: str,
    method: str,
    *,
    subsample: int = SUBSAMPLE,
    seed: int = SEED,
    instruction: str | None = None,
    runs: tuple[str, ...] = (),
    shard: str | None = None,
) -> Foretold:
    """What `ingest_judgments` has still to do; no judge is asked.

    The least is where no pair is similar, the most where all are. A token is taken for four characters.
    """
    _check(method, subsample)
    root = store.writable(root)
    prompts = read_judge_prompts(instruction)
    texts = sql.prompts(root) if method == "chat" else {}
    job = Job(root, "judgments", judge, {}, rollout_groups(root, "judgments", judge, runs), _no_rows)
    told = Foretold(method)
    total = {"prompts": 0, "pairs": 0, "characters": 0}
    for group in job.groups:
        units = units_to_do(job, group, part_of(shard))
        chosen = (
            judged_samples(root, group.run_id, {"subsample": subsample, "seed": seed}) if units else {}
        )
        task = str(group.run["task"])
        for unit in units:
            part = store.read_rows(unit.source, ["prompt_id", "sample", "text"]).to_pydict()
            for prompt_id, lengths in _judged(part, chosen, [len(t or "") for t in part["text"]]):
                m = len(lengths)
                shown = texts.get((task, prompt_id), {})
                fixed = len(prompts.of(task, _prompt_text(shown) or "", "", "")) if texts else 0
                total["prompts"] += 1
                total["pairs"] += m * (m - 1) // 2
                total["characters"] += m * (m - 1) // 2 * fixed + (m - 1) * sum(lengths)
    tokens = total["characters"] // _CHARACTERS
    both = 2 * total["pairs"]
    probe = 1 if total["prompts"] else 0
    least = both if method == "nli" else total["pairs"]
    of_least = 2 * tokens if method == "nli" else tokens
    return Foretold(
        told.method,
        total["prompts"],
        total["pairs"],
        (least + probe, both + probe),
        (of_least, 2 * tokens),
    )


def _no_rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
    raise NotImplementedError  # of a job that only tells what there is to do


def _check(method: str, subsample: int) -> None:
    if method not in OPTIONS:
        raise UsageError(f"--method {method}: one of {', '.join(OPTIONS)}")
    if subsample < 2:
        raise UsageError(f"--subsample {subsample}: needs 2 rollouts or more")


# ---------------------------------------------------------------- the job


def open_judgments(
    root: str | Path,
    judge: str,
    method: str,
    *,
    base_url: str | None = None,
    served_model: str | None = None,
    instruction: str | None = None,
    concurrency: int | None = None,
    max_tokens: int | None = None,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    embedder: str | None = None,
    threshold: float | None = None,
    grader: str | None = None,
    subsample: int = SUBSAMPLE,
    seed: int = SEED,
    runs: tuple[str, ...] = (),
    progress: Progress,
) -> Job:
    """The job of `ingest_judgments`, its judge ready."""
    given = {
        **{"base_url": base_url, "served_model": served_model, "instruction": instruction},
        **{"concurrency": concurrency, "max_tokens": max_tokens, "model": model, "device": device},
        **{"dtype": dtype, "batch_size": batch_size, "embedder": embedder, "threshold": threshold},
        "grader": grader,
    }
    require_own_options(method, given)
    _check(method, subsample)
    root = store.writable(root)
    prompts = read_judge_prompts(instruction)
    asked = _open(root, method, given, prompts)
    whole = {"subsample": subsample, "seed": seed}
    texts = sql.prompts(root) if method == "chat" else {}
    samples = functools.lru_cache(maxsize=1)(lambda run_id: judged_samples(root, run_id, whole))
    tried = not asked.reads_texts

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        nonlocal tried
        run_id, task = unit.group.run_id, str(unit.group.run["task"])
        part = store.read_rows(unit.source, ["prompt_id", "sample", "text"]).to_pydict()
        values = (
            text_of(part, "text", "text to judge", run_id)
            if asked.reads is None
            else asked.reads(run_id, part)
        )
        made = _Made()
        chosen = samples(run_id)
        for prompt_id, mine in _judged(part, chosen, values):
            where = f"run {run_id}: prompt {prompt_id}"
            prompt = ""
            if "{prompt}" in prompts.text(task) and method == "chat":
                prompt = _require_text(texts.get((task, prompt_id), {}), where)
            if not tried:
                _try(asked, judge, Pair(task, prompt, mine[0], mine[0]), progress)
                tried = True
            of_pair = functools.partial(_pair, task, prompt, mine)
            verdicts = _verdicts(asked, of_pair, len(mine), progress)
            _require_verdicts(judge, where, list(verdicts.values()))
            made.add(prompt_id, chosen[prompt_id], verdicts)
        return {"run_id": [run_id] * len(made.columns["sample"]), **made.columns}, made.tokens

    settings = {"judge": judge, "method": method, **whole, **asked.settings}
    groups = rollout_groups(root, "judgments", judge, runs)
    return Job(root, "judgments", judge, settings, groups, rows, device=asked.device)


def require_own_options(method: str, given: Mapping[str, Any]) -> None:
    """Raises UsageError for an option of another method, or where one that is needed is missing."""
    _check(method, SUBSAMPLE)
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if value is not None and name not in OPTIONS[method]:
            owner = next(each for each, names in OPTIONS.items() if name in names)
            raise UsageError(f"{option}: only with --method {owner}")
        if value is None and name in _NEEDED[method]:
            raise UsageError(f"--method {method} needs {option}")
    for name in ("concurrency", "max_tokens", "batch_size"):
        if given.get(name) is not None and given[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} {given[name]}: needs at least 1")


def _open(root: Path, method: str, given: Mapping[str, Any], prompts: JudgePrompts) -> Judge:
    if method == "chat":
        return chat_judge(
            given["base_url"],
            given["served_model"],
            prompts,
            given["concurrency"] or CONCURRENCY,
            given["max_tokens"] or MAX_TOKENS,
        )
    if method == "nli":
        return nli_judge(
            given["model"], given["device"], given["dtype"], given["batch_size"] or BATCH_SIZE
        )
    if method == "cosine":
        return cosine_judge(root, given["embedder"], given["threshold"])
    return grades_judge(root, given["grader"])


class _Made:
    """The rows of a shard, and the tokens that they took."""

    def __init__(self) -> None:
        names = ("prompt_id", "sample", "other_sample", "verdict", "probability", "reply", "status")
        self.columns: dict[str, list[Any]] = {name: [] for name in names}
        self.tokens = 0

    def add(
        self, prompt_id: str, samples: list[int], verdicts: Mapping[tuple[int, int], Verdict]
    ) -> None:
        for (i, j), said in sorted(verdicts.items()):
            status = "failed" if said.verdict is None else "ok"
            row = (prompt_id, samples[i], samples[j], said.verdict, said.probability, said.reply, status)
            for column, value in zip(self.columns.values(), row, strict=True):
                column.append(value)
            self.tokens += said.tokens


def _judged(
    part: Mapping[str, list[Any]], chosen: Mapping[str, list[int]], values: list[Any]
) -> Iterator[tuple[str, list[Any]]]:
    """Each prompt of a shard, with the values of its rollouts that are judged, by sample."""
    of_prompt: dict[str, dict[int, Any]] = {}
    for prompt_id, sample, value in zip(part["prompt_id"], part["sample"], values, strict=True):
        of_prompt.setdefault(prompt_id, {})[sample] = value
    for prompt_id, of_sample in of_prompt.items():
        yield prompt_id, [of_sample[sample] for sample in chosen[prompt_id]]


def _pair(task: str, prompt: str, values: list[Any], i: int, j: int) -> Pair:
    return Pair(task, prompt, values[i], values[j])


def _verdicts(judge: Judge, of_pair: Any, m: int, progress: Progress) -> dict[tuple[int, int], Verdict]:
    """What the judge says of each pair of places that it is asked about, of m rollouts."""
    pairs = list(combinations(range(m), 2))
    if judge.both:
        pairs += [(j, i) for i, j in pairs]
    verdicts = dict(zip(pairs, judge.ask([of_pair(*p) for p in pairs], progress), strict=True))
    if not judge.both:
        back = [(j, i) for i, j in pairs if verdicts[i, j].alike]
        verdicts |= zip(back, judge.ask([of_pair(*p) for p in back], progress), strict=True)
    return verdicts


def _try(judge: Judge, name: str, pair: Pair, progress: Progress) -> None:
    """Raises DataError where the judge does not find two identical texts alike."""
    (said,) = judge.ask([pair], progress)
    if not said.alike:
        answer = f"answered {said.reply[:80]!r}" if said.reply is not None else f"said {said.verdict}"
        raise DataError(
            f"judge {name}: of two identical texts it {answer}, so it cannot tell what is alike; choose "
            "another model, or another --instruction"
        )


def _require_verdicts(name: str, where: str, verdicts: list[Verdict]) -> None:
    """Raises DataError where too many of a prompt's calls gave no verdict."""
    failed = [said for said in verdicts if said.verdict is None]
    if len(failed) > _MOST_FAILED * len(verdicts):
        raise DataError(
            f"{where}: {len(failed)} of {len(verdicts)} calls of judge {name} gave no verdict, first "
            f"{(failed[0].reply or '')[:80]!r}; nothing of this shard is stored: choose another model, "
            "another --instruction, or more --max-tokens"
        )


def _prompt_text(prompt: Mapping[str, Any]) -> str | None:
    """A prompt as text: plain, or what its messages say."""
    if prompt.get("text") is not None or prompt.get("messages") is None:
        return prompt.get("text")
    said = json.loads(prompt["messages"])
    return "\n".join(str(message["content"]) for message in said)


def _require_text(prompt: Mapping[str, Any], where: str) -> str:
    text = _prompt_text(prompt)
    if text is None:
        raise DataError(
            f"{where} has no text in the store; choose other runs with --run, or an --instruction "
            "that has no {prompt}"
        )
    return text
