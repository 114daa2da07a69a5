"""A folder that came from someone else: checked whole before any of it is used.

Only JSON and Parquet are read, of regular files alone; every path stays inside the folder; no file
decodes to far more than it is; a record names only what is of it. Nothing of the folder is executed.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from canopy_store import store
from canopy_store.errors import CanopyError, DataError, UsageError
from canopy_store.schema import REGISTERS, TABLES
from canopy_store.sharing.page_sizes import column_bytes, text_bytes
from canopy_store.store import Record, format1
from canopy_store.upkeep.verify import MANIFEST, read_manifest, verify

_SMALL = 4 << 20  # bytes: the most a record or plan may have; that of 10,000 shards has half of it
_DECODED = 1 << 30  # bytes a file may always decode to; above, no more than this many times its size:
_RATIO = 100
_BESIDE = {"README.md", "croissant.json", "views.sql", "canopy.duckdb", "canopy.json"}
_PLAN = re.compile(r"plans/[^/.][^/]*\.json")
_RECORD = re.compile(r"commits/[^/.][^/]*(/[^/.][^/]*)+\.json")

Entries = dict[str, dict[str, Any]]


# ---------------------------------------------------------------- what is taken from a folder


@dataclass(frozen=True)
class Source:
    """A folder that nothing was found wrong with; no file is taken that no record of it names.

    Parameters
    ----------
    folder : a store of the present format
    records : its records
    live : whether others may be using it meanwhile
    """

    folder: Path
    records: list[Record]
    live: bool

    @cached_property
    def subjects(self) -> dict[tuple[str, str], list[Record]]:
        """All records of each run, or of what else jobs are over, by key and name, in order."""
        subjects: dict[tuple[str, str], list[Record]] = {}
        for record in self.records:
            if record.kind not in REGISTERS:
                subjects.setdefault(record.subject, []).append(record)
        return dict(sorted(subjects.items()))

    @property
    def registered(self) -> list[Record]:
        """The records of what the others refer to, checkpoints and scorers, in the order of need."""
        return [record for kind in REGISTERS for record in self.records if record.kind == kind]

    def plan(self, record: Record) -> Path | None:
        """The plan of a record's job, relative to the folder; None where it has none."""
        path = None if record.plan is None else store.plan_path(Path(), *record.plan)
        return path if path is not None and (self.folder / path).exists() else None


@contextmanager
def checked_source(folder: Path, exported: bool | None = None) -> Iterator[Source]:
    """A folder once all of it is checked: one with a MANIFEST, or a store, as merged stores are.

    One of format 1 is checked as it stands, and upgraded in a copy.

    Parameters
    ----------
    folder : path
    exported : whether it must have a MANIFEST [default: if it has one]

    Raises
    ------
    DataError
        It is damaged, or holds what no export and no store does.
    """
    if exported is None:
        exported = (folder / MANIFEST).exists()
    try:
        entries = check_source(folder) if exported else read_store(folder)
        require_sound(folder, trusted=False)
    except RecursionError:
        raise DataError(f"{folder}: JSON that is nested without end; do not trust it") from None
    if not format1.is_old(folder):
        yield Source(folder, store.records(folder), live=not exported)
        return
    from canopy_store.upkeep.upgrade import upgrade

    with tempfile.TemporaryDirectory(prefix="canopy-upgrade-") as copy:
        for name in ["canopy.json", *(name for name in entries if name not in _BESIDE)]:
            store.copy_file(folder / name, Path(copy, name), entries.get(name, {}).get("sha256"))
        upgrade(Path(copy), without_locks=True)  # nobody else has it
        yield Source(Path(copy), store.records(Path(copy)), live=False)


# ---------------------------------------------------------------- what is in it


