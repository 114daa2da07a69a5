"""Compact and remove: no row, bit or order is lost, whenever the power goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from canopy_store.upkeep.maintenance import compact, remove_run
from stores import (
    RUN,
    contents,
    fill,
    flip,
    ingest_arguments,
    same_views,
    views,
    write_prompts,
)

import canopy_store
from canopy_store import store
from canopy_store.schema import TABLES
from canopy_store.sharing import export
from canopy_store.sharing.merge import merge
from canopy_store.upkeep import maintenance
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
def root(origin, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(maintenance, "_GRACE", 0.0)
    return Path(shutil.copytree(origin, tmp_path / "s"))


def shards(root: Path, table: str) -> list[str]:
    return sorted({path.name.partition(".")[0][5:] for path in store.files(root, table)})


def ordered(root: Path) -> dict[str, pl.DataFrame]:
    """Every table's rows in the order of their files."""
    names = [t for t in TABLES if t != "runs" and store.files(root, t)]
    return {t: pl.concat(pl.DataFrame(store.read_rows(p)) for p in store.files(root, t)) for t in names}


def mb_for(root: Path, count: float) -> float:
    """The size, in MB, that holds so many of the store's shards of rollouts."""
    sizes = [path.stat().st_size for path in store.files(root, "rollouts")]
    return count * max(sizes) / (1 << 20)


# ---------------------------------------------------------------- compact


def without_work(found: dict[str, str]) -> dict[str, str]:
    """Of a store's contents all but the locks."""
    return {name: value for name, value in found.items() if ".work" not in name}


def test_status_names_the_remedy_for_many_small_shards(root, canopy, monkeypatch):
    monkeypatch.setattr("canopy_store.cli.MANY_SHARDS", 6)
    line = "6 shards of less than a MiB: queries are quicker once they are few: "
    assert f"{line}canopy compact --store {root}\n" in canopy("status", "--store", root)[1]
    assert canopy("compact", "--store", root)[0] == 0
    assert "shards of less" not in canopy("status", "--store", root)[1]


@pytest.mark.parametrize(("fit", "names"), [(1000, ["00006"]), (2, ["00006", "00007", "00008"])])
def test_few_shards_hold_the_same_rows_in_the_same_order(root, measured, fit, names):
    before = ordered(root)
    assert compact(root, target_mb=mb_for(root, fit)) == {RUN: (6, len(names))}
    for table in ("rollouts", "embeddings", "embedding_spectra", "scores", "rewards"):
        assert shards(root, table) == names
    assert all(frame.equals(before[table]) for table, frame in ordered(root).items())
    assert same_views(views(root), measured)
    assert verify(root, deep=True).rows() == []
    assert not list((root / ".work").glob("run=*/"))
    assert canopy_store.read(root, "runs")["n_shards"].to_list() == [len(names)]
    assert compact(root, target_mb=mb_for(root, 1)) == {}  # nothing more to join


def test_no_name_of_an_old_shard_leads_to_a_new_one(root):
    """So a reader with a stale list of files fails, however many of them it had opened before."""
    before = {
        path
        for table in TABLES
        if "run" in TABLES[table].partitions and table != "selections"
        for path in store.files(root, table)
    }
    opened = pq.ParquetFile(sorted(before)[0])
    compact(root, target_mb=mb_for(root, 2))
    assert not [path for path in before if path.exists()]
    opened.read()  # what was open stays readable
    compact(root)
    assert shards(root, "rollouts") == ["00009"]


def test_jobs_know_what_is_done_after_compaction(tmp_path, chain, canopy):
    """Sampling a complete run again does nothing; scoring goes by the new shards."""
    prompts = write_prompts(tmp_path / "p.jsonl", *PROMPTS[:6])
    roots = [tmp_path / name for name in ("plain", "scored first", "scored after")]
    for root in roots:
        assert canopy(*ingest_arguments(root, chain, prompts, samples=4))[0] == 0
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


def test_what_is_not_whole_is_refused_and_nothing_is_changed(root):
    for table in ("embeddings", "embedding_spectra"):
        for path in store.files(root, table):
            if path.name == "part-00001.parquet":
                path.unlink()
    before = contents(root)
    with pytest.raises(canopy_store.DataError, match="has 5 of 6 shards; finish its ingest"):
        compact(root)
    assert without_work(contents(root)) == without_work(before)
    assert compact(root, target_mb=mb_for(root, 1)) == {}
    # a group that lacks all of its shards is none the worse: they are still to do
    for path in store.files(root, "embeddings") + store.files(root, "embedding_spectra"):
        if path.name == "part-00000.parquet":
            path.unlink()
    compact(root, target_mb=mb_for(root, 2))
    assert shards(root, "rollouts") == ["00006", "00007", "00008"]
    assert shards(root, "embeddings") == ["00007", "00008"]


