"""`verify` finds each fault that is planted, one a test, and nothing in a store that is well."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import (
    RUN,
    as_format_1,
    enter,
    fill,
    flip,
    import_golden,
    rewrite,
    same_views,
    views,
    write_prompts,
)

import canopy_store
from canopy_store import store
from canopy_store.schema import TABLES, arrow_schema
from canopy_store.upkeep.verify import verify
from canopy_store.upkeep.verify_rows import CHECKS


@pytest.fixture(scope="session")
def whole(tmp_path_factory, chain) -> Path:
    """A store that is well, for reading only."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = write_prompts(folder / "p.jsonl", "a", "b", "c", "d", "e f")
    return fill(folder / "s", chain, prompts)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s"))


def test_a_store_that_is_well_has_no_problem(whole):
    assert verify(whole, deep=True).rows() == []


def test_a_golden_import_has_no_problem(tmp_path):
    import_golden(tmp_path / "s")
    assert verify(tmp_path / "s", deep=True).rows() == []


def test_an_empty_store_has_no_problem_and_no_store_is_an_error(tmp_path):
    canopy_store.init(tmp_path / "s")
    assert verify(tmp_path / "s").columns == ["file", "table", "what", "todo", "harmless"]
    assert verify(tmp_path / "s").is_empty()
    with pytest.raises(canopy_store.StoreError, match="no store here"):
        verify(tmp_path)


def test_every_check_that_a_table_names_is_there():
    assert {check for table in TABLES.values() for check in table.checks} == {*CHECKS}


# ---------------------------------------------------------------- one fault, one test


