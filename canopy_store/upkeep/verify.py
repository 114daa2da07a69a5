"""Whether a store is whole: every record, file, key, length, bound and sum, from the files alone.

`verify` reads each file that a record names once, a row group at a time, and never stops at a damaged
one: what it finds comes back as rows. Formulas are not written again here: sums and spectra are
recomputed by the code that stores them, and the check of logged data is the view logging_check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from canopy_store import sql, store
from canopy_store.errors import CanopyError, DataError
from canopy_store.schema import REGISTERS, TABLES
from canopy_store.sql.horizon import AT_HORIZON, BY_PATTERNS
from canopy_store.upkeep.manifest import MANIFEST, manifest_problem, read_manifest
from canopy_store.upkeep.verify_files import File, standing
from canopy_store.upkeep.verify_records import (
    Jobs,
    check_plans,
    check_unnamed,
    named_files,
    place_of,
    read_plans,
    read_records,
    version,
)
from canopy_store.upkeep.verify_report import AGAIN, COPY, SCHEMA, Report, short
from canopy_store.upkeep.verify_runs import (
    Others,
    Run,
    check_run,
    check_tables,
    half_compacted,
    read_frame,
)


def verify(root: str | Path, deep: bool = False, *, database: bool = True) -> pl.DataFrame:
    """One row per problem: file, table, what, todo, harmless; no row when all is well.

    Records against their plans and the files that they name, their bytes and hashes; files against
    their schema, checksums, path and MANIFEST; keys unique and leading to a row; lengths equal to
    n_tokens; bounds of log-probabilities and entropies; sums equal to their arrays; unit embeddings;
    spectra; run counts; the check of logged data. Rows marked harmless change no view: temporary files,
    files that no record names, runs not complete.

    Parameters
    ----------
    root : path of the store
    deep : also recomputes every spectrum from its embeddings
    database : also opens canopy.duckdb; for a folder that is not trusted, leave it shut

    Raises
    ------
    StoreError
        There is no store at ``root``. A damaged file is reported, never raised.
    """
    root = store.snapshot(store.locate(root))
    if not any((root / name).exists() for name in ("canopy.json", "commits", "runs")):
        store.require(root)
    with duckdb.connect() as con:
        if store.remote(root):
            con.register_filesystem(root.fs)  # type: ignore[attr-defined]
        con.execute(sql.source("macros"))
        report = Report(root, deep, con, version(root))
        _verify(report, database)
    return pl.DataFrame(report.rows, schema=SCHEMA)


def _verify(report: Report, database: bool) -> None:
    path = report.root / "canopy.json"
    try:
        store.require(report.root)
    except (CanopyError, OSError) as error:
        report.add_error(path, "", error, "write it anew: canopy init")
    if database:
        _check_database(report)
    report.standing = standing(report)
    plans = read_plans(report)
    records, orphans = read_records(report)
    check_plans(report, records, plans)
    small, runs = _sorted_out(report, records)
    named: dict[str, Mapping[str, Any]] = {
        name: said for record in records for name, said in record.files.items()
    }
    _check_manifest(report, named)
    finished = frozenset((record.kind, frozenset(record.keys.items())) for record in records)
    listed = {name for record in orphans for name in record.files}
    check_unnamed(report, named, listed, Jobs(finished, plans))
    _check_work_folder(report)
    # small tables whole, then one run after another: memory is bounded by the largest run
    of_runs = {name: settings for (kind, name), settings in plans.items() if kind == "run"}
    models = _check_models(report, small["models"])
    prompts = _check_prompts(report, small["prompts"])
    scorers = _check_scorers(report, small.get("scorers", []), models)
    others = Others(models, scorers, prompts, of_runs)
    for subject in sorted(runs):
        check = check_run if subject[0] == "run" else check_tables
        check(report, runs.pop(subject), others)


def _sorted_out(
    report: Report, records: Iterable[store.Record]
) -> tuple[dict[str, list[File]], dict[tuple[str, str], Run]]:
    """The files of registers and prompts, and the runs with theirs, by the subject of their records.

    Or what else jobs are over: a task of items, a corpus.
    """
    small: dict[str, dict[str, File]] = {table: {} for table in (*REGISTERS, "prompts")}
    runs: dict[tuple[str, str], Run] = {}
    for record in records:
        where = place_of(report, record)
        files = list(named_files(report, record))
        if record.kind not in REGISTERS:
            run = runs.setdefault(record.subject, Run(record.subject[1], where))
            if record.kind == "rollouts":
                run.record, run.settings = where, record.settings
            if all(file.table == "work" for file in files):
                report.add(where, record.kind, "names no file of its table", AGAIN)
        for file in files:
            if file.table not in small:
                runs[record.subject].files[file.table].append(file)
            elif small[file.table].setdefault(file.name, file).said != file.said:
                what = f"says other of {file.name} than another record"
                report.add(where, record.kind, what, COPY)
    return {table: list(files.values()) for table, files in small.items()}, runs


# ---------------------------------------------------------------- beside the tables


def _check_manifest(report: Report, named: Mapping[str, Mapping[str, Any]]) -> None:
    """An exported folder's MANIFEST: what it says of each file, and that it names every one."""
    path = report.root / MANIFEST
    if not path.exists():
        return
    try:
        entries = read_manifest(report.root)
    except DataError as error:
        report.add_error(path, "", error, "get the folder again")
        return
    for name, entry in entries.items():
        if named.get(name) == entry:
            continue  # checked against its record, which says the same
        what = manifest_problem(report.root / name, entry)
        if what:
            todo = "get it again; if you changed it yourself, export anew"
            report.add(name, _table(name), what, todo)
    for name, stands in report.standing.items():
        if stands == "file" and name not in entries and not name.endswith(".tmp"):
            todo = "move it out; if you added it yourself, export anew"
            report.add(name, _table(name), f"not in {MANIFEST}", todo)


