"""Merge: no row, bit or order is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from chain import save_chain
from stores import (
    RUN,
    contents,
    fill,
    import_alpha,
    ingest_arguments,
    rewrite,
    same_views,
    tables,
    views,
    write_prompts,
)

import canopy_store
from canopy_store import store
from canopy_store.schema import TABLES
from canopy_store.sharing import export, pull
from canopy_store.sharing.merge import merge
from canopy_store.upkeep.compact import compact
from canopy_store.upkeep.verify import verify

PROMPTS = [f"{a} {b}" for a in "abcd" for b in "efg"]  # 12: six shards of two


@pytest.fixture(scope="module")
def origin(tmp_path_factory, chain) -> Path:
    """A store with rows in every table, in six shards each; for reading only."""
    folder = tmp_path_factory.mktemp("shards")
    return fill(folder / "s", chain, write_prompts(folder / "p.jsonl", *PROMPTS))


@pytest.fixture(scope="module")
def measured(origin) -> dict[str, pl.DataFrame]:
    return views(origin)


@pytest.fixture
def root(origin, tmp_path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "s"))


def shards(root: Path, table: str) -> list[str]:
    return sorted({path.name.partition(".")[0][5:] for path in store.files(root, table)})


def mb_for(root: Path, count: float) -> float:
    """The size, in MB, that holds so many of the store's shards of rollouts."""
    sizes = [path.stat().st_size for path in store.files(root, "rollouts")]
    return count * max(sizes) / (1 << 20)


def without_work(found: dict[str, str]) -> dict[str, str]:
    """Of a store's contents all but the locks."""
    return {name: value for name, value in found.items() if ".work" not in name}


