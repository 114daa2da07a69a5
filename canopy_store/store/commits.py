"""Commits: what a store shows is what its records list, never what a folder listing finds.

A job ends by writing one record, last and atomically: what kind of job it was, its keys and settings,
and each file it made with rows, bytes and sha256. Until then nothing of it is shown. A table made of
another one (embeddings, scores, … of rollouts) is shown where a record of that one is there, so that
removing a run's first record takes all of it away in one step.

    STORE/commits/rollouts/run=….json
    STORE/commits/embeddings/embedder=…/run=….json
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from canopy_store.errors import DataError, StoreError
from canopy_store.schema import FORMAT_VERSION, TABLES
from canopy_store.store import format1
from canopy_store.store.files import exists, reaching, read_json, read_many, remote, sha256, write_json
from canopy_store.store.layout import (
    commit_path,
    now,
    path_keys,
    quoted,
    shard_number,
    unquoted,
)
from canopy_store.store.parquet import check_file, optional_of

# A file's folder (a table's, no part that leaves it) and the names in it: nothing that a pattern means.
_FOLDER = re.compile(r"(\w+)(?:/(?!\.\.?(?:/|$))[^/*?\[\]\0\\]+)*")
_NAMES = re.compile(r"(?:[^/*?\[\]\0\\\n]+\.parquet(?:\n(?!$)|$))*")


@dataclass(frozen=True)
class Record:
    """A job that is finished.

    Parameters
    ----------
    kind : the table that the job fills
    keys : what it is of, as in {"embedder": "minilm", "run": "llama.base.math"}
    files : under each path in the store {"rows", "bytes", "sha256"}, all None in format 1; and
        "optional", the optional columns that the file has, where it has any
    settings : what a job of the same keys must repeat
    committed_at : when, UTC, as text
    """

    kind: str
    keys: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    committed_at: str | None = None

    @property
    def run(self) -> str | None:
        """The run it is of, where it is of one."""
        return self.keys.get("run")

    @property
    def subject(self) -> tuple[str, str]:
        """Key and value of what the job was over, its last: a run; of other kinds a task, a corpus, …"""
        return list(self.keys.items())[-1]

    @property
    def plan(self) -> tuple[str, str] | None:
        """Kind and name of the plan whose settings its own repeat; None where it repeats none.

        That is a checkpoint's; spectra of a selection, which any job may have made that came to them;
        and what came with an import, beside which a job of that name may have been at other runs.
        """
        kind = TABLES[self.kind].plan
        if kind is None or self.kind == "embedding_spectra":
            return None
        if kind != "run" and self.settings.get("engine") == "import":
            return None
        return kind, next(iter(self.keys.values()))

    def of(self, table: str) -> list[str]:
        """Its files of one table, in name order."""
        start = f"{table}/"
        return sorted(name for name in self.files if name.startswith(start))

    def path(self, root: Path) -> Path:
        """Where the record stands."""
        return commit_path(root, self.kind, self.keys)


def commit(
    root: Path, kind: str, keys: Mapping[str, str], files: Iterable[Path], settings: Mapping[str, Any]
) -> Record:
    """The record of a finished job, written: from now on its files are shown, and no others of it.

    Parameters
    ----------
    root : path of the store
    kind, keys, settings : as of `Record`
    files : every file that the job made, or that its rows need
    """
    entries = {path.relative_to(root).as_posix(): entry(path) for path in files}
    record = Record(kind, dict(keys), dict(sorted(entries.items())), dict(settings), now().isoformat())
    write_record(root, record)
    return record


def entry(path: Path) -> dict[str, Any]:
    """What a record says of a file: rows, bytes, sha256, and optional columns where it has any."""
    metadata = check_file(path)
    with reaching(path):
        size = path.stat().st_size
    said = {"rows": metadata.num_rows, "bytes": size, "sha256": sha256(path)}
    optional = optional_of(metadata)
    return {**said, "optional": optional} if optional else said


def write_record(root: Path, record: Record) -> None:
    """Writes a record; one of the same kind and keys is replaced in one step."""
    value = {
        "version": FORMAT_VERSION,
        "kind": record.kind,
        "keys": record.keys,
        "files": record.files,
        "settings": record.settings,
        "committed_at": record.committed_at,
    }
    write_json(record.path(root), value)


def read_record(root: Path, path: Path, value: Any = None) -> Record:
    """The record at ``path`` (whose JSON value may be at hand).

    Raises
    ------
    DataError
        Not a record, of a newer version, or one that names what no store holds.
    """
    return _read_record(root, path, value)[0]


def _read_record(root: Path, path: Path, value: Any) -> tuple[Record, set[str]]:
    """As `read_record`, and the folders of its files: few, where it names thousands of files."""
    value = read_json(path) if value is None else value
    try:
        version, kind, keys = value["version"], value["kind"], value["keys"]
        if type(version) is int and version > FORMAT_VERSION:
            raise DataError(f"{path}: format version {version}; upgrade: pip install -U canopy-store")
        if version != FORMAT_VERSION:
            raise ValueError
        if {*keys} != {*TABLES[kind].commit} or not all(type(v) is str and v for v in keys.values()):
            raise ValueError
        keys = {key: keys[key] for key in TABLES[kind].commit}
        record = Record(kind, keys, value["files"], value["settings"], value["committed_at"])
        if not isinstance(record.settings, dict) or path.parts[len(root.parts) :] != _place_of(
            kind, keys
        ):
            raise ValueError
        return record, _checked_folders(record.files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path}: not a readable record of a commit; take it from a copy") from None


def _checked_folders(entries: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The folders of the files that a record names; ValueError for a path or number that none has.

    As few steps for each file as can be: of tens of thousands of files this is what opening costs.
    """
    folders = {name[: name.rindex("/")] for name in entries}
    for folder in folders:
        plain = _FOLDER.fullmatch(folder)
        if plain is None or plain[1] not in TABLES:
            raise ValueError
    if not _NAMES.fullmatch("\n".join([name[name.rindex("/") + 1 :] for name in entries])):
        raise ValueError
    for key in ("rows", "bytes"):
        numbers = [said[key] for said in entries.values()]
        if {*map(type, numbers)} - {int} or min(numbers, default=0) < 0:
            raise ValueError
        if max(numbers, default=0) >= 1 << 62:
            raise ValueError
    if {len(said["sha256"]) for said in entries.values()} - {64}:
        raise ValueError
    for name, said in entries.items():
        if "optional" in said:  # which the views will ask its file for
            known = TABLES[name[: name.index("/")]].optional
            if said["optional"] != [each for each in known if each in said["optional"]]:
                raise ValueError
    return folders


