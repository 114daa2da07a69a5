"""Augmented training data: what a model makes of each line, alone or with the whole set in its context.

    data lines × instructions → prompts → an ordinary run of rollouts → candidate lines → kept, rejected

The run resumes, spreads and is recorded as any other; what is kept follows from it.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.candidates import CHECKS, Entry, Judge, split
from canopy_store.ingest.generated import generation_of
from canopy_store.ingest.instructions import Instruction, read_instructions
from canopy_store.ingest.jobs import Job, run_job
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.prompts import read_prompt
from canopy_store.ingest.register import register_dataset
from canopy_store.ingest.rollouts import open_rollouts
from canopy_store.ingest.training_data import (
    check_records,
    is_written,
    read_records,
    text_of,
    write_once,
)
from canopy_store.store import treatments


@dataclass(frozen=True)
class Augmented:
    """What was made: the run, the row of ``datasets`` (None while other jobs still sample), the counts.

    Parameters
    ----------
    lines, candidates, kept : of the data, of what was answered, and of these in the file
    rejected : how many for each reason
    rejected_file : where each of them is, with its reason
    new : whether the files were written now; else they were there as they are
    """

    run: str
    row: dict[str, Any] | None
    lines: int
    candidates: int = 0
    kept: int = 0
    rejected: dict[str, int] | None = None
    rejected_file: Path | None = None
    new: bool = False


@dataclass(frozen=True)
class _Question:
    """One instruction about one line, and the prompt that it makes."""

    entry: Entry
    instruction: Instruction
    prompt: dict[str, Any]


def augment(
    root: str | Path,
    model: str,
    *,
    data: str | Path,
    out: str | Path,
    method: str,
    family: str,
    variant: str,
    task: str | None = None,
    instructions: Iterable[str] = (),
    checks: Iterable[str] = (),
    context_lines: int | None = None,
    keep_original: bool = False,
    samples: int = 4,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    seed: int = 0,
    **options: Any,
) -> Augmented:
    """What was made of training data: what was kept is in ``out``, which has its row in ``datasets``.

    Each line of ``out`` is {"text": …} with source_line, method, generator, instruction, run_id,
    prompt_id, sample and seed; what was rejected is beside it, as `rejected_of` names it, with reason
    and detail. The same call again samples what is missing and writes the same bytes. Source: Lampinen
    et al. 2025 (arXiv 2505.00661, augmented fine-tuning).

    Parameters
    ----------
    root : path of the store, made if missing
    model, family, variant : the augmenter and its names
    data : JSONL of training data; a line's "must_follow", a text or a list of them, or else its
        completion, is what the check of answer looks for
    method : local, each line alone; global, the set before each
    task : of the prompts [default: augment-METHOD-DATA]
    instructions : names of `instructions.INSTRUCTIONS` or files with {line} and, for global, {lines}
    checks : of `candidates.CHECKS`; names: capitalised words must be of the line (with global, of the
        set), and one of the line's among them; answer: as told at ``data``
    context_lines : with global, so many of the other lines, drawn anew for each, in place of the set
    keep_original : puts the lines of ``data`` before those that are kept
    samples, max_new_tokens, temperature, seed, options : as of
        `canopy_store.ingest.rollouts.ingest_rollouts`

    Raises
    ------
    ConflictError
        The run is stored with other settings, or ``out`` is there and holds something else.
    DataError
        Bad data or instructions, a prompt longer than the window, or nothing that can be kept.
    StoreError, UsageError
        What cannot be read; impossible settings.
    """
    data, out, checks = Path(data), Path(out), tuple(checks)
    rejected_file = rejected_of(out)
    _check(data, out, rejected_file, method, checks, context_lines)
    asking: dict[str, Any] = {
        "method": method,
        "instructions": tuple(instructions),
        "context_lines": context_lines,
        "seed": seed,
    }
    entries = _entries(data, "answer" in checks)
    asked = _questions(data, entries, **asking)
    task = task or f"augment-{method}-{data.stem}"
    sampling = {"samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature}
    names = {"model": model, "family": family, "variant": variant, "task": task}
    run = run_job(root, open_augment, {"data": data, **names, **asking, **sampling, **options})
    root = store.require(root)
    if not store.is_complete(root, run):
        return Augmented(run, None, len(entries))
    generator = f"{family}/{variant}"
    of_all = {"method": method, "generator": generator, "run_id": run, "seed": seed}
    kept, rejected = _judged(root, of_all, entries, asked, checks)
    if not kept:
        raise DataError(_nothing(data, generator, rejected))
    original = [each.record for each in entries] if keep_original else []
    contents = {out: _jsonl([*original, *kept]), rejected_file: _jsonl(rejected)}
    new = not all([is_written(path, content) for path, content in contents.items()])  # before any is
    for path in (rejected_file, out):
        write_once(path, contents[path])
    row = _add_row(root, data, out, of_all, len(original), len(kept))
    reasons = Counter(each["reason"] for each in rejected)
    found = len(kept) + len(rejected)
    return Augmented(run, row, len(entries), found, len(kept), dict(reasons), rejected_file, new)


def rejected_of(out: Path) -> Path:
    """Where the rejected of a data set stand: of NAME.jsonl in NAME.rejected.jsonl, else NAME.rejected.

    No two data sets share one: a.jsonl, a, a.v1 and a.v2 each have their own.
    """
    if out.suffix == ".jsonl":
        return out.with_suffix(".rejected.jsonl")
    return out.with_name(f"{out.name}.rejected")


def open_augment(
    root: str | Path,
    *,
    data: Path,
    method: str,
    instructions: tuple[str, ...],
    context_lines: int | None,
    seed: int,
    progress: Progress,
    **options: Any,
) -> Job:
    """The job of rollouts whose prompts are made of the data."""
    asked = _questions(data, _entries(data), method, instructions, context_lines, seed)
    job = open_rollouts(
        root,
        progress=progress,
        listed=[each.prompt for each in asked],
        prompts=data,
        seed=seed,
        shorten="shorten the line" if method == "local" else "take fewer lines with --context-lines N",
        **options,
    )
    said = {"method": method, "data_sha256": store.sha256(data)}
    job.settings["augment"] = said if context_lines is None else {**said, "context_lines": context_lines}
    return job


def _check(
    data: Path,
    out: Path,
    rejected_file: Path,
    method: str,
    checks: tuple[str, ...],
    context_lines: int | None,
) -> None:
    """Raises for what would be told only after all was sampled, or not at all."""
    for check in checks:
        if check not in CHECKS:
            raise UsageError(f"--check {check}: one of {', '.join(CHECKS)}")
    if context_lines is not None and method != "global":
        raise UsageError("--context-lines: only with --method global; local sees each line alone")
    if context_lines is not None and context_lines < 1:
        raise UsageError(f"--context-lines {context_lines}: needs at least 1")
    check_records(data)
    for path in (out, rejected_file):
        if path.resolve() == data.resolve():
            raise UsageError(f"--out {out}: would write over --data {data}; choose a new file")
        if path.is_dir():
            raise UsageError(f"--out {path}: is a folder; name a new file in it")


# ---------------------------------------------------------------- what is asked


def _entries(data: Path, answered: bool = False) -> list[Entry]:
    """The lines of the data; ``answered``: each must say what has to follow from it."""
    entries: list[Entry] = []
    seen: dict[str, int] = {}
    for number, (where, record) in enumerate(read_records(data), 1):
        text = text_of(record)
        if not text:
            raise DataError(f"{where}: holds nothing but spaces; remove it")
        if seen.setdefault(text, number) != number:
            raise DataError(f"{where}: the same text as line {seen[text]}; remove one")
        answers = record.get("must_follow", record.get("completion", []))
        listed = [answers] if isinstance(answers, str) else answers
        if not isinstance(listed, list) or not all(isinstance(a, str) and a.strip() for a in listed):
            raise DataError(f"{where}: must_follow needs a text, or a list of texts")
        if answered and not listed:
            raise DataError(f'{where}: --check answer needs "must_follow": "…" in every line; add it')
        entries.append(Entry(number, text, tuple(listed), record))
    return entries


def _questions(
    data: Path,
    entries: list[Entry],
    method: str,
    instructions: tuple[str, ...],
    context_lines: int | None,
    seed: int,
) -> list[_Question]:
    """Every instruction about every line, line by line."""
    told = read_instructions(method, instructions)
    asked = []
    for entry in entries:
        shown = [each.text for each in entries] if method == "global" else []
        if context_lines is not None:
            others = [at for at, each in enumerate(entries) if each is not entry]
            drawn = random.Random(f"{seed} {entry.line}").sample(others, min(context_lines, len(others)))
            shown = [entries[at].text for at in sorted(drawn)]
        for instruction in told:
            where = f"{data}: line {entry.line}"
            prompt = read_prompt({"text": instruction.of(entry.text, shown)}, where)
            asked.append(_Question(entry, instruction, {**prompt, "line": entry.line}))
    return asked


# ---------------------------------------------------------------- what is kept


def _judged(
    root: Path,
    of_all: dict[str, Any],
    entries: list[Entry],
    asked: list[_Question],
    checks: tuple[str, ...],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The kept and the rejected candidates, by line, instruction and sample; places count kept ones."""
    run, whole = of_all["run_id"], of_all["method"] == "global"
    with sql.connect(root, relations=("token_type",)) as con:
        replies: dict[str, list[tuple[int, str, str]]] = {}
        for prompt_id, *reply in con.sql(
            "select prompt_id, sample, text, finish_reason from rollouts where run_id = $run "
            "order by prompt_id, sample",
            params={"run": run},
        ).fetchall():
            if reply[1] is None:
                raise DataError(
                    f"run {run}: its texts were left out when it was exported; pull a folder that "
                    "has them"
                )
            replies.setdefault(prompt_id, []).append((reply[0], reply[1], reply[2]))

        def function_words(words: Iterable[str]) -> set[str]:
            query = "select word from unnest($words) t(word) where token_type(word) = 'function word'"
            return {word for (word,) in con.execute(query, {"words": sorted(words)}).fetchall()}

        texts = [text for listed in replies.values() for _, text, _ in listed]
        judge = Judge(entries, whole, checks, texts, function_words)
    kept: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for question in asked:
        prompt_id = question.prompt["prompt_id"]
        of = {"source_line": question.entry.line, "instruction": question.instruction.name, **of_all}
        for sample, reply, reason in replies.get(prompt_id, []):
            for text, problem in split(reply, question.instruction.labels, reason == "length"):
                found = (problem, _DETAILS[problem]) if problem else None
                found = found or judge.problem(text, question.entry, f"kept line {len(kept) + 1}")
                row = {"text": text, **of, "prompt_id": prompt_id, "sample": sample}
                if found is None:
                    kept.append(row)
                else:
                    rejected.append({**row, "reason": found[0], "detail": found[1]})
    return kept, rejected