def test_damage_is_not_copied_under_fresh_checksums(root):
    path = store.files(root, "rollouts")[3]
    column = pq.read_metadata(path).row_group(0).column(7)
    flip(path, column.data_page_offset + column.total_compressed_size - 2, 1)
    before = contents(root)
    with pytest.raises(canopy_store.DataError, match=r"part-00003\.parquet: cannot be read"):
        compact(root)
    assert without_work(contents(root)) == without_work(before)


def test_a_file_system_without_the_swap_is_refused(root, monkeypatch):
    def no_swap(one, other):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(maintenance, "_exchange", no_swap)
    before = contents(root)
    with pytest.raises(canopy_store.StoreError, match=r"cannot be swapped .* nothing is compacted"):
        compact(root)
    assert without_work(contents(root)) == without_work(before)
    assert [path.name for path in (root / ".work").iterdir()] == [f"run={RUN}.lock"]


def test_what_cannot_be_compacted_is_one_line(root, tmp_path, origin):
    with pytest.raises(canopy_store.UsageError, match="--target-mb 0"):
        compact(root, target_mb=0)
    with pytest.raises(canopy_store.StoreError, match="--run nobody: no complete run"):
        compact(root, ["nobody"])
    shared = export(origin, tmp_path / "shared")
    with pytest.raises(canopy_store.UsageError, match="an exported folder"):
        compact(shared)
    with pytest.raises(canopy_store.UsageError, match="an exported folder"):
        remove_run(shared, RUN)


DRIVER = """
import json, os, random, signal, sys, time
from canopy_store import store
from canopy_store.upkeep import maintenance
spare, calls, seed = json.loads(sys.argv[1])
random.seed(seed)
real, cut, swap = os.fsync, os.unlink, maintenance._exchange
def slow(f):
    def g(*a, **k):
        time.sleep(0.004)
        return f(*a, **k)
    return g
os.fsync, maintenance._exchange, maintenance._GRACE = slow(real), slow(swap), 0.05
os.unlink, os.rename = slow(cut), slow(os.rename)
maintenance.sql.write_database = lambda root: None  # its second would swallow most of the kills
def start(verb, root, more):
    pid = os.fork()
    if pid == 0:
        getattr(maintenance, verb)(root, **more)
        os._exit(0)
    return pid
began = time.monotonic()
assert os.waitpid(start(*spare), 0)[1] == 0
longest, kills = time.monotonic() - began, 0
for at, call in enumerate(calls):
    pid = start(*call)
    # spread evenly over the time it takes, so that every stage is hit
    time.sleep((at + random.random()) / len(calls) * longest)
    os.kill(pid, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
print(kills)
"""


def killed(spare: list[object], calls: list[list[object]], seed: int) -> int:
    """Runs each call and kills it with kill -9, the later ones later; how many were still running.

    ``spare`` is the same call on another copy: how long that takes is how long the last one gets.
    """
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([spare, calls, seed], default=str)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def test_killed_anywhere_every_view_stays_and_the_same_call_finishes(
    origin, measured, tmp_path, monkeypatch
):
    monkeypatch.setattr(maintenance, "_GRACE", 0.0)
    copies = [Path(shutil.copytree(origin, tmp_path / str(i))) for i in range(16)]
    rows, size = ordered(origin), mb_for(origin, 2)
    stages: dict[object, Path] = {}
    kills = 0
    for seed in (1, 2):
        spare = shutil.copytree(origin, tmp_path / f"spare {seed}")
        calls = [["compact", copy, {"target_mb": size}] for copy in (spare, *copies)]
        kills += killed(calls[0], calls[1:], seed)
        for copy in copies:
            assert all(frame.equals(rows[table]) for table, frame in ordered(copy).items())
            stage = (store.half_compacted(copy, RUN), *(len(store.files(copy, t)) for t in rows))
            if stage not in stages:
                stages[stage] = copy
                assert same_views(views(copy), measured)
                problems = verify(copy, deep=True)
                assert problems.filter(~pl.col("harmless")).is_empty(), problems.rows()
    assert kills >= 20
    assert len(stages) > 2, stages  # before, between and after the swaps
    for copy in copies:
        compact(copy, target_mb=size)
        assert shards(copy, "rollouts") == ["00006", "00007", "00008"]
        assert not [p for p in (copy / ".work").rglob("*") if p.suffix != ".lock"]
        assert all(frame.equals(rows[table]) for table, frame in ordered(copy).items())
    for copy in stages.values():
        assert verify(copy, deep=True).rows() == []


def test_half_way_no_job_writes_and_verify_says_what_to_do(root, measured, monkeypatch):
    swap, calls = maintenance._exchange, []

    def breaks(one: Path, other: Path) -> None:
        calls.append(other)
        if len(calls) == 4:  # the first is a trial
            raise KeyboardInterrupt
        swap(one, other)

    monkeypatch.setattr(maintenance, "_exchange", breaks)
    with pytest.raises(KeyboardInterrupt):
        compact(root)
    assert same_views(views(root), measured)
    (problem,) = verify(root, deep=True).rows()
    assert problem[2:] == (
        "a compaction that was stopped half way",
        f"finish it: canopy compact --store {root} --run {RUN}",
        True,
    )
    said = "compaction was stopped half way; finish it: canopy compact"
    for use in (lambda: export(root, root.parent / "out"), lambda: merge([root], root.parent / "t")):
        with pytest.raises(canopy_store.ConflictError, match=said):
            use()
    monkeypatch.undo()
    assert compact(root) == {RUN: (6, 1)}
    assert verify(root, deep=True).rows() == []


