"""What two stores say of the same name: the same, more or less of it, or something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from canopy_store import store
from canopy_store.errors import ConflictError, differences
from canopy_store.schema import REGISTERS, TABLES, added_columns, file_columns
from canopy_store.sharing.untrusted import Source
from canopy_store.store import Record

# Of a run, what may differ between two ingests that gave the same rollouts.
_VOLATILE = ("started_at", "finished_at", "wall_s", "energy_j", "energy_method", "versions", "n_shards")
_TODO = "nothing was taken: use another store, or remove what is here first"


def check_conflicts(source: Source, root: Path) -> None:
    """Nothing where all that the source has can come into the store, which need not exist.

    Raises
    ------
    ConflictError
        A name that is stored means something else in the source; says what differs.
    """
    stored = []
    if store.exists(root / "canopy.json"):
        stored = store.records(store.writable(root))
    _check_names(source, root, stored)
    for record in source.records:
        _check_plan(source, root, record)
    for table in REGISTERS:
        _check_register(source, root, stored, table)
    _check_prompts(source, root, stored)
    for records in source.subjects.values() if stored else ():
        check_subject(source, root, records)


def _same(what: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if stored != asked:
        raise ConflictError(
            f"{what} is stored with other values: {differences(stored, asked)[:400]}; {_TODO}"
        )


# ---------------------------------------------------------------- names, models, prompts


def _check_names(source: Source, root: Path, stored: Iterable[Record]) -> None:
    """Raises ConflictError for names that differ by case alone: some disks have one place for both."""
    taken, new = _names(stored), _names(source.records)
    for kind, names in new.items():
        begun = {name for name, _ in store.plans(root, kind)} if kind != "model" else set()
        there = taken.get(kind, set()) | begun
        for name in sorted(names - there):
            store.require_own_name(kind, name, there | names)


def _names(records: Iterable[Record]) -> dict[str, set[str]]:
    """The names that records bear, under the kind of thing that each names."""
    names: dict[str, set[str]] = {}
    for record in records:
        table = TABLES[record.kind]
        first, *others = record.keys.values()
        name = "/".join([first, *others]) if table.plan is None else first
        kind = "model" if record.kind == "models" else record.kind
        names.setdefault(table.plan or kind, set()).add(name)
    return names


def _check_plan(source: Source, root: Path, record: Record) -> None:
    plan = source.plan(record)
    if plan is not None and store.exists(root / plan):
        kind, _, name = plan.stem.partition("=")
        both = (store.read_plan(place / plan)["settings"] for place in (root, source.folder))
        _same(f"{kind} {store.unquoted(name)}", *both)


def _check_register(source: Source, root: Path, stored: Iterable[Record], table: str) -> None:
    """Raises ConflictError for a checkpoint, or a scorer, that is another one here."""
    (key,) = TABLES[table].keys
    may_lack = {column.name for column in TABLES[table].columns if not column.required}
    here = {row[key]: row for row in _rows(root, stored, table)}
    for row in _rows(source.folder, source.registered, table):
        # what the source does not say of a model is in no conflict; where it was loaded from may differ
        left = may_lack & {name for name in row if row[name] is None} if table == "models" else set()
        said = {name: value for name, value in row.items() if name not in left | {"source"}}
        known = here.get(row[key], said)
        for name in added_columns(table):  # what was stored before there was such a column
            if known.get(name) is None:
                said.pop(name, None)
        _same(f"{table.removesuffix('s')} {row[key]}", {name: known[name] for name in said}, said)


def _rows(root: Path, records: Iterable[Record], table: str) -> list[dict[str, Any]]:
    names = store.names(records, table)
    lacking = dict.fromkeys(added_columns(table))
    rows = (row for name in names for row in store.read_rows(root / name).to_pylist())
    return [{**lacking, **row} for row in rows]


def _check_prompts(source: Source, root: Path, stored: list[Record]) -> None:
    """Raises ConflictError for a prompt that has another text here."""
    theirs = _prompts(source.folder, store.names(source.records, "prompts"))
    tasks = set(theirs["task"].unique())
    names = store.names(stored, "prompts")
    here = [n for n in names if (store.path_keys("prompts", n) or {}).get("task") in tasks]
    both = _prompts(root, here).join(theirs, on=["task", "prompt_id"], suffix="_asked")
    for text in TABLES["prompts"].texts:
        for row in both.filter(pl.col(text) != pl.col(f"{text}_asked")).head(1).iter_rows(named=True):
            _same(f"prompt {row['prompt_id']}", {text: row[text]}, {text: row[f"{text}_asked"]})


def _prompts(root: Path, names: Iterable[str]) -> pl.DataFrame:
    """The rows of files of prompts, each row once, with the task of the path."""
    none = pl.DataFrame(schema={column.name: pl.String for column in file_columns("prompts")})
    return pl.concat([none, *(pl.DataFrame(store.read_rows(root / name)) for name in names)]).unique()


def prompts_add(source: Source, root: Path, ours: Record, theirs: Record) -> bool:
    """Whether the source's prompts of a run say anything that ours, of the same run, do not."""
    here, there = _prompts(root, ours.of("prompts")), _prompts(source.folder, theirs.of("prompts"))
    keys = ["task", "prompt_id"]
    return any(
        len(there.filter(pl.col(c).is_not_null()).join(here.drop_nulls(c), on=keys, how="anti"))
        for c in there.columns
    )