def at(name: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns[name][row] = value(columns[name][row]) if callable(value) else value

    return change


def step(value: float) -> Callable[[list[float]], list[float]]:
    return lambda steps: [value, *steps[1:]]


def without(row: int) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    return lambda columns: {k: v[:row] + v[row + 1 :] for k, v in columns.items()}


def doubled(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {k: [*v, v[0]] for k, v in columns.items()}


def longer(columns: dict[str, list[Any]]) -> None:
    """Moves probability between steps: the sum stays."""
    columns["eigenvalues"][0] = [
        x + (0.1, -0.1)[i] if i < 2 else x for i, x in enumerate(columns["eigenvalues"][0])
    ]


def turned(columns: dict[str, list[Any]]) -> None:
    columns["embedding"][0], columns["embedding"][1] = columns["embedding"][1], columns["embedding"][0]


def shorter(columns: dict[str, list[Any]]) -> None:
    for name in ("entropy", "logprob", "eos_logprob"):
        columns[name][3] = columns[name][3][:-1]


def tilted(columns: dict[str, list[Any]]) -> None:
    """Entropies another policy would have: all sums are right, the distribution is not."""
    columns["entropy"] = [[x * 0.3 for x in row] for row in columns["entropy"]]
    columns["entropy"] = [np.array(row, np.float32).tolist() for row in columns["entropy"]]
    columns["entropy_sum"] = [float(np.sum(row)) for row in columns["entropy"]]


EDITS = {
    "entropy below 0": ("rollouts", at("entropy", 3, step(-0.5)), "entropy outside 0 to 1.61"),
    "entropy above the support": ("rollouts", at("entropy", 3, step(1.7)), "entropy outside 0 to 1.61"),
    "entropy NaN": ("rollouts", at("entropy", 3, step(float("nan"))), "entropy outside 0 to 1.61"),
    "logprob above 0": ("rollouts", at("logprob", 3, step(0.5)), "logprob above 0"),
    "logprob -inf": ("rollouts", at("logprob", 3, step(float("-inf"))), "logprob above 0, or not"),
    "eos_logprob above 0": ("rollouts", at("eos_logprob", 3, step(0.5)), "eos_logprob above 0"),
    "log_mass above 0": ("rollouts", at("log_mass", 3, step(0.5)), "log_mass above 0"),
    "more kept than top-k": ("rollouts", at("n_kept", 3, step(6)), "n_kept outside 1 to 5"),
    "n_kept too short": ("rollouts", at("n_kept", 3, lambda x: x[:-1]), "n_kept is not as long"),
    "log_mass_sum": ("rollouts", at("log_mass_sum", 3, -1.0), "log_mass_sum is not the sum"),
    "a scored n_kept of none": ("scores", at("n_kept", 3, step(0)), "n_kept outside 1 to"),
    "top_logprobs above 0": (
        "rollouts",
        at("top_logprobs", 3, lambda x: [[0.5] * len(x[0]), *x[1:]]),
        "top_logprobs above 0",
    ),
    "entropy too long": ("rollouts", at("entropy", 3, lambda x: [*x, 0.0]), "entropy is not as long"),
    "logprob too short": ("rollouts", at("logprob", 3, lambda x: x[:-1]), "logprob is not as long"),
    "token_ids too long": ("rollouts", at("token_ids", 3, lambda x: [*x, 1]), "token_ids is not as"),
    "top_token_ids too long": (
        "rollouts",
        at("top_token_ids", 3, lambda x: [*x, [1, 2, 3]]),
        "top_token_ids is not as long",
    ),
    "no tokens": ("rollouts", at("n_tokens", 3, 0), "n_tokens below 1"),
    "entropy_sum": ("rollouts", at("entropy_sum", 3, lambda x: x + 1e-6), "entropy_sum is not the sum"),
    "surprisal_sum": ("rollouts", at("surprisal_sum", 3, 1.0), "surprisal_sum is not the sum"),
    "stop_entropy_sum": ("rollouts", at("stop_entropy_sum", 3, 1.0), "stop_entropy_sum is not the sum"),
    "a sum without its array": ("rollouts", at("logprob", 3, None), "surprisal_sum is not the sum"),
    "finish_reason": ("rollouts", at("finish_reason", 3, "tired"), "finish_reason neither"),
    "a rollout twice": ("rollouts", doubled, "2 rows share a key"),
    "a rollout gone": ("rollouts", without(3), "n_rollouts is 60 here and 59 in its files"),
    "another run's rollout": ("rollouts", at("run_id", 3, "other"), "run_id is not 'chain.base.walk'"),
    "a prompt nobody knows": ("rollouts", at("prompt_id", 3, "nobody"), "1 of its prompts are not in"),
    "another policy": ("rollouts", tilted, "logging_check: z is"),
    "embedding of length 2": (
        "embeddings",
        at("embedding", 3, lambda x: [2 * v for v in x]),
        "not of unit length",
    ),
    "embedding NaN": ("embeddings", at("embedding", 3, step(float("nan"))), "not of unit length"),
    "embedding gone": ("embeddings", without(3), "lacks 1 that spectra were made of"),
    "embedding of no rollout": ("embeddings", at("sample", 3, 99), "1 rows have no rollout"),
    "embedding twice": ("embeddings", doubled, "2 rows share a key"),
    "embeddings exchanged": ("embeddings", turned, "1 spectra are not those of the embeddings"),
    "eigenvalues": (
        "embedding_spectra",
        at("eigenvalues", 0, lambda x: [v * 0.9 for v in x]),
        "do not sum to 1",
    ),
    "other eigenvalues": ("embedding_spectra", longer, "1 spectra are not those of the embeddings"),
    "negative eigenvalue": (
        "embedding_spectra",
        at("eigenvalues", 0, lambda x: [1.5, *x[1:-1], -0.5]),
        "outside 0 to 1",
    ),
    "embedding_sum": (
        "embedding_spectra",
        at("embedding_sum", 0, step(3.0)),
        "do not agree with embedding_sum",
    ),
    "distances": (
        "embedding_spectra",
        at("semantic_distances", 0, step(3.0)),
        "do not agree with embedding_sum",
    ),
    "samples": ("embedding_spectra", at("samples", 0, lambda x: x[:-1]), "not n long"),
    "a spectrum gone": ("embedding_spectra", without(0), "lacks 12 rollouts of selection all"),
    "a reward of no rollout": ("rewards", at("sample", 3, 99), "1 rows have no rollout"),
    "a reward NaN": ("rewards", at("reward", 3, float("nan")), "reward is not finite"),
    "a reward twice": ("rewards", doubled, "2 rows share a key"),
    "a selected rollout that is none": ("selections", at("sample", 3, 99), "1 rows have no rollout"),
    "another selection": ("selections", without(3), "has 1 that are not of it"),
    "a score above 0": ("scores", at("logprob", 3, step(0.5)), "logprob above 0"),
    "a score's sum": ("scores", at("surprisal_sum", 3, 1.0), "surprisal_sum is not the sum"),
    "a score too short": ("scores", shorter, "entropy is not as long as n_tokens in 1 rows"),
    "a score of no rollout": ("scores", at("prompt_id", 3, "nobody"), "1 rows have no rollout"),
    "the run's tokens": ("runs", at("n_tokens", 0, 7), "n_tokens is 7 here and"),
    "the run's shards": ("runs", at("n_shards", 0, 7), "n_shards is 7 here and 3 in"),
    "the run's family": ("runs", at("family", 0, "other"), "family is other here and chain in"),
    "the run's model": ("runs", at("model_id", 0, "no/model"), "model no/model is not in models"),
    "the run's settings": ("runs", at("settings", 0, "{}"), "its settings are not its plan's"),
    "the run's name": ("runs", at("run_id", 0, "other"), "run_id is not 'chain.base.walk'"),
    "the run's time": ("runs", at("wall_s", 0, 7.0), "wall_s is 7.0 here and"),
    "the model's name": ("models", at("model_id", 0, "other/x"), "model chain/base is not in models"),
    "another model": ("models", at("model_id", 0, "other/x"), "holds other/x, which its name does not"),
    "a model of another family": ("models", at("family", 0, "other"), "family is not 'chain'"),
    "rollouts of another task": ("rollouts", at("task", 3, "other"), "task is not 'walk'"),
    "an embedder's of another": ("embeddings", at("embedder", 3, "F"), "embedder is not 'E'"),
    "a score under another policy": ("scores", at("policy", 3, '{"top_k":5}'), "policy is not '"),
    "a policy that is none": ("scores", at("policy", 3, "["), "cannot be read"),
    "a grade NaN": ("grades", at("score", 3, float("nan")), "score is not finite"),
    "a grade of no rollout": ("grades", at("sample", 3, 99), "1 rows have no rollout"),
    "a verdict that is none": ("judgments", at("verdict", 3, "maybe"), "verdict is none of similar"),
    "a verdict of a failed call": ("judgments", at("status", 3, "failed"), "ok without a verdict, or"),
    "a judgment's status": ("judgments", at("status", 3, "late"), "status neither ok nor failed"),
    "a probability above 1": ("judgments", at("probability", 3, 1.5), "probability outside 0 to 1"),
    "a pair with no rollout": (
        "judgments",
        at("other_sample", 3, 99),
        "other_sample that is no rollout",
    ),
    "a pair twice": ("judgments", doubled, "2 rows share a key"),
    "a cluster below 0": ("clusters", at("cluster", 0, -1), "cluster below 0"),
    "a cluster left out": ("clusters", at("cluster", 0, 7), "are not numbered from 0"),
    "a clustered rollout that is none": ("clusters", at("sample", 0, 99), "1 rows have no rollout"),
    "a grade twice": ("grades", doubled, "2 rows share a key"),
    "work that took less than nothing": ("work", at("seconds", 0, -1.0), "seconds below 0 in 1 rows"),
    "work on a shard twice": ("work", doubled, "2 rows share a key"),
    "two rows of a run": ("runs", doubled, "has 2 rows in runs, needs one"),
    "a spectrum of nothing": (
        "embedding_spectra",
        lambda columns: columns.update(eigenvalues=[[] for _ in columns["eigenvalues"]]),
        "do not sum to 1",
    ),
}


@pytest.mark.parametrize("fault", EDITS)
def test_an_edited_file_is_found(copy, fault):
    table, change, what = EDITS[fault]
    # a fault of the distribution shows over many rollouts, any other in one file
    for path in store.files(copy, table)[: None if change is tilted else 1]:
        rewrite(path, table, change)
        enter(copy, path)
    problems = verify(copy, deep=True, database=False)
    assert "in its record" not in " ".join(problems["what"])  # each fault is found by itself
    found = problems.filter(pl.col("what").str.contains(what, literal=True))
    assert len(found), problems["what"].to_list()
    assert not found["harmless"].any()
    assert all(problems["todo"].str.len_chars() > 5)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), path)


