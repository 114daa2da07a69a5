"""Stores merged into others: the same run twice is one, whatever its shards, and none is overwritten."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from chain import save_chain
from stores import (
    OF_TEXTS,
    RUN,
    as_format_1,
    contents,
    enter,
    fill,
    import_alpha,
    ingest_arguments,
    rewrite,
    rollout_rows,
    same_views,
    tables,
    views,
    write_parquet,
    write_prompts,
)

import canopy_store
from canopy_store import store
from canopy_store.schema import TABLES
from canopy_store.sharing import export, pull
from canopy_store.sharing.dataset_card import manifest_entry
from canopy_store.sharing.merge import merge
from canopy_store.upkeep.verify import verify

PROMPTS = [f"{a} {b}" for a in "abc" for b in "ef"]  # 6: three shards of two
ALPHA = [
    f"alpha.{variant}.{task}" for variant in ("base", "instruct") for task in ("coding", "completion")
]


@pytest.fixture(scope="module")
def origin(tmp_path_factory, chain) -> Path:
    """A store with rows in every table, in three shards each; for reading only."""
    folder = tmp_path_factory.mktemp("shards")
    return fill(folder / "s", chain, write_prompts(folder / "p.jsonl", *PROMPTS))


@pytest.fixture(scope="module")
def measured(origin) -> dict[str, pl.DataFrame]:
    return views(origin)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another store, of four imported runs and a selection; for reading only."""
    folder = tmp_path_factory.mktemp("other")
    return import_alpha(folder / "s", folder / "in.parquet", 4)


@pytest.fixture
def root(origin, tmp_path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "s"))


def join(root: Path, *kinds: str) -> None:
    """Makes one shard of many in the records of these kinds, as a compaction does."""
    for old in (record for kind in kinds for record in store.records(root, kind)):
        files = {
            n: s for n, s in old.files.items() if n.partition("/")[0] in ("prompts", "runs", "work")
        }
        for table in {name.partition("/")[0] for name in old.files.keys() - files.keys()}:
            names = old.of(table)
            rows = pa.concat_tables([store.read_rows(root / name) for name in names])
            ending = Path(names[0]).name.partition(".")[2]
            path = (root / names[0]).with_name(f"part-{store.fresh_number(old):05d}.{ending}")
            store.write_table(path, table, rows)
            files[path.relative_to(root).as_posix()] = store.entry(path)
        for name in old.of("runs"):
            rows = {**store.read_rows(root / name).to_pydict(), "n_shards": [1]}
            path = (root / name).with_name(f"part-{store.fresh_number(old):05d}.parquet")
            store.write_rows(path, "runs", rows)
            del files[name]
            files[path.relative_to(root).as_posix()] = store.entry(path)
        store.write_record(root, replace(old, files=files))
        store.remove_unnamed(root, old.files)


def change(root: Path, table: str, column: str, value: Any) -> None:
    """Gives every row of a table's first file another value, and the file its place in the record."""
    path = store.files(root, table)[0]
    rewrite(path, table, lambda c: c.__setitem__(column, [value] * len(c[column])))
    enter(root, path)


def forget(root: Path, *kinds: str) -> None:
    """Removes all records of these kinds with their files."""
    for kind in kinds:
        for record in store.records(root, kind):
            store.remove_record(root, record)


def without_views(root: Path) -> dict[str, str]:
    """Of a store's contents all but canopy.duckdb and the locks."""
    return {name: value for name, value in contents(root).items() if name[:5] not in ("canop", ".work")}


# ---------------------------------------------------------------- together


def test_stores_and_exports_are_merged_and_twice_is_once(origin, other, tmp_path):
    shared = export(other, tmp_path / "shared", where="variant = 'base'")
    root = tmp_path / "all"
    assert merge([origin, other, shared], root) == sorted([RUN, *ALPHA])
    assert verify(root, deep=True).rows() == []
    merged = tables(root)
    for table in TABLES:
        both = [*tables(origin)[table], *tables(other)[table]]
        assert sorted(map(str, merged[table])) == sorted(map(str, both))
    before = without_views(root)
    assert merge([origin, shared], root) == sorted([RUN, *(run for run in ALPHA if ".base." in run)])
    assert without_views(root) == before
    # what jobs must repeat has come along, so they can go on here
    plans = {path.name for path in (root / "plans").glob("*.json")}
    assert plans == {p.name for s in (origin, other) for p in (s / "plans").glob("*.json")}
    assert "embedder=E.json" in plans


