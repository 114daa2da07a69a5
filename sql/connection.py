"""A connection that reads: what `open` gives, and the check that every query of a reader passes.

The settings of a connection keep it inside the store's folder, but they let it write there too: COPY,
ATTACH and EXPORT reach every file that a view may read. So the text itself is checked first. The engine
parses it, and only what is listed here as reading is run; all else, new kinds of statement included, is
refused. The check is for queries: it is no wall against Python code.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, NoReturn

import duckdb

from canopy_store.errors import UsageError
from canopy_store.sql.horizon import AT_HORIZON, BY_PATTERNS

# A parsed query is made of these; others insert, update, delete or copy inside a WITH.
_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}

# Table functions of the files, the catalog and lists, and the views at a horizon. Not here: those that
# switch logging or profiling on, run a text as SQL, read a raw memory address, or keep what they read in
# a table (read_csv).
_TABLE_FUNCTIONS = re.compile(
    r"duckdb_\w+|pragma_\w+|read_parquet|parquet_\w+|read_(nd)?json(_auto)?|read_text|glob"
    r"|range|generate_series|repeat|repeat_row|unnest|summary|histogram|histogram_values"
    r"|json_each|json_tree|icu_calendar_names|pg_timezone_names"
    rf"|({'|'.join(AT_HORIZON)})_at|({'|'.join(BY_PATTERNS)})_by"
)

# `explain (analyze, format json) QUERY`, without a comment or a quote before the query: how these end
# is for the engine alone to say.
_OPTION = r"(?:analyze|format\s+\w+)(?:\s+true)?"
_EXPLAIN = re.compile(
    rf"explain\b\s*(?:analyze\b\s*)?(?:\(\s*{_OPTION}(?:\s*,\s*{_OPTION})*\s*\)\s*)?(?P<query>[a-z(].*)",
    re.IGNORECASE | re.ASCII | re.DOTALL,
)

_PRAGMA = re.compile(
    r"pragma\s+(version|platform|user_agent|collations|functions|database_list|database_size"
    r"|show_databases|show_tables|table_info\s*\(\s*(\w+|'\w+')\s*\))\s*;?\s*",
    re.IGNORECASE | re.ASCII,
)

# How a query with a PIVOT begins, and the words with which a part of one would write.
_PIVOT = re.compile(
    r"[\s(]*(desc|describe|summarize|pivot|with|from|select)\b", re.IGNORECASE | re.ASCII
)
_WRITING = ("copy", "insert", "update", "delete", "truncate", "merge")

_PARSED = """
select
    ast->>'$.error' = 'true',
    ast->>'$..type',
    ast->>'$..function.function_name'
from (select json_serialize_sql($query) as ast)
"""

_INSTEAD = "a query only reads: print its rows (--format csv > rows.csv), or fetch them and write those"


def check_reads(con: duckdb.DuckDBPyConnection, query: str) -> None:
    """Returns where every statement of a text only reads, and raises where one does not.

    Reading are SELECT, FROM, VALUES, WITH, PIVOT, SHOW, DESCRIBE and SUMMARIZE in any number, and alone
    in their text EXPLAIN of these, a PIVOT that takes its columns from the data, and PRAGMAs that show
    the catalog. Nothing is run or bound here.

    Raises
    ------
    UsageError
        The first statement, part or function that does not only read.
    duckdb.ParserException
        The text is not SQL.
    """
    if not isinstance(query, str):
        raise UsageError(f"a query is SQL text, not {type(query).__name__}")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"a query is UTF-8: its character {error.start + 1} is not") from None
    try:
        with con.cursor() as cursor:
            statements = cursor.extract_statements(query)
        kinds = [statement.type.name for statement in statements]
    except ValueError:  # a kind of statement that the Python package has no name for
        _refuse(f"{query.split(maxsplit=1)[0][:20].upper()} is refused")
    writing = [kind for kind in kinds if kind not in ("SELECT", "EXPLAIN", "MULTI", "PRAGMA")]
    if writing:
        _refuse(f"{writing[0].replace('_', ' ')} is refused")
    if all(kind == "SELECT" for kind in kinds):
        return _check_selects(con, query)
    if len(kinds) > 1:
        raise UsageError(
            "EXPLAIN, PRAGMA and PIVOT without IN stand alone: give each of these statements by itself"
        )
    text = statements[0].query  # without the comments before it
    if kinds == ["EXPLAIN"]:
        explained = _EXPLAIN.fullmatch(text)
        if not explained:
            _refuse("EXPLAIN is refused unless its query follows it, with no comment between")
        try:
            return check_reads(con, explained["query"])
        except duckdb.ParserException:
            _refuse("EXPLAIN is refused with other options than ANALYZE and FORMAT")
    if kinds == ["MULTI"]:
        return _check_pivot(con, text)
    if not _PRAGMA.fullmatch(text):
        _refuse("this PRAGMA is refused")
    return None


def _refuse(what: str) -> NoReturn:
    raise UsageError(f"{what}: {_INSTEAD}")


def _check_selects(con: duckdb.DuckDBPyConnection, query: str) -> None:
    """Raises unless the engine's own tree of the text holds nothing but reading."""
    with con.cursor() as cursor:
        row = cursor.execute(_PARSED, {"query": query}).fetchone()
    assert row is not None  # one row in, one row out
    failed, kinds, functions = row
    if failed:
        _refuse("what is no SELECT is refused")
    for kind in kinds:
        if kind.endswith("_NODE") and kind not in _NODES:
            _refuse(f"{kind.split('_')[0]} in a WITH is refused")
    for function in functions:
        if not _TABLE_FUNCTIONS.fullmatch(function.lower()):
            _refuse(f"the table function {function} is refused")
    if kinds.count("TABLE_FUNCTION") != len(functions):
        _refuse("a table function that has no name is refused")