def newer(path: Path) -> None:
    schema = arrow_schema("rollouts").with_metadata({b"canopy_schema": b"rollouts:99"})
    pq.write_table(schema.empty_table(), path)


def other_type(path: Path) -> None:
    rows = store.read_rows(path)
    at_column = rows.schema.get_field_index("n_tokens")
    rows = rows.set_column(at_column, "n_tokens", rows["n_tokens"].cast(pa.int64()))
    pq.write_table(rows, path)


def hostile_columns(path: Path) -> None:
    label = {b"canopy_schema": b"rollouts:1"}
    names = ['"; drop table runs; --', "\x1b[2J\n", "../../etc"]
    schema = pa.schema([pa.field(name, pa.int64()) for name in names], metadata=label)
    pq.write_table(schema.empty_table(), path)


def missing_value(path: Path) -> None:
    rows = store.read_rows(path)
    fields = [field.with_nullable(True) for field in rows.schema]
    rows = rows.cast(pa.schema(fields, metadata=rows.schema.metadata))
    pq.write_table(rows, path)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (cut, "truncated or not a Parquet file"),
        (foreign, "not a canopy_store file of rollouts"),
        (newer, "schema version 99"),
        (other_type, "schema differs: n_tokens"),
        (hostile_columns, "schema differs: columns"),
        (missing_value, "schema differs: family, variant, task, run_id"),
        (Path.unlink, "named by its record, not there"),
        (lambda p: p.rename(p.with_name("part.parquet")), "named by its record, not there"),
        (lambda p: p.rename(p.parent.parent / p.name), "named by its record, not there"),
        (lambda p: flip(p, 1000, 1), "its sha256 is not the one in its record"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes, its record says"),
        (lambda p: swap(p, os.mkfifo), "not a regular file"),
        (lambda p: swap(p, Path.mkdir), "not a regular file"),
        (lambda p: swap(p, lambda place: place.symlink_to(place.with_suffix(".away"))), "a link"),
        (lambda p: swap(p.parent, lambda place: place.symlink_to(place.with_suffix(".away"))), "a link"),
        (lambda p: os.mkfifo(p.with_name("notes.txt")), "not a regular file"),
        (lambda p: p.with_name("notes").mkdir(), "not a regular file"),
    ],
)
def test_a_damaged_file_is_a_row_and_no_error(copy, damage, what):
    damage(store.files(copy, "rollouts")[0])
    problems = verify(copy, database=False)
    found = problems.filter(pl.col("what").str.contains(what, literal=True))
    assert len(found), problems["what"].to_list()
    assert not found["harmless"].any()
    assert all(text.isprintable() for text in problems["what"])


