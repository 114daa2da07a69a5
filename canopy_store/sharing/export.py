"""Stores that travel: exported as a dataset that anyone can load, pulled with nothing taken on trust.

    OUT/README.md       the dataset card: a Hugging Face dataset as it stands, one config a table
    OUT/MANIFEST        JSON: sha256, bytes and rows of every file
    OUT/croissant.json  the same tables for Croissant readers
    OUT/views.sql       every view on relative paths; OUT/canopy.duckdb holds them ready
    OUT/canopy.json, plans, models, prompts, runs, rollouts, …    the store itself

A pull reads JSON and Parquet only, and nothing that the MANIFEST does not name.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import duckdb

from canopy_store import sql, store
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.schema import TABLES
from canopy_store.sharing.dataset_card import describe
from canopy_store.sharing.merge import TEXTS, merge_folder
from canopy_store.sharing.untrusted import check_source, require_sound
from canopy_store.upkeep.verify import MANIFEST, path_keys

_ALWAYS = ("models", "prompts", "runs", "rollouts")  # without these a folder is no store


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
    text : False leaves out prompts' and rollouts' texts, token_ids and top_token_ids; every measure
        stays computable
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
    root, out = store.require(root), Path(out).absolute()
    root = root if store.remote(root) else root.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: is there and not empty; choose another folder")
    if root == out.resolve() or root in out.resolve().parents:
        raise UsageError(f"{out}: inside the store; choose a folder outside it")
    if license is not None and not (license.isascii() and license.isprintable() and license):
        raise UsageError(f"--license {license!r}: needs an identifier, as in apache-2.0")
    wanted = _tables(tables, embeddings)
    runs = _chosen(root, where)
    scratch = out.parent / f".{out.name}.{os.getpid()}.exporting"
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.exporting"):
        if not store.alive(int("0" + re.sub(r"\D", "", old.suffixes[-2]))):
            shutil.rmtree(old, ignore_errors=True)  # of an export that was killed
    try:
        with store.writing(out):
            scratch.mkdir(parents=True)
        with store.holding(root, *(run["run_id"] for run in runs)):
            _fill(root, scratch, runs, wanted, text)
        sql.write_database(scratch)
        describe(scratch, out.name, text, license)
        require_sound(scratch)
        with store.writing(out):
            os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
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
    return wanted | set(_ALWAYS)


def _chosen(root: Path, where: str | None) -> list[dict[str, Any]]:
    with sql.connect(root) as con:
        try:
            found = con.sql(f"select * from runs where ({where or 'true'}) order by run_id").pl()
        except duckdb.Error as error:
            raise UsageError(f"--where {where}: {sql.explain(error)}") from None
    if found.is_empty():
        raise DataError(f"{root}: no complete run" + (f" where {where}" if where else " to export"))
    return found.to_dicts()


def _fill(root: Path, out: Path, runs: list[dict[str, Any]], tables: set[str], text: bool) -> None:
    """Copies the runs' files, their plans, models and prompts."""
    names = {run["run_id"] for run in runs}
    values: dict[str, set[str]] = {}
    for table in (t for t in TABLES if t in tables and "run" in TABLES[t].partitions):
        for path in store.files(root, table):
            keys = path_keys(table, path.relative_to(root).as_posix())
            if keys is None or keys["run"] not in names:
                continue
            if keys.get("selection", "all") != "all" and "selections" not in tables:
                continue
            for key, value in keys.items():
                values.setdefault(key.removesuffix("_id"), set()).add(value)
            target = out / path.relative_to(root).as_posix()
            if text or table not in TEXTS:
                store.copy_file(path, target)
            else:
                rows = store.read_rows(path)
                kept = {n: rows[n] for n in rows.column_names if n not in TEXTS[table]}
                store.write_rows(target, table, kept)
    _fill_prompts(root, out, text)
    checkpoints = store.table_rows(root, "models")
    models = {row["model_id"]: (path, row["parent_id"]) for path, row in checkpoints}
    needed = {run["model_id"] for run in runs}
    while needed:
        known = models.pop(needed.pop(), None)
        if known is not None:
            store.copy_file(known[0], out / known[0].relative_to(root).as_posix())
            needed |= {known[1]} - {None}  # ancestors, as far as they are known
    for path in sorted((root / "plans").glob("[!.]*.json")):
        kind, _, name = path.stem.partition("=")
        if store.unquoted(name) in (names if kind == "run" else values.get(kind, ())):
            store.copy_file(path, out / "plans" / path.name)
    for run in runs:
        path = root / "runs" / f"{store.quoted(run['run_id'])}.parquet"
        store.copy_file(path, out / "runs" / path.name)
    store.copy_file(root / "canopy.json", out / "canopy.json")


def _fill_prompts(root: Path, out: Path, text: bool) -> None:
    """The prompts of the exported rollouts, once each; a file that is needed whole is copied."""
    asked: dict[str, set[str]] = {}
    for path in store.files(out, "rollouts"):
        keys = path_keys("rollouts", path.relative_to(out).as_posix()) or {}
        ids = store.read_rows(path, ["prompt_id"])["prompt_id"].unique().to_pylist()
        asked.setdefault(keys["task"], set()).update(ids)
    for path in store.files(root, "prompts"):
        keys = path_keys("prompts", path.relative_to(root).as_posix()) or {}
        rows = store.read_rows(path).to_pylist()
        kept = [row for row in rows if row["prompt_id"] in asked.get(keys.get("task", ""), ())]
        if text and len(kept) == len(rows) > 0:
            store.copy_file(path, out / path.relative_to(root).as_posix())
            continue
        if not text:
            kept = [{**row, **dict.fromkeys(TEXTS["prompts"])} for row in kept]
        store.add_prompts(out, keys.get("task", ""), kept)


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
    entries = check_source(folder)
    require_sound(folder, trusted=False)
    return merge_folder(folder, root, entries, on_run)


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
