"""A query cannot write: hostile texts and methods are refused, and what reads works as in DuckDB."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import duckdb
import polars as pl
import pytest

from canopy_store.errors import UsageError
from canopy_store.sql.connection import Connection, check_reads


def locked(root: Path) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection that can read and write the folder and nothing else."""
    con = duckdb.connect(config={"python_enable_replacements": False})
    con.execute(f"create view runs as from read_parquet('{root}/runs.parquet')")
    con.execute("create macro twice(x) as 2 * x")
    con.execute("set allowed_directories = ?", [[str(root)]])
    con.execute("set enable_external_access = false")
    con.execute("set lock_configuration = true")
    return con


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    rows = {"task": ["math", "math", "trivia"], "variant": ["base", "sft", "base"], "n": [1, 2, 3]}
    pl.DataFrame(rows).write_parquet(tmp_path / "runs.parquet")
    monkeypatch.chdir(tmp_path)  # a relative path is a path in the store
    return tmp_path


@pytest.fixture
def con(root):
    with Connection(locked(root)) as con:
        yield con


def contents(root: Path) -> dict[str, bytes]:
    """Every file of the folder, byte for byte."""
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# Each of these changes the folder where nothing checks it.
WRITING = [
    "copy (select 1 as x) to '{root}/runs.parquet'",
    "COPY (SELECT 1 AS x) TO '{root}/new.csv'",
    "copy runs to '{root}/new.parquet' (format parquet)",
    "copy (select 1 as x, 2 as y) to '{root}/parts' (format parquet, partition_by (y))",
    "from runs; copy (select 1 as x) to '{root}/runs.parquet'",
    "select ';'; copy (select 1 as x) to '{root}/runs.parquet'; select 1",
    "select 'é\U0001f333'; copy (select 1 as x) to '{root}/runs.parquet'",
    "select $$;$$; copy (select 1 as x) to $${root}/runs.parquet$$",
    "-- from runs\ncopy (select 1 as x) to '{root}/runs.parquet'",
    "-- from runs\rcopy (select 1 as x) to '{root}/runs.parquet'",
    "/* from runs */copy/**/(select 1 as x)to'{root}/runs.parquet'",
    "\ufeffcopy (select 1 as x) to '{root}/runs.parquet'",
    "select 1;\u00a0copy\u2003(select 1 as x)\u200bto '{root}/runs.parquet'",
    "select 1\0; copy (select 1 as x) to '{root}/runs.parquet'",
    ";;;copy (select 1 as x) to '{root}/runs.parquet';;;",
    "with x as (copy (select 1 as x) to '{root}/runs.parquet') from x",
    "with a as (select 1), b as materialized (copy (from a) to '{root}/new.csv') select 2",
    "select 1; with x as (copy (select 1 as x) to '{root}/runs.parquet') from x",
    "with x as (copy (select 1 as x) to '{root}/runs.parquet') from x; from runs",
    "with x as (copy (select 1 as x) to '{root}/runs.parquet') pivot runs on task using sum(n)",
    'with "COPY" as (CoPy (select 1 as x) to \'{root}/new.csv\') from "COPY"',
    "copy (pivot runs on task using sum(n)) to '{root}/runs.parquet'",
    "explain analyze copy (select 1 as x) to '{root}/runs.parquet'",
    "EXPLAIN ANALYZE COPY (SELECT 1 AS x) TO '{root}/runs.parquet'",
    "explain (analyze) copy (select 1 as x) to '{root}/runs.parquet'",
    "explain (analyze, format json) copy (select 1 as x) to '{root}/runs.parquet'",
    "explain (format json, analyze) copy (select 1 as x) to '{root}/runs.parquet'",
    "explain /* select 1 */ analyze copy (select 1 as x) to '{root}/runs.parquet'",
    "explain -- select 1\nanalyze copy (select 1 as x) to '{root}/runs.parquet'",
    "explain analyze --\rcopy (select 1 as x) to '{root}/runs.parquet' --\n/* select 1 */",
    "/* c */ explain analyze copy (select 1 as x) to '{root}/runs.parquet'",
    "explain\u00a0analyze\u00a0copy (select 1 as x) to '{root}/runs.parquet'",
    "explain analyze copy (pivot runs on task using sum(n)) to '{root}/runs.parquet'",
    "explain analyze with x as (copy (select 1 as x) to '{root}/runs.parquet') from x",
    "explain select 1; copy (select 1 as x) to '{root}/runs.parquet'",
    "prepare p as copy (select 1 as x) to '{root}/runs.parquet'; execute p",
    "create table t as select 1 as x; copy t to '{root}/runs.parquet'",
    "attach '{root}/new.duckdb'",
    "attach '{root}/new.duckdb' as y; create table y.t as select 1",
    "export database '{root}/new'",
    "export database '{root}/new' (format parquet)",
]

