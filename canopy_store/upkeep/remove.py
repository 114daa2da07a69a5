"""A run, a corpus or a task removed: its record in one step, hiding all of it, and then its files."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from canopy_store import sql, store
from canopy_store.errors import StoreError
from canopy_store.schema import TABLES
from canopy_store.upkeep.originals import require_own


def remove_run(root: str | Path, run_id: str, *, without_locks: bool = False) -> int:
    """How many files of a run were removed: its records first, its plan last.

    A removal that was stopped leaves a run that is not complete, which no view shows, and is finished
    by calling it again. Models and the rules of selections stay, and prompts that other runs name:
    other runs may need them.

    Parameters
    ----------
    root : path of the store
    run_id : name of the run, complete or begun
    without_locks : where no locks can be had, as on object storage: no other job uses the run

    Raises
    ------
    StoreError
        No run of this name, complete or begun; no locks can be had; or the store is of format 1.
    ConflictError
        The run is in use.
    """
    return _remove(root, "run", run_id, without_locks)


def remove_corpus(root: str | Path, corpus: str, *, without_locks: bool = False) -> int:
    """How many files of a corpus were removed: its documents, and every scorer's scores of them.

    As `remove_run`. Models, scorers and the settings of scorers stay: other corpora may need them.

    Parameters
    ----------
    root : path of the store
    corpus : its name
    without_locks : where no locks can be had, as on object storage: no other job uses the corpus

    Raises
    ------
    StoreError
        No corpus of this name; no locks can be had; or the store is of format 1.
    ConflictError
        The corpus is in use.
    """
    return _remove(root, "corpus", corpus, without_locks)


def remove_task(root: str | Path, task: str, *, without_locks: bool = False) -> int:
    """How many files of a task's items were removed: these, and every scorer's scores of their options.

    As `remove_corpus`. Runs and prompts of the same task are other things, and stay.

    Parameters
    ----------
    root : path of the store
    task : its name
    without_locks : where no locks can be had, as on object storage: no other job uses the task

    Raises
    ------
    StoreError
        No items of this task; no locks can be had; or the store is of format 1.
    ConflictError
        The task is in use.
    """
    return _remove(root, "task", task, without_locks)


def _remove(root: str | Path, key: str, name: str, without_locks: bool) -> int:
    """As `remove_run`, of a run or of what else ``key`` says."""
    root = require_own(store.writable(root), f" and remove the {key} there")
    require_stored(root, key, name)
    with store.holding(root, name, key=key, exclusive=True, without_locks=without_locks):
        count = _remove_records(root, key, name)
        sql.write_database(root)  # its views must list no file that goes now
        files = [path.relative_to(root).as_posix() for path in store.uncommitted(root, name, key)]
        count += store.remove_unnamed(root, files)
        if key == "run":
            # who commits a run waits for this too, and then finds its prompts there, or writes them
            with store.waiting(root, "commit"):
                count += store.remove_unnamed(root, _prompts(root, name))
        _remove_rest(root, key, name)
        plan = store.plan_path(root, key, name)
        if store.exists(plan):
            count += 1
            plan.unlink()
        if not store.remote(root):
            for lock in store.lock_paths(root, name, key):
                lock.unlink(missing_ok=True)
    return count


def require_run(root: Path, run_id: str) -> None:
    """Raises StoreError where nothing of a run is stored."""
    require_stored(root, "run", run_id)


def require_stored(root: Path, key: str, name: str) -> None:
    """Raises StoreError where nothing of a run, or of what else ``key`` says, is stored."""
    planned = store.exists(store.plan_path(root, key, name))
    if not planned and not _records(root, key, name) and not store.uncommitted(root, name, key):
        raise StoreError(f"{name}: no {key} of this name; see: canopy status --store {root}")


def _records(root: Path, key: str, name: str) -> list[Path]:
    """Where a run's records stand, readable or not; first that without which no view shows any."""
    paths = [p for p in store.record_paths(root) if p.name == f"{key}={store.quoted(name)}.json"]
    parents = {root / "commits" / table.parent for table in TABLES.values() if table.parent}
    return sorted(paths, key=lambda path: path.parent not in parents)


def _remove_records(root: Path, key: str, name: str) -> int:
    paths = _records(root, key, name)
    for path in paths:
        with store.reaching(path):
            path.unlink(missing_ok=True)
        store.remove_empty(root, path.parent)
    return len(paths)


def _prompts(root: Path, run_id: str) -> list[str]:
    """The files of its task's prompts; none while a run that has begun may come to need them."""
    runs = {run["run_id"]: run for run in store.runs(root)}
    removed = runs.pop(run_id, None)
    if removed is None or any(r["task"] == removed["task"] and not r["complete"] for r in runs.values()):
        return []
    where = store.folder(root, "prompts", task=removed["task"])
    return [path.relative_to(root).as_posix() for path in store.matching(where, "*.parquet")]


def _patterns(key: str, name: str) -> Iterator[tuple[str, str]]:
    """Each table that has a folder of the run, and what leads to that from the table's own."""
    for table, definition in TABLES.items():
        if definition.partitions[-1:] == (key,):
            stars = "*/" * (len(definition.partitions) - 1)
            yield table, stars + glob.escape(f"{key}={store.quoted(name)}")


def _remove_rest(root: Path, key: str, name: str) -> None:
    """Removes temporary files, empty folders, and notes of shards that were never committed."""
    for table, pattern in _patterns(key, name):
        for note in store.matching(root / ".work" / "notes" / table, f"{pattern}/*.json"):
            with store.reaching(note):
                note.unlink()
            store.remove_empty(root, note.parent)
        for folder in [] if store.remote(root) else store.matching(root / table, pattern):
            store.remove_leftovers(folder)
            store.remove_empty(root, folder)
