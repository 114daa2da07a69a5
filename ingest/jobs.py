"""What every batch job does alike; a job itself says its table, its settings, its units and their rows.

    names checked → model loaded → plan agreed → for each run, held: units still to do → shards, each
    with a note for the table work → one commit → canopy.duckdb

A unit becomes one shard, under a name that follows from what it holds. So a job that was stopped does
only what is missing, several jobs share the work (``--shard i/n``, ``--executor ray``), and whoever
stores the last shard of a run commits it. One run is held at a time: thousands need one open file.
"""

from __future__ import annotations

import importlib
import inspect
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import ConflictError, DataError, UsageError, differences
from canopy_store.ingest import energy
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.settings import options_of, require_options
from canopy_store.schema import TABLES
from canopy_store.store import work

# How shards spread over processes; its function spread(root, open_job, options, …) does it.
EXECUTORS = {"local": None, "ray": "canopy_store.ingest.executor_ray"}

Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Unit:
    """A piece of work that becomes one shard: ``rows`` rows, made of the file ``source`` if of one."""

    group: Group
    number: int
    rows: int
    target: Path
    source: Path = Path()


@dataclass(frozen=True)
class Group:
    """What one commit is of: the last of its keys says what the job is over, a run or a file of items.

    Parameters
    ----------
    keys : of the commit record
    rows : rows in all, for the bar
    units : its units, in order; looked up anew when asked
    run : the run, as `store.runs` gives it, where it is one
    first : which of n jobs takes its first unit
    """

    keys: dict[str, str]
    rows: int
    units: Callable[[Group], list[Unit]]
    run: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0

    @property
    def subject(self) -> tuple[str, str]:
        """Key and value of what the job is over, as of its record."""
        return list(self.keys.items())[-1]

    @property
    def run_id(self) -> str:
        """The run's name, or that of what else the job is over."""
        return self.subject[1]

    def __str__(self) -> str:
        return " ".join(self.subject)


@dataclass
class Job:
    """A job that is ready: its model is loaded.

    Parameters
    ----------
    root : path of the store
    table : what it fills; its commits are of this kind
    name : of its plan: the embedder's, the scorer's, …; of rollouts, the run's
    settings : what a resumed one must repeat; replaced by those that are stored when they are agreed
    groups : what there is to do
    rows : a unit's columns, and how many tokens were sampled or read
    write : stores them; by default as rows of the table
    files : all that is stored of a unit; by default its target
    finish : commits a group whose shards these are; by default with those files alone
    after : what is still to be done for a group that is committed, every time
    yielding : settings that give way to the stored ones
    device : what it runs on, for the table work
    """

    root: Path
    table: str
    name: str
    settings: dict[str, Any]
    groups: list[Group]
    rows: Callable[[Unit, Progress], tuple[Columns, int]]
    write: Callable[[Unit, Columns], None] | None = None
    files: Callable[[Unit], list[Path]] = lambda unit: [unit.target]
    finish: Callable[[Group, list[Path]], None] | None = None
    after: Callable[[Group, Progress], None] | None = None
    yielding: tuple[str, ...] = ()
    device: str | None = None

    @property
    def kind(self) -> str:
        """The kind of its plan."""
        return TABLES[self.table].plan or self.table


OpenJob = Callable[..., Job]


def run_job(
    root: str | Path,
    open_job: OpenJob,
    options: Mapping[str, Any],
) -> str:
    """The name of the job, whose missing shards are now stored, and its runs committed where all are.

    Parameters
    ----------
    root : path of the store
    open_job : loads what the job needs: ``open_job(root, progress=…, **options)``
    options : what it takes, and what decides how the work is spread:

    shard : "i/n", from 1: only every n-th unit, for the i-th of n jobs on a scheduler
    executor : local, this process; or ray, the workers of a Ray cluster, whose nodes see the store and
        every file that the options name under the same paths
    workers : of a Ray cluster, how many; by default one a GPU, or one a node
    progress : what hears of it

    Raises
    ------
    UsageError
        An option that is none.
    ConflictError
        The job's name is stored with other settings, each of which is named; or a run is in use.
    CanopyError
        What ``open_job`` raises, or the job at its work.
    """
    own = dict(options)
    shard, executor, workers = (own.pop(name, None) for name in ("shard", "executor", "workers"))
    progress = own.pop("progress", None) or Progress()
    executor = executor or "local"
    if executor not in EXECUTORS:
        raise UsageError(f"--executor {executor}: one of {', '.join(EXECUTORS)}")
    part = part_of(shard)
    module = EXECUTORS[executor]
    if module is not None:
        if shard is not None:
            raise UsageError("--shard: not with --executor ray, which hands the shards out itself")
        return importlib.import_module(module).spread(root, open_job, own, workers, progress)
    if workers is not None:
        raise UsageError("--workers: only with --executor ray")
    job = ready(root, open_job, own, progress)
    announce(job, part, progress)
    for group in job.groups:
        with holding(job, group):
            reopen(job, group)
            units = units_to_do(job, group, part)
            while units:
                for unit in units:
                    do_unit(job, unit, progress)
                units = units_to_do(job, group, part)  # what these have shown to be needed
                if units:
                    announce(job, part, progress)
            complete(job, group, progress)
    sql.write_database(job.root)
    return job.name


