"""The ingest of grades: every stored rollout's answer against the reference of its prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.jobs import Columns, Job, Unit, rollout_groups, run_job, text_of
from canopy_store.ingest.progress import Progress

Find = Callable[[str], str | None]  # the answer in a rollout's text, None where there is none


def ingest_grades(root: str | Path, grader: str, **options: Any) -> str:
    """The name under which the grades of all complete runs' rollouts are now stored.

    An answer is correct where it equals the prompt's reference, spaces around both aside; its score is
    then 1, else 0. Shards already graded are skipped, so it resumes, and picks up runs added since.

    Parameters
    ----------
    root : path of the store
    grader : exact, the whole text is the answer; or regex, the last match of ``pattern`` is
    pattern : a regular expression; its first group, where it has one, is the answer
    name : name in the store; by default the grader's
    runs : run ids; by default every complete run
    shard, executor, workers, progress : as of `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    ConflictError
        The name is stored with another grader or pattern.
    DataError
        A rollout without text, or a prompt without reference.
    """
    return run_job(root, open_grades, {"grader": grader, **options})


def open_grades(
    root: str | Path,
    grader: str,
    *,
    pattern: str | None = None,
    name: str | None = None,
    runs: tuple[str, ...] = (),
    progress: Progress,
) -> Job:
    """The job of `ingest_grades`."""
    answer = _finder(grader, pattern)
    root = store.writable(root)
    name = name or grader
    prompts = sql.prompts(root)

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        run = unit.group.run
        part = store.read_rows(
            unit.source, ["run_id", "prompt_id", "sample", "text", "n_tokens"]
        ).to_pydict()
        answers = [answer(text) for text in text_of(part, "text", "text to grade", run["run_id"])]
        correct = []
        for prompt_id, found in zip(part["prompt_id"], answers, strict=True):
            reference = prompts.get((run["task"], prompt_id), {}).get("reference")
            if reference is None:
                raise DataError(
                    f"run {run['run_id']}: prompt {prompt_id} has no reference to grade by; give its "
                    'line in the prompts file a "reference" and ingest, or choose other runs with --run'
                )
            correct.append(found is not None and found.strip() == reference.strip())
        keys = {key: part[key] for key in ("run_id", "prompt_id", "sample")}
        scores = [float(right) for right in correct]
        return {**keys, "answer": answers, "correct": correct, "score": scores}, sum(part["n_tokens"])

    settings = {"grader": name, "method": grader, "pattern": pattern}
    return Job(root, "grades", name, settings, rollout_groups(root, "grades", name, runs), rows)


def _finder(grader: str, pattern: str | None) -> Find:
    """What finds the answer in a text."""
    if grader == "exact":
        if pattern is not None:
            raise UsageError("--pattern: only with --grader regex")
        return str.strip
    if grader != "regex":
        raise UsageError(f"--grader {grader}: one of exact, regex")
    if pattern is None:
        raise UsageError(r"--grader regex needs --pattern, as in --pattern '#### (-?\d+)'")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--pattern {pattern}: not a regular expression: {error}") from None

    def last(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        return matches[-1][1 if compiled.groups else 0] if matches else None

    return last
