"""Stores of format 1, written by the version that had it, are read as before and upgraded without loss.

tests/data/format1 was made once: ``sampled``, four prompts of model/ with embeddings, rewards, scores
under two policies and a selection, and a run begun and half done; ``imported``, four runs of
source.parquet with matched lengths. expected.json holds what that version answered.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from stops import stopped
from stores import contents, flip, rollouts, same_views, shell, tables, views

import canopy_store
from canopy_store import store
from canopy_store.schema import FORMAT_VERSION, TABLES, arrow_schema
from canopy_store.upkeep.compact import compact
from canopy_store.upkeep.upgrade import upgrade
from canopy_store.upkeep.verify import verify

DATA = Path(__file__).parent / "data" / "format1"
EXPECTED = json.loads((DATA / "expected.json").read_text())
NAMES = ("sampled", "imported")
RUN, HALF = "chain.base.walk", "chain.base.half"


@pytest.fixture(params=NAMES)
def old(request, tmp_path) -> Path:
    """A store of format 1."""
    return Path(shutil.copytree(DATA / request.param, tmp_path / request.param))


@pytest.fixture
def sampled(tmp_path) -> Path:
    return Path(shutil.copytree(DATA / "sampled", tmp_path / "sampled"))


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Views and tables of each store as it is, by its name."""
    return {name: (views(DATA / name), tables(DATA / name)) for name in NAMES}


