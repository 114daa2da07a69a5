"""One store's runs into another: nothing overwritten, the same run twice is one.

Conflicts are looked for before anything is written. Then run after run is copied, its row in runs last:
what is stopped half way stays hidden, and the same call finishes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from canopy_store import sql, store
from canopy_store.errors import ConflictError, DataError, StoreError, UsageError, differences
from canopy_store.schema import TABLES
from canopy_store.sharing.untrusted import check_source, read_store, require_sound
from canopy_store.upkeep.verify import MANIFEST, path_keys

# What an export may leave out of a table; without it every measure stays computable.
TEXTS = {"rollouts": ("text", "token_ids", "top_token_ids"), "prompts": ("text", "messages")}
# Of a run, what may differ between two ingests that gave the same rollouts.
_VOLATILE = ("started_at", "finished_at", "wall_s", "energy_j", "energy_method", "versions", "n_shards")
# (run, folder in the store, end of the file names): each file's name in the source and its place
Groups = dict[tuple[str, str, str], list[tuple[str, Path]]]
Entries = Mapping[str, Mapping[str, Any]]
# The jobs that fill a derived table, and can go on with one that is not whole.
_PLANS = {
    "embeddings": "embedder",
    "embedding_spectra": "embedder",
    "scores": "scorer",
    "rewards": "reward_model",
}


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
    checked = []
    for folder in folders:
        if not folder.is_dir():
            raise StoreError(f"{folder}: no such folder")
        if not store.remote(there) and folder.resolve() == there.resolve():
            raise UsageError(f"{folder}: the store itself; name another one to take in")
        own = (folder / MANIFEST).exists()
        entries = check_source(folder) if own else read_store(folder)
        require_sound(folder, trusted=False)
        runs = [row for _, row in store.table_rows(folder, "runs")]
        if not runs:
            raise DataError(f"{folder}: no complete run in it; see: canopy status --store {folder}")
        if store.exists(there / "canopy.json"):
            check_conflicts(folder, store.require(there), runs, group_files(entries), entries)
        checked.append((folder, entries, () if own else tuple(run["run_id"] for run in runs)))
    found: set[str] = set()
    for folder, entries, held in checked:
        with store.holding(folder, *held):
            found.update(merge_folder(folder, there, entries, on_run))
    return sorted(found)


def merge_folder(
    folder: Path,
    root: str | Path,
    entries: Entries,
    on_run: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The ids of the complete runs of a checked folder, now in the store, which is made if missing.

    Parameters
    ----------
    folder : a store or an exported folder that `untrusted` found nothing wrong with
    root : path of the store
    entries : the folder's files as a MANIFEST has them; no other is read
    on_run : called with (runs done, runs in all)

    Raises
    ------
    ConflictError
        Something of the same name is stored with other values, or a run is in use; nothing is changed.
    """
    runs = [row for _, row in store.table_rows(folder, "runs")]
    groups = group_files(entries)
    root = store.init(root)
    with store.holding(root, *(run["run_id"] for run in runs), exclusive=True):
        check_conflicts(folder, root, runs, groups, entries)
        for place in (root, root / "plans", root / "models", root / "runs"):
            store.remove_leftovers(place)  # of a merge that was killed
        models = store.table_rows(folder, "models")
        for _, model in sorted(models, key=lambda found: found[1]["generation"]):
            store.add_model(root, model)
        _add_prompts(folder, root)
        for name in sorted(n for n in entries if n.startswith("plans/")):
            if not name.startswith("plans/run=") and not (root / name).exists():
                store.copy_file(folder / name, root / name, entries[name]["sha256"])
        for done, run in enumerate(runs, 1):
            _merge_run(folder, root, run, groups, entries)
            if on_run:
                on_run(done, len(runs))
    sql.write_database(root)
    return sorted(run["run_id"] for run in runs)