def holding(job: Job, group: Group) -> AbstractContextManager[None]:
    """Holds what a group is of until the block ends."""
    key, name = group.subject
    return store.holding(job.root, name, key=key)


def part_of(shard: str | None) -> tuple[int, int]:
    """The numbers (i, n) of "i/n"."""
    if shard is None:
        return 1, 1
    first, _, second = shard.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise UsageError(f"--shard {shard}: needs i/n with i from 1 to n, as in 2/8")
    return int(first), int(second)


def ready(root: str | Path, open_job: OpenJob, options: Mapping[str, Any], progress: Progress) -> Job:
    """The job, loaded, its plan agreed, nothing in the way that a dead one left."""
    if "options" not in inspect.signature(open_job).parameters:
        require_options(options, options_of(open_job))
    for option in ("name", "run"):
        if options.get(option) is not None:
            store.check_name(f"--{option}", options[option])  # before a model is loaded for nothing
    job = open_job(root, progress=progress, **options)
    store.check_name("--run" if job.kind == "run" else "--name", job.name)
    for group in job.groups:
        for key, value in group.keys.items():
            store.check_name(f"--{key.removesuffix('_id')}", value)
    job.settings = store.plan(job.root, job.kind, job.name, job.settings, job.yielding)
    return job


def rollout_groups(
    root: Path, table: str, name: str, runs: Iterable[str], **keys: Callable[[str], str]
) -> list[Group]:
    """A group for each complete run (or each of those named), a unit for each shard of its rollouts.

    ``keys`` gives the further keys of the commit record, by run id.
    """
    groups = []
    for run in store.complete_runs(root, runs):
        further = {key: value(run["run_id"]) for key, value in keys.items()}
        groups.append(shard_group(root, table, name, run["record"], run, **further))
    return groups


def shard_group(
    root: Path,
    table: str,
    name: str,
    source: store.Record,
    run: Mapping[str, Any] | None = None,
    **keys: str,
) -> Group:
    """A group over what a record is of, a unit for each of its shards: rollouts of a run, or another's.

    Parameters
    ----------
    table : what the job fills, a shard of it for each shard of the source
    name : of the job: the first key of its records
    source : the record whose shards are read
    run : as of `Group`
    keys : further keys of the job's records
    """
    key, subject = source.subject
    of = {TABLES[table].commit[0]: name, **keys, key: subject}
    rows = sum(source.files[each]["rows"] for each in source.of(source.kind))
    units = _shard_units(root, table, source)
    return Group(of, rows, units, run or {}, first=zlib.crc32(subject.encode()))


def _shard_units(root: Path, table: str, source: store.Record) -> Callable[[Group], list[Unit]]:
    def units(group: Group) -> list[Unit]:
        record = store.record(root, source.kind, **source.keys)
        if record is None:
            raise ConflictError(f"{group}: removed since the job began; run it again")
        keys = {key: group.keys[key] for key in TABLES[table].partitions}
        where = store.folder(root, table, **keys)
        further = "".join(f".{v}" for k, v in group.keys.items() if k not in keys)
        return [
            Unit(
                group,
                number,
                record.files[name]["rows"],
                where / f"part-{number:05d}{further}.parquet",
                root / name,
            )
            for name in record.of(source.kind)
            for number in [store.shard_number(Path(name))]
        ]

    return units


# ---------------------------------------------------------------- the work


def committed(job: Job, group: Group) -> store.Record | None:
    """The record of a group that is done, None where it is not, or a shard of it is lost.

    Raises
    ------
    ConflictError
        It was made with other settings.
    """
    record = store.record(job.root, job.table, **group.keys)
    if record is not None and job.kind != "run":
        both = record.settings.keys() & job.settings.keys()
        stored, asked = ({k: side[k] for k in both} for side in (record.settings, job.settings))
        if stored != asked or record.settings.get("engine") == "import":
            stored = {**stored, **{k: v for k, v in record.settings.items() if k == "engine"}}
            raise ConflictError(
                f"{job.kind} {job.name} of {group} is stored with other settings: "
                f"{differences(stored, asked)}; give it another name with --name"
            )
    return record if record is not None and _is_whole(job, record) else None


def reopen(job: Job, group: Group) -> None:
    """Where a committed group has lost a shard: what is left is to be committed anew, with the rest.

    A shard tells by its number what it holds, so long as nothing was merged or compacted since. Where
    the numbers are others, what is left of rows that can be made again goes.

    Raises
    ------
    DataError
        They are rollouts, of which nothing is thrown away.
    """
    with store.waiting(job.root, "commit"):  # the other jobs that share the group come here too
        record = store.record(job.root, job.table, **group.keys)
        if record is None or _is_whole(job, record):
            return
        units = {(unit.target, unit.rows) for unit in group.units(group)}
        mine = [name for name in record.of(job.table) if (job.root / name).exists()]
        if not units.issuperset((job.root / name, record.files[name]["rows"]) for name in mine):
            if job.kind == "run":
                raise DataError(
                    f"{group}: a shard is lost, and the rest has been numbered anew since; take the "
                    "lost one from a copy, or begin anew after: canopy rm-run"
                )
            for name in mine:
                (job.root / name).unlink()
        with suppress(FileNotFoundError):
            record.path(job.root).unlink()


