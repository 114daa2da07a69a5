"""Stores that travel: exported as a dataset that anyone can load, pulled with nothing taken on trust.

    OUT/README.md       the dataset card: a Hugging Face dataset as it stands, one config a table
    OUT/MANIFEST        JSON: sha256, bytes and rows of every file
    OUT/croissant.json  the same tables for Croissant readers
    OUT/views.sql       every view on relative paths; OUT/canopy.duckdb holds them ready
    OUT/canopy.json, commits, plans, models, prompts, runs, rollouts, …    the store itself

A pull reads JSON and Parquet only, and nothing that the MANIFEST does not name.
"""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb

from canopy_store import sql, store
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.schema import REGISTERS, TABLES
from canopy_store.sharing.dataset_card import describe
from canopy_store.sharing.merge import merge_source
from canopy_store.sharing.untrusted import check_source, checked_source, require_sound
from canopy_store.store import Record
from canopy_store.upkeep.verify import MANIFEST

# Without these a folder is no store: what stands for itself, less what a job took.
_ALWAYS = {table.name for table in TABLES.values() if table.parent is None} - {"work"}


# ---------------------------------------------------------------- export


def export(
    root: str | Path,
    out: str | Path,
    *,
    tables: Iterable[str] | None = None,
    where: str | None = None,
    text: bool = True,
    embeddings: bool = True,
    license: str | None = None,
) -> Path:
    """The path of a new folder that is a store, a Hugging Face dataset and a Croissant dataset.

    Only complete runs travel, with their models and prompts. The folder appears whole, after
    `verify` found nothing wrong in it, or not at all.

    Parameters
    ----------
    root : path of the store
    out : the new folder; must not exist, or be empty
    tables : tables to take along besides models, prompts, runs and rollouts [default: all]
    where : an SQL condition on the table runs, as in ``family = 'llama' and task = 'math'``
    text : False leaves out prompts' and rollouts' texts, token_ids, top_token_ids and token_chars; every
        measure stays computable
    embeddings : False leaves out the embeddings and keeps their spectra; of the measures only
        length_terciles' semantic_diversity goes
    license : identifier of the rollouts' licence, as in apache-2.0

    Raises
    ------
    UsageError
        An unknown table, a condition that is not SQL, a folder that is not empty.
    DataError
        No run fits, or verify finds a problem.
    """
    root, out = store.writable(root), Path(out).absolute()
    root = root if store.remote(root) else root.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: is there and not empty; choose another folder")
    if root == out.resolve() or root in out.resolve().parents:
        raise UsageError(f"{out}: inside the store; choose a folder outside it")
    if license is not None and not (license.isascii() and license.isprintable() and license):
        raise UsageError(f"--license {license!r}: needs an identifier, as in apache-2.0")
    wanted = _tables(tables, embeddings)
    runs = _chosen(root, where)
    with _scratch(out) as scratch:
        _fill(root, scratch, runs, wanted, text, others=where is None)
        sql.write_database(scratch)
        shutil.rmtree(scratch / ".work", ignore_errors=True)  # locks, which nobody has there
        describe(scratch, out.name, text, license)
        require_sound(scratch)
        with store.writing(out):
            os.replace(scratch, out)
    return out


def _tables(tables: Iterable[str] | None, embeddings: bool) -> set[str]:
    wanted = set(TABLES if tables is None else tables)
    unknown = sorted(wanted - set(TABLES))
    if unknown:
        raise UsageError(f"no table {unknown[0]!r}: there are {', '.join(TABLES)}")
    if "embeddings" in wanted:
        wanted.add("embedding_spectra")  # what makes the embeddings' measures
    if not embeddings:
        wanted.discard("embeddings")
    return wanted | _ALWAYS


