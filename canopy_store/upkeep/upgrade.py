"""A store of format 1 made one of format 2, in place.

Every file is rewritten where it stands; those of models and runs, which get other places, beside the
old ones. Each finished job gets its record. Then canopy.json says 2: until that step the store is one
of format 1 and shows what it showed. A call that was stopped at any moment is finished by repeating it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from canopy_store import sql, store
from canopy_store.errors import ConflictError, DataError, StoreError
from canopy_store.schema import FORMAT_VERSION, METADATA_KEY, TABLES
from canopy_store.store import format1
from canopy_store.store.embeddings import add_shard_spectra, spectra_settings
from canopy_store.upkeep.originals import read_intact, require_own
from canopy_store.upkeep.verify import verify

# Tables whose jobs write a shard for each shard of the run's rollouts, under its number.
_BY_SHARD = ("scores", "embeddings", "rewards")


def upgrade(
    root: str | Path,
    *,
    on_file: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    without_locks: bool = False,
) -> int:
    """How many files of a store of format 1 were rewritten; 0 where it is of format 2 already.

    Values, order and views stay as they are. What a job has done some shards of, and not all, is shown
    once that job is finished, which goes on from there.

    Parameters
    ----------
    root : path of the store
    on_file : called with (files done, files in all)
    say : called with a line for each job that is not finished
    without_locks : where no locks can be had, as on object storage: no other job uses the store

    Raises
    ------
    ConflictError
        A run is in use, or was written to meanwhile.
    StoreError
        A compaction was stopped half way, no locks can be had, or the format is a newer one.
    DataError
        A damaged file: nothing is upgraded until it is mended.
    """
    root = require_own(store.require(root))
    format1.require_layout(root, format1.version(root))  # files of another format are no leftovers
    count = 0
    if format1.is_old(root):
        _require_compacted(root)
        _require_sound(root)
        count = _upgrade(root, on_file or (lambda *_: None), say or (lambda _: None), without_locks)
        version = {"format": "canopy_store", "version": FORMAT_VERSION}
        store.write_json(root / "canopy.json", version)
    left = _left(root)
    if left:  # the last step, whose end is known by their being gone
        sql.write_database(root)
        for path in left:
            with store.reaching(path):
                path.unlink()
    return count


def _require_sound(root: Path) -> None:
    """Raises DataError for the first thing wrong in the runs themselves: it gets no record of its own.

    What is made of them may lack shards: its job makes these, once the store is upgraded.
    """
    own = pl.col("table").is_in(["models", "prompts", "runs", "rollouts"])
    problems = verify(root, database=False).filter(~pl.col("harmless") & own)
    for row in problems.head(1).iter_rows(named=True):
        raise DataError(f"{root / row['file']}: {row['what']}; {row['todo']}")


def _require_compacted(root: Path) -> None:
    for work in store.matching(root / ".work", "run=*"):
        if store.exists(work / "journal.json"):
            run_id = store.unquoted(work.name.removeprefix("run="))
            raise StoreError(
                f"{root}: the compaction of run {run_id} was stopped half way; finish it with the "
                f"version that began it: canopy compact --store {root} --run {run_id}"
            )


def _left(root: Path) -> list[Path]:
    """The files of models and runs where format 1 had them."""
    return [
        path
        for table in ("models", "runs")
        for path in store.matching(root / table, "*.parquet")
        if _label(path, table) == f"{table}:1"
    ]


def _label(path: Path, table: str) -> str:
    metadata: dict[bytes, bytes] = store.check_file(path, table).metadata
    return metadata[METADATA_KEY].decode()


# ---------------------------------------------------------------- files


def _upgrade(
    root: Path, on_file: Callable[[int, int], None], say: Callable[[str], None], without_locks: bool
) -> int:
    """How many files were rewritten; then all of them are, and every finished job has its record."""
    listing = format1.listing(root)
    jobs: dict[str | None, list[store.Record]] = {}
    for job in (store.Record(*each) for each in format1.records(root)):
        jobs.setdefault(job.run, []).append(job)
    of_run: dict[str, list[str]] = {}
    for name, keys in listing.items():
        of_run.setdefault(keys.get("run", ""), []).append(name)
    of_none = of_run.pop("", [])
    for run_id in of_run:  # refusals first, before any work
        with store.holding(root, run_id, exclusive=True, without_locks=without_locks):
            pass
    count = done = 0

    def rewrite(names: list[str]) -> None:
        nonlocal count, done
        for name in names:
            count += _rewrite(root, name)
            done += 1
            on_file(done, len(listing))

    rewrite(of_none)
    records = {_commit_model(root, job) for job in jobs.get(None, []) if job.kind == "models"}
    prompts = _prompts(root, listing)
    for run_id, names in of_run.items():
        with store.holding(root, run_id, exclusive=True, without_locks=without_locks):
            rewrite(names)
            records |= _commit_jobs(root, jobs.get(run_id, []), prompts, say)
    for name in format1.listing(root).keys() - listing.keys():
        table = name.partition("/")[0]
        if _label(root / name, table) == f"{table}:1":
            raise ConflictError(f"{root / name}: written meanwhile; upgrade when no other job runs")
    for path in set(store.record_paths(root)) - records:  # of a call that was stopped, and then undone
        with store.reaching(path):
            path.unlink()
    _clear_work(root, without_locks)
    return count


def _rewrite(root: Path, name: str) -> bool:
    """Whether the file is now written as format 2 has it, and was not before."""
    table = name.partition("/")[0]
    if _label(root / name, table) != f"{table}:1":
        return False
    rows = read_intact(root / name, table)
    path = _own_place(root, table, rows.to_pylist()[0]) if table in ("models", "runs") else root / name
    schema = {}
    if table == "embeddings" and pa.types.is_fixed_size_list(kind := rows["embedding"].type):
        schema["embedding_dim"] = kind.list_size
    store.write_rows(path, table, dict(zip(rows.column_names, rows.columns, strict=True)), **schema)
    return True


def _own_place(root: Path, table: str, row: dict[str, Any]) -> Path:
    """Where format 2 has the file of a checkpoint or run, which stood in one folder with the others."""
    keys = {"family": row["family"], "variant": row["variant"]}
    if table == "runs":
        keys = {"run": row["run_id"]}
    return store.shard_path(store.folder(root, table, **keys), 0)


def _clear_work(root: Path, without_locks: bool) -> None:
    """Removes what compactions and removals of format 1 took out of the store and left."""
    for work in store.matching(root / ".work", "run=*"):
        if work.is_dir() and not work.is_symlink():
            run_id = store.unquoted(work.name.removeprefix("run="))
            with (
                store.holding(root, run_id, exclusive=True, without_locks=without_locks),
                store.writing(work),
            ):
                shutil.rmtree(work)


# ---------------------------------------------------------------- records

# Task, file and ids of each file of prompts.
_Prompts = list[tuple[str, Path, set[str]]]


def _prompts(root: Path, listing: dict[str, dict[str, str]]) -> _Prompts:
    names = [name for name in listing if name.startswith("prompts/")]
    return [
        (listing[name]["task"], root / name, set(_column(root / name, "prompt_id"))) for name in names
    ]


def _column(path: Path, name: str) -> list[Any]:
    return store.read_rows(path, [name])[name].to_pylist()


def _row(root: Path, job: store.Record, table: str) -> dict[str, Any]:
    """The row of the job's one file of a small table."""
    return store.read_rows(root / job.of(table)[0]).to_pylist()[0]


