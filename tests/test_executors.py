"""Job arrays and Ray: however a run's shards are spread, it is the run of a single process."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from chain import CHAIN_LOGITS, save_chain
from stores import ingest_arguments, rollouts, table_hashes, write_prompts

import canopy_store
from canopy_store import store
from canopy_store.errors import CanopyError
from canopy_store.ingest import executor_ray

SHARDS = 16

# One process a call, all at once; the heavy packages are imported once.
ARRAY = """
import json, os, sys
from canopy_store.cli import main
import canopy_store.ingest.rollouts, torch  # noqa
children = []
for arguments in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os._exit(main(arguments))
    children.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    return write_prompts(folder / "p.jsonl", *(f"{a} {b}" for a in "abcd" for b in "abcd"))


@pytest.fixture(scope="module")
def call(chain, prompts) -> Callable[..., list[str]]:
    """The command of the run, into a store; a shard of it takes some tenths of a second."""
    return lambda root: ingest_arguments(root, chain, prompts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, call) -> Path:
    """The run as a single process without a break stores it."""
    from canopy_store.cli import main

    torch.set_num_threads(1)  # as a worker with one CPU
    root = tmp_path_factory.mktemp("whole") / "s"
    assert main(call(root)) == 0
    return root


def assert_same_run(root: Path, whole: Path) -> None:
    assert rollouts(root).equals(rollouts(whole))
    assert table_hashes(root, "rollouts") == table_hashes(whole, "rollouts")
    assert canopy_store.read(root, "runs")["n_shards"].to_list() == [SHARDS]
    counted = ("run_id", "n_rollouts", "n_tokens", "n_prompts", "settings")
    assert (
        canopy_store.read(root, "runs")
        .select(counted)
        .equals(canopy_store.read(whole, "runs").select(counted))
    )


# ---------------------------------------------------------------- job arrays


