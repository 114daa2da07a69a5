"""Stores of format 1: read as they were, by listing; `canopy upgrade` makes them format 2.

    STORE/models/<family>--<variant>.parquet, STORE/runs/<run>.parquet
    STORE/prompts/task=…/…, STORE/rollouts/family=…/variant=…/task=…/run=…/part-00000.parquet, …

A run is there where its row in runs is; of what was made of it, every shard that is found. The files
lack the columns that stand in their paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from canopy_store.errors import StoreError
from canopy_store.schema import TABLES
from canopy_store.store.files import reaching, read_json
from canopy_store.store.layout import path_keys, unquoted

_SINGLE = ("models", "runs")  # tables whose files stood in one folder


def version(root: Path) -> int:
    """The store's format version.

    Raises
    ------
    StoreError
        canopy.json does not tell it.
    """
    try:
        found = read_json(root / "canopy.json")["version"]
        if type(found) is int:
            return found
    except (KeyError, TypeError):
        pass
    raise StoreError(f"{root / 'canopy.json'}: not readable as JSON with a version")


def is_old(root: Path) -> bool:
    """Whether the store is of format 1."""
    return version(root) == 1


def partitions(table: str) -> tuple[str, ...]:
    """The hive keys that a table's paths had."""
    return () if table in _SINGLE else TABLES[table].partitions


def listing(root: Path) -> dict[str, dict[str, str]]:
    """Every file that stands where format 1 puts one, with the values of its path."""
    found = {}
    for table in TABLES:
        with reaching(root):
            paths = sorted((root / table).rglob("*.parquet"))
        for path in paths:
            name = path.relative_to(root).as_posix()
            if table not in _SINGLE:
                keys = path_keys(table, name)
            elif path.parent == root / table:
                stem = unquoted(path.stem)
                keys = {"run": stem} if table == "runs" else {"model": stem}
            else:
                keys = None
            if keys is not None:
                found[name] = keys
    return found


def records(root: Path) -> list[tuple[str, dict[str, str], dict[str, dict[str, Any]]]]:
    """Kind, keys and files of each thing that a record of format 2 would be of."""
    there = listing(root)
    runs = {keys["run"]: name for name, keys in there.items() if name.startswith("runs/")}
    groups: dict[tuple[str, ...], tuple[str, dict[str, str], dict[str, Any]]] = {}
    for name, keys in there.items():
        table = name.partition("/")[0]
        if table == "runs" or ("run" in keys and keys["run"] not in runs):
            continue
        kind = table
        of = dict(keys)
        if table == "models":
            family, _, variant = keys["model"].partition("--")
            of = {"family": family, "variant": variant}
        elif table == "rollouts":
            of = {"run": keys["run"]}
        elif table == "scores":
            policy = name.rpartition("/")[2].split(".")[1]
            of = {"scorer_id": keys["scorer_id"], "policy": policy, "run": keys["run"]}
        elif table == "embedding_spectra" and keys["selection"] == "all":
            kind, of = "embeddings", {"embedder": keys["embedder"], "run": keys["run"]}
        group = groups.setdefault((kind, *of.values()), (kind, of, {}))
        group[2][name] = {"rows": None, "bytes": None, "sha256": None}
    for run, name in runs.items():
        group = groups.setdefault(("rollouts", run), ("rollouts", {"run": run}, {}))
        group[2][name] = {"rows": None, "bytes": None, "sha256": None}
    return list(groups.values())
