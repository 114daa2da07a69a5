"""Stores of format 1: read as they were, by listing; `canopy upgrade` makes them format 2.

    STORE/models/<family>--<variant>.parquet, STORE/runs/<run>.parquet
    STORE/prompts/task=…/…, STORE/rollouts/family=…/variant=…/task=…/run=…/part-00000.parquet, …

A run is there where its row in runs is; of what was made of it, every shard that is found. The files
lack the columns that stand in their paths.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from canopy_store.errors import StoreError
from canopy_store.schema import TABLES
from canopy_store.store.files import reaching, read_json, remote
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


def require_layout(root: Path, said: int) -> None:
    """Returns where a store's files stand as in the format that canopy.json says; asks for few names.

    An upgrade that was stopped has files of both: it says 1 to its end, and removes the old ones last.

    Raises
    ------
    StoreError
        They stand as in the other one, so that no view would show a row.
    """
    if said == 1 and not _has_old(root) and _has_commits(root):
        raise StoreError(
            f"{root}: canopy.json says version 1, and the files are of version 2; take canopy.json from "
            "a copy, or write 2 into it"
        )
    if said == 2 and not _has_commits(root) and _has_old(root):
        raise StoreError(
            f"{root}: canopy.json says version 2, and the files are of version 1; write 1 into it, and "
            f"then: canopy upgrade --store {root}"
        )


def _has_old(root: Path) -> bool:
    """Whether a run or checkpoint stands where format 1 had them: as a file, where 2 has a folder."""
    # a folder's name has "=" in it, which is encoded in what stands behind it and in a file's name
    return any(name.endswith(".parquet") and "=" not in name for t in _SINGLE for name in _in(root / t))


def _has_commits(root: Path) -> bool:
    return any(True for _ in _in(root / "commits"))


def _in(folder: Path) -> Iterator[str]:
    """What stands in a folder, and of a writer that is at it nothing; asked for one by one."""
    if remote(folder):
        with reaching(folder):
            yield from (each.name for each in (folder.iterdir() if folder.exists() else ()))
        return
    with suppress(OSError), os.scandir(folder) as entries:
        yield from (each.name for each in entries if not each.name.startswith("."))


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