def _table(name: str) -> str:
    top = name.partition("/")[0]
    return top if top in TABLES else ""


def _check_database(report: Report) -> None:
    """canopy.duckdb opens, and has the views this package would write."""
    path = report.root / "canopy.duckdb"
    if store.remote(path) or not path.exists():
        return
    todo = "rebuild it: canopy init --store DIR"
    try:
        store.require_regular(path)
        with duckdb.connect(str(path), read_only=True, config={"enable_external_access": False}) as con:
            views = con.execute(
                "select view_name from duckdb_views() where not internal union all "
                "select function_name from duckdb_functions() where function_type = 'table_macro'"
            ).fetchall()
    except (CanopyError, duckdb.Error, RuntimeError, UnicodeDecodeError) as error:
        report.add(path, "", f"cannot be opened: {short(error, path)[:100]}", todo)
        return
    macros = {f"{name}_at" for name in AT_HORIZON} | {f"{name}_by" for name in BY_PATTERNS}
    missing = sorted({*TABLES, *sql.VIEWS, *macros} - {name for (name,) in views})
    if missing:  # of another version: this package's own queries never read it
        report.add(path, "", f"lacks the views {', '.join(missing)}", todo, harmless=True)


def _check_work_folder(report: Report) -> None:
    """What compactions and removals of format 1 left when they were stopped; it changes no view."""
    for path in store.matching(report.root / ".work", "run=*"):
        run_id = store.unquoted(path.name.removeprefix("run="))
        if half_compacted(report, run_id):
            todo = "finish it with the version that began it"
            report.add(path, "", "a compaction that was stopped half way", todo, harmless=True)
        elif path.is_dir():
            what = "files of a compaction or removal that was stopped"
            report.add(path, "", what, "remove the folder when no job runs", harmless=True)


# ---------------------------------------------------------------- models, scorers and prompts


def _check_models(report: Report, files: Iterable[File]) -> frozenset[str]:
    """The ids of the models stored; reports those that are there twice, or under another's name."""
    models = read_frame(report, files, None)
    if models.is_empty():
        return frozenset()
    for row in models.filter(pl.col("model_id").is_duplicated()).iter_rows(named=True):
        what = f"model_id {row['model_id']} is there twice"
        report.add(row["file"], "models", what, "keep one of them")
    for row in models.iter_rows(named=True):
        named = row["model_id"] == f"{row['family']}/{row['variant']}"
        if report.version == 1 and row["file"].count("/") == 1:  # no folders say it there
            stem = "--".join(store.quoted(row[name]) for name in ("family", "variant"))
            named &= row["file"] == f"models/{stem}.parquet"
        if not named:
            what = f"holds {row['model_id']}, which its name does not say"
            report.add(row["file"], "models", what, AGAIN)
    return frozenset(models["model_id"])


def _check_scorers(report: Report, files: Iterable[File], models: frozenset[str]) -> frozenset[str]:
    """The ids of the scorers stored; reports those that are there twice, or of a model that is not."""
    scorers = read_frame(report, files, None)
    if scorers.is_empty():
        return frozenset()
    for row in scorers.filter(pl.col("scorer_id").is_duplicated()).iter_rows(named=True):
        report.add(row["file"], "scorers", f"scorer {row['scorer_id']} is there twice", AGAIN)
    for row in scorers.filter(~pl.col("model_id").is_in(list(models))).iter_rows(named=True):
        report.add(row["file"], "scorers", f"model {row['model_id']} is not in models", AGAIN)
    return frozenset(scorers["scorer_id"])


def _check_prompts(report: Report, files: Iterable[File]) -> pl.DataFrame:
    """Task and prompt_id of the prompts stored; reports those that stand with two texts."""
    texts, keys = list(TABLES["prompts"].texts), ["task", "prompt_id"]
    prompts = read_frame(report, files, None)
    if prompts.is_empty():
        return pl.DataFrame(schema=dict.fromkeys(keys, pl.String))
    texts = [name for name in texts if name in prompts.columns]
    said = prompts.group_by(keys).agg(pl.col(texts).drop_nulls().n_unique(), pl.col("file").first())
    for row in said.filter(pl.any_horizontal(pl.col(texts) > 1)).sort(keys).iter_rows(named=True):
        two = "texts" if row["text"] > 1 or row["messages"] > 1 else "right answers"
        what = f"prompt {row['prompt_id']} stands with two {two}"
        report.add(row["file"], "prompts", what, "keep one of them")
    return prompts.select(keys).unique()