def test_a_forged_journal_leads_nowhere(root, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    work = store.workspace(root, RUN)
    (work / "new").mkdir(parents=True)
    for where in ("../victim", f"rollouts/../../victim/run={RUN}", str(victim), "plans"):
        journal = {"folders": {where: ["part-00000.parquet"]}, "shards": [6, 1]}
        (work / "journal.json").write_text(json.dumps(journal))
        with pytest.raises(canopy_store.DataError, match="not a readable journal"):
            compact(root)
    shutil.rmtree(root / ".work")
    (root / ".work").symlink_to(victim)
    with pytest.raises(canopy_store.StoreError, match="a link, not a folder"), store.holding(root, RUN):
        pass
    assert list(victim.iterdir()) == []


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
                        answers.append(con.execute(query).fetchall()[0])
            except Exception as error:  # DuckDB's own, or this package's: a file is gone
                answers.append(type(error))

    read_once = threading.Event()
    with canopy_store.open(root) as con:
        whole = con.execute(query).fetchall()[0]
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    monkeypatch.setattr(maintenance, "_GRACE", 0.05)
    for fit in (2, 2, 2, 2):
        read_once.wait(0.3)
        compact(root, target_mb=mb_for(root, fit))
    read_once.wait(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    good = [answer for answer in answers if isinstance(answer, tuple)]
    assert set(good) == {whole}
    assert len(good) > 10


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


# ---------------------------------------------------------------- remove


def test_a_run_is_removed_and_merged_again(root, origin, measured):
    count = remove_run(root, RUN)
    gone = [p for p in origin.rglob("*") if p.is_file() and RUN in str(p) and ".work" not in p.parts]
    assert count == len(gone)
    assert not [p for p in root.rglob("*") if RUN in p.name]
    assert verify(root, deep=True).rows() == []
    assert canopy_store.read(root, "rollouts").is_empty()
    for name in (RUN, "*", "../s"):
        with pytest.raises(canopy_store.StoreError, match="no run of this name"):
            remove_run(root, name)
    assert merge([origin], root) == [RUN]
    assert same_views(views(root), measured)


def test_a_removal_killed_anywhere_is_finished_by_the_same_call(origin, tmp_path):
    copies = [Path(shutil.copytree(origin, tmp_path / str(i))) for i in range(10)]
    spare = shutil.copytree(origin, tmp_path / "spare")
    calls = [["remove_run", copy, {"run_id": RUN}] for copy in (spare, *copies)]
    kills = killed(calls[0], calls[1:], 3)
    assert kills >= 6
    stages = set()
    for copy in copies:
        problems = verify(copy)
        assert problems.filter(~pl.col("harmless")).is_empty(), problems.rows()
        seen = canopy_store.read(copy, "rollouts")["run_id"].len()
        assert seen in (0, 12 * len(PROMPTS))
        left = {path.relative_to(copy).parts[0] for path in copy.rglob("*") if path.is_file()}
        stages.add((seen, *sorted(left)))
        try:
            maintenance.require_run(copy, RUN)
        except canopy_store.StoreError:
            pass
        else:
            remove_run(copy, RUN)
        assert verify(copy, deep=True).rows() == []
        assert not [p for p in copy.rglob("*") if RUN in p.name and p.suffix != ".lock"]
    assert len(stages) > 2, stages


# ---------------------------------------------------------------- the commands


def test_the_commands(origin, tmp_path, canopy):
    root = tmp_path / "s"
    code, out, _ = canopy("merge", origin, "--store", root)
    assert (code, out) == (0, f"{root}: 1 runs from 1 stores: {RUN}\n")
    code, out, _ = canopy("compact", "--store", root)
    assert (code, out) == (0, f"{root}: {RUN}: 6 shards are now 1\n")
    assert "nothing to do" in canopy("compact", "--store", root)[1]
    code, out, _ = canopy("verify", "--store", root, "--json")
    assert (code, json.loads(out)) == (0, [])
    assert canopy("verify", "--store", root, "--format", "json")[1] == out
    code, out, err = canopy("rm-run", RUN, "nobody", "--store", root, "--yes")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "nobody: no run of this name" in err
    assert len(canopy_store.read(root, "runs")) == 1
    code, out, _ = canopy("rm-run", RUN, "--store", root, "--yes")
    assert (code, f"{RUN} removed" in out) == (0, True)
    assert canopy_store.read(root, "runs").is_empty()
    assert canopy("rm-run", "--store", root)[0] == 2