def test_an_array_at_once_with_one_job_twice(tmp_path, call, whole):
    root = tmp_path / "s"  # which the jobs make, all at the same moment
    calls = [[*call(root), "--shard", part] for part in ("1/3", "2/3", "2/3", "3/3")]
    done = subprocess.run(
        [sys.executable, "-c", ARRAY, json.dumps(calls)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0]", done.stderr[-2000:]
    assert_same_run(root, whole)
    assert not list(root.rglob("*.tmp"))


def test_an_array_in_any_order(tmp_path, call, whole, canopy):
    root = tmp_path / "s"
    for part in ("3/3", "1/3", "1/3", "2/3"):
        code, out, err = canopy(*call(root), "--shard", part)
        assert code == 0, err
        assert ("is complete" in out) == (part == "2/3")
        assert len(canopy_store.read(root, "rollouts")) == (SHARDS * 30 if part == "2/3" else 0)
    assert_same_run(root, whole)


@pytest.mark.parametrize("part", ["0/3", "4/3", "a/3", "3", "/", "1/0", "-1/2", "1/2/3", "1.5/2", ""])
def test_a_part_that_is_none(tmp_path, call, canopy, part):
    code, _, err = canopy(*call(tmp_path / "s"), f"--shard={part}")
    assert code == 2
    assert err == f"canopy: --shard {part}: needs i/n with i from 1 to n, as in 2/8\n"
    assert not (tmp_path / "s").exists()


def at_once(rounds: int, job: Callable[[int, int], Any]) -> list[list[Any]]:
    """What each of six processes gives for each round, which all begin at the same moment."""
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(6), fork.SimpleQueue()

    def process(number: int) -> None:
        os.fsync = lambda file: None  # names are raced for, not power cuts
        for round_ in range(rounds):
            barrier.wait(timeout=60)
            try:
                answers.put((round_, number, job(round_, number)))
            except CanopyError as error:
                answers.put((round_, number, type(error).__name__))

    processes = [fork.Process(target=process, args=(number,)) for number in range(6)]
    for each in processes:
        each.start()
    found: list[list[Any]] = [[None] * 6 for _ in range(rounds)]
    for _ in range(6 * rounds):
        round_, number, answer = answers.get()
        found[round_][number] = answer
    for each in processes:
        each.join()
    return found


def test_of_jobs_that_begin_at_once_one_settles_the_settings(tmp_path):
    root = store.init(tmp_path / "s")

    def begin(name: str, number: int, *more: Any) -> int:
        return store.plan(root, "run", name, {"batch_size": number}, *more)["batch_size"]

    for round_, answers in enumerate(at_once(40, lambda r, n: begin(f"strict {r}", n))):
        path = store.plan_path(root, "run", f"strict {round_}")
        winner = store.read_plan(path)["settings"]["batch_size"]
        assert answers == [n if n == winner else "ConflictError" for n in range(6)]
    for answers in at_once(40, lambda r, n: begin(f"yielding {r}", n, ["batch_size"])):
        assert len(set(answers)) == 1
    assert not list((root / "plans").glob(".*"))


def test_jobs_that_make_the_store_at_once(tmp_path):
    def make(round_: int, number: int) -> str:
        return store.init(tmp_path / str(round_)).name

    assert at_once(300, make) == [[str(round_)] * 6 for round_ in range(300)]


# ---------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with a CPU each, in this machine."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = nodes.address
    yield nodes.address
    nodes.shutdown()
    del os.environ["RAY_ADDRESS"]
    if before is not None:
        os.environ["RAY_ADDRESS"] = before


def sampling() -> list[psutil.Process]:
    """The cluster's processes that sample now: they are children of the nodes, which are ours."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::_Worker.make"]:
                found.append(process)
        except psutil.Error:
            pass
    return found


def awaited(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def meanwhile(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def stored(root: Path) -> int:
    return len(list((root / "rollouts").rglob("part-*.parquet"))) if root.exists() else 0


def test_a_worker_killed_while_it_samples(tmp_path, call, whole, cluster, canopy, monkeypatch):
    killed = []

    def kill() -> None:
        awaited(lambda: stored(tmp_path / "s") >= 2)
        while not killed:
            process = awaited(sampling)[0]
            process.suspend()
            if process in sampling():  # it has a shard in hand, and keeps it
                process.kill()
                killed.append(process)
            else:
                process.resume()

    monkeypatch.chdir(tmp_path)  # where the cluster's processes are not
    killer = meanwhile(kill)
    code, out, err = canopy(*call("s"), "--executor", "ray")
    killer.join()
    assert code == 0
    assert re.fullmatch(r"canopy: a worker died over shard \d+; another one takes it\n", err)
    assert out == "s: run chain.base.walk is complete\n"
    assert not killed[0].is_running()
    assert_same_run(tmp_path / "s", whole)


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """What a shell starts in the background is told to ignore Ctrl-C; these tests may be started so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_drivers_that_end_before_the_run(tmp_path, call, whole, cluster, canopy, ctrl_c_is_heard):
    root = tmp_path / "s"
    command = [sys.executable, "-m", "canopy_store.cli", *call(root), "--executor", "ray"]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    awaited(lambda: stored(root) >= 2)
    driver.kill()
    driver.wait()
    awaited(lambda: not sampling())  # the cluster ends a dead driver's workers
    assert stored(root) < SHARDS
    code, _, err = canopy(*call(root))  # another executor finishes
    assert code == 0, err
    assert_same_run(root, whole)

    root = tmp_path / "interrupted"  # begun by a job of an array, resumed by Ray
    assert canopy(*call(root), "--shard", "1/4")[0] == 0
    first = stored(root)

    def interrupt() -> None:
        awaited(lambda: stored(root) >= first + 2)
        os.kill(os.getpid(), signal.SIGINT)

    ctrl_c = meanwhile(interrupt)
    code, _, err = canopy(*call(root), "--executor", "ray")
    ctrl_c.join()
    assert code == 130
    assert err.strip() == (
        "canopy: interrupted; what was stored is whole: run the same command again to resume"
    )
    awaited(lambda: not sampling())
    assert first < stored(root) < SHARDS
    code, _, err = canopy(*call(root))  # another executor finishes
    assert code == 0, err
    assert_same_run(root, whole)
    assert not list((root / "rollouts").rglob("*.tmp"))


def test_data_that_fails_stops_the_run_with_its_line(tmp_path, cluster, canopy):
    logits = CHAIN_LOGITS.copy()
    logits[7] = np.nan  # after g
    broken = save_chain(tmp_path / "broken", logits)
    prompts = write_prompts(tmp_path / "p.jsonl", "a g")
    code, _, err = canopy(*ingest_arguments(tmp_path / "s", broken, prompts), "--executor", "ray")
    assert code == 1
    assert err == (
        f"canopy: {prompts}: line 1, sample 0, step 1: the model's logits are NaN or infinite; its "
        "weights are damaged, or the number format overflows: try --dtype float32\n"
    )
    assert not stored(tmp_path / "s")


def test_a_shard_that_kills_its_workers_is_named(tmp_path, call, cluster, canopy, monkeypatch):
    monkeypatch.setattr(executor_ray, "ATTEMPTS", 1)  # each takes seconds
    killer = meanwhile(lambda: awaited(sampling)[0].kill())
    code, _, err = canopy(*call(tmp_path / "s"), "--executor", "ray", "--workers", "1")
    killer.join()
    assert code == 1
    assert re.fullmatch(
        r"canopy: --executor ray: 1 workers died over shard \d+: .* run it again to resume\n", err
    )


def test_without_a_cluster_one_is_started_and_ended(tmp_path, chain, canopy, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "c d")
    before = psutil.Process().children(recursive=True)
    code, _, err = canopy(*ingest_arguments(tmp_path / "s", chain, prompts), "--executor", "ray")
    assert (code, err) == (0, "")
    assert len(canopy_store.read(tmp_path / "s", "rollouts")) == 60
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= {p.pid for p in before}


def test_no_cluster_answers(tmp_path, call, canopy, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    code, _, err = canopy(*call(tmp_path / "s"), "--executor", "ray")
    assert code == 2
    assert "no Ray cluster answers (RAY_ADDRESS is 127.0.0.1:9)" in err
    assert err.count("\n") == 1


def test_calls_that_ray_refuses(tmp_path, call, canopy, monkeypatch):
    for more, told in (
        (["--executor", "ray", "--shard", "1/2"], "--shard: not with --executor ray"),
        (["--workers", "2"], "--workers: only with --executor ray"),
        (["--executor", "ray", "--workers", "0"], "--workers 0: needs at least 1"),
    ):
        code, _, err = canopy(*call(tmp_path / "s"), *more)
        assert code == 2
        assert err.startswith(f"canopy: {told}")
        assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = canopy(*call(tmp_path / "s"), "--executor", "ray")
    assert code == 2
    assert "pip install 'canopy-store[ray]'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "expected"),
    [
        ([(8, 0)], None, True, (1, 8, 0)),  # one a node, with all its CPUs
        ([(8, 0), (8, 0), (0, 0)], None, True, (2, 8, 0)),  # a head that has none to give
        ([(8, 0), (8, 0)], 5, True, (5, 2, 0)),
        ([(4, 0), (16, 0)], None, True, (2, 8, 0)),
        ([(2, 0)], 7, True, (7, 1, 0)),  # those without room wait
        ([(32, 4), (32, 4), (16, 0)], None, True, (8, 8, 1)),  # one a GPU
        ([(32, 4)], 2, True, (2, 16, 1)),
        ([(32, 4)], None, False, (1, 32, 0)),
    ],
)
def test_each_worker_gets_as_many_cpus_as_leave_room(nodes, workers, gpus, expected):
    listed = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in nodes]
    count, needs = executor_ray.share(listed, workers, gpus)
    assert (count, needs["num_cpus"], needs["num_gpus"]) == expected


@pytest.mark.parametrize("name", ["model", "prompts", "documents", "items", "context", "data"])
def test_a_workers_folder_is_another_so_files_are_named_whole(tmp_path, monkeypatch, name):
    from canopy_store.ingest.executor_ray import _absolute

    (tmp_path / "file.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert _absolute(name, "file.jsonl") == str(tmp_path / "file.jsonl")
    assert _absolute(name, Path("file.jsonl")) == tmp_path / "file.jsonl"
    assert _absolute(name, "package:somewhere") == "package:somewhere"
    assert _absolute("task", "file.jsonl") == "file.jsonl"