# ---------------------------------------------------------------- runs


def trunk_of(records: Iterable[Record]) -> Record:
    """Of all records of a run, that of its rollouts; of others, that of which the others were made."""
    return next(record for record in records if TABLES[record.kind].parent is None)


def check_subject(source: Source, root: Path, records: list[Record]) -> None:
    """Nothing where a run of the source is not here, or says the same as far as both say anything.

    Raises
    ------
    ConflictError
        It does not, or is begun here and not complete.
    """
    trunk = trunk_of(records)
    if store.record(root, trunk.kind, **trunk.keys) is None:
        _check_unfinished(root, records, *trunk.subject)
        return
    for theirs in records:
        ours = store.record(root, theirs.kind, **theirs.keys)
        if ours is not None and ours.files != theirs.files:
            _check_record(source, root, ours, theirs)


def _check_unfinished(root: Path, records: list[Record], key: str, subject: str) -> None:
    """Raises ConflictError where the store has files of the run that no stopped merge has left."""
    if key == "run" and not store.exists(store.plan_path(root, "run", subject)):
        return
    said = {name: entry for record in records for name, entry in record.files.items()}
    for path in store.uncommitted(root, subject, key):
        name = path.relative_to(root).as_posix()
        if name not in said or not stored_as(path, said[name]):
            remove = f", or remove it: canopy rm-{key}" if key in ("run", "corpus", "task") else ""
            raise ConflictError(f"{path}: its {key} is begun here and not complete; finish it{remove}")


def _check_record(source: Source, root: Path, ours: Record, theirs: Record) -> None:
    """Raises ConflictError where two records of the same keys are of other rows."""
    if ours.kind == "rollouts":
        rows = (store.run_row(root, ours), store.run_row(source.folder, theirs))
        _same(f"run {ours.run}", *({k: v for k, v in r.items() if k not in _VOLATILE} for r in rows))
    for table in {name.partition("/")[0] for name in ours.files}:
        if not TABLES[table].commit:
            continue  # runs and prompts have checks of their own
        if not theirs.of(table) or same_files(ours, theirs, table):
            continue
        here = _comparable(root, ours, table)
        there = _comparable(source.folder, theirs, table)
        keys = [key for key in TABLES[table].keys if key in here.columns]
        both = here.join(there, on=keys, how="semi")
        where = (root / ours.of(table)[0]).parent
        if not len(both) == len(here) == len(there):
            what = (
                f"{len(here)} rows here, {len(there)} in {source.folder}, {len(both)} of them the same"
            )
            raise ConflictError(f"{where}: {what}; {_TODO}")
        names = [c for c in here.columns if not _agree(here[c], there[c], c in TABLES[table].texts)]
        if names:
            raise ConflictError(f"{where}: other values of {', '.join(names)}; {_TODO}")


def _agree(one: pl.Series, other: pl.Series, text: bool) -> bool:
    """Whether two columns say the same; one that a side leaves out says nothing."""
    if len(one) in (one.null_count(), other.null_count()):
        return True
    both = one.is_not_null() & other.is_not_null()
    return one.filter(both).equals(other.filter(both)) if text else one.equals(other)


def _comparable(root: Path, record: Record, table: str) -> pl.DataFrame:
    """The rows in key order, of what says whether two are the same: sums stand for their arrays."""
    lists = {c.name for c in TABLES[table].columns if c.type.endswith("[]")} - {"embedding", "samples"}
    own = [c.name for c in TABLES[table].columns if c.name not in lists]
    frames = [pl.DataFrame(store.read_rows(root / name, own)) for name in record.of(table)]
    rows = pl.concat(frames, how="diagonal")
    lacking = [name for name in added_columns(table) if name not in rows.columns]
    rows = rows.with_columns(pl.lit(None).alias(name) for name in lacking)
    return rows.sort([key for key in TABLES[table].keys if key in own])


# ---------------------------------------------------------------- files


def same_files(ours: Record, theirs: Record, table: str) -> bool:
    """Whether both records name the same files of a table, by content, whatever their names."""
    return _hashes(ours, table) == _hashes(theirs, table)


def _hashes(record: Record, table: str) -> list[str]:
    return sorted(record.files[name]["sha256"] for name in record.of(table))


def same_cut(source: Source, trunk: Record) -> bool:
    """Whether a run that is stored stands in the same shards in the source."""
    theirs = trunk_of(source.subjects[trunk.subject])
    cuts = [[(n, each.files[n]["rows"]) for n in each.of(trunk.kind)] for each in (trunk, theirs)]
    return cuts[0] == cuts[1]


def stored_as(path: Path, said: Mapping[str, Any]) -> bool:
    """Whether a file is there, with the bytes that a record's entry says."""
    if not store.exists(path):
        return False
    with store.reaching(path):
        size = path.stat().st_size
    return size == said["bytes"] and store.sha256(path) == said["sha256"]
