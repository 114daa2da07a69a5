"""Promises of the SQL layer: headers, keys, comments, no NaN, and the plain DuckDB shell."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from stores import import_golden, shell

import canopy_store
from canopy_store import sql
from canopy_store.analysis import bootstrap
from canopy_store.schema import COLUMNS, TABLES, arrow_schema
from canopy_store.sql.columns import METRICS, VIEW_DOCS, column_of
from canopy_store.sql.horizon import AT_HORIZON, file_at


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("golden") / "s"
    import_golden(root)
    return root


def test_every_view_file_is_listed_and_is_a_bare_select():
    folder = Path(sql.__file__).parent
    names = {path.stem for path in folder.glob("*.sql")} - {"macros"}
    listed = {*sql.VIEWS, *sql.MERGED, *(file_at(name) for name in AT_HORIZON)}
    assert names == listed
    for name in listed:
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
    for relation, name, comment in rows:
        column = column_of(relation, name)
        assert column.doc
        assert comment == (f"{column.doc} [{column.unit}]" if column.unit else column.doc)


def described(view: str, root: Path) -> dict[str, str]:
    """The type of each of a view's columns."""
    with canopy_store.open(root) as con:
        return {name: kind for name, kind, *_ in con.sql(f"describe {view}").fetchall()}


@pytest.mark.parametrize("view", sql.VIEWS)
def test_every_column_of_a_view_is_defined_with_its_type(golden, view):
    kinds = described(view, golden)
    assert {name: column_of(view, name).type for name in kinds} == kinds
    assert {column.name for column in VIEW_DOCS.get(view, ())} <= set(kinds)  # nothing beside them
    with pytest.raises(KeyError):
        column_of(view, "no such column")


def test_no_definition_of_a_column_is_idle_or_hidden(golden):
    shown = {name for view in sql.VIEWS for name in described(view, golden)}
    shared = [column.name for column in METRICS]
    assert len(set(shared)) == len(shared)
    assert set(shared) <= shown
    assert set(VIEW_DOCS) <= set(sql.VIEWS)
    # what holds in every view is in no view another
    assert not {c.name for columns in VIEW_DOCS.values() for c in columns} & {*shared, *COLUMNS}


@pytest.mark.parametrize(
    ("relation", "name", "grain"),
    [
        ("runs", "n_rollouts", "Rollouts in the run."),
        ("prompt_metrics", "n_rollouts", "Rollouts of the prompt in the selection."),
        ("model_metrics", "n_rollouts", "Rollouts of the run in the selection."),
        ("length_terciles", "n_rollouts", "of the prompt in the tercile"),
        ("model_length_terciles", "n_rollouts", "of all prompts in the tercile"),
        ("logging_check", "n_rollouts", "with logprob and entropy"),
        ("cross_entropy", "n_rollouts", "Scored rollouts of the prompt"),
        ("kl_divergence", "n_rollouts", "Scored rollouts of the run"),
        ("runs", "n_prompts", "Prompts in the run."),
        ("model_metrics", "n_prompts", "with a rollout in the selection"),
        ("model_length_terciles", "n_prompts", "with a rollout in the tercile"),
        ("kl_divergence", "n_prompts", "with a scored rollout"),
        ("rollouts", "n_tokens", "N: generated tokens"),
        ("rollout_metrics", "n_tokens", "N: generated tokens"),
        ("scored_rollouts", "n_tokens", "N: generated tokens"),
        ("prompt_metrics", "n_tokens", "of the prompt's rollouts"),
        ("model_metrics", "n_tokens", "of the run's rollouts"),
        ("rollout_metrics", "entropy_rate", "r_i: entropy_sum / n_tokens of the rollout."),
        ("prompt_metrics", "entropy_rate", "Mean over the prompt's rollouts"),
        ("model_metrics", "entropy_rate", "Mean over prompts"),
        ("length_terciles", "entropy_rate", "Mean over the tercile's rollouts"),
        ("model_length_terciles", "entropy_rate", "Mean over prompts of the tercile's"),
        ("prompt_metrics", "ce_star", "other than 'all' the mean of that subset, and no entropy"),
        ("model_metrics", "ce_star", "CE*: mean over prompts"),
        ("ce_star_decomposition", "ce_star", "stop_entropy + content_entropy"),
        ("ce_star_decomposition", "stop_entropy", "mean stop_entropy_sum"),
        ("eos_trajectory", "stop_entropy", "at the position"),
        ("entropy_trajectory", "active", "reach the position."),
        ("eos_trajectory", "active", "of those with eos_logprob"),
        ("prompt_metrics", "rho_pearson", "over the prompt's rollouts"),
        ("model_metrics", "rho_pearson", "weighted by n_rollouts - 3"),
        ("model_metrics", "rho_kendall", "weighted by pairs"),
        ("model_metrics", "vendi_score", "Geometric mean over prompts"),
        ("panel", "vendi_score", "the prompt's spectrum"),
        ("cross_entropy", "kl_se", "over the prompt's rollouts"),
        ("kl_divergence", "kl_se", "these prompts given"),
        ("kl_divergence", "kl_se_prompts", "over prompts"),
        ("kl_trajectory", "kl_se", "over active rollouts"),
        ("cross_entropy", "n_outside", "the prompt's n_rollouts"),
        ("kl_trajectory", "n_outside", "steps here"),
        ("training", "split", "train, or the corpus that was read"),
        ("perplexity", "split", "Part of the corpus"),
        ("option_accuracy", "split", "Part of the task"),
        ("rollouts", "entropy", "NULL where the engine gave none"),
        ("selected_rollouts", "entropy", "whole support; where the engine gave none, from scores"),
        ("rollout_metrics", "surprisal_sum", "where the engine gave none, from scores"),
    ],
)
def test_a_columns_meaning_is_that_of_its_view(relation, name, grain):
    assert grain in column_of(relation, name).doc


