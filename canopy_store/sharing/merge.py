"""One store's runs into another: nothing overwritten, the same run twice is one.

All of a source is checked, and conflicts are looked for, before anything is written. Then run after run
is copied: files to the paths they had, then the records, that of the run's rollouts last. So a run
appears whole, and a call that was stopped is finished by repeating it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from canopy_store import sql, store
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.schema import TABLES
from canopy_store.sharing.conflicts import (
    check_conflicts,
    check_subject,
    prompts_add,
    same_cut,
    same_files,
    stored_as,
    trunk_of,
)
from canopy_store.sharing.untrusted import Source, checked_source
from canopy_store.store import Record

Files = dict[str, dict[str, Any]]


def merge(
    sources: Iterable[str | Path],
    root: str | Path,
    *,
    on_run: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The ids of the complete runs of other stores, now in this one; made if it is missing.

    As `pull`, from stores as well as from exported folders: all of every source is checked before
    anything is written, the same run twice is one run, and a call that was stopped is finished by
    repeating it.

    Parameters
    ----------
    sources : paths of stores
    root : path of the store that takes their runs
    on_run : called with (runs done, runs in all), source by source

    Raises
    ------
    DataError
        A source is damaged, or holds what no store does.
    ConflictError
        Something of the same name is stored with other values; names what differs.
    """
    folders = [Path(source) for source in sources]
    there = store.locate(root)
    with ExitStack() as opened:
        checked = []
        for folder in folders:
            if not folder.is_dir():
                raise StoreError(f"{folder}: no such folder")
            if not store.remote(there) and folder.resolve() == there.resolve():
                raise UsageError(f"{folder}: the store itself; name another one to take in")
            source = opened.enter_context(checked_source(folder))
            if not source.subjects:
                raise DataError(f"{folder}: no complete run in it; see: canopy status --store {folder}")
            check_conflicts(source, there)
            checked.append(source)
        merged: set[str] = set()
        for source in checked:
            merged.update(merge_source(source, there, on_run))
    return sorted(merged)


def merge_source(
    source: Source, root: str | Path, on_run: Callable[[int, int], None] | None = None
) -> list[str]:
    """The ids of the complete runs of a checked folder, now in the store, which is made if missing.

    Raises
    ------
    ConflictError
        Something of the same name is stored with other values; nothing was changed. Or a run is in
        use; those before it are merged.
    """
    check_conflicts(source, store.locate(root))
    root = store.init(root)
    for record in source.registered:
        _take(source, root, record, None)
    for done, ((key, name), records) in enumerate(source.subjects.items(), 1):
        # ours alone, for what is there may be replaced; theirs shared with its other readers
        held = store.holding(source.folder, name, key=key) if source.live else nullcontext()
        with store.holding(root, name, key=key, exclusive=True), held:
            for record in records if source.live else ():
                if store.record(source.folder, record.kind, **record.keys) != record:
                    raise DataError(
                        f"{source.folder}: {key} {name} was changed while it was read; run it again"
                    )
            _merge_subject(source, root, records)
        if on_run:
            on_run(done, len(source.subjects))
    sql.write_database(root)
    return sorted(name for key, name in source.subjects if key == "run")


def _merge_subject(source: Source, root: Path, records: list[Record]) -> None:
    """Copies what the store lacks of a run: plans, what is made of its rollouts, these last.

    Of a task of items or a corpus likewise: what the others were made of is their trunk.
    """
    check_subject(source, root, records)
    trunk = trunk_of(records)
    mine = store.record(root, trunk.kind, **trunk.keys)
    for record in records:
        plan = source.plan(record)
        if plan is not None and not store.exists(root / plan):
            store.copy_file(source.folder / plan, root / plan)
    for record in sorted(records, key=lambda record: TABLES[record.kind].parent is None):
        _take(source, root, record, mine)


# ---------------------------------------------------------------- a record