def _check_pivot(con: duckdb.DuckDBPyConnection, query: str) -> None:
    """Raises where a PIVOT without IN could write.

    The engine gives no tree of one, as it is more statements than one. So no word of it may write, nor
    name a table function that is refused elsewhere: not even in quotes, where it would do no harm.
    """
    with con.cursor() as cursor:
        names = cursor.execute(
            "select distinct lower(function_name) from duckdb_functions()"
            " where function_type in ('table', 'table_macro')"
        ).fetchall()
    refused = [re.escape(name) for (name,) in names if not _TABLE_FUNCTIONS.fullmatch(name)]
    words = rf"(?<![a-z_])({'|'.join([*_WRITING, *refused])})(?![a-z0-9_])"
    word = re.search(words, query, re.IGNORECASE | re.ASCII)
    if word:
        raise UsageError(
            f"a PIVOT that takes its columns from the data is refused with the word {word[0]!r} in it: "
            f"name its values, ON column IN ('a', 'b'); {_INSTEAD}"
        )
    explained = _EXPLAIN.fullmatch(query)
    if not _PIVOT.match(explained["query"] if explained else query):
        _refuse("a PIVOT inside another statement than a query is refused")


def spill_folder() -> str:
    """A path for what one connection cannot hold in memory: DuckDB makes the folder, and removes it.

    It is inside a folder of this process that no other user can read, or could have made first, and
    that is removed when the process ends.
    """
    return os.path.join(_private_folder(os.getpid()), secrets.token_hex(8))


@functools.cache
def _private_folder(process: int) -> str:
    folder = tempfile.mkdtemp(prefix="canopy-duckdb-")
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a fork leaves its parent's folder alone
        shutil.rmtree(folder, ignore_errors=True)


def set_list(con: duckdb.DuckDBPyConnection, variable: str, values: list[str]) -> None:
    """Sets a variable to a list of texts, none with a zero byte: passed as one, which is far quicker."""
    con.execute(f"set variable {variable} = string_split(?, chr(0))", ["\0".join(values)])


class _Reader:
    """Those methods and properties of a DuckDB object that ``_reads`` names; the others are refused."""

    _raw: Any
    _con: duckdb.DuckDBPyConnection
    _reads: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(type(self._raw), name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        if name not in self._reads:
            _refuse(f"{name} is refused")
        value = getattr(self._raw, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def call(*arguments: Any, **options: Any) -> Any:
            given = [_raw(argument) for argument in arguments]
            return self._give(value(*given, **{key: _raw(option) for key, option in options.items()}))

        del call.__wrapped__  # type: ignore[attr-defined]  # would hand out the object behind this one
        return call

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._reads})

    def _give(self, value: Any) -> Any:
        """A value of the DuckDB object as a reader may have it; raises where its query would write."""
        if value is self._con:
            return self
        if isinstance(value, duckdb.DuckDBPyConnection):
            return Connection(value)
        if isinstance(value, duckdb.DuckDBPyRelation):
            # nothing has run yet, and this is the whole of what will
            check_reads(self._con, value.sql_query())
            return Relation(self._con, value)
        return value


def _raw(value: Any) -> Any:
    return value._raw if isinstance(value, _Reader) else value


_STEPS = """
aggregate any_value apply arg_max arg_min avg bit_and bit_or bit_xor bitstring_agg bool_and bool_or count
cross cume_dist dense_rank describe distinct drop except_ favg filter first first_value fsum geomean head
histogram intersect join lag last last_value lead limit list materialize max mean median min mode n_tile
nth_value offset order percent_rank pivot product project quantile quantile_cont quantile_disc rank
rank_dense rename row_number sample select select_dtypes select_types set_alias sort std stddev
stddev_pop stddev_samp string_agg sum union union_by_name unique unnest unpivot value_counts var var_pop
var_samp variance with_columns
"""

_ROWS = """
arrow df fetch_arrow_reader fetch_arrow_table fetch_record_batch fetchall fetchdf fetchnumpy iter_rows pl
preview show tf to_arrow_reader to_arrow_table to_df to_dicts torch
"""

_DESCRIPTIONS = "alias close columns description dtypes shape sql_query type types"