# ---------------------------------------------------------------- merge


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another store, of four imported runs and a selection; for reading only."""
    folder = tmp_path_factory.mktemp("other")
    return import_alpha(folder / "s", folder / "in.parquet", 4)


def test_stores_and_exports_are_merged_and_twice_is_once(origin, other, tmp_path):
    shared = export(other, tmp_path / "shared", where="variant = 'base'")
    root = tmp_path / "all"
    runs = sorted([RUN, *canopy_store.read(other, "runs")["run_id"]])
    assert merge([origin, other, shared], root) == runs
    assert verify(root, deep=True).rows() == []
    found = tables(root)
    for table in TABLES:
        both = [*tables(origin)[table], *tables(other)[table]]
        assert sorted(map(str, found[table])) == sorted(map(str, both))
    before = contents(root)
    assert merge([origin, shared], root) == sorted({RUN, *canopy_store.read(shared, "runs")["run_id"]})
    assert {**contents(root), "canopy.duckdb": ""} == {**before, "canopy.duckdb": ""}
    # what jobs must repeat has come along, so they can go on here
    plans = {path.name for path in (root / "plans").glob("*.json")}
    assert plans == {p.name for s in (origin, other) for p in (s / "plans").glob("*.json")}
    assert "embedder=E.json" in plans


def test_runs_that_are_not_complete_stay_where_they_are(other, tmp_path):
    source = Path(shutil.copytree(other, tmp_path / "source"))
    (source / "runs" / "alpha.base.coding.parquet").unlink()
    left = store.files(source, "rollouts")[0]
    left.with_name(".part-00001.parquet.host.1.tmp").write_bytes(b"x")
    runs = merge([source], tmp_path / "s")
    assert len(runs) == 3
    assert "alpha.base.coding" not in runs
    assert not [p for p in (tmp_path / "s" / "rollouts").rglob("*coding*") if "base" in str(p)]
    assert verify(tmp_path / "s", deep=True).rows() == []


@pytest.mark.parametrize("which", ["store", "second source"])
def test_a_conflict_is_refused_with_what_differs(other, origin, tmp_path, which):
    changed = Path(shutil.copytree(other, tmp_path / "changed"))
    path = store.files(changed, "rewards")[0]
    rewrite(path, "rewards", lambda c: c.__setitem__("reward", [0.25] * len(c["reward"])))
    root = tmp_path / "s"
    if which == "store":
        merge([other], root)
        before = contents(root)
        with pytest.raises(canopy_store.ConflictError, match="other values of reward"):
            merge([origin, changed], root)
        assert contents(root) == before
    else:
        with pytest.raises(canopy_store.ConflictError, match="other values of reward"):
            merge([origin, other, changed], root)
        assert verify(root, deep=True).rows() == []  # what came before it is whole
    for source, said in ((root, "the store itself"), (tmp_path / "none", "no such folder")):
        with pytest.raises(canopy_store.CanopyError, match=said):
            merge([source], root)


def test_a_source_is_checked_as_a_stranger_s(other, tmp_path):
    source = Path(shutil.copytree(other, tmp_path / "source"))
    path = store.files(source, "rollouts")[0]
    moved = path.rename(tmp_path / "elsewhere.parquet")
    path.symlink_to(moved)
    for change, said in (
        (lambda: None, "a link out of the folder"),
        (lambda: (path.unlink(), path.write_bytes(b"PAR1PAR1")), "truncated or not a Parquet file"),
        (lambda: (path.unlink(), moved.rename(path.with_name("x.parquet"))), "not where or how"),
    ):
        change()
        with pytest.raises(canopy_store.DataError, match=said):
            merge([source], tmp_path / "s")
        assert not (tmp_path / "s").exists()


def test_a_compacted_run_and_the_same_run_as_it_was_are_one(root, origin, measured, tmp_path):
    compact(root, target_mb=mb_for(root, 4))
    for table in ("scores", "rewards", "embeddings", "embedding_spectra"):
        shutil.rmtree(root / table)
    sparse = Path(shutil.copytree(root, tmp_path / "sparse"))
    assert merge([origin], root) == [RUN]  # what is lacking comes in the shards that are here
    for table in ("scores", "rewards", "embeddings"):
        assert shards(root, table) == shards(root, "rollouts") == ["00006", "00007"]
    assert verify(root, deep=True).rows() == []
    assert same_views(views(root), measured)
    before = contents(root)
    assert merge([origin, sparse], root) == [RUN]
    assert {**contents(root), "canopy.duckdb": ""} == {**before, "canopy.duckdb": ""}
    # part of a job's shards cannot be cut anew: the job must be finished where it began
    half = Path(shutil.copytree(origin, tmp_path / "half"))
    for path in store.files(half, "rewards")[3:]:
        path.unlink()
    store.plan(half, "reward_model", "R", {"reward_model": "R"})
    before = contents(sparse)
    with pytest.raises(canopy_store.ConflictError, match="has part of the run only"):
        merge([half], sparse)
    assert without_work(contents(sparse)) == without_work(before)


def test_a_store_that_travels_keeps_every_view_to_the_last_bit(origin, measured, tmp_path):
    """Scores with their divergences, selections and their spectra, rewards, compacted or not."""
    assert [view for view, frame in measured.items() if frame.is_empty()] == []
    shared = export(origin, tmp_path / "shared")
    pull(shared, tmp_path / "back")
    assert same_views(views(tmp_path / "back"), measured)
    assert tables(tmp_path / "back") == tables(origin)
    compact(tmp_path / "back")
    again = export(tmp_path / "back", tmp_path / "again")
    assert same_views(views(again), measured)
    assert verify(again, deep=True).rows() == []


# ---------------------------------------------------------------- the commands


def test_the_commands(origin, tmp_path, canopy):
    root = tmp_path / "s"
    code, out, _ = canopy("merge", origin, "--store", root)
    assert (code, out) == (0, f"{root}: 1 runs from 1 stores: {RUN}\n")
    code, out, _ = canopy("verify", "--store", root, "--json")
    assert (code, json.loads(out)) == (0, [])
    assert canopy("verify", "--store", root, "--format", "json")[1] == out


def test_another_model_is_another_store_s_conflict(tmp_path, chain, canopy):
    """The same names with other weights are refused by merge as by ingest."""
    other = save_chain(tmp_path / "other", eos=False)
    prompts = write_prompts(tmp_path / "p.jsonl", "a")
    for name, model, more in (("one", chain, []), ("two", other, ["--no-eos"])):
        arguments = ingest_arguments(tmp_path / name, model, prompts, samples=2)
        assert canopy(*arguments, *more)[0] == 0
    with pytest.raises(canopy_store.ConflictError, match="weights_sha256"):
        merge([tmp_path / "two"], tmp_path / "one")