def swap(path: Path, make: Callable[[Path], Any]) -> None:
    """Moves what is there away and makes something else of its name."""
    path.rename(path.with_suffix(".away"))
    make(path)


@pytest.mark.parametrize(
    ("place", "what"),
    [
        (lambda p: p.with_name("part.parquet"), "not where or how this table's files are named"),
        (lambda p: p.parents[1] / p.name, "not where or how this table's files are named"),
        (lambda p: p.with_name("part-00009.parquet"), "no record names it"),
        (lambda p: p.parents[2] / "task=run" / p.parent.name / p.name, "no record names it"),
        (lambda p: p.parents[1] / "run=gone" / p.name, "no record names it"),
    ],
)
def test_a_file_that_no_record_names_is_harmless(copy, place, what):
    before = views(copy)
    path = store.files(copy, "rollouts")[0]
    place(path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, place(path))
    ((found, harmless),) = verify(copy, database=False).select("what", "harmless").rows()
    assert what in found
    assert harmless
    assert same_views(views(copy), before)


def change_record(root: Path, kind: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edits the JSON of the run's record of a kind."""
    path = next(each.path(root) for each in store.records(root, kind))
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def entry(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        next(iter(record["files"].values()))[field] = value

    return change


def naming(name: str) -> Callable[[dict[str, Any]], None]:
    """Has the record name another file in place of its first."""

    def change(record: dict[str, Any]) -> None:
        record["files"][name] = record["files"].pop(next(iter(record["files"])))

    return change


def dropping(start: str) -> Callable[[dict[str, Any]], None]:
    """Has the record name one file less."""

    def change(record: dict[str, Any]) -> None:
        del record["files"][next(name for name in record["files"] if name.startswith(start))]

    return change


_OF_ANOTHER = f"rollouts/family=chain/variant=base/task=walk/run={RUN}2/part-00000.parquet"


@pytest.mark.parametrize(
    ("kind", "change", "what"),
    [
        ("rewards", entry("rows", 7), "24 rows, its record says 7"),
        ("rewards", entry("bytes", 7), "bytes, its record says 7"),
        ("rewards", entry("sha256", "0" * 64), "its sha256 is not the one in its record"),
        ("rewards", entry("sha256", "0"), "not a readable record of a commit"),
        ("rewards", entry("rows", None), "not a readable record of a commit"),
        ("rewards", naming("rewards/../../x.parquet"), "not a readable record of a commit"),
        ("rewards", naming("../x.parquet"), "not a readable record of a commit"),
        ("rewards", naming("/etc/x.parquet"), "not a readable record of a commit"),
        ("rewards", naming("rewards/x.parquet"), "where no file of a table can stand"),
        ("rewards", naming("nothing/x.parquet"), "not a readable record of a commit"),
        ("rewards", naming(f"rewards/reward_model=R/run={RUN}2/part-00000.parquet"), "of another job"),
        ("rewards", naming(f"rewards/reward_model=Q/run={RUN}/part-00000.parquet"), "of another job"),
        ("rewards", naming(f"work/kind=models/name=chain/run={RUN}/part-00000.parquet"), "another job"),
        ("rewards", naming(f"runs/run={RUN}/part-00000.parquet"), "of another job"),
        ("rewards", lambda record: record["files"].clear(), "names no file of its table"),
        ("rewards", lambda record: record.update(version=99), "format version 99"),
        ("rewards", lambda record: record.update(version="2"), "not a readable record of a commit"),
        ("rewards", lambda record: record.update(kind="plans"), "not a readable record"),
        ("rewards", lambda record: record.update(kind=["rewards"]), "not a readable record"),
        ("rewards", lambda record: record["keys"].update(run="other"), "not a readable record"),
        ("rewards", lambda record: [record], "not a readable record"),
        ("rewards", lambda record: {}, "not a readable record"),
        ("rollouts", naming(_OF_ANOTHER), "of another job"),
        ("rollouts", lambda record: record["settings"].update(seed=6), "settings are not its record's"),
        ("rollouts", dropping("runs/"), "has 0 rows in runs, needs one"),
        ("rollouts", dropping("rollouts/"), "n_shards is 3 here and 2 in its files"),
        ("rollouts", dropping("prompts/"), "5 of its prompts are not in prompts"),
        ("embeddings", dropping("embeddings/"), "lacks 24 that spectra were made of"),
        ("embeddings", dropping("embedding_spectra/"), "lacks 24 rollouts of selection all"),
        ("selections", dropping("selections/"), "names no file of its table"),
        ("models", naming(f"runs/run={RUN}/part-00000.parquet"), "of another job"),
        ("embeddings", naming(f"work/kind=x/name=E/run={RUN}/part-00000.parquet"), "of another job"),
    ],
)
def test_an_edited_record_is_found(copy, kind, change, what):
    change_record(copy, kind, change)
    problems = verify(copy, database=False)
    found = problems.filter(pl.col("what").str.contains(what, literal=True))
    assert len(found), problems["what"].to_list()
    assert not found["harmless"].any()


def test_records_that_differ_on_a_file_they_share(tmp_path, chain, whole):
    root = Path(shutil.copytree(whole, tmp_path / "s"))
    record = store.record(root, "rollouts", run=RUN)
    assert record is not None
    (prompts,) = record.of("prompts")
    keys = {"run": "another"}
    other = dataclasses.replace(record, keys=keys, files={prompts: {**record.files[prompts], "rows": 1}})
    store.write_record(root, other)
    assert f"says other of {prompts} than another record" in " ".join(verify(root)["what"])


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"commits/rewards/reward_model=R/run={RUN}.json", "not readable as JSON"),
        ("commits/rewards/x.json", "not readable as JSON"),
        (f"plans/run={RUN}.json", "not a readable plan"),
        ("canopy.json", "not readable as JSON"),
        ("MANIFEST", "not a readable MANIFEST"),
    ],
)
def test_json_that_is_nested_without_end(copy, name, what):
    (copy / name).write_text(NESTED)
    problems = verify(copy, database=False)
    found = problems.filter(pl.col("file") == name, pl.col("what").str.contains(what, literal=True))
    assert len(found), problems.rows()
    assert not found["harmless"].any()