def _commit_model(root: Path, job: store.Record) -> Path:
    """Where the record of a checkpoint now stands."""
    row = _row(root, job, "models")
    keys = {"family": row["family"], "variant": row["variant"]}
    return store.commit(root, "models", keys, [_own_place(root, "models", row)], {}).path(root)


def _commit_jobs(
    root: Path, jobs: list[store.Record], prompts: _Prompts, say: Callable[[str], None]
) -> set[Path]:
    """Where the records of a run's finished jobs now stand; none of a run that is not complete."""
    committed: list[store.Record] = []
    shards = {number for job in jobs for number in _numbers(job, "rollouts")}
    # spectra of selections last: their records name the others
    for job in sorted(jobs, key=lambda job: job.kind == "embedding_spectra"):
        record: store.Record | None
        if job.kind == "rollouts":
            record = _commit_rollouts(root, job, prompts)
        elif job.kind == "embedding_spectra":
            record = _commit_spectra(root, job, committed)
        else:
            record = _commit_derived(root, job, shards)
        if record is not None:
            committed.append(record)
            continue
        there = len(_numbers(job, job.kind))
        say(
            f"run {job.run}: {job.kind} of {_name(job)}: {there} of {len(shards)} shards, shown once "
            "that job is finished: run it again"
        )
    return {record.path(root) for record in committed}


