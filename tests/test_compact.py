"""Compaction: no row, bit or order is lost, whenever the power goes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import polars as pl
import pyarrow.parquet as pq
import pytest
from stops import stopped
from stores import (
    RUN,
    contents,
    fill,
    flip,
    ingest_arguments,
    same_views,
    table_hashes,
    views,
    write_prompts,
)

import canopy_store
from canopy_store import store
from canopy_store.schema import TABLES
from canopy_store.sharing import export
from canopy_store.upkeep import compact as compaction
from canopy_store.upkeep.compact import compact
from canopy_store.upkeep.remove import remove_run
from canopy_store.upkeep.verify import verify

PROMPTS = [f"{a} {b}" for a in "abcd" for b in "efg"]  # 12: six shards of two
SHARDED = ("rollouts", "embeddings", "embedding_spectra", "scores", "rewards")


@pytest.fixture(scope="module")
def origin(tmp_path_factory, chain) -> Path:
    """A store with rows in every table, in six shards each; for reading only."""
    folder = tmp_path_factory.mktemp("shards")
    return fill(folder / "s", chain, write_prompts(folder / "p.jsonl", *PROMPTS))


@pytest.fixture(scope="module")
def measured(origin) -> dict[str, pl.DataFrame]:
    return views(origin)


@pytest.fixture
def root(origin, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(compaction, "_GRACE", 0.0)
    return Path(shutil.copytree(origin, tmp_path / "s"))


def shards(root: Path, table: str) -> list[str]:
    """The numbers of the shards that records name."""
    return sorted({path.name.partition(".")[0][5:] for path in store.files(root, table)})


def ordered(root: Path) -> dict[str, pl.DataFrame]:
    """Every table's rows in the order of their files."""
    names = [t for t in TABLES if t != "runs" and store.files(root, t)]
    return {t: pl.concat(pl.DataFrame(store.read_rows(p)) for p in store.files(root, t)) for t in names}


def same_rows(root: Path, rows: dict[str, pl.DataFrame]) -> bool:
    now = ordered(root)
    return now.keys() == rows.keys() and all(now[table].equals(rows[table]) for table in rows)


def mb_for(root: Path, count: float) -> float:
    """The size, in MB, that holds so many of the store's shards of rollouts."""
    sizes = [path.stat().st_size for path in store.files(root, "rollouts")]
    return count * max(sizes) / (1 << 20)