def group_files(names: Iterable[str]) -> Groups:
    """The files of runs, those together that hold one thing: a table's shards of a run.

    Scores under several policies share a folder; the policy is in their names' ends.
    """
    found: Groups = {}
    for name in sorted(names):
        table = name.partition("/")[0]
        keys = path_keys(table, name) if table in TABLES else None
        if keys and "run" in keys:
            # the target is built from the values, never from the path that was given
            where, last = store.folder(Path(), table, **keys), Path(name).name
            group = (keys["run"], str(where), last.partition(".")[2])
            found.setdefault(group, []).append((name, where / last))
    return found


def resumable(root: Path, table: str, name: str) -> bool:
    """Whether the shards that this table's file belongs to come from a job that can go on."""
    keys = path_keys(table, name) or {}
    kind = _PLANS.get(table, "")
    value = keys.get(kind) or keys.get(f"{kind}_id") or ""
    return bool(kind) and store.plan_path(root, kind, value).exists()


# ---------------------------------------------------------------- conflicts


def check_conflicts(
    folder: Path, root: Path, runs: list[dict[str, Any]], groups: Groups, entries: Entries
) -> None:
    """Raises ConflictError where a name that is stored means something else in the folder."""
    for name in sorted(n for n in entries if n.startswith("plans/")):
        path, target = folder / name, root / name
        if target.exists():
            kind, _, value = path.stem.partition("=")
            _same(
                f"{kind} {store.unquoted(value)}",
                *(store.read_plan(p)["settings"] for p in (target, path)),
            )
    models = {row["model_id"]: row for _, row in store.table_rows(root, "models")}
    for _, row in store.table_rows(folder, "models"):
        said = {k: v for k, v in row.items() if v is not None and k != "source"}
        known = models.get(row["model_id"], said)
        _same(f"model {row['model_id']}", {k: known[k] for k in said}, said)
    texts: dict[tuple[str, str], dict[str, Any]] = {}
    for task, row in _prompts(root):  # the same prompt may stand in several files
        known = texts.setdefault((task, row["prompt_id"]), dict(row))
        known.update({c: row[c] for c in TEXTS["prompts"] if row[c] is not None})
    for task, row in _prompts(folder):
        known = texts.get((task, row["prompt_id"]), row)
        both = [c for c in TEXTS["prompts"] if known[c] is not None and row[c] is not None]
        _same(f"prompt {row['prompt_id']}", *({c: r[c] for c in both} for r in (known, row)))
    for run in runs:
        complete = store.is_complete(root, run["run_id"])
        if complete:
            stored = store.read_rows(_run_row(root, run["run_id"])).to_pylist()[0]
            _same(
                f"run {run['run_id']}",
                *({k: v for k, v in row.items() if k not in _VOLATILE} for row in (stored, run)),
            )
        mine = {group: files for group, files in groups.items() if group[0] == run["run_id"]}
        for (_, where, end), files in mine.items():
            _check_group(folder, root / where, end, files, entries, complete)
        numbers, cut = _cut(folder, root, mine, entries)
        for (_, where, _), files in mine.items() if cut else ():
            table = files[0][0].partition("/")[0]
            whole = [store.shard_number(target) for _, target in files] == numbers
            if table in _PLANS and not whole and resumable(folder, table, files[0][0]):
                raise ConflictError(
                    f"{folder / where}: has part of the run only, and the run stands in "
                    "other shards here; finish its ingest there first"
                )


