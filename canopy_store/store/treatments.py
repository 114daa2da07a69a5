"""What made a checkpoint: the curve of its training, and the data sets that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from canopy_store.errors import ConflictError, differences
from canopy_store.schema import TABLES, view_columns
from canopy_store.store.catalog import table_rows
from canopy_store.store.commits import commit, record
from canopy_store.store.files import exists
from canopy_store.store.layout import folder, shard_path
from canopy_store.store.locks import waiting
from canopy_store.store.parquet import write_rows

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
        path = shard_path(folder(root, "training", **keys), 0)
        whole = [{**row, **keys, "model_id": f"{family}/{variant}"} for row in rows]
        own = [column.name for column in TABLES["training"].columns]
        write_rows(path, "training", {name: [row.get(name) for row in whole] for name in own})
        commit(root, "training", keys, [path], {})


def add_dataset(root: Path, row: Mapping[str, Any]) -> None:
    """Stores what is known of a data set, a row of ``datasets``; the same again is once.

    What is not given again is not in conflict.

    Raises
    ------
    ConflictError
        The same data is stored with other values; names each difference.
    """
    given = {key: value for key, value in row.items() if value is not None}
    with waiting(root, "commit"):
        stored = {each["data_sha256"]: each for each in datasets(root)}
        known = stored.get(row["data_sha256"])
        if known is not None:
            if any(known[key] != value for key, value in given.items()):
                was = {key: known[key] for key in given}
                raise ConflictError(f"data {known['name']} is stored as: {differences(was, given)}")
            return
        keys = {"data_sha256": row["data_sha256"]}
        path = shard_path(folder(root, "datasets", **keys), 0)
        columns = [column.name for column in view_columns("datasets")]
        write_rows(path, "datasets", {name: [row.get(name)] for name in columns})
        commit(root, "datasets", keys, [path], {})


def datasets(root: Path) -> list[dict[str, Any]]:
    """The row of every data set."""
    return [row for _, row in table_rows(root, "datasets")]