def _place_of(kind: str, keys: Mapping[str, str]) -> tuple[str, ...]:
    """Where in the store a record stands, part by part."""
    *parts, last = (f"{key}={quoted(value)}" for key, value in keys.items())
    return ("commits", kind, *parts, f"{last}.json")


def _own_record(root: Path, path: Path, value: Any = None) -> Record:
    """As `read_record`; not one that names files that a job of its kind and run does not make.

    Raises
    ------
    DataError
        As `read_record`; or it names such a file, or lacks one; no query may go by it.
    """
    record, folders = _read_record(root, path, value)
    key, value = record.subject
    tables = (record.kind, *TABLES[record.kind].brings)
    # what a job over no run took stands under its subject all the same: work has one key for both
    parts = {table: {key, "run"} & {*TABLES[table].partitions} for table in tables}
    needed = {table: [f"/{part}={quoted(value)}/" for part in parts[table]] for table in tables}
    for folder in folders:
        own = needed.get(folder.partition("/")[0])
        if own is None or not all(part in f"{folder}/" for part in own):
            raise DataError(
                f"{path}: names files in {folder}, which is not of its job; see: canopy verify"
            )
    if not record.files:
        raise DataError(f"{path}: lists no file; see: canopy verify")
    if record.kind == "rollouts" and not record.of("runs"):
        raise DataError(f"{path}: lists no file of runs, which every run has; see: canopy verify")
    return record


def records(root: Path, kind: str | None = None, **keys: str) -> list[Record]:
    """The store's records of this kind and these keys (of all, by default), in path order.

    Those whose parent is not there are left out: the run was removed, or has not come yet. Only those
    that are asked for are read.

    Raises
    ------
    DataError
        One that cannot be read.
    """
    if format1.is_old(root):
        old_ones = [Record(*each) for each in format1.records(root)]
        if not old_ones and remote(root):
            format1.require_layout(root, 1)
        return [old for old in old_ones if kind in (None, old.kind) and keys.items() <= old.keys.items()]
    listed = _listed(root, kind)
    if not listed and kind in (None, "models") and remote(root):
        format1.require_layout(root, FORMAT_VERSION)
    if kind is not None and (above := TABLES[kind].parent) is not None:
        listed += _listed(root, above)
    places = [_place(name) for name in listed]
    there = set(places)
    wanted = []
    for name, (of, key, value) in zip(listed, places, strict=True):
        parent = TABLES[of].parent if of in TABLES else None
        if (
            kind in (None, of)
            and keys.get(key, value) == value
            and (parent is None or (parent, key, value) in there)
        ):
            wanted.append(root / name)
    every = (_own_record(root, path, value) for path, value in _read_all(root, wanted))
    return [each for each in every if keys.items() <= each.keys.items()]


