"""The store itself, its checkpoints, prompts and runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from canopy_store.errors import ConflictError, StoreError, differences
from canopy_store.schema import FORMAT_VERSION, TABLES, added_columns, view_columns
from canopy_store.store import format1, work
from canopy_store.store.commits import (
    Record,
    check_folders,
    commit,
    files,
    orphans,
    record,
    records,
    remove_record,
    uncommitted,
)
from canopy_store.store.files import create_json, exists, locate, matching, reaching, remote, writing
from canopy_store.store.layout import commit_path, content_id, folder, now, plan_path, shard_path
from canopy_store.store.parquet import read_rows, write_rows
from canopy_store.store.plans import plans, read_plan, require_own_name

# ---------------------------------------------------------------- the store


def init(root: str | Path) -> Path:
    """The path of the store at ``root``, to be written to; made if it is missing, a bucket never.

    Raises
    ------
    StoreError
        As `place`.
    """
    root, there = _placed(root)
    if there:
        return root
    if not remote(root):
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
    create_json(root / "canopy.json", {"format": "canopy_store", "version": FORMAT_VERSION})
    return root


def place(root: str | Path) -> Path:
    """The path of a store to be written to, or of where `init` may make one; makes nothing.

    Raises
    ------
    StoreError
        A folder of something else, one that cannot be written, or a store of another format.
    """
    return _placed(root)[0]


def _placed(root: str | Path) -> tuple[Path, bool]:
    """As `place`, and whether the store is there; each question is a request on object storage."""
    root = locate(root)
    if exists(root / "canopy.json"):
        return writable(root), True
    with reaching(root):
        foreign = root.is_file() or (root.is_dir() and any(p.suffix != ".tmp" for p in root.iterdir()))
        if foreign and not exists(root / "canopy.json"):  # or another job has made it meanwhile
            raise StoreError(f"{root}: not a store and not an empty folder; choose another --store")
    if not remote(root):
        above = next(folder for folder in [root, *root.absolute().parents] if folder.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise StoreError(f"{root}: {above} is no folder to write in; choose another --store")
    return root, False


def require(root: str | Path) -> Path:
    """The path of an existing store, to be read, after a check of its format version.

    Raises
    ------
    StoreError
        Not a store, one written by a newer version of this package, or one whose files are of another
        format than it says.
    """
    root = locate(root)
    if not exists(root / "canopy.json"):
        raise StoreError(f"{root}: no store here; make one with: canopy init --store {root}")
    version = format1.version(root)
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{root}: format version {version}, this package reads up to {FORMAT_VERSION}; "
            "upgrade it: pip install -U canopy-store"
        )
    if version < 1:
        raise StoreError(f"{root / 'canopy.json'}: version {version} is none; take it from a copy")
    if not remote(root):  # where each look is a request, who finds no record looks
        format1.require_layout(root, version)
    return root


def writable(root: str | Path) -> Path:
    """The path of an existing store, to be written to.

    Raises
    ------
    StoreError
        As `require`; or a store of format 1, which is read only until it is upgraded.
    """
    root = require(root)
    if format1.is_old(root):
        raise StoreError(
            f"{root}: a store of format 1, which is only read; upgrade it: canopy upgrade --store {root}"
        )
    if not remote(root):
        check_folders(root, writing=True)
    return root


# ---------------------------------------------------------------- models, prompts


def add_model(root: Path, row: Mapping[str, Any]) -> str:
    """The id of the checkpoint ``row`` describes, stored if it is new.

    Raises
    ------
    ConflictError
        The same family and variant are stored with other weights, parent or treatment.
    """
    model_id = f"{row['family']}/{row['variant']}"
    keys = {key: row[key] for key in TABLES["models"].commit}
    given = {k: v for k, v in row.items() if v is not None}
    mine = record(root, "models", **keys)
    if mine is not None and not all(exists(root / name) for name in mine.files):
        remove_record(root, mine)  # its row is lost, and written again
    stored = models(root)
    if model_id in stored:
        # what is not given again is not in conflict: an ingest need not repeat the parent
        later = [k for k in added_columns("models") if stored[model_id][k] is None]
        checked = {k: v for k, v in given.items() if k not in ("source", *later)}
        if any(stored[model_id][k] != v for k, v in checked.items()):
            was = {k: stored[model_id][k] for k in checked}
            raise ConflictError(
                f"model {model_id} is stored with other settings: {differences(was, checked)}; "
                "give another --variant"
            )
        return model_id
    require_own_name("model", model_id, stored)
    new = {
        "treatment": row.get("series") or row["variant"],
        "generation": 0,
        "parent_id": None,
        **given,
        "model_id": model_id,
    }
    if new["parent_id"]:
        parent = stored.get(new["parent_id"], {"generation": 0})
        new["generation"] = given.get("generation") or 1 + parent["generation"]
    commit_rows(root, "models", [new])
    return model_id


def models(root: Path) -> dict[str, dict[str, Any]]:
    """The row of every checkpoint, by model_id."""
    return {row["model_id"]: row for _, row in table_rows(root, "models")}


def add_prompts(root: Path, task: str, prompts: Iterable[Mapping[str, Any]]) -> list[Path]:
    """The file that holds a task's prompts; it is named after its content, so again is once."""
    rows = sorted(prompts, key=lambda row: row["prompt_id"])
    columns = {c.name: [row.get(c.name) for row in rows] for c in TABLES["prompts"].columns}
    path = folder(root, "prompts", task=task) / f"{content_id(columns)}.parquet"
    if rows and not exists(path):
        write_rows(path, "prompts", columns)
    return [path] if rows else []