def _name(job: store.Record) -> str:
    return next(iter(job.keys.values()))


def _numbers(job: store.Record, table: str) -> set[int]:
    return {store.shard_number(Path(name)) for name in job.of(table)}


def _paths(root: Path, job: store.Record, *tables: str) -> list[Path]:
    return [root / name for table in tables for name in job.of(table)]


def _commit_rollouts(root: Path, job: store.Record, prompts: _Prompts) -> store.Record:
    row = _row(root, job, "runs")
    shards = _paths(root, job, "rollouts")
    ids = {prompt for shard in shards for prompt in _column(shard, "prompt_id")}
    asked = [path for task, path, held in prompts if task == row["task"] and not ids.isdisjoint(held)]
    plan = store.plan_path(root, "run", row["run_id"])
    settings = store.read_plan(plan)["settings"] if store.exists(plan) else json.loads(row["settings"])
    files = [*shards, _own_place(root, "runs", row), *asked]
    return store.commit(root, "rollouts", job.keys, files, settings)


def _commit_derived(root: Path, job: store.Record, shards: set[int]) -> store.Record | None:
    """The record of what was made of a run's rollouts; None where its job has done some shards only.

    What has no plan came with an import, which may have had it for some shards, or was merged: whole.
    """
    files = _paths(root, job, job.kind)
    numbers = _numbers(job, job.kind)
    if job.kind == "embeddings":
        spectra = _numbers(job, "embedding_spectra")
        # format 1 wrote them after the embeddings, and in format 2 a shard that has embeddings is done
        added = [
            add_shard_spectra(root, _name(job), job.keys["run"], number)
            for number in sorted(numbers - spectra)
        ]
        files += [*_paths(root, job, "embedding_spectra"), *added]
        numbers = numbers or spectra  # an export may have left the embeddings out
    settings: dict[str, Any] = {}
    plan = store.plan_path(root, str(TABLES[job.kind].plan), _name(job))
    if store.exists(plan):
        settings = store.read_plan(plan)["settings"]
        if job.kind in _BY_SHARD and not shards <= numbers:
            return None
    elif job.kind in _BY_SHARD:
        settings = {next(iter(job.keys)): _name(job), "engine": "import"}
    return store.commit(root, job.kind, job.keys, files, settings)


def _commit_spectra(root: Path, job: store.Record, committed: list[store.Record]) -> store.Record | None:
    """The record of a selection's spectra; None where some lack, which their selection makes again."""
    of = {(record.kind, _name(record)): record for record in committed if record.kind != "scores"}
    embedded = of.get(("embeddings", job.keys["embedder"]))
    selected = of.get(("selections", job.keys["selection"]))
    if embedded is None or selected is None:
        return None
    if _numbers(job, "embedding_spectra") != _numbers(embedded, "embedding_spectra"):
        return None
    files = _paths(root, job, "embedding_spectra")
    return store.commit(root, job.kind, job.keys, files, spectra_settings(selected))
