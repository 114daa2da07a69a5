"""Records and plans: what they name, whether it is theirs to name, and what none of them names."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import CanopyError, DataError
from canopy_store.schema import FORMAT_VERSION, TABLES
from canopy_store.store import format1
from canopy_store.upkeep.verify_files import File, checked_rows
from canopy_store.upkeep.verify_report import COPY, Report

# Settings of each job planned, by its kind (run, embedder, …) and name.
Plans = dict[tuple[str, str], dict[str, Any]]


def version(root: Path) -> int:
    """The store's format; where canopy.json does not tell it, the one that its folders look like."""
    try:
        return format1.version(root)
    except CanopyError:
        old = (root / "runs").is_dir() and not (root / "commits").is_dir()
        return 1 if old else FORMAT_VERSION


# ---------------------------------------------------------------- records


def read_records(report: Report) -> tuple[list[store.Record], list[store.Record]]:
    """The records that views take their files from, and those whose run is not there."""
    if report.version == 1:
        old = [store.Record(*each) for each in format1.records(report.root)]
        _check_upgrade(report, {record.run for record in old})
        return old, []
    paths = store.record_paths(report.root)
    listed = set(paths)
    shown: list[store.Record] = []
    orphans: list[store.Record] = []
    for path in paths:
        try:
            record = _read(report.root, path)
        except FileNotFoundError:
            continue  # removed since it was listed
        except (CanopyError, OSError) as error:
            report.add_error(path, "", error)
            continue
        parent = TABLES[record.kind].parent
        key, value = record.subject
        if parent is None or store.commit_path(report.root, parent, {key: value}) in listed:
            shown.append(record)
            continue
        orphans.append(record)
        what = f"of {key} {value}, which is not complete; no view shows it"
        todo = f"finish the ingest of {key} {value}"
        if key in ("run", "corpus", "task"):
            todo += f", or remove the {key} again: canopy rm-{key} {shlex.quote(value)}"
            todo += f" --store {report.root}"
        report.add(path, record.kind, what, todo, harmless=True)
    return shown, orphans


def _read(root: Path, path: Path) -> store.Record:
    value = store.read_json(path)
    record = store.read_record(root, path, value)
    if value["version"] != FORMAT_VERSION:
        raise DataError(f"{path}: says format version {value['version']!r}; {COPY}")
    return record


def _check_upgrade(report: Report, runs: Collection[str | None]) -> None:
    """Records beside files of format 1 are an upgrade's, and of no other runs."""
    todo = f"finish it: canopy upgrade --store {report.root}"
    recorded = store.record_paths(report.root)
    for path in recorded:
        try:
            run = _read(report.root, path).run
        except (CanopyError, OSError):
            continue
        if run is not None and run not in runs:
            what = f"canopy.json says format 1, which does not have run {run}"
            report.add(path, "", what, f"{COPY}; or {todo}")
            return
    if recorded:
        report.add("commits", "", "records of an upgrade that was stopped", todo, harmless=True)


# ---------------------------------------------------------------- the files that they name


def place_of(report: Report, record: store.Record) -> str:
    """Where a record stands in the store; in format 1, where its first file does."""
    if report.version == 1:
        return next(iter(record.files))
    return record.path(report.root).relative_to(report.root).as_posix()


def named_files(report: Report, record: store.Record) -> Iterator[File]:
    """The files that a record names; reports names that are not its own to give."""
    for name, said in record.files.items():
        table = name.partition("/")[0]
        keys = place(report.version, table, name)
        if keys is None:
            what = f"names {name}, where no file of a table can stand"
            report.add(place_of(report, record), record.kind, what, COPY)
        elif report.version > 1 and not _own(record, table, name, keys):
            what = f"names {name}, which is of another job"
            report.add(place_of(report, record), record.kind, what, COPY)
        else:
            yield File(name, table, keys, said)


def place(version: int, table: str, name: str) -> dict[str, str] | None:
    """The values of a file's path; None where a store of this format has no file of the table."""
    if table not in TABLES:
        return None
    if version == 1 and not format1.partitions(table):
        stem = name.removeprefix(f"{table}/").removesuffix(".parquet")
        if name != f"{table}/{stem}.parquet" or not stem or store.quoted(store.unquoted(stem)) != stem:
            return None
        return {"run": store.unquoted(stem)} if "run" in TABLES[table].partitions else {}
    keys = store.path_keys(table, name)
    if keys is not None and version > 1 and "policy" in TABLES[table].commit:
        keys["policy"] = _policy(name)
    return keys


def _policy(name: str) -> str:
    """The policy's id in the name of a file of scores: ``part-00000.<id>.parquet``."""
    return name.rpartition("/")[2].split(".")[1]


def _own(record: store.Record, table: str, name: str, keys: Mapping[str, str]) -> bool:
    kind, of = job_of(table, name, keys)
    same_subject = keys.get("run") in (None, record.subject[1])
    return kind == record.kind and same_subject and of.items() <= record.keys.items()