def parquet(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*.parquet")}


def committed(root: Path) -> set[str]:
    return {name for record in store.records(root) for name in record.files}


def without_work(found: dict[str, str]) -> dict[str, str]:
    """Of a store's contents all but the locks."""
    return {name: value for name, value in found.items() if ".work" not in name}


# ---------------------------------------------------------------- what it does


def test_status_names_the_remedy_for_many_small_shards(root, canopy, monkeypatch):
    monkeypatch.setattr("canopy_store.cli.MANY_SHARDS", 6)
    line = "6 shards of less than a MiB: queries are quicker once they are few: "
    assert f"{line}canopy compact --store {root}\n" in canopy("status", "--store", root)[1]
    assert canopy("compact", "--store", root)[0] == 0
    assert "shards of less" not in canopy("status", "--store", root)[1]


@pytest.mark.parametrize(("fit", "names"), [(1000, ["00006"]), (2, ["00006", "00007", "00008"])])
def test_few_shards_hold_the_same_rows_in_the_same_order(root, measured, fit, names):
    before = ordered(root)
    rest = {
        r.path(root): {k: v for k, v in vars(r).items() if k != "files"} for r in store.records(root)
    }
    size = mb_for(root, fit)
    assert compact(root, target_mb=size) == {RUN: (6, len(names))}
    assert shards(root, "rollouts") == names
    for table in SHARDED:
        assert shards(root, table)[0] == names[0]
        assert len(shards(root, table)) <= len(names)
    assert same_rows(root, before)
    assert same_views(views(root), measured)
    assert verify(root, deep=True).rows() == []
    assert parquet(root) == committed(root)
    for record in store.records(root):
        said = {k: v for k, v in vars(record).items() if k != "files"}
        assert said == rest[record.path(root)]
    assert canopy_store.read(root, "runs")["n_shards"].to_list() == [len(names)]
    before = contents(root)
    assert compact(root, target_mb=size) == {}  # nothing more to join
    assert without_work(contents(root)) == without_work(before)


def test_shards_that_are_large_already_stay_where_they_are(root):
    """Those before the first that is joined keep their names and bytes, and stay first."""
    before, rows = contents(root), ordered(root)
    record = store.record(root, "rollouts", run=RUN)
    sizes = [record.files[name]["bytes"] for name in record.of("rollouts")]
    # the last two fit, no others do: each of them is as large as the bound
    small = sum(sorted(sizes)[:2])
    assert compact(root, target_mb=1.05 * small / (1 << 20)) != {}
    stayed = [name for name in record.of("rollouts") if (root / name).exists()]
    gone = [name for name in record.of("rollouts") if name not in stayed]
    assert stayed == record.of("rollouts")[: len(stayed)]
    assert len(gone) >= 2
    assert all(contents(root)[name] == before[name] for name in stayed)
    assert same_rows(root, rows)


def test_no_name_of_an_old_shard_leads_to_a_new_one(root):
    """So a reader with a stale list of files fails, however many of them it had opened before."""
    before = {path for table in SHARDED for path in store.files(root, table)}
    before |= set(store.files(root, "runs"))
    opened = pq.ParquetFile(sorted(before)[0])
    compact(root, target_mb=mb_for(root, 2))
    assert not [path for path in before if path.exists()]
    opened.read()  # what was open stays readable
    compact(root)
    assert shards(root, "rollouts") == ["00009"]


def test_old_files_stay_until_their_readers_have_opened_them(root, monkeypatch):
    """And by then canopy.duckdb names them no more."""
    seen: list[tuple[bool, bool]] = []
    before = store.files(root, "rollouts")

    def wait(seconds: float) -> None:
        with duckdb.connect(str(root / "canopy.duckdb"), read_only=True) as con:
            query = "select sql from duckdb_views() where view_name = 'rollouts'"
            ((view,),) = con.execute(query).fetchall()
        seen.append((all(path.exists() for path in before), before[0].name in view))

    monkeypatch.setattr(compaction.time, "sleep", wait)
    compact(root)
    assert seen == [(True, False)]
    assert not any(path.exists() for path in before)


@pytest.mark.parametrize("may_wait", [1, 1 << 30])
def test_a_store_need_not_fit_on_its_disk_twice(tmp_path, chain, canopy, monkeypatch, may_wait):
    root, prompts = tmp_path / "s", write_prompts(tmp_path / "p.jsonl", *PROMPTS[:2])
    for run in ("one", "two"):
        assert canopy(*ingest_arguments(root, chain, prompts, samples=2, run=run))[0] == 0
    monkeypatch.setattr(compaction, "_GRACE", 0.0)
    monkeypatch.setattr(compaction, "_MAY_WAIT", may_wait)
    left: list[int] = []
    compact(root, on_run=lambda done, every: left.append(len(parquet(root) - committed(root))))
    # of each run two shards and a row of runs; those of the first are gone once the second is done
    assert left == ([3, 3] if may_wait == 1 else [3, 6])
    assert parquet(root) == committed(root)


def test_jobs_know_what_is_done_after_compaction(tmp_path, chain, canopy, monkeypatch):
    """Sampling a complete run again does nothing; scoring goes by the new shards."""
    monkeypatch.setattr(compaction, "_GRACE", 0.0)
    prompts = write_prompts(tmp_path / "p.jsonl", *PROMPTS[:6])
    roots = [tmp_path / name for name in ("plain", "scored first", "scored after")]
    assert canopy(*ingest_arguments(roots[0], chain, prompts, samples=4))[0] == 0
    for root in roots[1:]:
        shutil.copytree(roots[0], root)
    score = ["ingest", "score", "--scorer", chain, "--policy", "full", "--store"]
    assert canopy(*score, roots[0])[0] == 0
    assert canopy(*score, roots[1])[0] == 0
    for root in roots[1:]:
        compact(root, target_mb=mb_for(root, 2))
    before = contents(roots[1] / "scores"), contents(roots[1] / "rollouts")
    assert canopy(*score, roots[1])[0] == 0
    assert canopy(*ingest_arguments(roots[1], chain, prompts, samples=4))[0] == 0
    assert (contents(roots[1] / "scores"), contents(roots[1] / "rollouts")) == before
    assert canopy(*score, roots[2])[0] == 0
    assert shards(roots[2], "scores") == shards(roots[2], "rollouts")
    assert ordered(roots[2])["scores"].equals(ordered(roots[0])["scores"])
    for root in roots[1:]:
        assert verify(root).rows() == []


# ---------------------------------------------------------------- what it refuses


def uncommit(root: Path, kind: str) -> store.Record:
    """The record of the one job of a kind, taken away: its files are those of a job that was stopped."""
    (record,) = store.records(root, kind)
    record.path(root).unlink()
    return record


def test_what_is_not_whole_is_refused_and_nothing_is_changed(root):
    record = uncommit(root, "rewards")
    (root / record.of("rewards")[1]).unlink()
    before = contents(root)
    with pytest.raises(canopy_store.DataError, match=r"has 5 of 6 shards; finish its ingest"):
        compact(root)
    assert without_work(contents(root)) == without_work(before)
    assert compact(root, target_mb=mb_for(root, 1)) == {}  # the shards keep their numbers
    for name in record.of("rewards")[2:]:
        (root / name).unlink()
    with pytest.raises(canopy_store.DataError, match=r"reward_model=R/run=.* has 1 of 6 shards"):
        compact(root)
    (root / record.of("rewards")[0]).unlink()
    assert compact(root) == {RUN: (6, 1)}


def test_a_shard_that_was_lost_can_be_made_again(root):
    """Its job's files are no leftovers then, and nothing of what is whole is removed."""
    (record,) = store.records(root, "rewards")
    lost, spare = record.of("rewards")[1], root / "rewards/reward_model=R" / f"run={RUN}"
    (root / lost).unlink()
    shutil.copy(root / record.of("rewards")[0], spare / "part-00006.parquet")
    with pytest.raises(canopy_store.DataError, match=r"part-00001\.parquet: gone"):
        compact(root)
    assert (spare / "part-00006.parquet").exists()


@pytest.mark.parametrize("at", ["page", "footer"])
def test_damage_is_not_copied_under_fresh_checksums(root, at):
    path = store.files(root, "rollouts")[3]
    column = pq.read_metadata(path).row_group(0).column(7)
    place = column.data_page_offset + column.total_compressed_size - 2
    if at == "footer":  # in a statistic, which no checksum covers
        data = path.read_bytes()
        place = data.rindex(RUN.encode())
    flip(path, place, 1)
    before, record = table_hashes(root, "rollouts", "runs"), store.record(root, "rollouts", run=RUN)
    with pytest.raises(canopy_store.DataError, match=r"part-00003\.parquet: (cannot be|not the bytes)"):
        compact(root)
    assert table_hashes(root, "rollouts", "runs") == before
    assert store.record(root, "rollouts", run=RUN) == record
    assert parquet(root) == committed(root)  # of what was compacted before, nothing is left either


def test_what_cannot_be_compacted_is_one_line(root):
    with pytest.raises(canopy_store.UsageError, match="--target-mb 0"):
        compact(root, target_mb=0)
    with pytest.raises(canopy_store.StoreError, match="--run nobody: no complete run"):
        compact(root, ["nobody"])
    (root / "MANIFEST").write_text("{}")
    with pytest.raises(canopy_store.UsageError, match=r"an exported folder.* and compact there"):
        compact(root)


# ---------------------------------------------------------------- stopped


def test_stopped_anywhere_every_view_stays_and_the_same_call_finishes(
    origin, measured, tmp_path, monkeypatch
):
    monkeypatch.setattr(compaction, "_GRACE", 0.0)
    copies = [Path(shutil.copytree(origin, tmp_path / str(i))) for i in range(10)]
    rows, size = ordered(origin), mb_for(origin, 2)
    spare = Path(shutil.copytree(origin, tmp_path / "spare"))
    stopped("canopy_store.upkeep.compact.compact", spare, copies, target_mb=size)
    stages: dict[object, Path] = {}
    for copy in copies:
        assert same_rows(copy, rows)
        named, there = committed(copy), parquet(copy)
        assert named <= there
        stage = (len(named), len(there) > len(named))
        if stage not in stages:
            stages[stage] = copy
            assert same_views(views(copy), measured)
            problems = verify(copy, deep=True)
            assert problems.filter(~pl.col("harmless")).is_empty(), problems.rows()
    assert len(stages) > 4, stages  # before, between and after the records are replaced
    for copy in copies:
        compact(copy, target_mb=size)
        assert shards(copy, "rollouts") == ["00006", "00007", "00008"]
        assert parquet(copy) == committed(copy) == committed(spare)
        assert same_rows(copy, rows)
        assert table_hashes(copy, *TABLES) == table_hashes(spare, *TABLES)
    assert verify(spare, deep=True).rows() == []
    assert same_views(views(spare), measured)


def test_leftovers_of_another_size_go_too(root, tmp_path, origin):
    """What was stopped with a small bound leaves more shards than a larger one writes over."""
    where = store.files(root, "rollouts")[0].parent
    for number in (6, 7, 8):
        shutil.copy(where / "part-00000.parquet", where / f"part-{number:05d}.parquet")
    assert compact(root) == {RUN: (6, 1)}
    assert [path.name for path in sorted(where.iterdir())] == ["part-00006.parquet"]
    assert same_rows(root, ordered(origin))


def test_a_job_that_begins_before_the_old_files_go_keeps_what_is_its_own(root, monkeypatch):
    """A run that was removed and sampled again has the names of its old shards anew."""
    record = store.record(root, "rollouts", run=RUN)
    first = root / record.of("rollouts")[0]
    spare = first.read_bytes()

    def wait(seconds: float) -> None:
        remove_run(root, RUN)
        first.parent.mkdir(parents=True)
        first.write_bytes(spare)

    monkeypatch.setattr(compaction.time, "sleep", wait)
    assert compact(root) == {RUN: (6, 1)}
    assert first.read_bytes() == spare


def test_readers_get_the_whole_answer_or_an_error(root, monkeypatch):
    query = "select count(*), sum(hash(prompt_id, sample, entropy, embedding)) from rollouts "
    query += "join embeddings using (run_id, prompt_id, sample)"
    stop = threading.Event()
    answers: list[object] = []

    def read() -> None:
        while not stop.is_set():
            try:
                with canopy_store.open(root) as con:
                    for _ in range(5):
                        answers.append(con.sql(query).pl().row(0))
            except Exception as error:  # DuckDB's own, or this package's: a file is gone
                answers.append(type(error))

    read_once = threading.Event()
    with canopy_store.open(root) as con:
        whole = con.sql(query).pl().row(0)
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    monkeypatch.setattr(compaction, "_GRACE", 0.05)
    for fit in (2, 4, 8, 16):
        read_once.wait(0.3)
        assert compact(root, target_mb=mb_for(root, fit)) or fit > 2
    read_once.wait(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    good = [answer for answer in answers if isinstance(answer, tuple)]
    assert set(good) == {whole}
    assert len(good) >= 5


# ---------------------------------------------------------------- who may write at once


def test_writers_share_a_run_and_compaction_has_it_alone(root):
    in_use = f"run {RUN}: in use by another process"
    with store.holding(root, RUN), store.holding(root, RUN):
        for use in (lambda: compact(root), lambda: remove_run(root, RUN)):
            with pytest.raises(canopy_store.ConflictError, match=in_use):
                use()
    with store.holding(root, RUN, exclusive=True):
        for exclusive in (False, True):
            with (
                pytest.raises(canopy_store.ConflictError, match=in_use),
                store.holding(root, RUN, exclusive=exclusive),
            ):
                pass
        with store.holding(root, "another"):
            pass
    assert compact(root) == {RUN: (6, 1)}


def test_kill_9_lets_go(root):
    code = "import sys; from pathlib import Path; from canopy_store import store\n"
    code += "with store.holding(Path(sys.argv[1]), sys.argv[2], exclusive=True):\n"
    code += "    print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, root, RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(canopy_store.ConflictError, match="in use"):
        compact(root)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert compact(root) == {RUN: (6, 1)}


def test_where_no_locks_can_be_had_it_needs_to_be_told(root, monkeypatch, canopy):
    """As on object storage: nothing tells there whether another job uses a run."""
    monkeypatch.setattr("canopy_store.store.locks.lock", lambda *_: None)
    for command in (["compact"], ["rm-run", RUN, "--yes"]):
        code, _, said = canopy(*command, "--store", root)
        assert (code, "pass --without-locks" in said) == (1, True)
    assert len(shards(root, "rollouts")) == 6
    assert canopy("compact", "--without-locks", "--store", root)[0] == 0
    assert shards(root, "rollouts") == ["00006"]
    assert canopy("rm-run", RUN, "--yes", "--without-locks", "--store", root)[0] == 0
    assert canopy_store.read(root, "runs").is_empty()


def test_a_store_that_cannot_be_written_can_be_exported(origin, tmp_path, monkeypatch):
    real = os.open

    def read_only(path, flags, *rest, **more):
        if str(path).endswith(".lock"):
            raise OSError(30, "Read-only file system")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    export(origin, tmp_path / "out")
    with (
        pytest.raises(canopy_store.StoreError, match="cannot be locked: Read-only"),
        store.holding(origin, RUN, exclusive=True),
    ):
        pass


def test_the_command(root, canopy):
    code, out, _ = canopy("compact", "--store", root)
    assert (code, out) == (0, f"{root}: {RUN}: 6 shards are now 1\n")
    assert "nothing to do" in canopy("compact", "--store", root)[1]