# Each of these is refused too: most change the connection, or run what no check has seen.
REFUSED = [
    "create table t as select 1",
    "create or replace temp view runs as select 9 as n",
    "create temp table runs as select 9 as n",
    "create table u as pivot runs on task using sum(n)",
    "create macro twice(x) as 3 * x",
    "create secret (type s3)",
    "drop view runs",
    "drop macro twice",
    "alter view runs rename to walks",
    "comment on view runs is 'mine'",
    "insert into runs values ('a', 'b', 1)",
    "insert into runs pivot runs on task using sum(n)",
    "update runs set n = 0",
    "delete from runs",
    "truncate runs",
    "merge into runs using runs as other on runs.n = other.n when matched then delete",
    "with x as (insert into runs values ('a', 'b', 1) returning *) from x",
    "with x as (delete from runs returning *) from x",
    "with x as (update runs set n = 0 returning *) from x",
    "select exists (with y as (delete from runs returning *) from y)",
    "from runs where n in (with y as (copy runs to 'x') from y)",
    "describe with x as (delete from runs returning *) from x",
    "summarize (with x as (copy runs to 'x') from x)",
    "explain with x as (copy runs to 'x') from x",
    "explain copy runs to 'x'",
    "explain create table t as pivot runs on task using sum(n)",
    "explain (analyze 'true') delete from runs",
    "explain (format 'json') copy runs to 'x'",
    "copy runs from 'runs.parquet'",
    "copy from database memory to other",
    "import database 'x'",
    "set threads = 1",
    "set variable x = 1",
    "set global temp_directory = 'x'",
    "set enable_external_access = true",
    "reset threads",
    "use memory",
    "load httpfs",
    "install httpfs",
    "force install httpfs from 'x'",
    "update extensions",
    "connect 'x'",
    "detach memory",
    "call pragma_version()",
    "call enable_logging('QueryLog', storage = 'file', storage_path = 'x')",
    "prepare p as select 1",
    "execute p",
    "deallocate p",
    "checkpoint",
    "force checkpoint",
    "vacuum",
    "analyze",
    "begin",
    "commit",
    "rollback",
    "pragma enable_profiling",
    "pragma enable_profiling = 'json'",
    "pragma profiling_output = 'x'",
    "pragma threads = 4",
    "pragma import_database('x')",
    "pragma add_parquet_key('a', '0123456789112345')",
    "pragma json_execute_serialized_sql('x')",
    "pragma table_info('runs'); copy runs to 'x'",
    "pragma version; select 1",
    "from query('from runs')",
    "from query($$with x as (copy runs to 'x') from x$$)",
    "from main.QUERY('from runs')",
    "from \"query\"('from runs')",
    "from (select 1), lateral (from query('from runs'))",
    "select * from runs where n in (from query_table('runs'))",
    "from json_execute_serialized_sql(json_serialize_sql('from runs'))",
    "describe from query('from runs')",
    "explain from query('from runs')",
    "pivot (from query('from runs')) on task using sum(n)",
    "pivot (from \"QUERY\"/**/('from runs')) on task using sum(n)",
    "explain pivot (from query('from runs')) on task using sum(n)",
    "from enable_logging(storage := 'file', storage_path := 'x')",
    "from enable_profiling(save_location := 'x')",
    "from checkpoint()",
    "from force_checkpoint()",
    "from truncate_duckdb_logs()",
    "from create_external_resource('x')",
    "from read_csv('runs.parquet', store_rejects = true, rejects_table = 'runs')",
    "from sniff_csv('runs.parquet')",
    "from read_duckdb('x.duckdb', table_name = 'x')",
    "from arrow_scan(1, 2, 3)",
    "from pandas_scan(1)",
    "from seq_scan('runs')",
]

