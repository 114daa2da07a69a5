"""The ingest of grades: every stored rollout's answer against the reference of its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import DataError
from canopy_store.ingest.graders import Grade, grader_of, source_hash
from canopy_store.ingest.jobs import Columns, Job, Unit, rollout_groups, run_job, text_of
from canopy_store.ingest.progress import Progress


def ingest_grades(root: str | Path, grader: str, **options: Any) -> str:
    """The name under which the grades of all complete runs' rollouts are now stored.

    An answer is correct where it equals the prompt's reference in the grader's sense; its score is then
    1, else 0, and a function of one's own gives scores between. Shards already graded are skipped, so
    it resumes, and picks up runs added since.

    Parameters
    ----------
    root : path of the store
    grader : exact, the whole text is the answer, and regex, the last match of ``pattern`` is: compared
        as text, spaces around it aside; choice, the letter that is stated last; number, the last
        number, compared by value; math, the expression that the package math-verify finds; python,
        what ``function`` says
    pattern : a regular expression; its first group, where it has one, is the answer
    function : module:name of a function of text and reference that gives True or False, a score from
        0 to 1 (1 is right), or (answer, score); it is imported, and runs as any code of one's own
    name : name in the store; by default the grader's
    runs : run ids; by default every complete run
    shard, executor, workers, progress : as of `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    UsageError
        An unknown grader, no regular expression, no such function, math-verify is not installed.
    ConflictError
        The name is stored with another grader, pattern or function.
    DataError
        A rollout without text, a prompt without reference or with one that the grader cannot read, or a
        function that fails on a rollout: of that shard nothing is stored, and no grade of the run shows.
    """
    return run_job(root, open_grades, {"grader": grader, **options})


def open_grades(
    root: str | Path,
    grader: str,
    *,
    pattern: str | None = None,
    function: str | None = None,
    name: str | None = None,
    runs: tuple[str, ...] = (),
    progress: Progress,
) -> Job:
    """The job of `ingest_grades`."""
    grade = grader_of(grader, pattern, function)
    root = store.writable(root)
    name = name or grader
    prompts = sql.prompts(root)

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        run = unit.group.run
        part = store.read_rows(
            unit.source, ["run_id", "prompt_id", "sample", "text", "n_tokens"]
        ).to_pydict()
        texts = text_of(part, "text", "text to grade", run["run_id"])
        grades: list[Grade] = []
        for prompt_id, sample, text in zip(part["prompt_id"], part["sample"], texts, strict=True):
            reference = prompts.get((run["task"], prompt_id), {}).get("reference")
            if reference is None:
                raise DataError(
                    f"run {run['run_id']}: prompt {prompt_id} has no reference to grade by; give its "
                    'line in the prompts file a "reference" and ingest, or choose other runs with --run'
                )
            try:
                grades.append(grade(text, reference))
            except DataError as error:
                where = f"run {run['run_id']}: prompt {prompt_id} sample {sample}"
                raise DataError(f"{where}: {error}") from error
        keys = {key: part[key] for key in ("run_id", "prompt_id", "sample")}
        found = {field: [getattr(each, field) for each in grades] for field in Grade._fields}
        return {**keys, **found}, sum(part["n_tokens"])

    settings = {"grader": name, "method": grader, "pattern": pattern}
    if function is not None:
        settings |= {"function": function, "function_source": source_hash(function)}
    return Job(root, "grades", name, settings, rollout_groups(root, "grades", name, runs), rows)