def _chosen(root: Path, where: str | None) -> list[dict[str, Any]]:
    query = f"select * from runs where ({where or 'true'}) order by run_id"
    with sql.connect(root, relations=sql.named(query)) as con:
        try:
            chosen = con.sql(query).pl()
        except (duckdb.Error, UsageError) as error:
            said = sql.explain(error) if isinstance(error, duckdb.Error) else error
            raise UsageError(f"--where {where}: {said}") from None
    others = where is None and any(record.kind not in REGISTERS for record in store.records(root))
    if chosen.is_empty() and not others:
        raise DataError(f"{root}: no complete run" + (f" where {where}" if where else " to export"))
    return chosen.to_dicts()


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, locked until the block ends; those of killed exports are removed."""
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.exporting"):
        try:
            left = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or no folder
        try:
            if store.lock(left):
                shutil.rmtree(old, ignore_errors=True)
        finally:
            os.close(left)
    with store.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        while True:
            scratch = out.with_name(f".{out.name}.{secrets.token_hex(4)}.exporting")
            scratch.mkdir()
            held = os.open(scratch, os.O_RDONLY)
            store.lock(held)
            if scratch.exists():  # not tidied up by another export between the two steps
                break
            os.close(held)
    try:
        yield scratch
    finally:
        os.close(held)
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(
    root: Path, out: Path, runs: list[dict[str, Any]], tables: set[str], text: bool, others: bool
) -> None:
    """Copies the runs, one after the other, their models, and what says that the folder is a store.

    ``others`` also copies what jobs were over that is no run: items, documents.
    """
    store.copy_file(root / "canopy.json", out / "canopy.json")
    every = store.records(root)
    of: dict[tuple[str, str], list[Record]] = {("run", run["run_id"]): [] for run in runs}
    for record in every:
        if others and record.kind not in REGISTERS and record.run is None:
            of.setdefault(record.subject, [])
        if record.subject in of:
            of[record.subject].append(record)
    for (key, name), records in of.items():
        with store.holding(root, name, key=key):
            for old in records:
                # as it is now: it may have been compacted since it was listed
                now = store.record(root, old.kind, **old.keys)
                if now is None:
                    raise DataError(f"{root}: {key} {name} was removed meanwhile; run it again")
                _copy_record(root, out, now, tables, text)
    taken = [record for records in of.values() for record in records]
    needed = {run["model_id"] for run in runs} | _copy_scorers(root, out, taken, every, tables, text)
    checkpoints = {"/".join(r.keys.values()): r for r in every if r.kind == "models"}
    parents = {row["model_id"]: row["parent_id"] for _, row in store.table_rows(root, "models")}
    while needed:
        model_id = needed.pop()
        model = checkpoints.pop(model_id, None)
        if model is not None:
            _copy_record(root, out, model, tables, text)
            needed |= {parents[model_id]} - {None}  # ancestors, as far as they are known


def _copy_scorers(
    root: Path, out: Path, taken: list[Record], every: list[Record], tables: set[str], text: bool
) -> set[str]:
    """The ids of the checkpoints of the scorers that these records refer to, which are copied."""
    named = {r.keys["scorer_id"] for r in taken if "scorers" in TABLES[r.kind].refers}
    needed = set()
    for record in every:
        if record.kind == "scorers" and record.keys["scorer_id"] in named:
            _copy_record(root, out, record, tables, text)
            for name in record.of("scorers"):
                needed.update(store.read_rows(root / name, ["model_id"])["model_id"].to_pylist())
    return needed


def _copy_record(root: Path, out: Path, record: Record, tables: set[str], text: bool) -> None:
    """Copies a record with its files and its plan; nothing where all that it is of stays at home."""
    if "selection" in record.keys and "selections" not in tables:
        return
    taken = [name for name in record.files if name.partition("/")[0] in tables]
    if not any(TABLES[name.partition("/")[0]].commit for name in taken):
        return
    asked: set[str] = set()
    for name in record.of("rollouts"):
        asked.update(store.read_rows(root / name, ["prompt_id"])["prompt_id"].unique().to_pylist())
    files: dict[str, Any] = {}
    for name in taken:
        table = name.partition("/")[0]
        said = record.files[name]
        if table == "prompts":
            files |= _copy_prompts(root, out, name, said, asked, text)
        elif text or not TABLES[table].texts:
            store.copy_file(root / name, out / name, said["sha256"])
            files[name] = said
        else:
            rows = store.read_rows(root / name)
            kept = {n: rows[n] for n in rows.column_names if n not in TABLES[table].texts}
            store.write_rows(out / name, table, kept)
            files[name] = store.entry(out / name)
    plan = record.plan
    if plan is not None and store.exists(store.plan_path(root, *plan)):
        store.copy_file(store.plan_path(root, *plan), store.plan_path(out, *plan))
    store.write_record(out, replace(record, files=dict(sorted(files.items()))))


def _copy_prompts(
    root: Path, out: Path, name: str, said: Mapping[str, Any], asked: set[str], text: bool
) -> dict[str, Any]:
    """Copies the prompts asked for, a file needed whole as it is; the entry of what came of it."""
    rows = store.read_rows(root / name).to_pylist()
    kept = [row for row in rows if row["prompt_id"] in asked]
    if text and len(kept) == len(rows):
        store.copy_file(root / name, out / name, said["sha256"])
        return {name: said}
    if not text:
        kept = [{**row, **dict.fromkeys(TABLES["prompts"].texts)} for row in kept]
    keys = store.path_keys("prompts", name) or {}
    paths = store.add_prompts(out, keys["task"], kept)
    return {path.relative_to(out).as_posix(): store.entry(path) for path in paths}


# ---------------------------------------------------------------- pull


def pull(
    source: str | Path, root: str | Path, *, on_run: Callable[[int, int], None] | None = None
) -> list[str]:
    """The ids of the runs of an exported folder, merged into the store; made if it is missing.

    Everything is checked before anything is written: hashes and sizes against the MANIFEST, paths,
    the size each file decodes to, all that `verify` checks, and conflicts with what is stored. Then
    run after run is copied, its row in runs last: an interrupted pull resumes, the same run twice is
    one run. Nothing of the source is executed; JSON and Parquet alone are read.

    Parameters
    ----------
    source : a folder that `export` wrote, or the id of a dataset on the Hugging Face hub
    root : path of the store
    on_run : called with (runs done, runs in all)

    Raises
    ------
    DataError
        The folder is damaged, or holds what no export writes.
    ConflictError
        Something of the same name is stored with other values; names what differs.
    """
    if Path(source).exists():
        return _pull_folder(Path(source), root, on_run)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise StoreError(f"{source}: no such folder, and not a hub id as in user/name")
    hub = _hub()
    with tempfile.TemporaryDirectory(prefix="canopy-pull-") as folder:
        try:
            hub.snapshot_download(str(source), repo_type="dataset", local_dir=folder)
        except Exception as error:  # the client's own errors are many; none may show a token
            raise StoreError(f"{source}: cannot be downloaded: {_no_token(error)}") from None
        return _pull_folder(Path(folder), root, on_run)


def _pull_folder(folder: Path, root: str | Path, on_run: Callable[[int, int], None] | None) -> list[str]:
    with checked_source(folder, exported=True) as source:
        return merge_source(source, root, on_run)


# ---------------------------------------------------------------- push


def push(
    folder: str | Path, repo: str, *, dry_run: bool = False, private: bool = True
) -> list[tuple[str, int]]:
    """Name and bytes of each file of an exported folder that was sent to the Hugging Face hub.

    Parameters
    ----------
    folder : a folder that `export` wrote, unchanged since
    repo : id of the dataset, user/name; made if it is missing, closed to others unless ``private``
        is False
    dry_run : sends nothing and asks for no network
    """
    folder = Path(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"{repo}: not the id of a dataset, as in user/name")
    entries = check_source(folder)
    require_sound(folder)
    names = sorted([MANIFEST, *entries])
    sizes = [(name, (folder / name).stat().st_size) for name in names]
    if dry_run:
        return sizes
    hub = _hub()
    try:
        api = hub.HfApi()
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        # only what the MANIFEST names: notes and caches beside it stay at home
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            repo_type="dataset",
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in names],
        )
    except Exception as error:  # the client's own errors are many; none may show a token
        raise StoreError(f"{repo}: cannot be sent: {_no_token(error)}; push again to resume") from None
    return sizes


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            "the hub needs huggingface_hub: install it with: pip install 'canopy-store[hub]'"
        ) from None
    return huggingface_hub


def _no_token(error: Exception) -> str:
    return re.sub(r"hf_\w+|(?i:bearer)\s+\S+", "hf_…", " ".join(str(error).split()))[:300]