SYNTAX = [
    "selec 1",
    "select 1; selec 2",
    "explain explain select 1",
    "copy",
    "with x as (attach 'x') from x",
]


def run_each_way(con: Connection, text: str) -> None:
    """Raises AssertionError where any way to run the text takes it."""
    for way in (con.sql, con.query, con.from_query, con.execute, con.get_table_names):
        with pytest.raises(UsageError):
            way(text)
    with pytest.raises(UsageError):
        con.table("runs").query("x", text)


@pytest.mark.parametrize("text", WRITING)
def test_a_text_that_would_write_is_refused_and_writes_nothing(root, con, text):
    text = text.replace("{root}", str(root))
    before = contents(root)
    run_each_way(con, text)
    assert contents(root) == before
    with locked(root) as raw, suppress(duckdb.Error):  # of what reads the file that it has replaced
        raw.execute(text).fetchall()
    assert contents(root) != before, "this text writes nothing, checked or not"


@pytest.mark.parametrize("text", REFUSED)
def test_a_text_that_does_more_than_read_is_refused(root, con, text):
    before = contents(root)
    run_each_way(con, text)
    assert contents(root) == before
    assert con.sql("select sum(n) from runs").fetchall() == [(6,)]


@pytest.mark.parametrize("text", SYNTAX)
def test_what_is_no_sql_is_said_by_the_engine(con, text):
    with pytest.raises(duckdb.ParserException):
        con.sql(text)


def test_the_message_names_the_kind_and_what_to_do_instead(con):
    said = {
        "copy runs to 'x'": "COPY is refused: a query only reads",
        "with x as (copy runs to 'x') from x": "COPY in a WITH is refused",
        "explain analyze copy runs to 'x'": "COPY is refused",
        "use memory": "SET is refused",
        "update extensions": "UPDATE is refused",
        "from query('from runs')": "the table function query is refused",
        "pragma threads": "this PRAGMA is refused",
        "explain/**/select 1": "EXPLAIN is refused unless its query follows it",
        "explain (format 'json') select 1": "other options than ANALYZE and FORMAT",
        "pivot (with x as (copy runs to 'x') from x) on task": "name its values",
        "from runs; explain from runs": "stand alone",
    }
    for text, message in said.items():
        with pytest.raises(UsageError) as raised:
            con.sql(text)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match=r"--format csv > rows\.csv"):
        con.sql("copy runs to 'x'")
    with pytest.raises(UsageError, match="not Statement"):
        con.sql(duckdb.extract_statements("from runs")[0])
    with pytest.raises(UsageError, match="its character 9 is not"):
        con.sql("select '\udcff'")


READING = {
    "from runs": 3,
    "select 1; from runs": 3,
    "-- how many\nselect count(*) from runs; -- all": 1,
    "values (1), (2)": 2,
    "table runs": 3,
    "(((from runs)))": 3,
    "select 'copy runs to ''x''; drop view runs' as text": 1,
    'select n as "copy" from runs': 3,
    "select $$; attach 'x'$$": 1,
    "select n, twice(n) from runs qualify row_number() over (partition by task order by n) = 1": 2,
    "with x as (from runs), y as materialized (from x) from y union all by name from x": 6,
    "with recursive r as (select 1 as a union all select a + 1 from r where a < 4) from r": 4,
    "from range(4)": 4,
    "select unnest([1, 2])": 2,
    "from generate_series(1, 3), lateral (select 1)": 3,
    "from 'runs.parquet'": 3,
    "from read_parquet('{root}/runs.parquet')": 3,
    "from glob('{root}/*')": 1,
    "select name from parquet_schema('{root}/runs.parquet') where type is not null": 3,
    "show tables": 1,
    "describe runs": 3,
    "describe select 1": 1,
    "summarize runs": 3,
    "from (describe runs)": 3,
    "select view_name from duckdb_views() where not internal": 1,
    "select table_name from information_schema.tables": 1,
    "pivot runs on task using sum(n)": 2,
    "-- by task\npivot runs on task using sum(n);": 2,
    "pivot runs on task in ('math') using sum(n) group by variant": 2,
    "with x as (from runs) from (pivot x on variant using sum(n) group by task)": 2,
    "unpivot runs on n into name key value v": 3,
    "describe pivot runs on task using sum(n)": 3,
    "explain from runs": 1,
    "EXPLAIN (FORMAT json) (select 1)": 1,
    "explain analyze from runs": 1,
    "explain (analyze, format json) from runs": 1,
    "-- the plan\nexplain from runs": 1,
    "explain pivot runs on task using sum(n)": 1,
    "pragma version": 1,
    "pragma table_info('runs')": 3,
    "PRAGMA show_tables;": 1,
    "select setseed(0.5), random() < 2": 1,
    "select " + " || ".join(["'a'"] * 900): 1,
}