def same(root: Path, measured: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    """Whether every view and every table is what it was, to the last bit."""
    of_views, of_tables = measured[root.name.partition(" ")[0]]
    return same_views(views(root), of_views) and str(tables(root)) == str(of_tables)


def close(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return one == other


# ---------------------------------------------------------------- as it is


@pytest.mark.parametrize("name", NAMES)
def test_a_store_of_format_1_answers_as_before(name, measured):
    of_views, of_tables = measured[name]
    expected = EXPECTED[name]
    assert {table: len(of_tables[table]) for table in expected["rows"]} == expected["rows"]
    for view in ("model_metrics", "cross_entropy"):
        rows = sorted(of_views[view].to_dicts(), key=lambda row: (row["run_id"], str(row)))
        before = sorted(expected[view], key=lambda row: (row["run_id"], str(row)))
        columns = before[0] if before else ()
        keys = [c for c in ("run_id", "selection", "prompt_id", "scorer_id", "policy") if c in columns]
        by_key = {tuple(row[key] for key in keys): row for row in rows}
        assert len(by_key) == len(before)
        for row in before:
            now = by_key[tuple(row[key] for key in keys)]
            assert [c for c in row if c in now and not close(row[c], now[c])] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_store_of_format_1_is_only_read(name, canopy, tmp_path):
    root = shutil.copytree(DATA / name, tmp_path / name)
    before = contents(root)
    run = canopy_store.read(root, "runs")["run_id"][0]
    for command in (
        ["compact"],
        ["rm-run", run, "--yes"],
        ["import", DATA / "source.parquet"],
        ["init"],
    ):
        code, _, said = canopy(*command, "--store", root)
        assert (code, f"canopy upgrade --store {root}" in said) == (1, True), said
    assert contents(root) == before


# ---------------------------------------------------------------- upgraded


def test_an_upgraded_store_is_the_same_to_the_last_bit(old, measured):
    done: list[tuple[int, int]] = []
    said: list[str] = []
    files = len(list(old.rglob("*.parquet")))
    assert upgrade(old, on_file=lambda *at: done.append(at), say=said.append) == files
    assert done == [(at, files) for at in range(1, files + 1)]
    assert said == []
    assert json.loads((old / "canopy.json").read_text())["version"] == FORMAT_VERSION
    assert same(old, measured)
    assert verify(old, deep=True)["harmless"].all()
    runs = canopy_store.read(old, "runs")["run_id"].sort().to_list()
    assert shell(old, "select run_id from runs order by 1") == [{"run_id": run} for run in runs]
    # as this version writes them, and in no other place
    for path in old.rglob("*.parquet"):
        table = path.relative_to(old).parts[0]
        schema = pq.read_schema(path)
        size = schema.field("embedding").type.list_size if table == "embeddings" else None
        assert schema.equals(arrow_schema(table, size), check_metadata=True), path
        assert pq.read_metadata(path).row_group(0).column(0).has_offset_index
        assert store.path_keys(table, path.relative_to(old).as_posix()) is not None
    before = contents(old)
    assert upgrade(old) == 0
    assert contents(old) == before


def test_an_upgraded_store_equals_an_import_of_the_same_source(tmp_path):
    root, fresh = Path(shutil.copytree(DATA / "imported", tmp_path / "old")), tmp_path / "fresh"
    upgrade(root)
    canopy_store.import_rollouts(fresh, DATA / "source.parquet", max_new_tokens=64)
    for table in ("models", "rollouts", "embeddings", "rewards"):
        keys = TABLES[table].keys
        frames = [canopy_store.read(each, table).sort(keys) for each in (root, fresh)]
        assert frames[0].equals(frames[1]), table
    # the same source again is once, as in a store that never was of format 1
    before = {name: value for name, value in contents(root).items() if name != "canopy.duckdb"}
    canopy_store.import_rollouts(root, DATA / "source.parquet", max_new_tokens=64)
    assert {n: v for n, v in contents(root).items() if n in before and ".work" not in n} == {
        n: v for n, v in before.items() if ".work" not in n
    }
    kept = [{(r.kind, *r.keys.values()): r.settings for r in store.records(s)} for s in (root, fresh)]
    assert {key: kept[0].get(key) for key in kept[1]} == kept[1]


def test_an_upgraded_store_can_be_worked_on(sampled, canopy, measured):
    """Jobs know what is done; runs are compacted and removed like any other."""
    upgrade(sampled)
    before = {n: v for n, v in contents(sampled).items() if n.startswith(("commits/", "scores/"))}
    score = ["ingest", "score", "--scorer", DATA / "model", "--policy", "full", "--store", sampled]
    assert canopy(*score)[0] == 0
    assert canopy("select", "reward", "--keep", "0.5", "--store", sampled)[0] == 0
    assert {
        n: v for n, v in contents(sampled).items() if n.startswith(("commits/", "scores/"))
    } == before
    assert compact(sampled) == {RUN: (4, 1)}
    assert same_views(views(sampled), measured["sampled"][0])
    assert canopy_store.remove_run(sampled, RUN) > 0
    assert canopy_store.read(sampled, "scores").is_empty()


def test_a_run_that_was_begun_is_finished_by_its_ingest(sampled, canopy):
    upgrade(sampled)
    (where,) = (path for path in (sampled / "rollouts").rglob("run=*") if HALF in path.name)
    before = contents(where)
    assert sorted(before) == ["part-00000.parquet", "part-00002.parquet"]
    assert [run["complete"] for run in store.runs(sampled)] == [False, True]
    options = {
        "model": DATA / "model",
        "family": "chain",
        "variant": "base",
        "task": "walk",
        "prompts": DATA / "prompts.jsonl",
        "samples": 6,
        "max-new-tokens": 20,
        "seed": 5,
        "prompts-per-shard": 1,
        "top-k": 5,
        "top-logprobs": 2,
        "run": HALF,
    }
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    code, _, said = canopy("ingest", "rollouts", "--store", sampled, *given)
    assert code == 0, said
    after = contents(where)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    assert len(rollouts(sampled).filter(pl.col("run_id") == HALF)) == 24
    assert verify(sampled, deep=True).rows() == []


# ---------------------------------------------------------------- what was not finished


def remove(root: Path, pattern: str) -> None:
    files = list(root.glob(pattern))
    assert files
    for path in files:
        path.unlink()


def test_what_a_job_has_not_finished_is_left_to_it(sampled, canopy):
    """It is told, shown when it is whole, and the shards that are there are kept."""
    remove(sampled, "rewards/*/*/part-00002.parquet")
    remove(sampled, "scores/*/*/part-00001.55d4050fd7f9b108.parquet")
    remove(sampled, "embedding_spectra/*/selection=reward*/*/part-00003.parquet")
    said: list[str] = []
    upgrade(sampled, say=said.append)
    lacks = "3 of 4 shards, shown once that job is finished: run it again"
    assert sorted(said) == [
        f"run {RUN}: embedding_spectra of E: {lacks}",
        f"run {RUN}: rewards of R: {lacks}",
        f"run {RUN}: scores of chain/base: {lacks}",
    ]
    assert [record.keys["policy"] for record in store.records(sampled, "scores")] == ["aa6c0b6edffcebf3"]
    for table, rows in (("rewards", 0), ("scores", 24), ("embeddings", 24)):
        assert len(canopy_store.read(sampled, table)) == rows
    where = next((sampled / "scores").rglob("run=*"))
    before = contents(where)
    for policy in ("run", "full"):
        score = ["ingest", "score", "--scorer", DATA / "model", "--policy", policy]
        assert canopy(*score, "--store", sampled)[0] == 0
    after = contents(where)
    assert len(after) == 8
    assert {name: after[name] for name in before} == before
    assert len(canopy_store.read(sampled, "scores")) == 48
    store.embeddings.add_spectra(sampled, RUN)
    spectra = canopy_store.read(sampled, "embedding_spectra").filter(pl.col("selection") != "all")
    assert len(spectra) == 4
    assert verify(sampled, deep=True)["harmless"].all()


def test_embeddings_without_their_spectra_get_them(sampled, measured):
    """In format 1 they came after the embeddings, in format 2 a shard that has embeddings is done."""
    remove(sampled, "embedding_spectra/*/selection=all/*/part-00001.parquet")
    upgrade(sampled)
    assert same(sampled, measured)


def test_what_an_import_had_for_some_rollouts_is_whole(tmp_path):
    root = Path(shutil.copytree(DATA / "imported", tmp_path / "imported"))
    remove(root, "rewards/*/run=alpha.base.coding/*.parquet")
    rows = len(canopy_store.read(root, "rewards"))
    said: list[str] = []
    upgrade(root, say=said.append)
    assert said == []
    assert len(canopy_store.read(root, "rewards")) == rows > 0


# ---------------------------------------------------------------- refused


def test_what_cannot_be_upgraded_is_one_line_and_changes_nothing(sampled, canopy):
    before = contents(sampled)

    def refused(part: str) -> None:
        code, _, said = canopy("upgrade", "--store", sampled)
        assert (code, len(said.splitlines())) == (1, 1), said
        assert part in said
        now = contents(sampled)
        assert {name: now[name] for name in before} == before

    with store.holding(sampled, RUN):
        refused(f"run {RUN}: in use by another process")
    work = sampled / ".work" / f"run={RUN}"
    work.mkdir()
    (work / "journal.json").write_text("{}")
    refused(f"run {RUN} was stopped half way; finish it with the version that began it")
    (work / "journal.json").unlink()
    (sampled / "MANIFEST").write_text("{}")
    assert "an exported folder" in canopy("upgrade", "--store", sampled)[2]
    (sampled / "MANIFEST").unlink()
    (sampled / "canopy.json").write_text('{"version": 3}')
    assert "format version 3" in canopy("upgrade", "--store", sampled)[2]
    (sampled / "canopy.json").write_text('{"version": 1}')
    assert canopy("upgrade", "--store", sampled)[0] == 0
    assert not work.exists()  # what a compaction had taken out of the store


@pytest.mark.parametrize("name", NAMES)
def test_files_of_one_format_under_the_other_s_number_are_an_error(name, canopy, tmp_path):
    """They would show no row, and an upgrade would take the rows of runs for what it had left behind."""
    old = Path(shutil.copytree(DATA / name, tmp_path / "old"))
    new = Path(shutil.copytree(DATA / name, tmp_path / "new"))
    upgrade(new)
    for root, right, wrong in ((old, 1, 2), (new, 2, 1)):
        said = f"write {right} into it"
        (root / "canopy.json").write_text(json.dumps({"version": wrong}))
        before = contents(root)
        for command in (
            ["status"],
            ["sql", "from runs"],
            ["upgrade"],
            ["export", "--out", tmp_path / "o"],
        ):
            code, _, line = canopy(*command, "--store", root)
            assert (code, len(line.splitlines()), said in line) == (1, 1, True), line
        code, _, line = canopy("import", DATA / "source.parquet", "--store", root)
        assert (code, said in line) == (1, True)
        with pytest.raises(canopy_store.StoreError, match=said):
            canopy_store.open(root)
        assert any(said in todo for todo in verify(root)["todo"])
        assert contents(root) == before
        (root / "canopy.json").write_text(json.dumps({"version": right}))
        assert len(canopy_store.read(root, "runs")) == EXPECTED[name]["rows"]["runs"]


def test_a_store_that_is_new_or_at_its_first_run_is_no_other_format_s(tmp_path, monkeypatch):
    assert canopy_store.status(canopy_store.init(tmp_path / "s")).is_empty()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "canopy.json").write_text('{"version": 1}')
    assert canopy_store.status(tmp_path / "one").is_empty()
    # what the first job writes before it commits anything; folders' names may end as files' do
    for table, keys in (
        ("runs", {"run": "a.parquet"}),
        ("models", {"family": "a.parquet", "variant": "b"}),
    ):
        path = store.shard_path(store.folder(tmp_path / "s", table, **keys), 0)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    assert canopy_store.status(tmp_path / "s").is_empty()
    # once anything is committed nothing is looked for among the files
    (tmp_path / "s" / "commits" / "rollouts").mkdir(parents=True)
    monkeypatch.setattr("canopy_store.store.format1._has_old", lambda root: pytest.fail("looked for"))
    assert canopy_store.status(tmp_path / "s").is_empty()


def test_damage_is_not_upgraded(sampled, measured):
    path = sorted((sampled / "rewards").rglob("*.parquet"))[2]
    column = pq.read_metadata(path).row_group(0).column(3)
    place = column.data_page_offset + column.total_compressed_size - 2
    flip(path, place, 1)
    before = path.read_bytes()
    with pytest.raises(canopy_store.DataError, match=r"part-00002\.parquet: cannot be read"):
        upgrade(sampled)
    assert path.read_bytes() == before
    flip(path, place, 1)
    assert same(sampled, measured)  # still of format 1, half of it rewritten
    upgrade(sampled)
    assert same(sampled, measured)


def test_where_no_locks_can_be_had_it_needs_to_be_told(sampled, canopy, monkeypatch):
    monkeypatch.setattr("canopy_store.store.locks.lock", lambda *_: None)
    assert "pass --without-locks" in canopy("upgrade", "--store", sampled)[2]
    code, out, _ = canopy("upgrade", "--without-locks", "--store", sampled)
    assert (code, "a store of format 2: 34 files rewritten" in out) == (0, True)
    assert "a store of format 2: nothing to do" in canopy("upgrade", "--store", sampled)[1]


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize("name", NAMES)
def test_stopped_anywhere_it_reads_as_before_and_the_same_call_finishes(name, tmp_path, measured):
    copies = [Path(shutil.copytree(DATA / name, tmp_path / f"{name} {i}")) for i in range(5)]
    spare = Path(shutil.copytree(DATA / name, tmp_path / f"{name} spare"))
    stopped("canopy_store.upkeep.upgrade.upgrade", spare, copies)

    def lasting(root: Path) -> set[str]:
        return {n for n in contents(root) if not n.startswith(".work") and n != "canopy.duckdb"}

    versions = []
    for copy in copies:
        versions.append(json.loads((copy / "canopy.json").read_text())["version"])
        assert same(copy, measured)
        assert verify(copy)["harmless"].all()
    assert versions == sorted(versions)
    assert set(versions) == {1, FORMAT_VERSION}
    for copy in copies:
        upgrade(copy)
        assert same(copy, measured)
        assert lasting(copy) == lasting(spare)
        assert verify(copy, deep=True)["harmless"].all()
        assert shell(copy, "select count(*) as n from runs")[0]["n"] == EXPECTED[name]["rows"]["runs"]