@pytest.mark.parametrize("name", ["canopy.json", f"commits/rewards/reward_model=R/run={RUN}.json"])
def test_json_that_is_huge_is_not_read(copy, name):
    with (copy / name).open("wb") as file:
        file.truncate(1 << 40)  # a hole: no disk holds it, nor memory
    problems = verify(copy, database=False)
    assert problems.filter(file=name)["what"].to_list() == ["over 67,108,864 bytes"]


@pytest.mark.parametrize(
    "name",
    ["canopy.json", "canopy.duckdb", f"plans/run={RUN}.json", "commits/rewards/x.json", "MANIFEST"],
)
def test_a_pipe_is_never_waited_for(copy, name):
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    assert "not a regular file" in " ".join(verify(copy).filter(file=name)["what"])


def test_a_record_that_no_run_has_and_a_misplaced_one(copy):
    record = next(iter(store.records(copy, "rewards")))
    path = record.path(copy)
    shutil.copy(path, path.with_name("run=gone.json"))
    (problem,) = verify(copy, database=False).rows(named=True)
    assert problem["what"] == "not a readable record of a commit"
    assert not problem["harmless"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("plans/run=chain.base.walk.json", "no readable plan of chain.base.walk"),
        ("canopy.json", "not readable as JSON"),
        ("canopy.duckdb", "cannot be opened"),
    ],
)
def test_a_damaged_file_beside_the_tables(copy, name, what):
    (copy / name).write_text("{")
    assert what in " ".join(verify(copy)["what"])


