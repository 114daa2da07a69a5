"""Promises of the SQL layer: headers, keys, comments, no NaN, and the plain DuckDB shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import duckdb
import polars as pl
import pytest
from stores import import_golden, shell

import canopy_store
from canopy_store import sql
from canopy_store.schema import COLUMNS, TABLES, arrow_schema, view_columns


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("golden") / "s"
    import_golden(root)
    return root


def test_every_view_file_is_listed_and_is_a_bare_select():
    folder = Path(sql.__file__).parent
    names = {path.stem for path in folder.glob("*.sql")} - {"macros"}
    assert names == set(sql.VIEWS)
    for name in sql.VIEWS:
        lines = sql.source(name).splitlines()
        assert [line.split(":")[0] for line in lines[:3]] == ["-- grain", "-- keys", "-- source"]
        assert lines[3].split()[0] in ("select", "with")


@pytest.mark.parametrize("view", sql.VIEWS)
def test_keys_are_unique_and_not_null(golden, view):
    keys = sql.source(view).splitlines()[1].removeprefix("-- keys: ").split(", ")
    frame = canopy_store.read(golden, view)
    assert not frame.select(keys).is_duplicated().any()
    assert not any(frame[key].null_count() for key in keys)


@pytest.mark.parametrize("relation", [*TABLES, *sql.VIEWS])
def test_no_number_is_nan(golden, relation):
    frame = canopy_store.read(golden, relation)
    for name, kind in frame.schema.items():
        if kind == pl.Float64:
            assert not frame[name].is_nan().any(), name


def test_every_column_is_explained_in_the_database_itself(golden):
    with duckdb.connect(golden / "canopy.duckdb", read_only=True) as con:
        rows = con.sql(
            "select table_name, column_name, comment from duckdb_columns() where not internal"
        ).fetchall()
    assert {name for name, _, _ in rows} == {*TABLES, *sql.VIEWS}
    assert [row for row in rows if not row[2]] == []
    used = {column for _, column, _ in rows}
    assert used == {*COLUMNS, *(c.name for t in TABLES for c in view_columns(t))}


def test_schemas_in_files_are_the_schemas_in_code(golden):
    import pyarrow.parquet as pq

    from canopy_store import store

    for table in TABLES:
        for path in store.files(golden, table):
            want = arrow_schema(table, embedding_dim=16 if table == "embeddings" else None)
            assert pq.read_schema(path).equals(want, check_metadata=True)


def test_the_plain_shell_runs_every_view(golden, tmp_path):
    moved = tmp_path / "a folder [1] 'moved'"
    golden.rename(moved)
    try:
        for view in sql.VIEWS:
            count = len(canopy_store.read(moved, view))
            assert shell(moved, f"select count(*) as n from {view}") == [{"n": count}]
        assert shell(moved, "select round(vendi_score([0.5, 0.5], 2), 6) as v") == [{"v": 2.0}]
    finally:
        moved.rename(golden)


def test_an_empty_store_has_every_view(tmp_path, canopy):
    assert canopy("init", "--store", tmp_path / "s")[0] == 0
    for relation in (*TABLES, *sql.VIEWS):
        assert len(canopy_store.read(tmp_path / "s", relation)) == 0
    assert shell(tmp_path / "s", "select count(*) as n from model_metrics") == [{"n": 0}]


def test_names_that_are_hostile_to_paths_and_sql(tmp_path):
    names = ["../../up", "a/b", "'; drop view runs; --", "fam=ily", "ü%41 x", "."]
    rows = [
        {
            "family": name,
            "variant": "v/1",
            "task": "t=1",
            "prompt_id": name,
            "sample": 0,
            "entropy": [1.0],
        }
        for name in names
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "in.parquet")
    canopy_store.import_rollouts(tmp_path / "s" / "t", tmp_path / "in.parquet")
    frame = canopy_store.read(tmp_path / "s" / "t", "model_metrics")
    assert sorted(frame["family"]) == sorted(names)
    assert set(frame["variant"]) == {"v/1"}
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["t"]


def test_formats(golden, canopy, tmp_path):
    query = "select family, variant, task, round(ce_star, 6) as ce_star from model_metrics order by all"
    frame = canopy_store.open(golden).sql(query).pl()
    assert "ce_star" in canopy("sql", query, "--store", golden)[1]
    _, out, _ = canopy("sql", query, "--store", golden, "--format", "csv")
    assert pl.read_csv(out.encode()).equals(frame)
    _, out, _ = canopy("sql", query, "--store", golden, "--format", "json")
    assert pl.DataFrame(json.loads(out)).equals(frame)
    command = [sys.executable, "-m", "canopy_store.cli", "sql", query, "--store", golden]
    parquet = subprocess.run([*command, "--format", "parquet"], capture_output=True, check=True)
    (tmp_path / "out.parquet").write_bytes(parquet.stdout)
    assert pl.read_parquet(tmp_path / "out.parquet").equals(frame)
    code, _, err = canopy("sql", "from rollouts", "--store", golden, "--format", "csv")
    assert (code, "is a list; choose json or parquet" in err) == (2, True)


def test_read_suggests_the_name_meant(golden):
    with pytest.raises(canopy_store.UsageError, match="did you mean model_metrics"):
        canopy_store.read(golden, "model_metric")


def test_others_read_the_store_without_this_package(golden):
    plain = pl.scan_parquet(golden / "rollouts", hive_partitioning=True).collect()
    assert len(plain) == 1920
    assert {"family", "variant", "task", "run", "run_id"} <= set(plain.columns)
    import pyarrow.dataset as ds

    assert ds.dataset(golden / "rollouts", partitioning="hive").count_rows() == 1920


def test_the_public_names_are_these():
    assert sorted(canopy_store.__all__) == [
        "CanopyError",
        "ConflictError",
        "DataError",
        "FitError",
        "StoreError",
        "UsageError",
        "__version__",
        "compact",
        "compare",
        "export",
        "import_rollouts",
        "init",
        "merge",
        "open",
        "power",
        "pull",
        "push",
        "read",
        "remove_run",
        "select_lengths",
        "select_reward",
        "status",
        "verify",
    ]
    assert all(hasattr(canopy_store, name) for name in canopy_store.__all__)


def test_importing_the_package_imports_no_torch():
    code = "import canopy_store, canopy_store.cli, sys; print([m for m in ('torch', 'transformers', "
    code += "'sentence_transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_is_documented_with_an_example():
    from canopy_store.cli import cli

    def walk(command, path):
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*path, name])
        if not getattr(command, "commands", None):
            yield path, command

    for path, command in walk(cli, ["canopy"]):
        assert "Example" in (command.help or ""), path
        assert " ".join(path) in command.help, path
