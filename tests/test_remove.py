"""A run removed: from every view at once, whenever the power goes, and nothing of it is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest
from stops import interleaved, stopped
from stores import (
    RUN,
    contents,
    fill,
    ingest_arguments,
    rollout_rows,
    shell,
    write_parquet,
    write_prompts,
)

import canopy_store
from canopy_store import store
from canopy_store.schema import TABLES
from canopy_store.sharing.merge import merge
from canopy_store.upkeep.remove import remove_run, require_run
from canopy_store.upkeep.verify import verify

ROWS = 12 * 4  # of fill's samples and these prompts


@pytest.fixture(scope="module")
def origin(tmp_path_factory, chain) -> Path:
    """A store with rows in every table, in two shards each; for reading only."""
    folder = tmp_path_factory.mktemp("remove")
    return fill(folder / "s", chain, write_prompts(folder / "p.jsonl", "a b", "b c", "c d", "d e"))


@pytest.fixture
def root(origin, tmp_path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "s"))


def names(root: Path) -> set[str]:
    return {name for name in contents(root) if not name.startswith(".work")}


def of_the_run(root: Path, run_id: str = RUN) -> list[Path]:
    """Whatever has the run in its path."""
    name = store.quoted(run_id)
    return [path for path in root.rglob("*") if name in str(path.relative_to(root))]


def test_nothing_of_a_run_is_left_and_the_rest_stays(root):
    before = names(root)
    mine = {name for name in before if RUN in name or name.startswith("prompts/")}
    assert len([name for name in mine if name.startswith("commits/")]) >= 6
    assert remove_run(root, RUN) == len(mine)
    assert names(root) == before - mine
    assert of_the_run(root) == []
    assert verify(root, deep=True).rows() == []
    for table in TABLES:
        assert canopy_store.read(root, table).is_empty() == (table != "models")
    assert shell(root, "select count(*) as n from rollouts") == [{"n": 0}]


def test_a_run_that_is_not_there_is_one_line(root):
    remove_run(root, RUN)
    for name in (RUN, "*", "../s", "[abc]"):
        with pytest.raises(canopy_store.StoreError, match="no run of this name"):
            remove_run(root, name)
    (root / "MANIFEST").write_text("{}")
    with pytest.raises(canopy_store.UsageError, match=r"an exported folder.* and remove the run there"):
        remove_run(root, RUN)


def test_a_removed_run_can_be_imported_again(tmp_path):
    file = write_parquet(tmp_path / "in.parquet", rollout_rows(prompts=("p", "q"), reward=[1.0] * 5))
    root = tmp_path / "s"
    canopy_store.import_rollouts(root, file)
    before, rows = names(root), canopy_store.read(root, "rollouts")
    remove_run(root, "f.base.t")
    assert canopy_store.import_rollouts(root, file) == ["f.base.t"]
    assert names(root) == before
    assert canopy_store.read(root, "rollouts").equals(rows)


def test_prompts_stay_while_another_run_names_them_or_may_come_to(tmp_path, chain, canopy):
    root, prompts = tmp_path / "s", write_prompts(tmp_path / "p.jsonl", "a", "b")
    for run, more in (("one", []), ("two", []), ("begun", ["--shard", "1/2"])):
        arguments = ingest_arguments(root, chain, prompts, samples=2, run=run)
        assert canopy(*arguments, *more)[0] == 0
    (file,) = (root / "prompts").rglob("*.parquet")
    remove_run(root, "one")
    remove_run(root, "two")
    assert canopy_store.read(root, "rollouts").is_empty()
    assert file.exists()  # the run that has begun stores the same file
    remove_run(root, "begun")
    assert not (root / "prompts").exists()


def test_what_jobs_left_half_done_goes_too(root):
    """Orphans, uncommitted shards, notes and temporary files of a run that never was complete."""
    for kind in ("rewards", "rollouts"):
        (record,) = store.records(root, kind)
        record.path(root).unlink()
    where = next((root / "rollouts").rglob("run=*"))
    (where / ".part-00009.parquet.0123abcd.tmp").write_bytes(b"x")
    note = root / ".work" / "notes" / where.relative_to(root) / "part-00000.json"
    note.parent.mkdir(parents=True)
    note.write_text("{}")
    assert store.orphans(root)
    remove_run(root, RUN)
    assert of_the_run(root) == []
    assert not (root / ".work" / "notes").exists()


def test_a_record_that_cannot_be_read_is_removed_with_its_run(root):
    (record,) = store.records(root, "scores")
    record.path(root).write_text("{")
    remove_run(root, RUN)
    assert of_the_run(root) == []
    assert verify(root, deep=True).rows() == []


def test_a_removal_stopped_anywhere_is_finished_by_the_same_call(origin, tmp_path):
    copies = [Path(shutil.copytree(origin, tmp_path / str(i))) for i in range(9)]
    spare = Path(shutil.copytree(origin, tmp_path / "spare"))
    stopped("canopy_store.upkeep.remove.remove_run", spare, copies, run_id=RUN)
    stages = set()
    for copy in copies:
        problems = verify(copy)
        assert problems.filter(~pl.col("harmless")).is_empty(), problems.rows()
        rows = {
            t: len(canopy_store.read(copy, t)) for t in ("runs", "rollouts", "rewards", "embeddings")
        }
        whole = {"runs": 1, "rollouts": ROWS, "rewards": ROWS, "embeddings": ROWS}
        assert rows in (whole, dict.fromkeys(whole, 0))
        tops = {path.relative_to(copy).parts[0] for path in of_the_run(copy)}
        stages.add((rows["runs"], *sorted(tops)))
        try:
            require_run(copy, RUN)
        except canopy_store.StoreError:
            assert tops <= {".work"}  # the lock, which goes last
        else:
            remove_run(copy, RUN)
        assert verify(copy, deep=True).rows() == []
        assert names(copy) == names(spare)
    assert len(stages) > 4, stages


def test_the_command(root, canopy):
    code, _, err = canopy("rm-run", RUN, "nobody", "--store", root, "--yes")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "nobody: no run of this name" in err
    assert len(canopy_store.read(root, "runs")) == 1
    code, out, _ = canopy("rm-run", RUN, "--store", root, "--yes")
    assert (code, f"{RUN} removed" in out) == (0, True)
    assert canopy_store.read(root, "runs").is_empty()
    assert canopy("rm-run", "--store", root)[0] == 2


def test_prompts_that_a_merge_beside_it_needs_stay(tmp_path):
    """Whichever comes first at whichever write, the prompts of the run that is merged are there."""
    root, other = tmp_path / "s", tmp_path / "other"
    for place, variant in ((root, "base"), (other, "sft")):
        file = write_parquet(tmp_path / "prompts.parquet", rollout_rows(variant, prompt=["a"] * 5))
        canopy_store.import_rollouts(place, file)
    (mine,) = store.files(root, "prompts")
    assert (other / mine.relative_to(root)).exists()
    copies = (Path(shutil.copytree(root, tmp_path / str(i))) for i in range(1000))

    def merges(copy: Path) -> object:
        return merge([other], copy)

    def removes(copy: Path) -> object:
        return remove_run(copy, "f.base.t")

    for call, beside in ((removes, merges), (merges, removes)):
        *roots, last = interleaved(lambda: next(copies), call, beside)
        assert len(roots) >= 8
        beside(last)
        for each in (*roots, last):
            assert canopy_store.read(each, "runs")["run_id"].to_list() == ["f.sft.t"]
            assert canopy_store.read(each, "prompts")["text"].to_list() == ["a"]
        assert verify(roots[-1]).filter(~pl.col("harmless")).is_empty()