def test_leftovers_are_harmless(copy):
    for folder in (store.files(copy, "rollouts")[0].parent, copy / "plans", copy / "commits"):
        (folder / ".part-00000.parquet.0123abcd.tmp").write_bytes(b"x")
    (copy / "commits" / "notes.txt").write_bytes(b"x")
    what = "a temporary file, of a job under way or of one that was stopped"
    problems = verify(copy)
    assert sorted(problems["what"]) == [what] * 3 + ["no record of a commit"]
    assert problems["harmless"].all()


def test_a_run_not_complete_is_harmless_with_all_that_is_made_of_it(copy):
    record = store.record(copy, "rollouts", run=RUN)
    assert record is not None
    record.path(copy).unlink()
    problems = verify(copy)
    assert problems["harmless"].all()
    texts = problems["what"].to_list()
    assert f"not committed: 3 files of run {RUN}, which is not complete; no view shows them" in texts
    assert texts.count(f"of run {RUN}, which is not complete; no view shows it") == 8
    shard = store.matching(copy, "rollouts/*/*/*/*/*.parquet")[0]
    cut(shard)  # a resumed run would take it for done
    found = verify(copy).filter(~pl.col("harmless"))
    assert found["file"].to_list() == [shard.relative_to(copy).as_posix()]


def test_a_removed_run_without_its_plan(copy):
    record = store.record(copy, "rollouts", run=RUN)
    assert record is not None
    store.remove_record(copy, record)
    (copy / "plans" / f"run={RUN}.json").unlink()
    problems = verify(copy)
    assert problems["harmless"].all()
    assert {*problems["what"]} == {f"of run {RUN}, which is not complete; no view shows it"}
    assert f"canopy rm-run {RUN} --store {copy}" in problems["todo"][0]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("embeddings", "embedder E"),
        ("rewards", "reward_model R"),
        ("scores", "scorer S"),
        ("grades", "grader G"),
        ("judgments", "judge J"),
        ("clusters", "clustering J.components"),
    ],
)
def test_half_a_job_is_harmless(copy, kind, said):
    for record in store.records(copy, kind):
        record.path(copy).unlink()
        (copy / record.of(kind)[0]).unlink()
    problems = verify(copy, database=False).filter(table=kind)
    assert problems.select("what", "harmless").rows() == [
        (f"not committed: 2 files of {said}, which is not done with run {RUN}; no view shows them", True)
    ]
    next((copy / "plans").glob(f"{said.split()[0]}=*")).unlink()
    problems = verify(copy, database=False).filter(table=kind)
    assert {*problems["what"]} == {"no record names it; no view shows it"}
    assert problems["harmless"].all()


