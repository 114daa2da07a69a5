"""What keeps a store in shape: other stores merged in, small shards made few, runs removed.

A compaction writes a run's new folders beside the store's tables, then swaps each with the old one in a
single step of the file system:

    STORE/.work/run=…/new/<table>/…     the new shards; after the swap, the old ones
    STORE/.work/run=…/journal.json      there once all is written, until all is swapped
    STORE/.work/run=….lock              held by whoever uses the run

The new shards have numbers that the run never had. So a reader that listed the old ones finds its files
gone, which is an error, and can never read rows twice or miss some.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from canopy_store import sql, store
from canopy_store.errors import CanopyError, DataError, StoreError, UsageError
from canopy_store.schema import TABLES
from canopy_store.sharing.merge import group_files, resumable
from canopy_store.upkeep.verify import MANIFEST, path_keys

# Seconds from a swap to the removal of the old files: a reader may just have opened their folder.
_GRACE = 2.0


# ---------------------------------------------------------------- compact


def compact(
    root: str | Path,
    runs: Iterable[str] = (),
    *,
    target_mb: float = 128,
    on_run: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[int, int]]:
    """The number of shards before and after, of each run whose small shards were made few.

    Rows keep their values and their order; every view is the same to the last bit. A call that was
    stopped, at any moment, is finished by repeating it.

    Parameters
    ----------
    root : path of the store, in a local folder
    runs : run ids; by default every complete run
    target_mb : size up to which shards of rollouts are joined, in 2**20 bytes; what was made of the
        rollouts is joined in the same way
    on_run : called with (runs done, runs in all)

    Raises
    ------
    StoreError
        The file system cannot swap two folders in one step; nothing is changed.
    DataError
        A run whose embeddings, scores or rewards are not whole, or a damaged file.
    ConflictError
        A run is in use.
    """
    if not target_mb > 0:
        raise UsageError(f"--target-mb {target_mb}: needs more than 0")
    root = _own(root, "compact")
    chosen = [run["run_id"] for run in store.complete_runs(root, runs)]
    target = int(target_mb * (1 << 20))
    shards = _shards(root)
    for run_id in chosen:  # refusals first, before any work
        if not store.half_compacted(root, run_id):
            _groups(root, run_id, shards.get(run_id, {}), target)
    done: dict[str, tuple[int, int]] = {}
    swapped: list[tuple[float, str]] = []
    for at, run_id in enumerate(chosen, 1):
        with store.holding(root, run_id, exclusive=True, mending=True):
            if store.half_compacted(root, run_id):
                done[run_id] = _finish(root, run_id)
                swapped.append((time.monotonic(), run_id))
            else:
                _clear(store.workspace(root, run_id))
                mine = _shards(root).get(run_id, {})
                groups = _groups(root, run_id, mine, target)
                if len(groups) < sum(map(len, groups)):
                    _require_exchange(root, run_id)
                    _rewrite(root, run_id, mine, groups)
                    done[run_id] = _finish(root, run_id)
                    swapped.append((time.monotonic(), run_id))
        if on_run:
            on_run(at, len(chosen))
        while swapped and time.monotonic() - swapped[0][0] > _GRACE:
            _remove_old(root, swapped.pop(0)[1])
    for when, run_id in swapped:
        time.sleep(max(0.0, when + _GRACE - time.monotonic()))
        _remove_old(root, run_id)
    return done


# folder in the store and end of the file names: the files, by their shards' numbers
_Shards = dict[tuple[str, str], dict[int, Path]]


def _own(root: str | Path, verb: str, anywhere: bool = False) -> Path:
    """The path of a store that is no export: a local one, or anywhere."""
    root = store.require(root)
    if store.remote(root) and not anywhere:
        raise UsageError(f"{root}: {verb} needs a store in a local folder")
    if store.exists(root / MANIFEST):
        raise UsageError(
            f"{root}: an exported folder, whose {MANIFEST} names its files: merge it into "
            f"a store and {verb} there"
        )
    return root


def _shards(root: Path) -> dict[str, _Shards]:
    """Every run's shards, selections aside: they are one file a run."""
    names = [
        path.relative_to(root).as_posix()
        for table in TABLES
        if "run" in TABLES[table].partitions and table != "selections"
        for path in store.files(root, table)
    ]
    found: dict[str, _Shards] = {}
    for (run_id, where, end), files in group_files(names).items():
        numbered = {store.shard_number(target): root / name for name, target in files}
        found.setdefault(run_id, {})[where, end] = numbered
    return found