@pytest.mark.parametrize("text", READING)
def test_a_text_that_reads_works_as_in_duckdb(root, con, text):
    query = text.replace("{root}", str(root))
    before = contents(root)
    assert len(con.sql(query).fetchall()) == READING[text]
    assert len(con.execute(query).fetchall()) == READING[text]
    assert contents(root) == before


def test_parameters_and_an_empty_text(con):
    rows = con.execute("select n from runs where task = ? order by n", ["math"]).fetchall()
    assert (
        rows == con.sql("select n from runs where task = $t order by n", params={"t": "math"}).fetchall()
    )
    assert rows == [(1,), (2,)]
    assert con.sql(" ; -- nothing") is None


def test_every_function_with_side_effects_has_been_looked_at(con):
    # One that is new here may write: look before it joins the list.
    functions = con.sql(
        "select distinct function_name from duckdb_functions()"
        " where has_side_effects and function_type not in ('table', 'pragma')"
    ).fetchall()
    assert {name for (name,) in functions} <= {
        *("current_connection_id", "current_query", "current_query_id", "current_transaction_id"),
        *("error", "gen_random_uuid", "random", "uuid", "uuidv4", "uuidv7", "sleep_ms", "stats"),
        *("txid_current", "vector_type"),
        *("currval", "nextval", "setval"),  # of a sequence, which no query can create
        *("setseed", "write_log"),  # of the connection alone: a locked one has no log file
    }


def test_expressions_smuggle_no_statement(root, con):
    runs = con.table("runs")
    before = contents(root)
    copy = f"copy (select 1 as x) to '{root}/runs.parquet'"
    inner = f"(with x as ({copy}) select x from x)"
    steps = [
        lambda text: runs.filter(text),
        lambda text: runs.filter(duckdb.SQLExpression(text)),
        lambda text: runs.project(text),
        lambda text: runs.project(duckdb.SQLExpression(text)),
        lambda text: runs.select("n", groups=text),
        lambda text: runs.aggregate(text),
        lambda text: runs.aggregate("sum(n)", text),
        lambda text: runs.group_by("task").agg(text),
        lambda text: runs.order(text),
        lambda text: runs.sort(text),
        lambda text: runs.sum("n", text),
        lambda text: runs.sum("n", window_spec=text),
        lambda text: runs.apply("sum", "n", "", text),
        lambda text: runs.apply(text, "n"),
        lambda text: runs.row_number(text),
        lambda text: runs.join(runs.set_alias("other"), text),
        lambda text: runs.with_columns(x=duckdb.SQLExpression(text)),
        lambda text: runs.pivot("task", ["math"], text),
        lambda text: runs.select_types([text]),
        lambda text: runs[text],
        lambda text: con.table(text),
        lambda text: con.view(text),
        lambda text: con.values(duckdb.SQLExpression(text)),
    ]
    hostile = [
        copy,
        inner,
        f"true; {copy}",
        f"n) ; {copy}; --",
        f"exists {inner}",
        f"1 from runs; {copy}; select 1",
    ]
    for step in steps:
        for text in hostile:
            with pytest.raises((UsageError, duckdb.Error, AttributeError)):
                step(text).fetchall()
    for text in ("n in (from query('select 1'))", "exists (from checkpoint())"):
        with pytest.raises(UsageError, match="table function"):
            runs.filter(text)
    assert contents(root) == before