def test_a_plan_that_is_not_what_its_jobs_repeated(copy):
    """A setting more, less or other: a job that goes on under its name would be refused."""
    plans = sorted(path.name.removesuffix(".json") for path in (copy / "plans").iterdir())
    kinds = [name.partition("=")[0] for name in plans]
    assert kinds == [
        *("clustering", "embedder", "grader", "judge", "reward_model", "run", "scorer", "selection")
    ]
    for name in plans:
        path = copy / "plans" / f"{name}.json"
        said = json.loads(path.read_text())
        key = sorted(said["settings"])[0]
        others = [{**said["settings"], "more": None}, {**said["settings"], key: "x"}]
        for settings in (*others, {k: v for k, v in said["settings"].items() if k != key}):
            store.write_json(path, {**said, "settings": settings})
            problems = verify(copy).filter(~pl.col("harmless"))
            assert len(problems) == 1, (name, settings)
            assert "its settings are not" in problems["what"][0]
            assert name.startswith("run=") or problems["file"][0] == f"plans/{name}.json"
        store.write_json(path, said)
    assert verify(copy).is_empty()


def test_an_import_of_that_name_need_not_repeat_a_plan(copy):
    """A job under the name made other runs' rows; that it is none of its own is said by the import."""
    (record,) = store.records(copy, "rewards")
    store.write_record(
        copy, dataclasses.replace(record, settings={"reward_model": "R", "engine": "import"})
    )
    assert verify(copy).is_empty()


@pytest.mark.parametrize(
    ("column", "values", "what"),
    [
        ("text", ["another"], "stands with two texts"),
        ("reference", ["7", "7"], None),
        ("reference", ["7", "8"], "stands with two right answers"),
    ],
)
def test_two_texts_of_one_prompt(copy, column, values, what):
    row = next(iter(store.table_rows(copy, "prompts")))[1]
    record = store.record(copy, "rollouts", run=RUN)
    assert record is not None
    files = dict(record.files)
    for source, value in enumerate(values):
        (path,) = store.add_prompts(copy, "walk", [{**row, column: value, "source": str(source)}])
        files[path.relative_to(copy).as_posix()] = store.entry(path)
    store.write_record(copy, dataclasses.replace(record, files=files))
    found = verify(copy)["what"].to_list()
    assert found == ([] if what is None else [f"prompt {row['prompt_id']} {what}"])


# ---------------------------------------------------------------- one flipped byte


def test_a_flipped_byte_is_found_or_changes_no_view(copy):
    clean = views(copy)
    assert verify(copy, deep=True).is_empty()
    rng = random.Random(20240607)
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)
    harmless = 0
    for _ in range(40):
        path = rng.choice(files)
        place, mask = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        before = path.read_bytes()
        flip(path, place, mask)
        problems = verify(copy, deep=True, database=path.suffix == ".duckdb")
        if problems.filter(~pl.col("harmless")).is_empty():
            harmless += 1
            assert same_views(views(copy), clean), (path, place, mask)
        path.write_bytes(before)
    assert harmless < 20


def test_json_is_whatever_it_is(copy):
    for text in (
        "[]",
        "null",
        '{"settings": 3}',
        '{"settings": {"run_id": 3}, "started_at": "x"}',
        "\x00",
    ):
        (copy / "plans" / f"run={RUN}.json").write_text(text)
        assert "no readable plan" in " ".join(verify(copy, database=False)["what"])
        (copy / "MANIFEST").write_text(text)
        assert "not a readable MANIFEST" in " ".join(verify(copy, database=False)["what"])
    (copy / "MANIFEST").write_text(json.dumps({"version": 1, "files": {"../x": None}}))
    assert "not a readable MANIFEST" in " ".join(verify(copy, database=False)["what"])


