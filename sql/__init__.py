"""The DuckDB layer: views over a store's Parquet files, derived and rebuilt from nothing.

Two ways to have them: `connect`, an in-memory database on absolute paths that can read the store and
nothing else, and `write_database`, the file canopy.duckdb on relative paths, for a plain DuckDB shell
opened in the store's folder. A store on object storage has the first alone.
"""

from __future__ import annotations

import difflib
import glob
import os
import tempfile
from collections.abc import Callable
from importlib.resources import files as resources
from pathlib import Path
from typing import TypeVar

import duckdb
import polars as pl

from canopy_store import store
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.schema import TABLES, view_columns
from canopy_store.sql.columns import column_of

T = TypeVar("T")

# In order: a view stands on tables and on views before it.
VIEWS = (
    "selected_rollouts",
    "rollout_metrics",
    "prompt_metrics",
    "model_metrics",
    "ce_star_decomposition",
    "entropy_trajectory",
    "eos_trajectory",
    "length_terciles",
    "model_length_terciles",
    "panel",
    "logging_check",
    "scored_rollouts",
    "cross_entropy",
    "kl_divergence",
    "kl_trajectory",
)


def source(name: str) -> str:
    """The text of one of the SQL files beside this one."""
    return resources(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8")


def connect(root: str | Path, *, incomplete: bool = False) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with every table and view of the store, closed to all other files.

    Parameters
    ----------
    root : path of the store; where that is on object storage, the connection shows the files that
        were there when it was made
    incomplete : also shows rollouts of runs that are not complete

    Raises
    ------
    StoreError, DataError
        No store, a newer format, or a file in it that is truncated or foreign.
    """
    root = store.snapshot(store.require(root))
    con = duckdb.connect(config={"python_enable_replacements": False})
    con.execute("set temp_directory = ?", [os.path.join(tempfile.gettempdir(), "canopy-duckdb")])
    try:
        if store.remote(root):
            con.register_filesystem(root.fs)  # type: ignore[attr-defined]
            # a file's entity tag goes with every request for it, so what was read of it stays true
            con.execute("set validate_external_file_cache = 'NO_VALIDATION'")
        else:
            root = root.resolve()
        found = store.tables(root)
        _check_files(con, found)
        _create_views(con, found, str(root), incomplete)
    except duckdb.Error as error:
        con.close()
        raise explain(error) from None
    # the pattern is checked as well as the files it finds, and brackets in it are escaped
    con.execute("set allowed_directories = ?", [[str(root), glob.escape(str(root))]])
    con.execute("set enable_external_access = false")
    con.execute("set lock_configuration = true")
    return con


def read(root: str | Path, relation: str, *, incomplete: bool = False) -> pl.DataFrame:
    """A polars frame of one table or view of the store.

    Raises
    ------
    UsageError
        No such table or view; the message lists them.
    """
    if relation not in (*TABLES, *VIEWS):
        near = difflib.get_close_matches(relation, (*TABLES, *VIEWS), 1)
        hint = f"did you mean {near[0]}?" if near else "there are " + ", ".join((*TABLES, *VIEWS))
        raise UsageError(f"no table or view {relation!r}: {hint}")

    def ask() -> pl.DataFrame:
        with connect(root, incomplete=incomplete) as con:
            return con.sql(f"from {relation}").pl()

    return again(ask)


# What a reader hears of a file that it had listed and a compaction has since replaced.
_GONE = ("No such file or directory", "No files found that match", "gone since it was listed")


def again(ask: Callable[[], T]) -> T:
    """What ``ask`` gives; asked up to three times where a file that it had listed is gone."""
    for left in (2, 1, 0):
        try:
            return ask()
        except (duckdb.IOException, DataError) as error:
            if not left or not any(said in str(error) for said in _GONE):
                raise
    raise AssertionError  # the last round returns or raises


def write_database(root: str | Path) -> Path | None:
    """The path of canopy.duckdb, rebuilt: run it from inside the store's folder.

    Written in a storage version that older DuckDB shells open too. None on object storage: its views
    are relative to a folder that a shell is in.
    """
    root = store.locate(root)
    if store.remote(root):
        return None
    root = store.require(root).resolve()
    path = root / "canopy.duckdb"
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="canopy-") as scratch:
        fresh = Path(scratch) / "canopy.duckdb"
        con = duckdb.connect()
        try:
            os.chdir(root)  # views are bound as they are made, and these paths are relative
            con.execute(f"attach '{_literal(str(fresh))}' as canopy (storage_version 'v1.2.0')")
            con.execute("use canopy")
            create_views(con, root, "", False)
            _comment(con)
            con.execute("use memory")
            con.execute("detach canopy")
        except duckdb.Error as error:
            raise explain(error) from None
        finally:
            os.chdir(before)
            con.close()
        with store.replacing(path) as file:
            file.write(fresh.read_bytes())
    return path


def explain(error: duckdb.Error) -> DataError | StoreError:
    """A DuckDB error as one line."""
    if "Traceback (most recent call last)" in str(error):  # of the object store's client
        last = str(error).strip().splitlines()[-1]
        return StoreError(f"object storage: {last[:300]}; nothing stored is lost: run it again")
    text = " ".join(str(error).split("LINE 1:")[0].split())
    if "No space left" in text:
        return StoreError(f"the disk is full: {text}; free some space and run it again")
    return DataError(text)


def _literal(text: str) -> str:
    return text.replace("'", "''")


def _pattern(table: str, prefix: str) -> str:
    depth = "/*" * len(TABLES[table].partitions)
    base = f"{glob.escape(prefix)}/" if prefix else ""
    return _literal(f"{base}{table}{depth}/*.parquet")


def _check_files(con: duckdb.DuckDBPyConnection, found: dict[str, list[Path]]) -> None:
    """Raises the clear error for the first file whose label is not one this package can read."""
    for table, files in found.items():
        unsure = {str(path): path for path in files if not store.ends_labelled(path, table)}
        if not unsure:
            continue
        try:
            labelled = con.execute(
                "select file_name, value::varchar from parquet_kv_metadata(?)"
                " where key = 'canopy_schema'::blob",
                [[glob.escape(name) for name in unsure]],
            ).fetchall()
        except duckdb.Error:
            labelled = []
        expected = f"{table}:{store.FORMAT_VERSION}"
        good = {name for name, label in labelled if label == expected}
        for name, path in unsure.items():
            if name not in good:
                store.check_file(path, table)


def create_views(con: duckdb.DuckDBPyConnection, root: Path, prefix: str, incomplete: bool) -> None:
    """Makes every macro, table view and view in the database."""
    _create_views(con, store.tables(root), prefix, incomplete)


def _create_views(
    con: duckdb.DuckDBPyConnection, found: dict[str, list[Path]], prefix: str, incomplete: bool
) -> None:
    # A view is bound as it is made, files and all: on empty tables first that costs nothing
    statements = [source("macros")]
    statements += [_table_view(table, False, prefix, incomplete) for table in TABLES]
    statements += [f"create or replace view {view} as {source(view)}" for view in VIEWS]
    statements += [_table_view(table, True, prefix, incomplete) for table in TABLES if found[table]]
    con.execute(";\n".join(statements))


def _comment(con: duckdb.DuckDBPyConnection) -> None:
    """Says grain, meaning and unit in the database itself, for people in a shell."""
    statements = []
    grains = {table: TABLES[table].grain for table in TABLES}
    grains |= {v: source(v).splitlines()[0].removeprefix("-- grain: ") for v in VIEWS}
    for relation, grain in grains.items():
        statements.append(f"comment on view {relation} is '{_literal(grain)}'")
    for relation, name in con.execute(
        "select table_name, column_name from duckdb_columns() where not internal"
    ).fetchall():
        column = column_of(relation, name)
        text = f"{column.doc} [{column.unit}]" if column.unit else column.doc
        statements.append(f"comment on column {relation}.\"{name}\" is '{_literal(text)}'")
    con.execute(";\n".join(statements))


def table_view(root: Path, table: str, prefix: str, incomplete: bool) -> str:
    """The statement that makes a table's view; ``prefix`` is the store's path, or empty for relative."""
    return _table_view(table, bool(store.files(root, table)), prefix, incomplete)


def _table_view(table: str, stored: bool, prefix: str, incomplete: bool) -> str:
    columns = view_columns(table)
    if not stored:
        # a glob that matches nothing fails: a typed view of no rows stands in
        empty = ", ".join(f'null::{c.type} as "{c.name}"' for c in columns)
        return f"create or replace view {table} as select {empty} where false"
    keys = TABLES[table].partitions
    hive = ", ".join(f"'{key}': varchar" for key in keys)
    options = f", hive_partitioning = true, hive_types = {{{hive}}}" if keys else ""
    names = ", ".join(f'"{c.name}"::{c.type} as "{c.name}"' for c in columns)
    scan = f"read_parquet('{_pattern(table, prefix)}'{options})"
    text = f"create or replace view {table} as select {names} from {scan}"
    if table == "prompts":
        # the same prompt may stand in the files of several ingests
        text += " qualify row_number() over (partition by task, prompt_id order by source) = 1"
    if "run" in keys and not incomplete:
        text += " where run_id in (select run_id from runs)"
    return text