def test_one_run_is_held_at_a_time(other, tmp_path):
    """A job may use the others meanwhile; and thousands of runs need one open file."""
    root, seen = tmp_path / "s", []

    def on_run(done: int, runs: int) -> None:
        with store.holding(root, *ALPHA, exclusive=True), store.holding(other, *ALPHA, exclusive=True):
            seen.append((done, runs))

    assert merge([other], root, on_run=on_run) == ALPHA
    assert seen == [(done, 4) for done in (1, 2, 3, 4)]
    with store.holding(root, ALPHA[2]), pytest.raises(canopy_store.ConflictError, match="in use"):
        merge([other], root)


def test_runs_that_are_not_complete_stay_where_they_are(other, tmp_path):
    source = Path(shutil.copytree(other, tmp_path / "source"))
    store.commit_path(source, "rollouts", {"run": "alpha.base.coding"}).unlink()
    left = next(source.glob("rollouts/*/*/*/run=alpha.base.coding/*"))
    left.with_name(".part-00001.parquet.0123abcd.tmp").write_bytes(b"x")
    assert merge([source], tmp_path / "s") == ALPHA[1:]
    assert not [p for p in (tmp_path / "s").rglob("*") if "run=alpha.base.coding" in p.name]
    assert verify(tmp_path / "s", deep=True).rows() == []


def test_a_run_appears_whole_and_what_is_stopped_is_finished(other, tmp_path, monkeypatch):
    """Stopped before each of its writes in turn, no view shows a part, and the next call goes on."""
    import canopy_store.sharing.merge as module

    root, copies, expected = tmp_path / "s", [], tables(other)
    real_copy, real_record = store.copy_file, store.write_record
    left = 0

    def stops(real):
        def write(*arguments, **more):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            copies.append(arguments)
            return real(*arguments, **more)

        return write

    monkeypatch.setattr(module.store, "copy_file", stops(real_copy))
    monkeypatch.setattr(module.store, "write_record", stops(real_record))
    stopped = 0
    while True:
        left = 7
        try:
            merge([other], root)
            break
        except KeyboardInterrupt:
            stopped += 1
        runs = set(canopy_store.read(root, "runs")["run_id"])
        for table, rows in tables(root).items():
            if "run" in TABLES[table].partitions:
                assert rows == [row for row in expected[table] if row["run_id"] in runs]
    assert stopped >= 8
    assert tables(root) == expected
    assert verify(root, deep=True).rows() == []
    assert len(copies) == len({str(arguments) for arguments in copies})  # nothing is copied again


# ---------------------------------------------------------------- conflicts


@pytest.mark.parametrize("which", ["store", "second source"])
def test_a_conflict_is_refused_with_what_differs(other, origin, tmp_path, which):
    changed = Path(shutil.copytree(other, tmp_path / "changed"))
    change(changed, "rewards", "reward", 0.25)
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


def test_another_model_is_another_store_s_conflict(tmp_path, chain, canopy):
    """The same names with other weights are refused by merge as by ingest."""
    model = save_chain(tmp_path / "other", eos=False)
    prompts = write_prompts(tmp_path / "p.jsonl", "a")
    for name, path, more in (("one", chain, []), ("two", model, ["--no-eos"])):
        arguments = ingest_arguments(tmp_path / name, path, prompts, samples=2)
        assert canopy(*arguments, *more)[0] == 0
    with pytest.raises(canopy_store.ConflictError, match="weights_sha256"):
        merge([tmp_path / "two"], tmp_path / "one")


def imported(root: Path, **more: Any) -> Path:
    """A store of one small import."""
    rows = [{**row, **more} for row in rollout_rows(lengths=(1, 2))]
    canopy_store.import_rollouts(root, write_parquet(root.with_suffix(".parquet"), rows))
    return root


