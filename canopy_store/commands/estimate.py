"""What a study will take, before it is run: rows, tokens, bytes and device hours of its commands.

Lengths and speeds are those of what a store has had done: a rollout is as long as those stored of its
task, else as those of any, else as --max-new-tokens lets it be; a job is as fast as the table ``work``
says, sampling as that of its task, else as any. Augmenting is sampling: an answer to each instruction
about each line, so often.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

import canopy_store
from canopy_store import store
from canopy_store.errors import CanopyError
from canopy_store.ingest.corpus import read_documents
from canopy_store.ingest.instructions import read_instructions
from canopy_store.ingest.items import read_items
from canopy_store.ingest.prompts import read_prompts
from canopy_store.ingest.training_data import read_records

# The table that a command fills, by whose work its speed is known.
_FILLS = {
    "rollouts": "rollouts",
    "augment": "rollouts",
    "options": "option_scores",
    "documents": "document_scores",
    "embed": "embeddings",
    "score": "scores",
    "reward": "rewards",
    "grade": "grades",
}
_OVER_ROLLOUTS = ("embed", "score", "reward", "grade")


def estimate(lines: Sequence[tuple[str, Mapping[str, Any]]], speeds: Path) -> pl.DataFrame:
    """A row per kind of command: how many, and rows, tokens, bytes and hours of a device in all.

    What cannot be foretold is NULL: seconds of a job that the store of ``speeds`` has never seen done,
    and all of what starts from a file that another of the lines is to write.

    Parameters
    ----------
    lines : name and options of each command; this process is in the folder that they are run in
    speeds : a store with work of the kind, on the device that is meant

    Raises
    ------
    CanopyError
        A file of prompts, items or documents that a line names cannot be read.
    """
    known = _Known(speeds)
    # each file is read once for all the arms that name it
    prompts = functools.cache(read_prompts)
    items = functools.cache(read_items)
    documents = functools.cache(read_documents)
    records = functools.cache(lambda path: sum(1 for _ in read_records(path)))
    runs: dict[str, tuple[float, float]] = {}  # rows and tokens of each that is sampled
    written: set[str] = set()  # by the lines before
    found: list[dict[str, Any]] = []
    for name, given in lines:
        task = None
        if name in _OVER_ROLLOUTS:
            of = [runs[run] for run in given.get("runs") or runs if run in runs]
            rows, read = sum(n for n, _ in of), sum(length for _, length in of)
        elif name in ("rollouts", "augment"):
            task = given["task"]
            if name == "rollouts":
                rows = len(prompts(given["prompts"])) * given["samples"]
            else:
                data = Path(given["data"])
                task = task or f"augment-{given['method']}-{data.stem}"
                told = len(read_instructions(given["method"], given["instructions"]))
                to_come = given["data"] in written and not data.exists()
                rows = math.nan if to_come else told * records(data) * given["samples"]
            read = rows * known.length(task, given["max_new_tokens"])
            run = given["run"] or f"{given['family']}.{given['variant']}.{task}"
            runs[run] = rows, read
        elif name == "options" and given["items"] is not None:
            rows = sum(map(len, items(given["items"])))
            read = rows * known.per_row("option_scores", "tokens")
        elif name == "documents" and given["documents"] is not None:
            rows = len(documents(given["documents"]))
            read = rows * known.per_row("document_scores", "tokens")
        else:
            rows, read = 0, math.nan
        if given.get("out"):
            written.add(given["out"])
        table = _FILLS.get(name)
        seconds = read / known.speed(table, task) if table else math.nan
        size = rows * known.bytes_per_row(table, read / rows if rows else 0.0) if table else math.nan
        found.append(
            {"command": name, "rows": rows, "tokens": read, "bytes": size, "hours": seconds / 3600}
        )
    numbers = ("rows", "tokens", "bytes", "hours")
    frame = pl.DataFrame(found, schema={"command": pl.String, **dict.fromkeys(numbers, pl.Float64)})
    summed = frame.group_by("command", maintain_order=True).agg(
        pl.len().alias("commands"), *(pl.col(name).sum() for name in numbers)
    )
    whole = (pl.col(name).round().fill_nan(None).cast(pl.Int64) for name in numbers[:3])
    return summed.with_columns(*whole, pl.col("hours").round(3).fill_nan(None))


class _Known:
    """Lengths, sizes and speeds of what a store has had done; NaN where it has nothing of the kind."""

    def __init__(self, root: Path) -> None:
        self.work = self.runs = pl.DataFrame()
        self.files: Mapping[str, tuple[int, int]] = {}
        try:
            root = store.require(root)
        except CanopyError:
            return  # not made yet
        self.work = canopy_store.read(root, "work").filter(pl.col("seconds") > 0)
        self.runs = canopy_store.read(root, "runs")
        sizes: dict[str, tuple[int, int]] = {}
        for record in store.records(root):
            for name in record.of(record.kind):
                said = record.files[name]
                rows, size = sizes.get(record.kind, (0, 0))
                sizes[record.kind] = rows + (said["rows"] or 0), size + (said["bytes"] or 0)
        self.files = sizes

    def _of(self, table: str) -> pl.DataFrame:
        return self.work.filter(kind=table) if len(self.work) else self.work

    def speed(self, table: str, task: str | None = None) -> float:
        """Tokens a second, of the runs of a task where there are any."""
        work = self._of(table)
        if task is not None and len(work):
            of_task = self.runs.filter(task=task)["run_id"].implode()
            same = work.filter(pl.col("run_id").is_in(of_task))
            work = same if len(same) else work
        return _ratio(work, "tokens", "seconds")

    def per_row(self, table: str, column: str) -> float:
        return _ratio(self._of(table), column, "rows")

    def length(self, task: str, most: int) -> float:
        """Tokens of a rollout."""
        if not len(self.runs):
            return most
        same = self.runs.filter(task=task)
        length = _ratio(same if len(same) else self.runs, "n_tokens", "n_rollouts")
        return most if math.isnan(length) else min(most, length)

    def bytes_per_row(self, table: str, tokens: float) -> float:
        """Of the files of a table; of rollouts by their tokens, since that is what most of them is."""
        rows, size = self.files.get(table, (0, 0))
        if table == "rollouts" and len(self.runs):
            return tokens * size / max(float(self.runs["n_tokens"].sum()), 1.0)
        return size / rows if rows else math.nan


def _ratio(frame: pl.DataFrame, above: str, below: str) -> float:
    """Sum over sum; NaN of no rows."""
    return (
        float(frame[above].sum()) / (float(frame[below].sum()) or math.nan) if len(frame) else math.nan
    )
