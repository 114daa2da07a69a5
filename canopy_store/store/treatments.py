"""What made a checkpoint: the curve of its training, and the data sets that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from canopy_store.errors import ConflictError, differences
from canopy_store.store.catalog import commit_rows, table_rows
from canopy_store.store.commits import record
from canopy_store.store.files import exists
from canopy_store.store.locks import waiting

METHODS = ("given", "local", "global", "oracle", "rollouts", "mixed")


def add_training(root: Path, family: str, variant: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Stores the curve of a checkpoint's training, rows as of the table ``training``; once.

    A curve that is stored stays: it is of the weights that ``models`` names.
    """
    keys = {"family": family, "variant": variant}
    with waiting(root, "commit"):
        stored = record(root, "training", **keys)
        if not rows or (stored and all(exists(root / name) for name in stored.files)):
            return
        model = {**keys, "model_id": f"{family}/{variant}"}
        commit_rows(root, "training", [{**row, **model} for row in rows])


def add_dataset(root: Path, row: Mapping[str, Any]) -> None:
    """Stores what is known of a data set, a row of ``datasets``; the same again is once.

    What is not given again is not in conflict, nor is a name: the same data in a second file keeps its
    first.

    Raises
    ------
    ConflictError
        The same data is stored with other values; names each difference.
    """
    given = {key: value for key, value in row.items() if value is not None and key != "name"}
    with waiting(root, "commit"):
        stored = {each["data_sha256"]: each for each in datasets(root)}
        known = stored.get(row["data_sha256"])
        if known is not None:
            if any(known[key] != value for key, value in given.items()):
                was = {key: known[key] for key in given}
                raise ConflictError(f"data {known['name']} is stored as: {differences(was, given)}")
            return
        commit_rows(root, "datasets", [row])


def datasets(root: Path) -> list[dict[str, Any]]:
    """The row of every data set."""
    return [row for _, row in table_rows(root, "datasets")]