def test_a_prompt_has_one_text(tmp_path):
    texts = {"one": "Say a.", "two": "Say b.", "none": None}
    for name, text in texts.items():
        imported(tmp_path / name, variant=name, **({"prompt": text} if text else {}))
    merge([tmp_path / "one"], tmp_path / "s")
    before = contents(tmp_path / "s")
    said = "prompt p is stored with other values: text .stored 'Say a.', asked 'Say b.'"
    with pytest.raises(canopy_store.ConflictError, match=said):
        merge([tmp_path / "two"], tmp_path / "s")
    assert contents(tmp_path / "s") == before
    for order in (("none", "one"), ("one", "none")):
        root = tmp_path / "-".join(order)
        merge([tmp_path / name for name in order], root)
        assert canopy_store.read(root, "prompts")["text"].to_list() == ["Say a."]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"task": "T"}, "run f.base.T: f.base.t is stored"),
        ({"family": "F", "task": "u"}, "model F/base: f/base is stored"),
        ({"variant": "sft", "embedding": [0.6, 0.8]}, "embedder imported: Imported is stored"),
    ],
)
def test_names_that_differ_by_case_alone_are_refused(tmp_path, names, said):
    """Some disks cannot tell the two apart: the one would be written over the other."""
    root = imported(tmp_path / "s", embedding=[1.0, 0.0])
    store.plan(root, "embedder", "Imported", {"embedder": "Imported"})
    forget(root, "embeddings")
    before = contents(root)
    with pytest.raises(canopy_store.ConflictError, match=said):
        merge([imported(tmp_path / "o", **names)], root)
    assert contents(root) == before


# ---------------------------------------------------------------- a source is a stranger's


def test_a_plan_that_is_not_what_its_jobs_repeated_is_refused(origin, tmp_path):
    """It would be taken along, and settle what the next job of that name must be."""
    source = Path(shutil.copytree(origin, tmp_path / "source"))
    for path in sorted((source / "plans").iterdir()):
        said = json.loads(path.read_text())
        store.write_json(path, {**said, "settings": {**said["settings"], "planted": 1}})
        with pytest.raises(canopy_store.DataError, match="settings are not") as error:
            merge([source], tmp_path / "s")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "s").exists()
        store.write_json(path, said)
    assert merge([source], tmp_path / "s") == [RUN]


def test_a_source_is_checked_as_a_stranger_s(other, tmp_path):
    source = Path(shutil.copytree(other, tmp_path / "source"))
    path = store.files(source, "rollouts")[0]
    moved = path.rename(tmp_path / "elsewhere.parquet")
    path.symlink_to(moved)
    for damage, said in (
        (lambda: None, "a link out of the folder"),
        (lambda: (path.unlink(), path.write_bytes(b"PAR1PAR1")), "truncated or not a Parquet file"),
        (lambda: path.unlink(), "cannot be read"),
        (lambda: (moved.rename(path), change(source, "rollouts", "entropy_sum", 9.0)), "entropy_sum"),
    ):
        damage()
        with pytest.raises(canopy_store.DataError, match=said) as error:
            merge([source], tmp_path / "s")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "s").exists()


def test_a_record_of_a_store_that_names_others_files_is_refused(other, tmp_path):
    source = Path(shutil.copytree(other, tmp_path / "source"))
    name = store.files(source, "rollouts")[0].relative_to(source).as_posix()
    keys = {"grader": "x", "run": ALPHA[3]}
    store.commit(source, "grades", keys, [source / name], {})
    with pytest.raises(canopy_store.DataError, match="which is not of it"):
        merge([source], tmp_path / "s")
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------- a source of format 1