def job_of(table: str, name: str, keys: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Kind and keys of the record that names such a file; of prompts, any run's."""
    kind, of = table, dict(keys)
    if table == "work":
        kind = keys["kind"]
        if kind not in TABLES:
            return kind, {}
        of |= {TABLES[kind].commit[0]: keys["name"], TABLES[kind].commit[-1]: keys["run"]}
    elif table == "embedding_spectra" and keys["selection"] == "all":
        kind = "embeddings"
    elif not TABLES[table].commit:
        kind = "rollouts"
    commit = TABLES[kind].commit
    if "policy" in commit:
        of["policy"] = _policy(name)
    return kind, {key: of[key] for key in commit if key in of}


# ---------------------------------------------------------------- plans


def read_plans(report: Report) -> Plans:
    """The settings of each job planned; reports plans that cannot be read."""
    plans: Plans = {}
    for name, stands in report.standing.items():
        last = name.removeprefix("plans/")
        if last == name or last.startswith(".") or stands != "file":
            continue
        path = report.root / name
        try:
            settings = store.read_plan(path)["settings"]
            kind, _, planned = last.removesuffix(".json").partition("=")
            if kind == "run" and store.plan_path(report.root, kind, settings["run_id"]) != path:
                raise DataError(f"{path}: names another run, {settings['run_id']!r}")
            plans[kind, store.unquoted(planned)] = settings
        except (CanopyError, OSError, KeyError, TypeError, AttributeError) as error:
            what = str(error).removeprefix(f"{path}: ").partition("; ")[0]
            report.add(path, "", what, COPY)
    return plans


def check_plans(report: Report, records: Iterable[store.Record], plans: Plans) -> None:
    """Reports plans that say otherwise than the jobs that repeated them: the next one would be refused.

    Those of runs are compared with the run's row.
    """
    told = set()
    for record in records if report.version > 1 else ():
        plan = record.plan
        if plan is None or plan[0] == "run" or plan in told or plan not in plans:
            continue
        if plans[plan] != record.settings:
            told.add(plan)
            both = record.settings, plans[plan]
            keys = {key for each in both for key in each}
            odd = sorted(k for k in keys if any(k not in s for s in both) or both[0][k] != both[1][k])
            what = f"its settings are not those of {place_of(report, record)}: {', '.join(odd)[:300]}"
            report.add(store.plan_path(report.root, *plan), record.kind, what, COPY)


# ---------------------------------------------------------------- what no record names


@dataclass(frozen=True)
class Jobs:
    """The jobs that are finished, by kind and keys of their records, and the plans of all begun."""

    finished: frozenset[tuple[str, frozenset[tuple[str, str]]]]
    plans: Plans

    def has_run(self, run: str) -> bool:
        """Whether the run is complete."""
        return ("rollouts", frozenset({("run", run)})) in self.finished

    def under_way(self, table: str, name: str, keys: Mapping[str, str]) -> str | None:
        """The job that such a file is of, where it was begun and is not finished."""
        kind, of = job_of(table, name, keys)
        runs = [keys["run"]] if "run" in keys else self._of_task(keys.get("task"))
        open_runs = [run for run in runs if ("run", run) in self.plans and not self.has_run(run)]
        if open_runs:
            return f"run {open_runs[0]}, which is not complete"
        job, job_name = TABLES[kind].plan if kind in TABLES else None, next(iter(of.values()), "")
        if job and (job, job_name) in self.plans and (kind, frozenset(of.items())) not in self.finished:
            return f"{job} {job_name}, which is not done with {' '.join(list(of.items())[-1])}"
        return None

    def _of_task(self, task: str | None) -> list[str]:
        return [
            name
            for (kind, name), said in self.plans.items()
            if kind == "run" and said.get("task") == task
        ]


def check_unnamed(report: Report, named: Collection[str], listed: Collection[str], jobs: Jobs) -> None:
    """Reports what stands in the store and no record names; only odd things change what views show.

    Parameters
    ----------
    named : files that are shown
    listed : files of records that are not shown, which are reported
    """
    folders = {name.rpartition("/")[0] for name in named}
    above = {folder[:at] for folder in folders for at, c in enumerate(f"{folder}/") if c == "/"}
    begun: dict[tuple[str, str], list[File]] = {}
    for name, stands in report.standing.items():
        top, folder, last = name.partition("/")[0], *name.rpartition("/")[::2]
        table = top if top in TABLES else ""
        shown = folder in folders or name in above or not table
        if stands == "link":
            what, todo = "a link, not a file or a folder", "put what it leads to there"
            report.add(name, table, what, todo, harmless=not shown)
        elif stands == "odd" or (stands == "folder" and folder in folders and report.version > 1):
            what, todo = "not a regular file", "move it out of the store"
            report.add(name, table, what, todo, harmless=not shown)
        elif stands == "folder" or name in named or name in listed:
            continue
        elif last.startswith(".") and last.endswith(".tmp"):
            what = "a temporary file, of a job under way or of one that was stopped"
            report.add(name, table, what, "remove it when no job runs", harmless=True)
        elif table:
            _check_stray(report, table, name, jobs, begun)
        elif top == "commits" and not last.endswith(".json"):
            report.add(name, "", "no record of a commit", "move it out", harmless=True)
    for (folder, job), files in begun.items():
        what = f"not committed: {len(files)} files of {job}; no view shows them"
        report.add(folder, files[0].table, what, "run that job again to finish it", harmless=True)
        for file in files:  # the job would take them for done
            for _ in checked_rows(report, file, None):
                pass


def _check_stray(
    report: Report, table: str, name: str, jobs: Jobs, begun: dict[tuple[str, str], list[File]]
) -> None:
    """Adds a file that no record names to those of its job, or reports it where none is under way."""
    keys = place(report.version, table, name)
    if keys is not None:
        job = jobs.under_way(table, name, keys)
        if job:
            begun.setdefault((name.rpartition("/")[0], job), []).append(File(name, table, keys))
        else:
            what = "no record names it" if report.version > 1 else "its run is not in runs"
            report.add(name, table, f"{what}; no view shows it", "remove it", harmless=True)
    elif place(FORMAT_VERSION if report.version == 1 else 1, table, name) is not None:
        todo = f"finish it: canopy upgrade --store {report.root}"
        report.add(name, table, "of an upgrade that was stopped", todo, harmless=True)
    else:
        what = "not where or how this table's files are named"
        report.add(name, table, what, "move it out", harmless=report.version > 1)
