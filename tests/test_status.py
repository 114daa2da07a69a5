"""`status` tells what is there, and what is not finished, from records, plans and the table runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from stores import RUN, as_format_1, fill, rollout_rows, write_parquet, write_prompts

import canopy_store
from canopy_store import store
from canopy_store.upkeep.status import made_of_runs


@pytest.fixture(scope="session")
def filled(tmp_path_factory, chain) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    prompts = write_prompts(folder / "p.jsonl", "a", "b", "c", "d", "e f")
    return fill(folder / "s", chain, prompts)


@pytest.fixture
def copy(filled, tmp_path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "s"))


def of_run(root: Path) -> dict[str, object]:
    (row,) = canopy_store.status(root).rows(named=True)
    return row


def test_a_complete_run(filled):
    shards = store.files(filled, "rollouts")
    tokens = canopy_store.read(filled, "rollouts")["n_tokens"].sum()
    assert of_run(filled) == {
        "run_id": RUN,
        "family": "chain",
        "variant": "base",
        "task": "walk",
        "complete": True,
        "shards": 3,
        "shards_planned": 3,
        "rollouts": 60,
        "tokens": tokens,
        "bytes": sum(path.stat().st_size for path in shards),
        "entropies": True,
        "embedders": "E",
    }


def test_a_run_that_is_not_complete(copy):
    record = store.record(copy, "rollouts", run=RUN)
    assert record is not None
    record.path(copy).unlink()
    (copy / record.of("rollouts")[0]).unlink()
    row = of_run(copy)
    assert not row["complete"]
    assert (row["shards"], row["shards_planned"]) == (2, 3)
    assert (row["rollouts"], row["tokens"]) == (None, None)  # no footer is read
    assert row["bytes"] == sum((copy / name).stat().st_size for name in record.of("rollouts")[1:])


def test_an_embedder_that_is_under_way(copy):
    (record,) = store.records(copy, "embeddings")
    store.plan(copy, "embedder", "F", {"embedder": "F"})
    assert of_run(copy)["embedders"] == "E"
    for number, name in enumerate(record.of("embeddings")[:2]):
        path = store.shard_path(store.folder(copy, "embeddings", embedder="F", run=RUN), number)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(copy / name, path)
    assert of_run(copy)["embedders"] == "E, F (2/3)"
    record.path(copy).unlink()
    assert of_run(copy)["embedders"] == "E (3/3), F (2/3)"  # not committed, if but for that


def test_what_is_made_of_runs_is_told_with_how_many_it_covers(copy, tmp_path, canopy):
    """Of complete runs alone, whatever its policy; and what was begun and has done none."""
    rows = rollout_rows(reward=[0.1, 0.2, 0.3, 0.4, 0.5], embedding=[[1.0, 0.0]] * 5)
    file = write_parquet(tmp_path / "in.parquet", rows)
    canopy_store.import_rollouts(copy, file, reward_model="R", max_new_tokens=8)
    (scored,) = store.records(copy, "scores")
    again = replace(scored, keys={**scored.keys, "policy": "0" * 16})
    files = {n.replace(scored.keys["policy"], "0" * 16): said for n, said in scored.files.items()}
    for old, new in zip(scored.files, files, strict=True):
        shutil.copy(copy / old, copy / new)
    store.write_record(copy, replace(again, files=files))
    store.plan(copy, "grader", "H", {"grader": "H"})
    expected = {
        ("embedder", "E"): 1,
        ("embedder", "imported"): 1,
        ("grader", "G"): 1,
        ("grader", "H"): 0,
        ("judge", "J"): 1,
        ("clustering", "J.components"): 1,
        ("reward_model", "R"): 2,
        ("scorer", "S"): 1,
        ("selection", "reward_top_50"): 1,
    }
    assert {row[:2]: row[2:] for row in made_of_runs(copy).rows()} == {
        key: (runs, 2) for key, runs in expected.items()
    }
    out = canopy("status", "--store", copy)[1]
    for line in (
        "embedders: E (1 of 2 runs), imported (1 of 2 runs)",
        "graders: G (1 of 2 runs), H (0 of 2 runs)",
        "reward models: R (2 of 2 runs)",
        "scorers: S (1 of 2 runs)",
        "selections: reward_top_50 (1 of 2 runs)",
    ):
        assert line in out.splitlines()
    record = store.record(copy, "rollouts", run=RUN)
    assert record is not None
    record.path(copy).unlink()
    assert made_of_runs(copy).filter(name="R").row(0)[2:] == (1, 1)


def test_no_footer_of_rollouts_is_read(copy):
    before = of_run(copy)
    for path in store.files(copy, "rollouts"):
        path.write_bytes(b"x" * path.stat().st_size)
    assert of_run(copy) == before


def test_a_row_of_runs_that_cannot_be_read(copy):
    (path,) = store.files(copy, "runs")
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(canopy_store.CanopyError, match="part-00000"):
        canopy_store.status(copy)


def test_entropies_that_lack_until_scores_complete_them(tmp_path):
    rows = [{**row, "entropy": None, "n_tokens": 3} for row in rollout_rows(lengths=(3, 3))]
    rows = [{**row, "temperature": 1.0, "top_k": 0, "top_p": 1.0} for row in rows]
    frame = pl.DataFrame(rows).with_columns(pl.col("entropy").cast(pl.List(pl.Float64)))
    frame.write_parquet(tmp_path / "f.parquet")
    whole = write_parquet(tmp_path / "g.parquet", rollout_rows(variant="other"))  # no logprob
    root = tmp_path / "s"
    canopy_store.import_rollouts(root, tmp_path / "f.parquet", max_new_tokens=8)
    canopy_store.import_rollouts(root, whole, max_new_tokens=8)

    def entropies() -> dict[str, bool]:
        return dict(canopy_store.status(root).select("run_id", "entropies").rows())

    assert entropies() == {"f.base.t": False, "f.other.t": True}
    policy = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    keys = {"scorer_id": "f/base", "policy": store.content_id(policy), "run": "f.base.t"}
    where = store.folder(root, "scores", scorer_id="f/base", run="f.base.t")
    path = where / f"part-00000.{keys['policy']}.parquet"
    steps = [[0.5, 0.5, 0.5]] * 2
    columns = {
        **{"run_id": ["f.base.t"] * 2, "prompt_id": ["p"] * 2, "sample": [0, 1]},
        **{"policy": [store.canonical(policy)] * 2, "entropy": steps, "entropy_sum": [1.5] * 2},
    }
    store.write_rows(path, "scores", columns)
    store.commit(root, "scores", keys, [path], {})
    assert entropies() == {"f.base.t": True, "f.other.t": True}


def test_an_empty_store(tmp_path):
    assert canopy_store.status(store.init(tmp_path / "s")).is_empty()


def test_a_store_of_format_1_is_told_by_its_listing(copy):
    before = of_run(copy)
    as_format_1(copy)
    sizes = [path.stat().st_size for path in store.files(copy, "rollouts")]
    assert of_run(copy) == {**before, "bytes": sum(sizes)}
    next((copy / "embedding_spectra" / "embedder=E" / "selection=all").glob("*/*.parquet")).unlink()
    assert of_run(copy)["embedders"] == "E (2/3)"