def test_a_source_of_format_1_is_upgraded_in_a_copy(other, tmp_path, monkeypatch):
    """Whether it is a store or an exported folder; it stays as it is, and nothing else stays."""
    pytest.importorskip("canopy_store.upkeep.upgrade")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    old = as_format_1(Path(shutil.copytree(other, tmp_path / "old")))
    shutil.rmtree(old / ".work")
    before = contents(old)
    assert merge([old], tmp_path / "merged") == ALPHA
    assert contents(old) == before
    files = {p.relative_to(old).as_posix(): manifest_entry(p) for p in old.rglob("*") if p.is_file()}
    (old / "MANIFEST").write_text(json.dumps({"version": 1, "files": files}))
    assert pull(old, tmp_path / "pulled") == ALPHA
    for root in (tmp_path / "merged", tmp_path / "pulled"):
        assert same_views(views(root), views(other))
        assert verify(root, deep=True).rows() == []
    assert list((tmp_path / "scratch").glob("canopy-upgrade-*")) == []
    path = next(old.glob("rewards/*/*/*"))
    path.rename(path.with_name("evil.parquet"))
    with pytest.raises(canopy_store.DataError, match="MANIFEST"):
        pull(old, tmp_path / "refused")
    (old / "MANIFEST").unlink()
    with pytest.raises(canopy_store.DataError, match="not where or how a store's files are named"):
        merge([old], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


# ---------------------------------------------------------------- the same run in other shards


def test_a_compacted_run_and_the_same_run_as_it_was_are_one(root, origin, measured, tmp_path):
    join(root, "rollouts", "embeddings", "scores", "rewards")
    sparse = Path(shutil.copytree(root, tmp_path / "sparse"))
    forget(sparse, "scores", "rewards", "embeddings", "embedding_spectra")
    assert merge([origin], sparse) == [RUN]  # what is lacking comes in the shards it has there
    assert verify(sparse, deep=True).rows() == []
    assert same_views(views(sparse), measured)
    # under numbers that no job here takes for those of its own shards
    rollouts = {store.shard_number(path) for path in store.files(sparse, "rollouts")}
    for table in ("scores", "rewards", "embeddings"):
        assert min(store.shard_number(path) for path in store.files(sparse, table)) > max(rollouts)
    for source, target in ((origin, root), (root, sparse), (sparse, root), (origin, sparse)):
        before = without_views(target)
        assert merge([source], target) == [RUN]
        assert without_views(target) == before


def test_what_a_job_left_unfinished_is_replaced_by_what_is_whole(root, origin, measured):
    """Its shards have the names that the source's files would take."""
    paths = [path.relative_to(root) for path in store.files(root, "rewards")]
    forget(root, "rewards")
    for name in paths[:2]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(origin / name, root / name)
    rewrite(root / paths[0], "rewards", lambda c: c.__setitem__("reward", [7.0] * len(c["reward"])))
    assert merge([origin], root) == [RUN]
    assert same_views(views(root), measured)
    assert verify(root, deep=True).rows() == []
    assert not (root / paths[0]).exists()


def test_what_is_lacking_of_a_record_is_added_and_the_rest_stays(origin, measured, tmp_path):
    """Without texts and embeddings first, whole later; a part again changes nothing."""
    root = tmp_path / "s"
    small = export(origin, tmp_path / "small", text=False, embeddings=False)
    whole = export(origin, tmp_path / "whole")
    pull(small, root)
    bare = [*store.files(root, "rollouts"), *store.files(root, "prompts")]
    assert canopy_store.read(root, "rollouts")["text"].null_count() == 12 * len(PROMPTS)
    assert store.files(root, "embeddings") == []
    join(root, "rollouts")
    pull(whole, root)
    assert same_views(views(root), measured)
    assert tables(root)["embeddings"] == tables(origin)["embeddings"]
    assert tables(root)["prompts"] == tables(origin)["prompts"]
    assert not [path for path in bare if path.exists() and path.parts[-5] == "rollouts"]
    assert verify(root, deep=True).rows() == []
    before = without_views(root)
    for part in (small, whole, origin):
        assert merge([part], root) == [RUN]
        assert without_views(root) == before


def test_a_run_of_another_store_with_fewer_rollouts_is_another_run(root, origin, tmp_path):
    small = Path(shutil.copytree(origin, tmp_path / "small"))
    path = store.files(small, "rewards")[0]
    rewrite(path, "rewards", lambda c: {name: values[:5] for name, values in c.items()})
    enter(small, path)
    before = without_views(root)
    with pytest.raises(canopy_store.ConflictError, match=r"72 rows here, 53 in .*small, 53 of them"):
        merge([small], root)
    assert without_views(root) == before


def test_a_store_that_travels_keeps_every_view_to_the_last_bit(origin, measured, tmp_path):
    """Scores with their divergences, selections and their spectra, rewards, compacted or not."""
    assert {view for view, frame in measured.items() if frame.is_empty()} == OF_TEXTS & measured.keys()
    shared = export(origin, tmp_path / "shared")
    pull(shared, tmp_path / "back")
    assert same_views(views(tmp_path / "back"), measured)
    assert tables(tmp_path / "back") == tables(origin)
    join(tmp_path / "back", "rollouts", "embeddings", "scores", "rewards", "selections")
    again = export(tmp_path / "back", tmp_path / "again")
    assert same_views(views(again), measured)
    assert verify(again, deep=True).rows() == []


def test_the_command(origin, tmp_path, canopy):
    root = tmp_path / "s"
    code, out, _ = canopy("merge", origin, "--store", root)
    assert (code, out) == (0, f"{root}: 1 runs from 1 stores: {RUN}\n")
    code, out, _ = canopy("verify", "--store", root, "--json")
    assert (code, json.loads(out)) == (0, [])
    assert canopy("verify", "--store", root, "--format", "json")[1] == out