def _groups(root: Path, run_id: str, shards: _Shards, target: int) -> list[list[int]]:
    """The numbers of the rollouts' shards that become one, in order.

    Raises
    ------
    DataError
        What was made of the rollouts is there for some shards of a group only.
    """
    homes = [found for (where, _), found in shards.items() if where.startswith("rollouts/")]
    if len(homes) != 1:
        raise DataError(f"run {run_id}: its rollouts stand in {len(homes)} folders; see: canopy verify")
    groups: list[list[int]] = []
    size = 0
    for number, path in sorted(homes[0].items()):
        size += path.stat().st_size
        if not groups or size > target:
            groups.append([])
            size = path.stat().st_size
        groups[-1].append(number)
    for (where, end), found in shards.items():
        lost = sorted(found.keys() - homes[0].keys())
        if lost:
            raise DataError(f"{found[lost[0]]}: its run has no shard of that number; see: canopy verify")
        table = where.partition("/")[0]
        name = f"{where}/part-00000.{end}"
        if table == "rollouts" or not resumable(root, table, name):
            continue
        for group in groups:
            there = len(found.keys() & set(group))
            if 0 < there < len(group):
                raise DataError(
                    f"run {run_id}: {where} has {len(found)} of {len(homes[0])} shards; finish its "
                    f"ingest, or compact other runs with --run"
                )
    return groups


def _rewrite(root: Path, run_id: str, shards: _Shards, groups: list[list[int]]) -> None:
    """Writes the new folders of a run and, when all of them are on disk, the journal."""
    work = store.workspace(root, run_id)
    first = 1 + max(number for group in groups for number in group)
    folders: dict[str, list[str]] = {}
    for (where, end), found in shards.items():
        table = where.partition("/")[0]
        for at, group in enumerate(groups):
            paths = [found[number] for number in group if number in found]
            if not paths:
                continue
            name = f"part-{first + at:05d}.{end}"
            folders.setdefault(where, []).append(name)
            rows = pa.concat_tables([_read(path, table) for path in paths])
            with store.replacing(work / "new" / where / name) as file:
                store.write_parquet(rows, file)
    for place, _, _ in os.walk(work / "new"):
        store.flush(Path(place))
    store.flush(work)
    store.write_json(
        work / "journal.json",
        {
            "folders": {where: sorted(names) for where, names in folders.items()},
            "shards": [sum(map(len, groups)), len(groups)],
        },
    )


def _read(path: Path, table: str) -> pa.Table:
    """A shard's rows; damage must not be copied under fresh checksums."""
    store.check_file(path, table)
    try:
        return pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: cannot be read: {' '.join(str(error).split())[:150]}; see: canopy verify"
        ) from None


def _finish(root: Path, run_id: str) -> tuple[int, int]:
    """Swaps what the journal lists and is not swapped yet; the run's row, then the journal, go last."""
    work = store.workspace(root, run_id)
    journal = work / "journal.json"
    try:
        recorded = json.loads(journal.read_text())
        folders = {str(where): list(names) for where, names in recorded["folders"].items()}
        before, after = map(int, recorded["shards"])
        for where, names in folders.items():
            keys = path_keys(where.partition("/")[0], f"{where}/{names[0]}")
            if keys is None or keys["run"] != run_id:
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise DataError(f"{journal}: not a readable journal; take the store from a copy") from None
    with store.writing(root):
        for where, names in folders.items():
            live, fresh = root / where, work / "new" / where
            if sorted(path.name for path in live.glob("part-*.parquet")) != names:
                _exchange(fresh, live)
            store.flush(live.parent)
            store.flush(fresh.parent)
    path = root / "runs" / f"{store.quoted(run_id)}.parquet"
    row = store.read_rows(path).to_pylist()[0]
    store.write_rows(path, "runs", {key: [value] for key, value in {**row, "n_shards": after}.items()})
    with store.writing(root):
        journal.unlink()
        store.flush(work)
    return before, after