def table_rows(root: Path, table: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each row of a small table, with its file; a column that the file lacks is NULL."""
    lacking = dict.fromkeys(added_columns(table))
    for path in files(root, table):
        for row in read_rows(path).to_pylist():
            yield path, {**lacking, **row}


def commit_rows(root: Path, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Stores rows of a small table, all of one commit, in one file; a column not given is NULL."""
    keys = {key: rows[0][key] for key in TABLES[table].commit}
    path = shard_path(folder(root, table, **keys), 0)
    columns = [column.name for column in view_columns(table)]
    write_rows(path, table, {name: [row.get(name) for row in rows] for name in columns})
    commit(root, table, keys, [path], {})


# ---------------------------------------------------------------- runs


def is_complete(root: Path, run_id: str) -> bool:
    """Whether the run is committed."""
    if format1.is_old(root):
        return record(root, "rollouts", run=run_id) is not None
    return exists(commit_path(root, "rollouts", {"run": run_id}))


def complete_run(
    root: Path,
    shards: list[Path],
    row: Mapping[str, Any],
    settings: Mapping[str, Any],
    prompts: list[Path],
    sampled: list[Path] | None = None,
) -> Record:
    """The record of a run, whose ingest ends with it; counts come from its shards.

    Parameters
    ----------
    root : path of the store
    shards : all of its rollouts' files
    row : what the table ``runs`` says of it, the counts aside
    settings : those of its plan
    prompts : files of its prompts
    sampled : the shards that were sampled, where those of its rollouts were made of them
    """
    run_id = row["run_id"]
    sampled = shards if sampled is None else sampled
    rollouts = tokens = 0
    logged = True
    counts: dict[str, int] = {}
    for shard in shards:
        part = read_rows(shard, ["prompt_id", "n_tokens", "entropy_sum", "surprisal_sum"])
        rollouts += part.num_rows
        logged &= not (part["entropy_sum"].null_count or part["surprisal_sum"].null_count)
        tokens += sum(part["n_tokens"].to_pylist())
        for prompt in part["prompt_id"].to_pylist():
            counts[prompt] = counts.get(prompt, 0) + 1
    noted, total = work.gather(root, "rollouts", run_id, run_id, sampled)
    counted = {
        "n_rollouts": rollouts,
        "n_tokens": tokens,
        "n_prompts": len(counts),
        "n_samples": max(counts.values(), default=0),
        "n_shards": len(shards),
        "logged": logged,
        "finished_at": now(),
        "started_at": read_plan(plan_path(root, "run", run_id))["started_at"],
        "wall_s": total["seconds"],
        "energy_j": total["energy_j"],
        "energy_method": total["energy_method"],
    }
    path = shard_path(folder(root, "runs", run=run_id), 0)
    write_rows(path, "runs", {key: [value] for key, value in {**row, **counted}.items()})
    model = record(root, "models", family=row["family"], variant=row["variant"])
    if model is None:
        raise StoreError(f"run {run_id}: its checkpoint is gone from models; run its ingest again")
    done = commit(root, "rollouts", {"run": run_id}, [*shards, path, *prompts, *noted], settings)
    work.forget(root, sampled)
    return done


def run_row(root: Path, done: Record) -> dict[str, Any]:
    """The row in ``runs`` of a committed run."""
    return read_rows(root / done.of("runs")[0]).to_pylist()[0]


def runs(root: Path) -> list[dict[str, Any]]:
    """Every run begun, in name order: its plan's settings; complete, record, where, shards."""
    done = {each.run: each for each in records(root, "rollouts")}
    begun = []
    for _, path in plans(root, "run"):
        settings = read_plan(path)["settings"]
        names = {key: settings[key] for key in ("family", "variant", "task")}
        where = folder(root, "rollouts", run=settings["run_id"], **names)
        of_run = done.get(settings["run_id"])
        shards = (
            matching(where, "part-*.parquet")
            if of_run is None
            else [root / name for name in of_run.of("rollouts")]
        )
        begun.append(
            {
                **settings,
                "complete": of_run is not None,
                "where": where,
                "shards": shards,
                "record": of_run,
            }
        )
    return begun


def complete_runs(root: Path, wanted: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The complete runs, as `runs` gives them; only those wanted, where any is named.

    Raises
    ------
    StoreError
        One that is wanted is not there or not complete.
    """
    complete = {run["run_id"]: run for run in runs(root) if run["complete"]}
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    for run_id in wanted:
        if run_id not in complete:
            raise StoreError(f"--run {run_id}: no complete run of this name; see: canopy status")
    return [complete[run_id] for run_id in wanted] if wanted else list(complete.values())


def forget_unfinished(root: Path, run_id: str, engine: str) -> None:
    """Removes a run that this engine began and never completed, files first and its plan last.

    For imports, which cost nothing to repeat: a refused file must not stand in a mended one's way.
    """
    path = plan_path(root, "run", run_id)
    if not exists(path) or is_complete(root, run_id):
        return
    if read_plan(path)["settings"]["engine"] != engine:
        return
    for old in orphans(root):
        if old.run == run_id:
            remove_record(root, old)
    for file in uncommitted(root, run_id):
        file.unlink()
    path.unlink()