class Relation(_Reader):
    """What a query would give: DuckDB's relation without the methods that write.

    It has the steps (`filter`, `project`, `aggregate`, `join`, `order`, `limit` and the others), what
    describes it (`columns`, `types`, `shape`, `explain`), and what fetches its rows: `pl`, `df`,
    `to_arrow_table`, `fetchall`, `fetchnumpy`, or polars and pandas themselves, through Arrow.
    """

    _raw: duckdb.DuckDBPyRelation
    _reads = frozenset(_STEPS.split() + _ROWS.split() + _DESCRIPTIONS.split())

    def __init__(self, con: duckdb.DuckDBPyConnection, raw: duckdb.DuckDBPyRelation) -> None:
        self._con = con
        self._raw = raw

    def explain(self, *, analyze: bool = False) -> str:
        """The plan the engine runs, as text; with ``analyze``, run and timed."""
        return self._raw.explain("analyze" if analyze else "standard")

    def group_by(self, *columns: Any) -> Grouped:
        """The relation by groups: continue with ``agg``."""
        return Grouped(self, columns)

    def query(self, name: str, query: str) -> Relation | None:
        """The relation of a query that reads this one under a name."""
        check_reads(self._con, query)
        return self._give(self._raw.query(name, query))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and not hasattr(type(self._raw), name):
            return self._give(getattr(self._raw, name))  # a column
        return super().__getattr__(name)

    def __getitem__(self, name: str) -> Relation:
        return self._give(self._raw[name])

    def __contains__(self, name: str) -> bool:
        return name in self._raw

    def __len__(self) -> int:
        return len(self._raw)

    def __str__(self) -> str:
        return str(self._raw)

    def __repr__(self) -> str:
        return repr(self._raw)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return self._raw._repr_mimebundle_(include, exclude)

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> Any:
        return self._raw.__arrow_c_stream__(requested_schema)


class Grouped:
    """A relation by groups, which waits for its aggregates."""

    def __init__(self, relation: Relation, columns: tuple[Any, ...]) -> None:
        self._relation = relation
        self._columns = columns

    def agg(self, *aggregates: Any) -> Relation:
        """The relation of one row a group: its columns, then the aggregates."""
        relation = self._relation
        return relation._give(relation._raw.group_by(*self._columns).agg(*aggregates))


_CONNECTION = """
abort complete description df fetch_df fetch_df_chunk fetchall fetchdf fetchmany
fetchnumpy fetchone from_arrow from_df interrupt query_progress rowcount table tf to_arrow_reader
to_arrow_table torch values view
"""


class Connection(_Reader):
    """A DuckDB connection that reads: every query passes `check_reads`, and there is no method to write.

    It has those methods of DuckDB's own connection that run a query (`sql`, `execute`, `table`), fetch
    rows (`fetchall`, `fetchone`, `df`, `to_arrow_table`), or put a Python frame beside the store's
    relations (`from_arrow`, `register`).

    >>> with canopy_store.open("my-store") as con:
    ...     con.sql("from model_metrics").filter("task = 'math'").pl()
    """

    _reads = frozenset(_CONNECTION.split())

    def __init__(
        self, con: duckdb.DuckDBPyConnection, files: Mapping[str, list[str]] | None = None
    ) -> None:
        self._con = self._raw = con
        self._frames: set[str] = set()
        self._files = files or {}

    def cursor(self) -> Connection:
        """Another connection to the same views of the same files, as for another thread."""
        other = self._con.cursor()
        for variable, paths in self._files.items():  # each connection has variables of its own
            set_list(other, variable, paths)
        return Connection(other, self._files)

    duplicate = cursor

    def sql(self, query: str, *, alias: str = "", params: object = None) -> Any:
        """The `Relation` of the last statement of a query; None where the text holds no statement."""
        check_reads(self._con, query)
        relation = self._con.sql(query, alias=alias, params=params)
        return None if relation is None else Relation(self._con, relation)

    query = from_query = sql

    def execute(self, query: str, parameters: object = None) -> Connection:
        """This connection, with the rows of the query to fetch."""
        check_reads(self._con, query)
        self._con.execute(query, parameters)
        return self

    def get_table_names(self, query: str, *, qualified: bool = False) -> set[str]:
        """The names of the tables and views that a query reads."""
        check_reads(self._con, query)
        return self._con.get_table_names(query, qualified=qualified)

    def register(self, view_name: str, python_object: object) -> Connection:
        """This connection, with a Python frame that queries can read under a name of its own.

        Raises
        ------
        UsageError
            The name is one of the store's tables and views.
        """
        if view_name.casefold() in self._stored():
            raise UsageError(f"{view_name!r} is a relation of the store: give the frame another name")
        self._con.register(view_name, _raw(python_object))
        self._frames.add(view_name)
        return self

    def unregister(self, view_name: str) -> Connection:
        """This connection, without the frame of that name."""
        if view_name in self._frames:
            self._con.unregister(view_name)
            self._frames.discard(view_name)
        return self

    def close(self) -> None:
        """Closes this connection; its cursors stay open."""
        self._con.close()

    def _stored(self) -> set[str]:
        with self._con.cursor() as cursor:  # which sees no frame of this connection
            return {
                name.casefold()
                for (name,) in cursor.execute(
                    "select view_name from duckdb_views() union select table_name from duckdb_tables()"
                ).fetchall()
            }

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