def check_source(folder: Path) -> Entries:
    """The MANIFEST's entries, once every path and size in it is one that an export writes.

    Raises
    ------
    DataError
        A path, a link, a size or a file that no export writes; names the file.
    """
    if not (folder / MANIFEST).exists():
        raise DataError(
            f"{folder}: no {MANIFEST} here; make a folder to share with canopy export, or take a whole "
            "store in with canopy merge"
        )
    store.require_regular(folder / MANIFEST)
    entries = read_manifest(folder)
    for name in ("canopy.json", *entries):
        try:
            store.require_regular(folder / name)
        except OSError:
            raise DataError(
                f"{folder / name}: named in {MANIFEST}, not there; get the folder again"
            ) from None
    store.require(folder)
    places = _Places(folder)
    for name, entry in entries.items():
        if name not in _BESIDE:
            places.check_name(name, f"{folder / MANIFEST}: names {name!r}, which no export writes")
        _check_file(folder, name, entry["rows"])
    for top in ("plans", "commits", *TABLES):
        for path in _walk(folder / top):
            if path.relative_to(folder).as_posix() not in entries:
                raise DataError(f"{path}: not in {MANIFEST}; remove it, or get the folder again")
    _check_records(folder, entries)
    return entries


def _walk(top: Path) -> Iterator[Path]:
    """Everything in a folder that is no folder, and the folder itself where it is a link."""
    if top.is_symlink() or (top.exists() and not top.is_dir()):
        yield top
        return
    for place, folders, files in os.walk(top):
        yield from (Path(place, name) for name in files)
        yield from (Path(place, name) for name in folders if os.path.islink(os.path.join(place, name)))


def read_store(folder: Path) -> Entries:
    """As `check_source`, of a store that has no MANIFEST: what one would say of its files and plans."""
    _require_inside(folder, "canopy.json")
    store.require(folder)
    small = [*store.matching(folder / "plans", "[!.]*.json"), *store.record_paths(folder)]
    places = _Places(folder)
    entries: Entries = {}
    for path in small:
        name = path.relative_to(folder).as_posix()
        places.check_name(name, f"{path}: not where or how a store's files are named; move it out")
        _require_inside(folder, name)
        _check_file(folder, name, None)
        entries[name] = {"rows": None, "sha256": None}
    records = store.records(folder)
    named = {name: dict(said) for record in records for name, said in record.files.items()}
    if format1.is_old(folder):
        # what stood there was the store, whatever its name
        for path in (path for table in TABLES for path in _walk(folder / table)):
            if not path.name.startswith("."):
                named.setdefault(path.relative_to(folder).as_posix(), {})
    for name, said in named.items():
        path = folder / name
        _require_inside(folder, name)
        places.check_name(name, f"{path}: not where or how a store's files are named; move it out")
        rows = said.get("rows")
        _check_file(folder, name, store.check_file(path).num_rows if rows is None else rows)
        entries[name] = {"sha256": None, **said}
    _check_records(folder, entries)
    return entries


def _require_inside(folder: Path, name: str) -> None:
    """Raises DataError for what is no regular file, or is outside the folder, before it is opened."""
    inside = os.path.realpath(folder)
    if not os.path.realpath(folder / name).startswith(inside + os.sep):
        raise DataError(f"{folder / name}: a link out of the folder; do not trust it")
    try:
        store.require_regular(folder / name)
    except OSError as error:
        raise DataError(f"{folder / name}: cannot be read: {error.strerror}") from None


def require_sound(folder: Path, trusted: bool = True) -> None:
    """Raises DataError for the first problem that `verify` finds; canopy.duckdb only where trusted."""
    problems = verify(folder, database=trusted).filter(~pl.col("harmless"))
    if len(problems):
        first = problems.row(0, named=True)
        more = f" (and {len(problems) - 1} more: canopy verify)" if len(problems) > 1 else ""
        raise DataError(f"{folder / first['file']}: {first['what']}{more}; {first['todo']}")