def test_explain_of_a_relation_takes_no_text(root, con):
    before = contents(root)
    assert "PARQUET" in con.table("runs").explain().upper()
    assert "TOTAL TIME" in con.table("runs").explain(analyze=True).upper().replace("_", " ")
    with pytest.raises(TypeError):
        con.table("runs").explain(format=f"json) copy (select 1 as x) to '{root}/runs.parquet' --")
    assert contents(root) == before


def test_no_method_writes(root, con):
    relation = con.table("runs")
    before = contents(root)
    for name in ("write_parquet", "write_csv", "to_parquet", "to_csv", "create", "to_table", "map"):
        with pytest.raises(UsageError, match=f"{name} is refused: a query only reads"):
            getattr(relation, name)
    for name in ("create_view", "to_view", "insert", "insert_into", "update"):
        with pytest.raises(UsageError):
            getattr(relation, name)
    for name in ("executemany", "append", "appender", "query_appender", "create_function", "checkpoint"):
        with pytest.raises(UsageError, match=f"{name} is refused"):
            getattr(con, name)
    for name in ("begin", "load_extension", "register_filesystem", "table_function", "enable_profiling"):
        with pytest.raises(UsageError):
            getattr(con, name)
    assert contents(root) == before
    assert not hasattr(con, "no_such_method")
    assert not hasattr(relation, "no_such_column")


def test_nothing_public_is_duckdbs_own(con):
    """What a connection and a relation give is wrapped, or has no relation in it."""
    duck = (duckdb.DuckDBPyConnection, duckdb.DuckDBPyRelation)
    relation = con.sql("from runs")
    for reader in (con, relation):
        for name in dir(reader):
            if name.startswith("_"):
                continue
            value = getattr(reader, name)
            assert not isinstance(value, duck), name
            assert not hasattr(value, "__wrapped__"), name
    for given in (
        con.cursor(),
        con.duplicate(),
        con.register("x", pl.DataFrame({"a": [1]})),
    ):
        assert type(given) is Connection
    assert con.execute("from x") is con
    con.fetchall()
    for given in (relation.task, relation["task"], relation.filter("n > 1"), relation.materialize()):
        assert type(given) is type(relation)
    assert type(relation.query("x", "from x")) is type(relation)
    assert type(relation.query("x", "explain from x")) is type(relation)


def test_a_relation_has_the_steps_of_duckdb(con):
    runs = con.sql("from runs")
    assert runs.columns == ["task", "variant", "n"]
    assert (runs.shape, len(runs), "n" in runs, "m" in runs) == ((3, 3), 3, True, False)
    assert [str(kind) for kind in runs.types] == ["VARCHAR", "VARCHAR", "BIGINT"]
    assert runs.filter("n > 1").project("n").order("n desc").limit(1).fetchall() == [(3,)]
    assert runs.aggregate("task, sum(n) as n", "task").sort("n", "task").fetchall() == [
        ("math", 3),
        ("trivia", 3),
    ]
    assert runs.group_by("task").agg("max(n) as n").order("n").fetchall() == [("math", 2), ("trivia", 3)]
    other = runs.select("n", duckdb.SQLExpression("n * 10").alias("m")).set_alias("other")
    assert runs.join(other, "n").project("m").order("m").fetchall() == [(10,), (20,), (30,)]
    assert len(runs.union(runs)) == 6
    assert len(runs.union(runs).distinct()) == 3
    assert runs.except_(runs.filter("n = 1")).count("*").fetchall() == [(2,)]
    assert runs.drop("task").columns == ["variant", "n"]
    assert runs.describe().columns[0] == "aggr"
    assert runs.query("mine", "select sum(n) from mine").fetchall() == [(6,)]
    assert runs.n.fetchall() == runs["n"].fetchall() == [(1,), (2,), (3,)]
    assert "trivia" in repr(runs)
    assert "trivia" in str(runs)
    assert "<table" in runs._repr_mimebundle_()["text/html"]