def _same(what: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if stored != asked:
        raise ConflictError(
            f"{what} is stored with other values: {differences(stored, asked)[:400]}; nothing was "
            "taken: use another store, or remove what is here first"
        )


def _prompts(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, row in store.table_rows(root, "prompts"):
        yield store.unquoted(path.parent.name.removeprefix("task=")), row


def _run_row(root: Path, run_id: str) -> Path:
    return root / "runs" / f"{store.quoted(run_id)}.parquet"


def _copied(stored: list[Path], files: list[tuple[str, Path]], entries: Entries) -> bool:
    """Whether what is stored is some of these files and no other: a merge that was stopped, or done."""
    known = {target.name: entries[name]["sha256"] for name, target in files}
    return all(known.get(path.name) == store.sha256(path) for path in stored)


def _check_group(
    folder: Path, where: Path, end: str, files: list[tuple[str, Path]], entries: Entries, complete: bool
) -> None:
    """Raises ConflictError where the store's folder ``where`` holds other rows than the source's."""
    stored = sorted(where.glob(f"*.{end}"))
    if _copied(stored, files, entries):
        return
    if not complete:
        raise ConflictError(
            f"{where}: its run is begun here and not complete; finish it, or remove it: canopy rm-run"
        )
    table = files[0][0].partition("/")[0]
    here, there = _comparable(stored, table), _comparable([folder / name for name, _ in files], table)
    keys = [key for key in TABLES[table].keys if key in here.columns]
    mine, theirs = here.join(there, on=keys, how="semi"), there.join(here, on=keys, how="semi")
    # a run's rollouts and a selection are sets; of what is derived, either side may have more
    if table in ("rollouts", "selections") and not len(mine) == len(here) == len(there):
        what = f"{len(here)} rows here, {len(there)} in {folder}, {len(mine)} of them the same"
    else:
        names = [c for c in here.columns if not _agree(mine[c], theirs[c], c in TEXTS.get(table, ()))]
        if not names:
            return
        what = f"other values of {', '.join(names)}"
    raise ConflictError(
        f"{where}: {what}; nothing was taken: use another store, or remove what is here first"
    )


def _agree(one: pl.Series, other: pl.Series, text: bool) -> bool:
    """Whether two columns say the same; one that a side leaves out says nothing."""
    if len(one) in (one.null_count(), other.null_count()):
        return True
    both = one.is_not_null() & other.is_not_null()
    return one.filter(both).equals(other.filter(both)) if text else one.equals(other)


def _comparable(paths: list[Path], table: str) -> pl.DataFrame:
    """The rows in key order, of what says whether two are the same: sums stand for their arrays."""
    lists = {c.name for c in TABLES[table].columns if c.type.endswith("[]")} - {"embedding", "samples"}
    keys = [key for key in TABLES[table].keys if any(c.name == key for c in TABLES[table].columns)]
    names = [c.name for c in TABLES[table].columns if c.name not in lists]
    frames = [pl.DataFrame(store.read_rows(path, names)) for path in paths]
    return pl.concat(frames).sort(keys)


# ---------------------------------------------------------------- what is copied


def _add_prompts(folder: Path, root: Path) -> None:
    """Adds the prompts that the store lacks, and the texts of those it has without."""
    theirs = {(task, row["prompt_id"]): row for task, row in _prompts(folder)}
    for path in store.files(root, "prompts"):
        task = store.unquoted(path.parent.name.removeprefix("task="))
        rows = store.read_rows(path).to_pylist()
        filled = [
            {
                **row,
                **{
                    c: theirs.get((task, row["prompt_id"]), row)[c]
                    for c in TEXTS["prompts"]
                    if row[c] is None
                },
            }
            for row in rows
        ]
        if filled != rows:
            store.add_prompts(root, task, filled)
            path.unlink()
    known = {(task, row["prompt_id"]) for task, row in _prompts(root)}
    new: dict[str, list[dict[str, Any]]] = {}
    for (task, prompt_id), row in theirs.items():
        if (task, prompt_id) not in known:
            new.setdefault(task, []).append(row)
    for task, added in new.items():
        store.add_prompts(root, task, added)


def _merge_run(
    folder: Path, root: Path, run: Mapping[str, Any], groups: Groups, entries: Entries
) -> None:
    """Copies what the store lacks of a run: plan, rollouts, the rest, and last the row in runs."""
    plan = f"{store.plan_path(Path(), 'run', run['run_id'])}"
    if not (root / plan).exists():
        store.copy_file(folder / plan, root / plan, entries[plan]["sha256"])
    mine = {group: files for group, files in groups.items() if group[0] == run["run_id"]}
    numbers, cut = _cut(folder, root, mine, entries)
    # embeddings before spectra: a shard that has its spectra is done
    order = ["rollouts", *(table for table in TABLES if table != "rollouts")]
    for (_, where, end), files in sorted(
        mine.items(), key=lambda found: order.index(found[1][0][0].partition("/")[0])
    ):
        table = files[0][0].partition("/")[0]
        stored = sorted((root / where).glob(f"*.{end}"))
        store.remove_leftovers(root / where)
        if table == "rollouts" and not _copied(stored, files, entries):
            _fill_texts(stored, [folder / name for name, _ in files])
        elif table in _PLANS and cut:
            whole = [store.shard_number(target) for _, target in files] == numbers
            _regroup([folder / name for name, _ in files], table, cut, root / where, end, whole)
        else:
            for name, target in files:
                if not (root / target).exists():
                    store.copy_file(folder / name, root / target, entries[name]["sha256"])
    row = f"{_run_row(Path(), run['run_id'])}"
    if not (root / row).exists():
        store.copy_file(folder / row, root / row, entries[row]["sha256"])


def _keys(rows: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[name].to_pylist() for name in names), strict=True))