class _Places:
    """Where files of the folder's format stand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.old = format1.listing(folder) if format1.is_old(folder) else None

    def check_name(self, name: str, refusal: str) -> None:
        """Raises DataError for a name under which nothing stands, with ``refusal``, or that deceives."""
        table = name.partition("/")[0]
        keys: Mapping[str, str] | None = None
        if table in TABLES:
            keys = store.path_keys(table, name) if self.old is None else self.old.get(name)
        elif _PLAN.fullmatch(name) or (self.old is None and _RECORD.fullmatch(name)):
            keys = {}
        if keys is None:
            raise DataError(refusal)
        try:
            for key, value in keys.items():
                store.check_name(key, value)
        except UsageError as error:
            raise DataError(f"{self.folder / name}: {error}") from None


def _check_records(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises DataError for a record that names what is not of it, or not there."""
    for record in () if format1.is_old(folder) else store.records(folder):
        path = record.path(folder)
        for value in record.keys.values():
            try:
                store.check_name("a record's key", value)
            except UsageError as error:
                raise DataError(f"{path}: {error}") from None
        for name, said in record.files.items():
            entry = entries.get(name)
            if entry is None or any(entry[key] != said[key] for key in ("rows", "bytes", "sha256")):
                raise DataError(f"{path}: names {name!r}, which is not what {MANIFEST} lists")
            if not _is_of(record, name):
                raise DataError(f"{path}: names {name!r}, which is not of it; do not trust it")
        _check_rows_of_one(path, record)


def _check_rows_of_one(path: Path, record: Record) -> None:
    """Raises DataError for a checkpoint, scorer or run without the one row that says what it is."""
    table = {**{kind: kind for kind in REGISTERS}, "rollouts": "runs"}.get(record.kind)
    if table is not None and [record.files[name]["rows"] for name in record.of(table)] != [1]:
        raise DataError(f"{path}: needs one file of {table} with one row; take it from a copy")


def _is_of(record: Record, name: str) -> bool:
    """Whether a file may be of this record: of its table, its keys and the kind of its job.

    A record that names another run's files would add their rows to those of that run.
    """
    table = name.partition("/")[0]
    of = {"kind": record.kind, **record.keys}
    if record.kind == "embeddings":
        of["selection"] = "all"
        tables = {"embeddings", "embedding_spectra", "work"}
    elif record.kind == "rollouts":
        tables = {"rollouts", *(name for name, each in TABLES.items() if not each.commit)}
    else:
        tables = {record.kind, "work"}
        if of.get("selection") == "all":
            return False
    keys = store.path_keys(table, name) if table in tables else None
    if keys is None or any(of.get(key, value) != value for key, value in keys.items()):
        return False
    further = [v for k, v in record.keys.items() if k not in TABLES[record.kind].partitions]
    return "run" not in keys or Path(name).name.split(".")[1:] == [*further, "parquet"]


def _check_file(folder: Path, name: str, rows: int | None) -> None:
    table = name.partition("/")[0]
    if table in TABLES:
        _check_size(folder / name, table, rows)
    elif name.endswith(".json") and (folder / name).stat().st_size > _SMALL:
        raise DataError(f"{folder / name}: over {_SMALL:,} bytes; do not trust it")


def _check_size(path: Path, table: str, rows: int | None) -> None:
    """Refuses a file that would decode to far more than it is: 1 GiB, and 100 times its size."""
    size, decoded = path.stat().st_size, 0
    most = max(_DECODED, _RATIO * size)
    try:
        metadata = store.check_file(path, table)
        with open(path, "rb") as file:
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                # of a group without rows nothing is read
                for column in map(group.column, range(group.num_columns if group.num_rows else 0)):
                    decoded += max(column_bytes(file, column), 8 * group.num_rows)
        if decoded <= most and metadata.num_rows == rows:
            decoded += text_bytes(path, metadata)
    except CanopyError:
        raise
    except Exception as error:  # whatever a forged file makes the reader say, it is one line here
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:150]}") from None
    if decoded > most or metadata.num_rows != rows:
        raise DataError(
            f"{path}: {size:,} bytes that decode to {metadata.num_rows:,} rows, over {decoded:,} bytes "
            f"({MANIFEST} says {rows} rows); do not trust it"
        )
