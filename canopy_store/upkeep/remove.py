"""A run removed: its record in one step, by which every view is rid of it, then its files."""

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
    root = require_own(store.writable(root), " and remove the run there")
    require_run(root, run_id)
    with store.holding(root, run_id, exclusive=True, without_locks=without_locks):
        count = _remove_records(root, run_id)
        sql.write_database(root)  # its views must list no file that goes now
        files = [path.relative_to(root).as_posix() for path in store.uncommitted(root, run_id)]
        count += store.remove_unnamed(root, files)
        # who commits a run waits for this too, and then finds its prompts there, or writes them
        with store.waiting(root, "commit"):
            count += store.remove_unnamed(root, _prompts(root, run_id))
        _remove_rest(root, run_id)
        plan = store.plan_path(root, "run", run_id)
        if store.exists(plan):
            count += 1
            plan.unlink()
        if not store.remote(root):
            for lock in store.lock_paths(root, run_id):
                lock.unlink(missing_ok=True)
    return count


def require_run(root: Path, run_id: str) -> None:
    """Raises StoreError where nothing of a run is stored."""
    planned = store.exists(store.plan_path(root, "run", run_id))
    if not planned and not _records(root, run_id) and not store.uncommitted(root, run_id):
        raise StoreError(f"{run_id}: no run of this name; see: canopy status --store {root}")


def _records(root: Path, run_id: str) -> list[Path]:
    """Where a run's records stand, readable or not; first that without which no view shows any."""
    paths = [p for p in store.record_paths(root) if p.name == f"run={store.quoted(run_id)}.json"]
    return sorted(paths, key=lambda path: path.parent != root / "commits" / "rollouts")


def _remove_records(root: Path, run_id: str) -> int:
    paths = _records(root, run_id)
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


def _patterns(run_id: str) -> Iterator[tuple[str, str]]:
    """Each table that has a folder of the run, and what leads to that from the table's own."""
    for table, definition in TABLES.items():
        if "run" in definition.partitions:
            stars = "*/" * (len(definition.partitions) - 1)
            yield table, stars + glob.escape(f"run={store.quoted(run_id)}")


def _remove_rest(root: Path, run_id: str) -> None:
    """Removes temporary files, empty folders, and notes of shards that were never committed."""
    for table, pattern in _patterns(run_id):
        for note in store.matching(root / ".work" / "notes" / table, f"{pattern}/*.json"):
            with store.reaching(note):
                note.unlink()
            store.remove_empty(root, note.parent)
        for folder in [] if store.remote(root) else store.matching(root / table, pattern):
            store.remove_leftovers(folder)
            store.remove_empty(root, folder)
