"""Small shards made few: each record of a run is replaced by one that names few files.

The joined shards are written beside the old ones, under numbers that the record never had; then the
record is replaced, in one step; the old files go last. So a reader that listed the old ones has all of
their rows or finds a file gone, which is an error, and can never read rows twice or miss some.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from canopy_store import sql, store
from canopy_store.errors import CanopyError, DataError, StoreError, UsageError
from canopy_store.schema import TABLES
from canopy_store.upkeep.originals import read_intact, require_own

# Seconds from a record's replacement to the removal of its old files: a reader may just have listed them
_GRACE = 2.0
# Bytes of old files that may wait for that: a large store need not fit on its disk twice
_MAY_WAIT = 1 << 30

# Tables whose jobs write a shard for each shard of the run's rollouts, under its number.
_BY_SHARD = {name for name, table in TABLES.items() if table.parent and "work" in table.brings}
# Tables whose files are no shards; they stay as they are.
_WHOLE = {name for name, table in TABLES.items() if not table.commit and not table.parent}

# A folder of the store and the end of its shards' names, which is the policy's of scores.
Place = tuple[str, str]
# The shards of each place that are to become one, in order.
Groups = dict[Place, list[list[str]]]
# What shards are of: ("run", its name), or another key and name that jobs are over.
Subject = tuple[str, str]


def compact(
    root: str | Path,
    runs: Iterable[str] = (),
    *,
    corpora: Iterable[str] = (),
    tasks: Iterable[str] = (),
    target_mb: float = 128,
    on_run: Callable[[int, int], None] | None = None,
    without_locks: bool = False,
) -> dict[str, tuple[int, int]]:
    """The number of shards before and after, of each run, corpus or task whose small ones were joined.

    Counted are those of rollouts, under the run's name, of documents, under ``corpus NAME``, and of
    items, under ``task NAME``.

    Rows keep their values and their order; every view is the same to the last bit. A call that was
    stopped, at any moment, is finished by repeating it.

    Parameters
    ----------
    root : path of the store
    runs, corpora, tasks : run ids, names of corpora, and of tasks of items; where none of the three is
        named, all that is complete
    target_mb : size up to which shards are joined, in 2**20 bytes: those of rollouts, and those of each
        thing that was made of them
    on_run : called with (runs done, runs in all)
    without_locks : where no locks can be had, as on object storage: no other job uses these runs

    Raises
    ------
    StoreError
        No locks can be had, or the store is of format 1.
    DataError
        A run of which a job has done some shards, or a damaged file.
    ConflictError
        A run is in use.
    """
    if not target_mb > 0:
        raise UsageError(f"--target-mb {target_mb}: needs more than 0")
    root = require_own(store.writable(root), " and compact there")
    chosen = _chosen(root, runs, {"corpus": corpora, "task": tasks})
    target = int(target_mb * (1 << 20))
    for subject in chosen:  # refusals first, before any work
        _look(root, subject, target)
    done: dict[str, tuple[int, int]] = {}
    old = _Old(root, without_locks)
    try:
        for at, subject in enumerate(chosen, 1):
            key, name = subject
            with store.holding(root, name, key=key, exclusive=True, without_locks=without_locks):
                _compact(root, subject, target, old, done)
            if on_run:
                on_run(at, len(chosen))
            if old.size > _MAY_WAIT:
                old.remove()
    except CanopyError:
        old.remove()  # of the runs before
        raise
    old.remove()
    return done


def _chosen(root: Path, runs: Iterable[str], others: Mapping[str, Iterable[str]]) -> list[Subject]:
    """What is to be compacted: what is named, else all runs, and all else that jobs are over."""
    runs = list(runs)
    named = [(key, name) for key, names in others.items() for name in names]
    trunks = {table.parent for table in TABLES.values() if table.parent} - {"rollouts"}
    stored = [record.subject for kind in sorted(trunks) for record in store.records(root, kind)]
    for key, name in named:
        if (key, name) not in stored:
            raise StoreError(f"--{key} {name}: no {key} of this name; see: canopy status")
    chosen = []
    if runs or not named:
        chosen = [("run", run["run_id"]) for run in store.complete_runs(root, runs)]
    return chosen + (named if runs or named else stored)


def _compact(
    root: Path, subject: Subject, target: int, old: _Old, done: dict[str, tuple[int, int]]
) -> None:
    """Replaces a run's records, one after the other; adds to what is old and to what is done."""
    look = _look(root, subject, target)
    if look.unread:
        store.remove_unnamed(root, look.unread)
    for record, groups in look.records:
        now = _join(root, record, groups) if groups else record
        if groups and TABLES[record.kind].parent is None:
            name = subject[1] if subject[0] == "run" else " ".join(subject)
            done[name] = len(record.of(record.kind)), len(now.of(record.kind))
        old.add(subject, now, record, look.stale)


# ---------------------------------------------------------------- what there is to do


@dataclass
class _Look:
    """What a run's compaction has to do.

    Parameters
    ----------
    records : each with the groups of its shards that become one
    unread : files of a compaction that was stopped, which no reader has listed
    stale : files that a record named before it was replaced, by a call that was then stopped
    """

    records: list[tuple[store.Record, Groups]]
    unread: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)