def test_a_relation_shows_itself(con, capsys):
    con.sql("from runs").show()
    assert "trivia" in capsys.readouterr().out


def test_polars_pandas_and_arrow_take_a_relation(con):
    runs = con.sql("from runs order by n")
    frame = runs.pl()
    assert frame["n"].to_list() == [1, 2, 3]
    for other in (
        pl.from_arrow(runs).struct.unnest(),
        pl.DataFrame(runs),
        runs.pl(lazy=True).filter(pl.col("n") > 0).collect(),
        pl.from_arrow(runs.to_arrow_table()),
        pl.from_arrow(runs.to_arrow_reader()),
        pl.from_pandas(runs.df()),
        pl.from_pandas(con.execute("from runs order by n").df()),
        pl.read_database("from runs order by n", con),
    ):
        assert other.equals(frame)
    import pyarrow as pa

    assert pa.table(runs).num_rows == 3
    with pytest.raises(UsageError):
        pl.read_database("copy runs to 'x'", con)


def test_a_connection_fetches_and_cursors(con):
    con.execute("from runs order by n")
    assert con.fetchone() == ("math", "base", 1)
    assert con.fetchmany(1) == [("math", "sft", 2)]
    assert con.fetchall() == [("trivia", "base", 3)]
    assert [column[0] for column in con.execute("from runs").description] == ["task", "variant", "n"]
    assert list(con.fetchnumpy()) == ["task", "variant", "n"]
    assert con.get_table_names("from other") == {"other"}
    with con.cursor() as cursor:
        assert cursor.sql("select count(*) from runs").fetchall() == [(3,)]
        with pytest.raises(UsageError):
            cursor.execute("create table t as select 1")
    assert con.sql("select count(*) from runs").fetchall() == [(3,)]
    con.close()
    with pytest.raises(duckdb.ConnectionException):
        con.sql("from runs")


def test_a_frame_stands_beside_the_relations_and_never_before_one(con):
    frame = pl.DataFrame({"task": ["math"], "title": ["Mathematics"]})
    con.register("titles", frame)
    query = "select distinct title from runs join titles using (task)"
    assert con.sql(query).fetchall() == [("Mathematics",)]
    con.register("titles", con.sql("select 'trivia' as task, 'Trivia' as title"))
    assert con.sql(query).fetchall() == [("Trivia",)]
    assert con.from_arrow(frame).join(con.table("runs"), "task").count("*").fetchall() == [(2,)]
    for name in ("runs", "RUNS", "Duckdb_Views"):
        with pytest.raises(UsageError, match="give the frame another name"):
            con.register(name, frame)
    con.unregister("titles").unregister("runs")
    assert con.sql("show tables").fetchall() == [("runs",)]
    assert con.sql("select sum(n) from runs").fetchall() == [(6,)]


def test_check_reads_leaves_an_open_result_alone(root):
    with locked(root) as raw:
        raw.execute("from range(3)")
        raw.fetchone()
        check_reads(raw, "from runs")
        check_reads(raw, "pivot runs on task using sum(n)")
        assert raw.fetchall() == [(1,), (2,)]


def test_the_spill_folder_is_private_and_goes(tmp_path):
    code = """
import os, stat, sys
from pathlib import Path
import duckdb
from canopy_store.sql.connection import spill_folder

first, second = Path(spill_folder()), Path(spill_folder())
assert first != second and first.parent == second.parent
assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
con = duckdb.connect(config={"memory_limit": "40MB", "threads": 1, "temp_directory": str(first)})
con.execute("create table t as select range as a, repeat('x', 100) || range as b from range(1000000)")
assert sum(path.stat().st_size for path in first.iterdir()) > 1 << 20, "nothing was spilled"
assert con.execute("select count(*) from t").fetchall() == [(1000000,)]
con.close()
assert not first.exists()
pid = os.fork()
if not pid:
    assert Path(spill_folder()).parent != first.parent
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert first.parent.exists()
print(first.parent)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