def _take(source: Source, root: Path, theirs: Record, trunk: Record | None) -> None:
    """Commits a record of the source's: whole where the store has none of its keys, or what that lacks.

    ``trunk`` is the record of the run's rollouts, where they are stored already.
    """
    ours = store.record(root, theirs.kind, **theirs.keys)
    files: Files = {} if ours is None else {name: dict(said) for name, said in ours.files.items()}
    first = max(store.fresh_number(ours), store.fresh_number(trunk))
    for table in dict.fromkeys(name.partition("/")[0] for name in theirs.files):
        if table == "prompts" or (ours is not None and same_files(ours, theirs, table)):
            continue
        if ours is None or not ours.of(table):
            files |= _copy(source, root, theirs, table, trunk, first)
        elif filled := _fill_texts(source, root, ours, theirs, table):
            files = {name: said for name, said in files.items() if name not in ours.of(table)} | filled
    # prompts are of no run: what removes one must not find them unnamed once they were found here
    with store.waiting(root, "commit") if theirs.of("prompts") else nullcontext():
        same = ours is not None and same_files(ours, theirs, "prompts")
        if not same and (ours is None or prompts_add(source, root, ours, theirs)):
            files |= _copy(source, root, theirs, "prompts", trunk, first)
        if ours is None or files != ours.files:
            store.write_record(root, replace(ours or theirs, files=dict(sorted(files.items()))))
    _sweep(root, files)


def _copy(
    source: Source, root: Path, theirs: Record, table: str, trunk: Record | None, first: int
) -> Files:
    """Copies a record's files of one table, and says under which names.

    These are the source's, so that a call that was stopped finds its files again. Where other files
    have them, shards get numbers from ``first`` on. So they do where the run's rollouts stand here in
    other shards: a job that was stopped takes what is under its shards' numbers for its own.
    """
    targets = {name: name for name in theirs.of(table)}
    taken = [n for n in targets if store.exists(root / n) and not stored_as(root / n, theirs.files[n])]
    if table == "prompts":
        for name in taken:
            fresh = f"{theirs.files[name]['sha256'][:16]}.parquet"
            targets[name] = Path(name).with_name(fresh).as_posix()
    elif trunk is not None and (taken or not same_cut(source, trunk)):
        for number, name in enumerate(targets, first):
            fresh = f"part-{number:05d}.{_ending(name)}"
            targets[name] = Path(name).with_name(fresh).as_posix()
    for name, target in targets.items():
        said = theirs.files[name]
        if not stored_as(root / target, said):
            store.copy_file(source.folder / name, root / target, said["sha256"])
    return {target: dict(theirs.files[name]) for name, target in targets.items()}


def _ending(name: str) -> str:
    """What follows the number in a shard's name: the policy's id in those of scores."""
    return Path(name).name.partition(".")[2]


def _fill_texts(source: Source, root: Path, ours: Record, theirs: Record, table: str) -> Files:
    """The table's files of our record, written anew with the texts that it lacks; none if it lacks none.

    Both agree in all they share, as the conflicts' check has shown.
    """
    names = ours.of(table)
    lacking = [text for text in TABLES[table].texts if not _have(root, names, text)]
    given = [text for text in lacking if _have(source.folder, theirs.of(table), text)]
    if not given:
        return {}
    keys = [column.name for column in TABLES[table].columns if column.name in TABLES[table].keys]
    parts = [store.read_rows(source.folder / name, [*keys, *given]) for name in theirs.of(table)]
    rows = pa.concat_tables(parts)
    place = {key: at for at, key in enumerate(_pairs(rows, *keys))}
    files: Files = {}
    for number, name in enumerate(names, store.fresh_number(ours)):
        shard = store.read_rows(root / name)
        at = pa.array([place[key] for key in _pairs(shard, *keys)], pa.int64())
        for text in given:
            index = shard.schema.get_field_index(text)
            shard = shard.set_column(index, shard.schema.field(text), rows[text].take(at))
        path = store.shard_path((root / name).parent, number)
        store.write_table(path, table, shard)
        files[path.relative_to(root).as_posix()] = store.entry(path)
    return files


def _have(root: Path, names: list[str], column: str) -> bool:
    """Whether any row of these files has a value in a column."""
    parts = (store.read_rows(root / name, [column])[column] for name in names)
    return any(part.null_count < len(part) for part in parts)


def _pairs(rows: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[name].to_pylist() for name in names), strict=True))


def _sweep(root: Path, files: Files) -> None:
    """Removes what stands under a record's keys and is not of it: replaced, or left by a stopped job."""
    numbered = {t for t, each in TABLES.items() if each.commit or "run" in each.partitions}
    shards = [name for name in files if name.partition("/")[0] in numbered]
    for folder, ending in {(Path(name).parent, _ending(name)) for name in shards}:
        for path in store.matching(root / folder, f"part-*.{ending}"):
            if _ending(path.name) == ending and path.relative_to(root).as_posix() not in files:
                with store.reaching(path):
                    path.unlink(missing_ok=True)
