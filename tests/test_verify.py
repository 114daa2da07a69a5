"""`verify` finds each fault that is planted, one a test, and nothing in a store that is well."""

from __future__ import annotations

import json
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
from stores import RUN, fill, flip, import_golden, rewrite, same_views, views, write_prompts

import canopy_store
from canopy_store import store
from canopy_store.schema import arrow_schema
from canopy_store.upkeep.verify import verify


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
    "the run's name": ("runs", at("run_id", 0, "other"), "holds other, which its name does not say"),
    "the model's name": ("models", at("model_id", 0, "other/x"), "model chain/base is not in models"),
}


@pytest.mark.parametrize("fault", EDITS)
def test_an_edited_file_is_found(copy, fault):
    table, change, what = EDITS[fault]
    path = store.files(copy, table)[0]
    rewrite(path, table, change)
    problems = verify(copy, deep=True, database=False)
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
        (missing_value, "schema differs: run_id"),
        (Path.unlink, "n_shards is 3 here and 2 in its files"),
        (lambda p: p.rename(p.with_name("part.parquet")), "not where or how"),
        (lambda p: p.rename(p.parent.parent / p.name), "not where or how"),
        (lambda p: shutil.copy(p, p.with_name("part-00009.parquet")), "rows share a key"),
        (lambda p: shutil.copytree(p.parent, p.parents[2] / "task=run" / p.parent.name), "stands in"),
    ],
)
def test_a_damaged_file_is_a_row_and_no_error(copy, damage, what):
    damage(store.files(copy, "rollouts")[0])
    problems = verify(copy, database=False)
    assert len(problems.filter(pl.col("what").str.contains(what, literal=True))), problems[
        "what"
    ].to_list()
    assert all(text.isprintable() for text in problems["what"])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("plans/run=chain.base.walk.json", "no readable plan of chain.base.walk"),
        ("canopy.json", "not readable as JSON with a version"),
        ("canopy.duckdb", "cannot be opened"),
    ],
)
def test_a_damaged_file_beside_the_tables(copy, name, what):
    (copy / name).write_text("{")
    assert what in " ".join(verify(copy)["what"])


def test_leftovers_and_runs_not_complete_are_harmless(copy):
    folder = store.files(copy, "rollouts")[0].parent
    (folder / ".part-00000.parquet.host.1.tmp").write_bytes(b"x")
    assert verify(copy).select("what", "harmless").rows() == [
        ("a temporary file of a writer that was stopped", True)
    ]
    store.files(copy, "runs")[0].unlink()
    problems = verify(copy)
    assert problems["harmless"].all()
    assert f"run {RUN} is not complete" in " ".join(problems["what"])


def test_two_texts_of_one_prompt(copy):
    path = store.files(copy, "prompts")[0]
    rows = store.read_rows(path).to_pylist()
    store.add_prompts(copy, "walk", [{**rows[0], "text": "another"}])
    assert "stands with two texts" in " ".join(verify(copy)["what"])


# ---------------------------------------------------------------- one flipped byte


def test_a_flipped_byte_is_found_or_changes_no_view(copy):
    clean = views(copy)
    assert verify(copy, deep=True).is_empty()
    rng = random.Random(20240607)
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)
    harmless = 0
    for _ in range(60):
        path = rng.choice(files)
        place, mask = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        before = path.read_bytes()
        flip(path, place, mask)
        problems = verify(copy, deep=True, database=path.suffix == ".duckdb")
        if problems.filter(~pl.col("harmless")).is_empty():
            harmless += 1
            assert same_views(views(copy), clean), (path, place, mask)
        path.write_bytes(before)
    assert harmless < 30


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