def test_schemas_in_files_are_the_schemas_in_code(golden):
    import pyarrow.parquet as pq

    from canopy_store import store

    for table in TABLES:
        for path in store.files(golden, table):
            want = arrow_schema(table, embedding_dim=16 if table == "embeddings" else None)
            assert pq.read_schema(path).equals(want, check_metadata=True)


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        ("same_policy", r"\$\.temperature"),
        ("varies", r"1e-12 \* "),
        ("number_of", r"1 / squared_similarity"),
        ("passes", r"5\.7e-7"),
        ("diversity_of_sum", r"1 - \(\w*\.?squared_norm|embedding_sum\) - "),
    ],
)
def test_a_rule_is_written_once(rule, pattern):
    """In the macro; the views call it, and `analysis.bootstrap` repeats two of them for its draws."""
    written = {name for name in ("macros", *sql.VIEWS) if re.search(pattern, sql.source(name))}
    calling = {name for name in sql.VIEWS if f"{rule}(" in sql.source(name)}
    assert written == {"macros"}
    assert len(re.findall(pattern, sql.source("macros"))) == 1
    assert calling


def in_duckdb(expression: str, **columns: np.ndarray) -> np.ndarray:
    """What DuckDB gives for an expression of columns, with the macros; NULL as NaN."""
    with duckdb.connect() as con:
        con.execute(sql.source("macros"))
        con.register("given", pl.DataFrame(columns))
        return con.sql(f"select ({expression})::double as x from given").pl()["x"].to_numpy()


def test_sql_and_python_decide_alike_what_is_constant():
    sizes = [0.0, 1e-9, 1e-3, 0.7, 1.0, 1.5, 300.0, 1e6, 1e12]
    gaps = [0, 1e-16, 1e-13, 0.9e-12, 0.999e-12, 1e-12, 1.001e-12, 1.1e-12, 2e-12, 1e-10, 1e-9]
    low, gap, sign = (a.ravel() for a in np.meshgrid(sizes, gaps, [1, -1]))
    low, high = sign * low, sign * low + gap * np.maximum(1, low)
    ours = bootstrap.varies(low, high)
    theirs = in_duckdb("varies(lo, hi)", lo=low, hi=high)
    assert (ours == theirs.astype(bool)).all()
    assert not bootstrap.varies(1.0, 1 + 0.9e-12)
    assert bootstrap.varies(1.0, 1 + 1e-10)


def test_sql_and_python_give_one_diversity():
    rng = np.random.default_rng(0)
    n = np.array([0, 1, 2, 3, 40, 1000] * 20, float)
    squared_norm = rng.uniform(0, 1, len(n)) * n**2
    ours = bootstrap.diversity_of_sum(squared_norm, n)
    theirs = in_duckdb("diversity_of_sum(s, n)", s=squared_norm, n=n)
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert np.isnan(ours).tolist() == (n < 2).tolist()


def test_the_plain_shell_runs_every_view(golden, tmp_path):
    moved = tmp_path / "a folder [1] 'moved'"
    golden.rename(moved)
    try:
        for view in sql.VIEWS:
            count = len(canopy_store.read(moved, view))
            assert shell(moved, f"select count(*) as n from {view}") == [{"n": count}]
        for name in AT_HORIZON:
            with canopy_store.open(moved) as con:
                [(count,)] = con.sql(f"select count(*) from {name}_at(7)").fetchall()
            assert shell(moved, f"select count(*) as n from {name}_at(7)") == [{"n": count}]
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
        "calibrate",
        "ce_star_estimates",
        "compact",
        "compare",
        "export",
        "import_options",
        "import_rollouts",
        "init",
        "merge",
        "open",
        "pass_at_k_curve",
        "power",
        "power_of_regression",
        "pull",
        "push",
        "read",
        "read_panel",
        "regress",
        "remove_corpus",
        "remove_run",
        "remove_task",
        "select_lengths",
        "select_reward",
        "status",
        "upgrade",
        "verify",
        "write_figures",
        "write_report",
    ]
    assert all(callable(getattr(canopy_store, n)) for n in canopy_store.__all__ if n != "__version__")
    assert not hasattr(canopy_store, "write_reports")


def test_importing_the_package_imports_nothing_slow():
    code = "import canopy_store, canopy_store.cli, sys; print([m for m in ('torch', 'transformers', "
    code += "'sentence_transformers', 'altair', 'statsmodels', 'scipy.stats') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