def _look(root: Path, subject: Subject, target: int) -> _Look:
    """What there is to do with a run, or with what else jobs are over.

    Raises
    ------
    DataError
        A job has done some of the shards that are to be joined: the others would get other numbers.
    """
    key, name = subject
    # what the others are made of comes last
    records = sorted(
        store.records(root, **{key: name}), key=lambda record: TABLES[record.kind].parent is None
    )
    look = _Look([(record, _groups(record, target)) for record in records])
    owners = {_place(file): record for record in records for file in record.files}
    begun: dict[Place, set[int]] = {}
    for path in store.uncommitted(root, name, key):
        file = path.relative_to(root).as_posix()
        owner = owners.get(_place(file))
        if owner is None:
            if _table(file) in _BY_SHARD:
                begun.setdefault(_place(file), set()).add(store.shard_number(path))
        elif all(store.exists(root / each) for each in owner.files):  # no job is making lost ones again
            unread = store.shard_number(path) >= store.fresh_number(owner)
            (look.unread if unread else look.stale).append(file)
    for record, groups in look.records:
        if record.kind == "rollouts":
            _refuse_miscounted(root, record)
        if TABLES[record.kind].parent is None:
            _refuse_begun(record, groups, begun)
    return look


def _refuse_miscounted(root: Path, rollouts: store.Record) -> None:
    """Rows that the run does not have must not get a sound record of their own."""
    rows = sum(rollouts.files[name]["rows"] for name in rollouts.of("rollouts"))
    counted = store.run_row(root, rollouts)["n_rollouts"]
    if rows != counted:
        raise DataError(
            f"run {rollouts.run}: {rows} rollouts in its files, {counted} in runs; see: canopy verify"
        )


def _refuse_begun(trunk: store.Record, groups: Groups, begun: dict[Place, set[int]]) -> None:
    joined = {store.shard_number(Path(n)) for several in groups.values() for g in several for n in g}
    for (where, _), numbers in begun.items():
        if numbers & joined:
            raise DataError(
                f"{' '.join(trunk.subject)}: {where} has {len(numbers)} of {len(trunk.of(trunk.kind))} "
                f"shards; finish its ingest, or compact others with --{trunk.subject[0]}"
            )


def _groups(record: store.Record, target: int) -> Groups:
    """The record's shards in groups of up to ``target`` bytes, of places where some are joined.

    Shards before the first that is joined are in no group: they stay, and stay first.
    """
    places: dict[Place, list[str]] = {}
    for name in record.files:
        if _table(name) not in _WHOLE:
            places.setdefault(_place(name), []).append(name)
    found: Groups = {}
    for place, names in places.items():
        groups: list[list[str]] = []
        size = 0
        for name in sorted(names, key=lambda name: store.shard_number(Path(name))):
            size += record.files[name]["bytes"]
            if not groups or size > target:
                groups.append([])
                size = record.files[name]["bytes"]
            groups[-1].append(name)
        first = next((at for at, group in enumerate(groups) if len(group) > 1), len(groups))
        if groups[first:]:
            found[place] = groups[first:]
    return found


def _place(name: str) -> Place:
    folder, _, last = name.rpartition("/")
    return folder, last.partition(".")[2]


def _table(name: str) -> str:
    return name.partition("/")[0]


# ---------------------------------------------------------------- the work


def _join(root: Path, record: store.Record, groups: Groups) -> store.Record:
    """The record that has replaced ``record``, once its joined shards were written."""
    files = dict(record.files)
    first = store.fresh_number(record)
    for (where, end), several in groups.items():
        for number, group in enumerate(several, first):
            path = root / where / f"part-{number:05d}.{end}"
            store.write_table(path, _table(where), _rows(root, record, group))
            files[path.relative_to(root).as_posix()] = store.entry(path)
            for name in group:
                del files[name]
    if record.kind == "rollouts":
        row = store.run_row(root, record)
        row["n_shards"] = sum(_table(name) == "rollouts" for name in files)
        for name in record.of("runs"):
            del files[name]
        path = store.shard_path(store.folder(root, "runs", run=row["run_id"]), first)
        store.write_rows(path, "runs", {key: [value] for key, value in row.items()})
        files[path.relative_to(root).as_posix()] = store.entry(path)
    fresh = replace(record, files=dict(sorted(files.items())))
    store.write_record(root, fresh)
    return fresh


def _rows(root: Path, record: store.Record, names: list[str]) -> pa.Table:
    """The rows of shards, end to end, each as its record has it."""
    parts = []
    for name in names:
        parts.append(read_intact(root / name, _table(name)))
        if store.sha256(root / name) != record.files[name]["sha256"]:
            raise DataError(f"{root / name}: not the bytes that its record names; see: canopy verify")
    try:
        return store.join_rows(parts, _table(names[0]))
    except pa.ArrowException:
        raise DataError(
            f"{root / names[0]}: other columns than {names[-1]}; see: canopy verify"
        ) from None


@dataclass
class _Old:
    """Files that no record names any more, kept until whoever listed them has opened them."""

    root: Path
    without_locks: bool
    size: int = 0
    waiting: dict[Subject, list[tuple[store.Record, list[str]]]] = field(default_factory=dict)

    def add(self, subject: Subject, now: store.Record, before: store.Record, stale: list[str]) -> None:
        """Notes the files that ``now`` replaces, and those left by a call that was stopped."""
        places = {_place(name) for name in before.files}
        gone = [*(before.files.keys() - now.files.keys()), *(n for n in stale if _place(n) in places)]
        if gone:
            self.waiting.setdefault(subject, []).append((now, gone))
            self.size += sum(before.files[name]["bytes"] for name in gone if name in before.files)

    def remove(self) -> None:
        """Removes them; those of a run that a job has begun on are left to the next compaction."""
        if not self.waiting:
            return
        sql.write_database(self.root)  # its views must list no file that goes now
        time.sleep(_GRACE)
        for (key, name), replaced in self.waiting.items():
            locks = self.without_locks
            try:
                with store.holding(self.root, name, key=key, exclusive=True, without_locks=locks):
                    for record, names in replaced:
                        if store.record(self.root, record.kind, **record.keys) == record:
                            store.remove_unnamed(self.root, names)
            except CanopyError:
                continue
        self.waiting, self.size = {}, 0