def _cut(folder: Path, root: Path, groups: Groups, entries: Entries) -> tuple[list[int], list[Path]]:
    """The numbers of a run's shards in the source; and its shards here, where they hold others' rows.

    Compaction cuts a run anew, so that shards of one name need not be the same.
    """
    for (_, where, end), files in groups.items():
        if files[0][0].startswith("rollouts/"):
            numbers = [store.shard_number(target) for _, target in files]
            stored = sorted((root / where).glob(f"*.{end}"))
            if _copied(stored, files, entries):
                return numbers, []
            keys = ["prompt_id", "sample"]
            same = [path.name for path in stored] == [target.name for _, target in files] and all(
                store.read_rows(path, keys).equals(store.read_rows(folder / name, keys))
                for path, (name, _) in zip(stored, files, strict=True)
            )
            return numbers, [] if same else stored
    return [], []


def _fill_texts(stored: list[Path], source: list[Path]) -> None:
    """Gives rollouts stored without texts those of the source, a shard at once.

    Both agree in all they share, as the conflicts' check has shown.
    """
    names = TEXTS["rollouts"]
    given: pa.Table | None = None
    for path in stored:
        rows = store.read_rows(path)
        lacking = [name for name in names if rows[name].null_count == len(rows)]
        if lacking and given is None:
            parts = [store.read_rows(p, ["prompt_id", "sample", *names]) for p in source]
            given = pa.concat_tables(parts)
            place = {key: at for at, key in enumerate(_keys(given, "prompt_id", "sample"))}
        lacking = [n for n in lacking if given is not None and given[n].null_count < len(given)]
        if not lacking or given is None:
            continue
        at = pa.array([place[key] for key in _keys(rows, "prompt_id", "sample")], pa.int64())
        for name in lacking:
            index = rows.schema.get_field_index(name)
            rows = rows.set_column(index, rows.schema.field(name), given[name].take(at))
        with store.replacing(path) as file:
            store.write_parquet(rows, file)


def _regroup(
    source: list[Path], table: str, shards: list[Path], where: Path, end: str, whole: bool
) -> None:
    """Writes a derived table's rows in the shards that the run's rollouts stand in here."""
    names = ("prompt_id",) if table == "embedding_spectra" else ("prompt_id", "sample")
    rows = pa.concat_tables([store.read_rows(path) for path in source])
    place = {key: at for at, key in enumerate(_keys(rows, *names))}
    for shard in shards:
        target = where / f"{shard.name.partition('.')[0]}.{end}"
        keys = dict.fromkeys(_keys(store.read_rows(shard, list(names)), *names))
        at = pa.array([place[key] for key in keys if key in place], pa.int64())
        if (whole or len(at)) and not target.exists():
            with store.replacing(target) as file:
                store.write_parquet(rows.take(at), file)
