"""The DuckDB layer: views over a store's Parquet files, derived and rebuilt from nothing.

Two ways to have them: `connect`, an in-memory database on absolute paths that can read the store and
nothing else, and `write_database`, the file canopy.duckdb on relative paths, for a plain DuckDB shell
opened in the store's folder. A store on object storage has the first alone.
"""

from __future__ import annotations

import difflib
import functools
import glob
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import polars as pl

from canopy_store import store
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.schema import TABLES, added_columns, view_columns
from canopy_store.sql.columns import column_of
from canopy_store.sql.connection import Connection, set_list, spill_folder
from canopy_store.sql.horizon import AT_HORIZON, BY_PATTERNS, file_at, macro_at, macro_by
from canopy_store.store import format1

T = TypeVar("T")

# Tables of which one row may stand in several files: a file of SQL says what the view shows.
MERGED = ("prompts",)

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
    "stop_check",
    "truncation",
    "graded_prompts",
    "pass_at_k",
    "model_pass_at_k",
    "scored_rollouts",
    "cross_entropy",
    "kl_divergence",
    "kl_trajectory",
    "document_metrics",
    "perplexity",
    "forgetting",
    "gain_forgetting",
    "paired_documents",
    "token_type_contributions",
    "number_formats",
    "collapse",
    "item_metrics",
    "option_accuracy",
    "cost_per_token",
    "meanings",
    "meaning_metrics",
)