def _place(name: str) -> tuple[str, str, str]:
    """A record's kind, and key and value of its subject, from where it stands in the store."""
    parts = name.split("/")
    key, _, value = parts[-1].removesuffix(".json").partition("=")
    return parts[1], key, unquoted(value)


def orphans(root: Path) -> list[Record]:
    """The records whose parent is not there, in path order; those that cannot be read left out."""
    if format1.is_old(root):
        return []
    every = []
    for path in record_paths(root):
        try:
            every.append(read_record(root, path))
        except (DataError, FileNotFoundError):
            continue
    there = {(each.kind, each.subject) for each in every}
    return [r for r in every if (p := TABLES[r.kind].parent) is not None and (p, r.subject) not in there]


def record(root: Path, kind: str, **keys: str) -> Record | None:
    """The record of one job, None where it is not finished; read alone, without its parent."""
    if format1.is_old(root):
        return next(iter(records(root, kind, **keys)), None)
    path = commit_path(root, kind, keys)
    return _own_record(root, path) if exists(path) else None


def record_paths(root: Path, kind: str | None = None) -> list[Path]:
    """Where records stand, of one kind or of all, in path order, at one moment."""
    return [root / name for name in _listed(root, kind)]


def _listed(root: Path, kind: str | None = None) -> list[str]:
    """As `record_paths`, below the store: text, which sorts in a tenth of the time of paths.

    Listed until two listings are alike: so a run that is added or removed meanwhile is there with all
    that came with it, or not at all.
    """
    top = "commits" if kind is None else f"commits/{kind}"
    if remote(root):
        with reaching(root):
            found = (path.relative_to(root).as_posix() for path in (root / top).rglob("*.json"))
            return sorted(found, key=_parts)
    _require_folder(root / "commits")
    names, before = sorted(_walk(root, top), key=_parts), None
    for _ in range(20):
        if names == before:
            break
        names, before = sorted(_walk(root, top), key=_parts), names
    return names


def _parts(name: str) -> list[str]:
    return name.split("/")


def _walk(root: Path, top: str) -> Iterator[str]:
    start, folders = str(root), [top]
    while folders:
        folder = folders.pop()
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(f"{start}/{folder}") as entries,
        ):
            for each in entries:
                if each.name.endswith(".json") and not each.name.startswith("."):
                    yield f"{folder}/{each.name}"
                elif each.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}/{each.name}")


def _read_all(root: Path, paths: list[Path]) -> Iterator[tuple[Path, Any]]:
    if remote(root):
        yield from zip(paths, read_many(paths), strict=True)
        return
    for path in paths:
        try:
            yield path, read_json(path)
        except FileNotFoundError:
            continue  # removed since it was listed


# ---------------------------------------------------------------- files


def names(every: Iterable[Record], table: str) -> list[str]:
    """The files of a table that these records name, each once, in name order."""
    return sorted({name for each in every for name in each.of(table)})


def tables(every: Iterable[Record]) -> dict[str, list[str]]:
    """The files that these records name, by table, each once, in name order."""
    named: dict[str, set[str]] = {table: set() for table in TABLES}
    for each in every:
        for name in each.files:
            named[name[: name.index("/")]].add(name)
    return {table: sorted(files) for table, files in named.items()}


def optional_columns(every: Iterable[Record]) -> dict[str, tuple[str, ...]]:
    """The optional columns of the files that these records name; of a file without one, nothing."""
    return {
        name: tuple(said["optional"])
        for each in every
        for name, said in each.files.items()
        if "optional" in said
    }


def files(root: Path, table: str) -> list[Path]:
    """A table's committed files, in name order."""
    return [root / name for name in names(records(root), table)]


def fresh_number(old: Record | None) -> int:
    """A shard number above all that a record names: what replaces its files never has their names."""
    return 0 if old is None else 1 + max((shard_number(Path(name)) for name in old.files), default=-1)