_DETAILS = {"unlisted": "stands outside of the list", "cut": "ends at --max-new-tokens"}


def _nothing(data: Path, generator: str, rejected: list[dict[str, Any]]) -> str:
    """What is said where nothing is kept."""
    reasons = Counter(each["reason"] for each in rejected)
    counts = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    first = next((each["text"] for each in rejected if each["text"]), "")
    return (
        f"{data}: nothing that {generator} answered can be kept ({counts}); its first answer is "
        f"{first[:80]!r}: give it an --instruction with examples, or another model, and a new --run"
    )


def _jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _add_row(
    root: Path, data: Path, out: Path, of_all: dict[str, Any], original: int, kept: int
) -> dict[str, Any]:
    """The row of ``datasets`` of what is written, now stored; that of the data is stored before it."""
    digest = register_dataset(root, data)
    source = next(row for row in treatments.datasets(root) if row["data_sha256"] == digest)
    lines = original + kept
    real = (1.0 if source["real"] is None else source["real"]) * original / lines
    replayed = (source["replayed"] or 0.0) * original / lines
    behind = max(generation_of(root, of_all["generator"]), source["generation"] or 0)
    row = {
        "data_sha256": store.sha256(out),
        "name": out.stem,
        "lines": lines,
        "method": of_all["method"],
        "generator": of_all["generator"],
        "generation": 1 + behind,
        "real": real,
        "replayed": replayed,
        "generated": 1 - real - replayed,
        "source": f"run {of_all['run_id']}",
        "license": source["license"],
    }
    treatments.add_dataset(root, row)
    sql.write_database(root)
    return row