def _is_whole(job: Job, record: store.Record) -> bool:
    """Whether every file that the record names is there: a shard that was lost is made again."""
    files = [job.root / name for name in record.files]
    # an object store loses nothing, and each question is a request
    return store.remote(job.root) or _stored(files).issuperset(files)


def units_to_do(job: Job, group: Group, part: tuple[int, int] = (1, 1)) -> list[Unit]:
    """The units not yet stored that fall to the i-th of n jobs; none once the group is committed."""
    if committed(job, group) is not None:
        return []  # whatever its files are now: they may have been compacted
    mine = list(_share(group, part))
    there = _stored(path for unit in mine for path in job.files(unit))
    return [unit for unit in mine if not there.issuperset(job.files(unit))]


def _share(group: Group, part: tuple[int, int]) -> Iterator[Unit]:
    for at, unit in enumerate(group.units(group)):
        if (group.first + at) % part[1] == part[0] - 1:
            yield unit


def _stored(files: Iterable[Path]) -> set[Path]:
    """What is there in these files' folders, after what killed writers left is removed."""
    there: set[Path] = set()
    for folder in {path.parent for path in files}:
        store.remove_leftovers(folder)
        there |= set(store.matching(folder, "*.parquet"))
    return there


def announce(job: Job, part: tuple[int, int], progress: Progress) -> None:
    """Tells how many rows the job has in all, and how many of them are stored."""
    total = done = 0
    for group in job.groups:
        if part == (1, 1) and committed(job, group) is not None:
            total, done = total + group.rows, done + group.rows
            continue
        mine = list(_share(group, part))
        left = {unit.target for unit in units_to_do(job, group, part)}
        total += sum(unit.rows for unit in mine)
        done += sum(unit.rows for unit in mine if unit.target not in left)
    progress.start(total, done)


def do_unit(job: Job, unit: Unit, progress: Progress) -> None:
    """Makes and stores one shard, with a note of what it took."""
    started, used = time.perf_counter(), energy.meter(job.device)
    columns, tokens = job.rows(unit, progress)
    joules, method = used()
    work.note(
        job.root,
        unit.target,
        rows=unit.rows,
        tokens=tokens,
        seconds=time.perf_counter() - started,
        energy_j=joules,
        energy_method=method,
        device=job.device,
    )
    if job.write is not None:
        job.write(unit, columns)
    else:
        store.write_rows(unit.target, job.table, columns)
    progress.rollouts(unit.rows)


def complete(job: Job, group: Group, progress: Progress) -> bool:
    """Whether the group is committed, which it is once every unit is stored."""
    with store.waiting(job.root, "commit"):  # of two that store the last shards, one commits
        done = committed(job, group) is not None or _commit(job, group)
    if done and job.after is not None:
        job.after(group, progress)
    return done


def _commit(job: Job, group: Group) -> bool:
    """Whether every unit is stored, and so the group is committed now."""
    units = group.units(group)
    files = [path for unit in units for path in job.files(unit)]
    if not _stored(files).issuperset(files):
        return False
    shards = [unit.target for unit in units]
    if job.finish is not None:
        job.finish(group, shards)
    else:
        noted, _ = work.gather(job.root, job.table, job.name, group.run_id, shards)
        store.commit(job.root, job.table, group.keys, [*files, *noted], job.settings)
        work.forget(job.root, shards)
    _remove_stale(job, group, files)
    return True


def _remove_stale(job: Job, group: Group, files: list[Path]) -> None:
    """Removes shards of a cut of the run that an earlier commit had, and what was made of them."""
    key, name = group.subject
    left = store.uncommitted(job.root, name, key) if not store.remote(job.root) else []
    folders = {path.parent for path in files}
    ends = {path.name.partition(".")[2] for path in files}
    for path in left:
        mine = path.parent in folders and path.name.partition(".")[2] in ends
        cut_otherwise = job.table == "rollouts" and store.shard_number(path) >= len(files)
        if mine or cut_otherwise:
            path.unlink(missing_ok=True)


def text_of(part: Mapping[str, list[Any]], column: str, what: str, run_id: str) -> list[Any]:
    """A column of a shard, no row of which lacks it.

    Raises
    ------
    DataError
        One does; names it.
    """
    if None in part[column]:
        at = part[column].index(None)
        raise DataError(
            f"run {run_id}: prompt {part['prompt_id'][at]} sample {part['sample'][at]} has no {what}; "
            "choose other runs with --run"
        )
    return part[column]