def remove_record(root: Path, old: Record) -> None:
    """Removes a record, and then the files that no other one names."""
    with reaching(root):
        old.path(root).unlink(missing_ok=True)
    remove_empty(root, old.path(root).parent)
    remove_unnamed(root, old.files)


def remove_unnamed(root: Path, candidates: Iterable[str]) -> int:
    """How many of these files were removed: those that no record names, parent or none."""
    left = set(candidates)
    runs = {(path_keys(name.partition("/")[0], name) or {}).get("run", "") for name in left}
    for record_name in _listed(root):
        # a file of a run, and of work, is named by records of its name; of a prompts file, any may be
        _, _, value = _place(record_name)
        if left and ("" in runs or value in runs):
            left -= read_record(root, root / record_name).files.keys()
            runs = {(path_keys(name.partition("/")[0], name) or {}).get("run", "") for name in left}
    count = 0
    for name in sorted(left):
        path = root / name
        with reaching(path):
            try:
                path.unlink()
            except FileNotFoundError:
                continue
        count += 1
        remove_empty(root, path.parent)
    return count


def remove_empty(root: Path, folder: Path) -> None:
    """Removes a folder and those above it, inside the store, that have nothing in them."""
    if remote(root):
        return
    while folder != root and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return  # something is in it
        folder = folder.parent


def uncommitted(root: Path, value: str, key: str = "run") -> list[Path]:
    """A run's files that no record names: of jobs that are under way or were stopped.

    Or those of what else jobs are over: a task, a corpus, … where ``key`` says so.
    """
    named = {name for each in records(root, **{key: value}) for name in each.files}
    last = glob.escape(f"{key}={quoted(value)}")
    paths: list[Path] = []
    for table, definition in TABLES.items():
        if definition.partitions[-1:] == (key,) and (key == "run" or definition.commit):
            stars = "*/" * (len(definition.partitions) - 1)
            with reaching(root):
                paths += (root / table).glob(f"{stars}{last}/*.parquet")
    if key != "run":  # work has one key for whatever jobs are over
        with reaching(root):
            paths += (root / "work").glob(f"*/*/{glob.escape(f'run={quoted(value)}')}/*.parquet")
    unnamed = (path for path in paths if path.relative_to(root).as_posix() not in named)
    return sorted(path for path in unnamed if _is_over(path.relative_to(root).as_posix(), key))


def _is_over(name: str, key: str) -> bool:
    """Whether a file is of what jobs with this last key are over: of work, its kind of job tells."""
    kind = (path_keys("work", name) or {}).get("kind")
    return kind not in TABLES or TABLES[kind].commit[-1:] == (key,)


def check_folders(root: Path, writing: bool = False) -> list[str]:
    """The tables' folders, once all that stands in them proves to be folders and regular files.

    ``writing`` looks at the folders of records, plans and locks, too.

    Raises
    ------
    StoreError
        A link that leads to a folder or out of the store, by which a path could leave it; a pipe or a
        device, which could be opened for a file.
    """
    tops = [*TABLES, *(("commits", "plans", ".work") if writing else ())]
    folders = [top for top in tops if _require_folder(root / top)]
    waiting = list(folders)
    inside = os.path.realpath(root) + os.sep
    while waiting:
        folder = waiting.pop()
        with suppress(FileNotFoundError), os.scandir(root / folder) as entries:
            for each in entries:
                if each.is_file(follow_symlinks=False):
                    continue
                if each.is_dir(follow_symlinks=False) and not each.name.endswith(".parquet"):
                    waiting.append(f"{folder}/{each.name}")
                else:
                    _check_link(root / folder / each.name, inside)
    return [folder for folder in folders if folder in TABLES]


def _require_folder(path: Path) -> bool:
    """Whether a folder is there; what is there and is none, or leads elsewhere, is a StoreError."""
    if not os.path.lexists(path):
        return False
    if os.path.islink(path) or not os.path.isdir(path):
        raise StoreError(f"{path}: not a folder; put the folder itself there")
    return True


def _check_link(path: Path, inside: str) -> None:
    """Raises StoreError for what is no file, and for a link to anything but a file of the store."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode) and os.path.realpath(path).startswith(inside)
    except FileNotFoundError:
        return  # a link to nothing: the query that needs it will say so
    except OSError:
        regular = False
    if not regular:
        raise StoreError(f"{path}: not a regular file of the store; move it out of the store")