# ---------------------------------------------------------------- exported folders


def manifest_of(root: Path) -> dict[str, dict[str, Any]]:
    """What a MANIFEST says of every file of a store."""
    return {
        path.relative_to(root).as_posix(): (
            store.entry(path)
            if path.suffix == ".parquet"
            else {"rows": None, "bytes": path.stat().st_size, "sha256": store.sha256(path)}
        )
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix in (".parquet", ".json") and ".work" not in path.parts
    }


def test_a_manifest_names_every_file_and_no_other(copy):
    entries = manifest_of(copy)

    def problems(**changed: dict[str, Any] | None) -> list[tuple[str, str]]:
        files = {name: said for name, said in {**entries, **changed}.items() if said is not None}
        (copy / "MANIFEST").write_text(json.dumps({"version": 2, "files": files}))
        return verify(copy, database=False).select("file", "what").rows()

    assert problems() == []
    for name in (
        f"plans/run={RUN}.json",
        f"commits/rollouts/run={RUN}.json",
        store.files(copy, "rollouts")[0].relative_to(copy).as_posix(),
    ):
        assert problems(**{name: None}) == [(name, "not in MANIFEST")]
        wrong = {**entries[name], "sha256": "0" * 64}
        assert problems(**{name: wrong}) == [(name, "its sha256 is not the one in MANIFEST")]
    lost = {"rows": 1, "bytes": 1, "sha256": "0" * 64}
    assert problems(**{"plans/x.json": lost}) == [("plans/x.json", "named in MANIFEST, not there")]


# ---------------------------------------------------------------- format 1


@pytest.fixture
def old(copy) -> Path:
    """The same store in format 1, as far as that had its tables."""
    return as_format_1(copy)


def test_a_store_of_format_1_is_verified_too(old):
    assert verify(old, deep=True, database=False).rows() == []
    shard = store.files(old, "rollouts")[0]
    rewrite_1(shard, "rollouts", at("entropy_sum", 3, 1.0))
    assert "entropy_sum is not the sum" in " ".join(verify(old, database=False)["what"])
    shutil.copy(shard, shard.with_name("part-00009.parquet"))
    assert "rows share a key" in " ".join(verify(old, database=False)["what"])


def rewrite_1(path: Path, table: str, change: Callable[[dict[str, list[Any]]], Any]) -> None:
    columns = store.read_rows(path).to_pydict()
    change(columns)
    store.write_rows(path, table, columns, version=1)


def test_format_1_without_a_runs_row(old):
    (old / "runs" / f"{RUN}.parquet").unlink()
    problems = verify(old, database=False)
    assert problems["harmless"].all()
    assert f"not committed: 3 files of run {RUN}, which is not complete" in " ".join(problems["what"])


def test_format_1_while_it_is_upgraded(whole, old):
    """Files of both formats, and records, stand in it until canopy.json says 2."""
    for name in ("rollouts", "scores", "commits", f"runs/run={RUN}", "models/family=chain"):
        if (whole / name).is_dir():
            shutil.copytree(whole / name, old / name, dirs_exist_ok=True)
    problems = verify(old, deep=True, database=False)
    assert problems["harmless"].all(), problems.rows()
    assert {*problems["what"]} == {
        "of an upgrade that was stopped",
        "records of an upgrade that was stopped",
    }


def test_what_an_upgrade_has_not_removed_yet(copy):
    shutil.copy(store.files(copy, "runs")[0], copy / "runs" / f"{RUN}.parquet")
    ((what, harmless),) = verify(copy).select("what", "harmless").rows()
    assert (what, harmless) == ("of an upgrade that was stopped", True)


def test_format_2_whose_canopy_json_says_1(copy):
    (copy / "canopy.json").write_text(json.dumps({"format": "canopy_store", "version": 1}))
    problems = verify(copy, database=False).filter(~pl.col("harmless"))
    assert f"canopy.json says format 1, which does not have run {RUN}" in " ".join(problems["what"])