@functools.cache
def source(name: str) -> str:
    """The text of one of the SQL files beside this one."""
    return resources(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8")


def connect(
    root: str | Path, *, incomplete: bool = False, relations: Iterable[str] | None = None
) -> Connection:
    """A DuckDB connection that only reads: every table and view of the store, and no other file.

    It shows the store as its commits were when the connection was made: what is finished later is
    shown by the next one.

    Parameters
    ----------
    root : path of the store
    incomplete : also shows rollouts of runs that are not complete
    relations : the tables, views and macros that will be asked for, by default all; views that none
        of them reads are not made, which saves most of the time that opening takes

    Raises
    ------
    StoreError, DataError
        No store, a newer format, or a record in it that cannot be read.
    """
    root = store.require(root)
    con = duckdb.connect(config={"python_enable_replacements": False})
    con.execute("set temp_directory = ?", [spill_folder()])
    try:
        if not store.remote(root):
            root = root.resolve()
        shown = shown_files(root, incomplete)
        folders = [""] if store.remote(root) else store.check_folders(root)
        if store.remote(root):
            root = store.snapshot(root)  # listed after the records: what these name is there
            con.register_filesystem(root.fs)  # type: ignore[attr-defined]
            # a file's entity tag goes with every request for it, so what was read of it stays true
            con.execute("set validate_external_file_cache = 'NO_VALIDATION'")
        con.execute(";\n".join(_on_no_files(format1.is_old(root), relations)))
        files = _on_files(con, root, shown)
    except duckdb.Error as error:
        con.close()
        raise explain(error) from None
    except BaseException:
        con.close()
        raise
    # the pattern is checked as well as the file that it leads to, and brackets in it are escaped
    allowed = {f"{start}/{each}".rstrip("/") for start in (root, _escaped(root)) for each in folders}
    con.execute("set allowed_directories = ?", [sorted(allowed)])
    con.execute("set enable_external_access = false")
    con.execute("set lock_configuration = true")
    return Connection(con, files)


# Words of a query that may read any relation, or lists them all.
_ANY = re.compile(
    r"\b(show|pragma|query|query_table|information_schema|(duckdb|pg|sqlite)_\w+)\b|^\s*desc\w*\W*$",
    re.IGNORECASE,
)


def named(query: str) -> list[str] | None:
    """The words of a query, the relations that it reads among them; None where it may read any."""
    return None if _ANY.search(query) else re.findall(r"\w+", query.lower())


def shown_files(root: Path, incomplete: bool = False) -> dict[str, list[str]]:
    """The files of each table that its view reads, relative to the store: those that records name."""
    shown = store.tables(store.records(root))
    if incomplete:
        begun = (run for run in store.runs(root) if not run["complete"])
        shards = (path for run in begun for path in run["shards"])
        shown["rollouts"] += [path.relative_to(root).as_posix() for path in shards]
    return shown


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
        with connect(root, incomplete=incomplete, relations=(relation,)) as con:
            return con.sql(f"from {relation}").pl()

    try:
        return again(ask)
    except duckdb.Error as error:
        raise explain(error) from None


def prompts(root: str | Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every prompt's row, by task and prompt_id; each value is there where any ingest brought it."""
    return {(row["task"], row["prompt_id"]): row for row in read(root, "prompts").to_dicts()}


# What a reader hears of a file that it had listed and a compaction has since replaced.
_GONE = ("No such file or directory", "No files found that match", "gone, by a compaction")


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
    # of two that finish at once, the later one must have seen what the earlier one committed
    with store.waiting(root, "canopy.duckdb"), tempfile.TemporaryDirectory(prefix="canopy-") as scratch:
        fresh = Path(scratch) / "canopy.duckdb"
        make_database(fresh, root, shown_files(root))
        with store.replacing(path) as file:
            file.write(fresh.read_bytes())
    return path


def make_database(path: Path, root: Path, shown: dict[str, list[str]]) -> None:
    """Writes a new database of views on the files ``shown``, for a shell in the store's folder."""
    path.write_bytes(_empty_database(format1.is_old(root), tuple(TABLES)))
    try:
        with _inside(path) as con:
            _on_files(con, root, shown, relative=True)
            _comment(con, [table for table, names in shown.items() if names])
    except duckdb.Error as error:
        raise explain(error) from None


@functools.cache
def _empty_database(old: bool, tables: tuple[str, ...]) -> bytes:
    """A database of every view, on no files: most of the time that one of a store takes to make."""
    with tempfile.TemporaryDirectory(prefix="canopy-") as scratch:
        path = Path(scratch) / "canopy.duckdb"
        with _inside(path, "(storage_version 'v1.2.0')") as con:
            con.execute(";\n".join(_on_no_files(old)))
            _comment(con, (*tables, *VIEWS))
        return path.read_bytes()


@contextmanager
def _inside(path: Path, options: str = "") -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that makes views in a database file, which is whole when the block ends."""
    with duckdb.connect() as con:
        con.execute(f"attach '{_literal(str(path))}' as canopy {options}")
        con.execute("use canopy")
        con.execute(_no_files())
        con.execute("begin")  # else each statement is flushed to the disk by itself
        yield con
        con.execute("commit")
        con.execute("use memory")
        con.execute("detach canopy")


# Views are bound as they are made. Those of canopy.duckdb are bound to this in place of files, which
# would have to be found from the folder that this process is in; the shell that opens them has its own.
def _no_files() -> str:
    columns = {c.name: c.type for table in TABLES for c in view_columns(table)}
    columns |= {key: "VARCHAR" for table in TABLES.values() for key in table.partitions}
    nothing = ", ".join(f'null::{kind} as "{name}"' for name, kind in columns.items())
    return (
        "create or replace temp macro read_parquet"
        "(files, hive_partitioning := false, hive_types := null, union_by_name := false) as table "
        f"select {nothing} where false"
    )


def explain(error: duckdb.Error) -> DataError | StoreError:
    """A DuckDB error as one line."""
    if "Traceback (most recent call last)" in str(error):  # of the object store's client
        last = str(error).strip().splitlines()[-1]
        return StoreError(f"object storage: {last[:300]}; nothing stored is lost: run it again")
    text = " ".join(str(error).split("LINE 1:")[0].split())
    if "No space left" in text:
        return StoreError(f"the disk is full: {text}; free some space and run it again")
    if "Too many open files" in text:
        return StoreError(f"{text}; raise the limit: ulimit -n 4096")
    for pattern, what in _FILE_ERRORS.items():
        if named := re.search(pattern, text):
            return DataError(f"{named[1]}: {what}")
    return DataError(text)


_LOST = "gone, by a compaction or a removal, or lost; run it again, or see: canopy verify"
_DAMAGED = "truncated or not a Parquet file; see: canopy verify"
# what DuckDB says of a file that it cannot read, and what its reader should hear
_FILE_ERRORS = {
    r'(?:No files found that match the pattern|Cannot open file) "([^"]+)"': _LOST,
    r"No magic bytes found at end of file '([^']+)'": _DAMAGED,
    r"[Ff]ile '([^']+)'.*(?:too small|magic|footer|corrupt|metadata)": _DAMAGED,
}


def _literal(text: str) -> str:
    return text.replace("'", "''")


def _escaped(root: Path) -> str:
    """The store's own path in patterns of files, where a bracket would mean something else."""
    return glob.escape(str(root))


def create_views(con: duckdb.DuckDBPyConnection, root: Path) -> None:
    """Makes every macro, table view and view of a store in a database that can read its files."""
    con.execute(";\n".join(_on_no_files(format1.is_old(root))))
    _on_files(con, root, shown_files(root))


def statements(root: Path) -> list[str]:
    """What makes every macro, table view and view of a store, in order, run from inside its folder."""
    old = format1.is_old(root)
    texts = [source("macros").rstrip().rstrip(";")]
    for table, names in shown_files(root).items():
        listed = ", ".join(f"'{_literal(name)}'" for name in names)
        texts.append(_table_view(table, f"[{listed}]" if names else None, old))
    return texts + _views()


def _views(relations: Iterable[str] | None = None) -> list[str]:
    """What makes every view, then every table macro; or those named and the views that they read."""
    made = {view: f"create or replace view {view} as\n{source(view).rstrip()}" for view in VIEWS}
    made |= {f"{name}_at": macro_at(name, source(file_at(name))) for name in AT_HORIZON}
    made |= {f"{name}_by": macro_by(name, source(name)) for name in BY_PATTERNS}
    if relations is None:
        return list(made.values())
    asked, needed = list(relations), set()
    while asked:
        name = asked.pop()
        if name in made and name not in needed:
            needed.add(name)
            asked += re.findall(r"\w+", made[name])
    return [text for name, text in made.items() if name in needed]


def _on_no_files(old: bool, relations: Iterable[str] | None = None) -> list[str]:
    """What makes everything on empty tables: a view is bound as it is made, which then costs no file."""
    tables = [_table_view(table, None, old) for table in TABLES]
    return [source("macros").rstrip().rstrip(";"), *tables, *_views(relations)]


def _on_files(
    con: duckdb.DuckDBPyConnection, root: Path, shown: dict[str, list[str]], relative: bool = False
) -> dict[str, list[str]]:
    """Makes the tables on their files; the lists of these, by the name of the variable that holds each.

    With ``relative`` they are in the tables' own text, from the store's folder.
    """
    variables: dict[str, list[str]] = {}
    old, start = format1.is_old(root), _escaped(root)
    for table, names in shown.items():
        if not names:
            continue
        if relative:
            listed = ", ".join(f"'{_literal(name)}'" for name in names)
            con.execute(_table_view(table, f"[{listed}]", old))
        else:
            # in a variable, for lists of thousands in a view's text are parsed with every query
            variable = f"canopy_{table}"
            paths = [f"{start}/{name}" for name in names]
            con.execute(f"set variable {variable} = ?", [paths[:1]])
            con.execute(_table_view(table, f"getvariable('{variable}')", old))
            set_list(con, variable, paths)
            variables[variable] = paths
    return variables


def _table_view(table: str, files: str | None, old: bool) -> str:
    """The statement that makes a table's view over ``files``, an SQL list of paths; None for no rows."""
    columns = view_columns(table)
    if files is None:
        # no file can be bound: a typed view of no rows stands in
        empty = ", ".join(f'null::{c.type} as "{c.name}"' for c in columns)
        return f"create or replace view {table} as select {empty} where false"
    keys = format1.partitions(table) if old else TABLES[table].partitions
    hive = ", ".join(f"'{key}': varchar" for key in keys)
    options = f", hive_partitioning = true, hive_types = {{{hive}}}" if keys else ""
    shown = []
    for c in columns:
        # the path's own value, by which whole files are left unopened
        value = '"run"' if c.name == "run_id" and "run" in keys else f'"{c.name}"'
        shown.append(f'{"null" if old and c.since > 1 else value}::{c.type} as "{c.name}"')
    rows = f"read_parquet({files}{options})"
    if added_columns(table):  # any file may lack them, and all of them may
        lacking = ", ".join(f'null::{c.type} as "{c.name}"' for c in columns if c.added)
        whole = f"read_parquet({files}{options}, union_by_name = true)"
        rows = f"(select {lacking} where false union all by name from {whole})"
    text = f"select {', '.join(shown)} from {rows}"
    if table in MERGED:
        text = f"with stored as ({text}) {source(table)}"
    return f"create or replace view {table} as {text}"


def _comment(con: duckdb.DuckDBPyConnection, relations: Sequence[str]) -> None:
    """Says grain, meaning and unit in the database itself, for people in a shell."""
    statements = []
    for name in relations:
        first = source(name).splitlines()[0] if name in VIEWS else TABLES[name].grain
        statements.append(f"comment on view {name} is '{_literal(first.removeprefix('-- grain: '))}'")
    for relation, name in con.execute(
        "select table_name, column_name from duckdb_columns() "
        "where not internal and list_contains(?, table_name)",
        [list(relations)],
    ).fetchall():
        column = column_of(relation, name)
        text = f"{column.doc} [{column.unit}]" if column.unit else column.doc
        statements.append(f"comment on column {relation}.\"{name}\" is '{_literal(text)}'")
    con.execute(";\n".join(statements))