def _remove_old(root: Path, run_id: str) -> None:
    try:
        with store.holding(root, run_id, exclusive=True):
            _clear(store.workspace(root, run_id))
    except CanopyError:
        pass  # a job has begun on the run; the next compaction clears it


def _clear(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        with store.writing(folder):
            shutil.rmtree(folder)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders' names in one step, so that either name always leads to a whole folder."""
    library = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        failed = library.renamex_np(a, b, 2)  # RENAME_SWAP
    else:
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        failed = library.renameat2(here, a, here, b, exchange)
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _require_exchange(root: Path, run_id: str) -> None:
    """Raises StoreError where folders of the store cannot be swapped."""
    work = store.workspace(root, run_id)
    one, other = work / "one", work / "other"
    with store.writing(root):
        one.mkdir(parents=True)
        other.mkdir()
    try:
        _exchange(one, other)
        tables = [path for path in (root / table for table in TABLES) if path.exists()]
        if any(path.stat().st_dev != work.stat().st_dev for path in tables):
            raise OSError(0, "its tables stand on several file systems")
    except (OSError, AttributeError) as error:
        _clear(work)
        why = error.strerror if isinstance(error, OSError) else "no such call here"
        raise StoreError(
            f"{root}: two folders cannot be swapped in one step ({why}), so nothing is compacted; copy "
            "the store to a file system that can, as ext4, xfs, btrfs or APFS"
        ) from None


# ---------------------------------------------------------------- remove

# What was made of the rollouts goes before them, and so that each stage is a store that is well.
_REMOVED = ("embeddings", "embedding_spectra", "selections", "rewards", "scores", "rollouts")


def remove_run(root: str | Path, run_id: str) -> int:
    """How many files of a run were removed: its row in runs first, its plan last.

    Its folders leave the store one by one, each in one step; a removal that was stopped leaves an
    incomplete run, which no view shows, and is finished by calling it again. Models, prompts and the
    rules of selections stay: other runs may need them.

    Raises
    ------
    StoreError
        No run of this name, complete or begun.
    ConflictError
        The run is in use.
    """
    root = _own(root, "rm-run", anywhere=True)
    require_run(root, run_id)
    with store.holding(root, run_id, exclusive=True, mending=True):
        row = root / "runs" / f"{store.quoted(run_id)}.parquet"
        plan = store.plan_path(root, "run", run_id)
        count = 0
        with store.writing(root):
            for path in (row, *_folders(root, run_id)):
                if path.is_dir():
                    count += sum(1 for file in path.rglob("*") if file.is_file())
                    _take_away(root, run_id, path)
                elif path.exists():
                    count += 1
                    path.unlink()
            place = store.workspace(root, run_id)
            if not store.remote(root):
                _clear(place)
            if plan.exists():
                count += 1
                plan.unlink()
            if not store.remote(root):
                place.with_name(f"{place.name}.lock").unlink(missing_ok=True)
    sql.write_database(root)
    return count


def require_run(root: Path, run_id: str) -> None:
    """Raises StoreError where nothing of a run is stored."""
    row = root / "runs" / f"{store.quoted(run_id)}.parquet"
    some = row.exists() or store.plan_path(root, "run", run_id).exists()
    if not some and not _folders(root, run_id):
        raise StoreError(f"{run_id}: no run of this name; see: canopy status --store {root}")


def _folders(root: Path, run_id: str) -> list[Path]:
    """The folders of a run's files, in the order in which they go."""
    name = re.sub(r"([*?\[])", r"[\1]", f"run={store.quoted(run_id)}")
    found = []
    for table in _REMOVED:
        stars = "*/" * (len(TABLES[table].partitions) - 1)
        found += sorted((root / table).glob(f"{stars}{name}"))
    return found


def _take_away(root: Path, run_id: str, path: Path) -> None:
    """Removes a folder: on a file system, first from where readers look, in one step."""
    if store.remote(root):
        for file in sorted(path.rglob("*")):
            if file.is_file():
                file.unlink()
        return
    work = store.workspace(root, run_id)
    work.mkdir(parents=True, exist_ok=True)
    os.rename(path, tempfile.mkdtemp(prefix="removed-", dir=work))
    for folder in path.parents:
        if folder.parent == root or any(folder.iterdir()):
            break
        folder.rmdir()
