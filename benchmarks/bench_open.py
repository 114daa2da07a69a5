"""Opening a store of many runs, and reading one of them: what must not grow with the number of files.

    python benchmarks/bench_open.py [--runs 1000] [--shards 20] [--store DIR]

Builds a store of tiny shards (kept in DIR where it is named), then prints, as medians of five in fresh
processes: seconds to open it, seconds of three queries on one named run, and how many files each opened,
as the kernel counts them (inotify; Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import canopy_store
from canopy_store import store
from canopy_store.store.embeddings import write_embeddings
from canopy_store.store.rollouts import write_shard

POLICY = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def build(root: Path, runs: int, shards: int) -> None:
    """A store of complete runs with embeddings and scores; a shard holds the rollouts of one prompt."""
    os.fsync = lambda descriptor: None  # a benchmark's store may be lost
    store.init(root)
    store.add_model(root, {"family": "f", "variant": "base"})
    for number in range(runs):
        run_id = f"run{number:05d}"
        names = {"family": "f", "variant": "base", "task": "t"}
        settings = {"run_id": run_id, **names, "engine": "import"}
        store.plan(root, "run", run_id, settings)
        rollouts, embedded, scored = [], [], []
        for shard in range(shards):
            keys = {"run_id": [run_id] * 2, "prompt_id": [f"p{shard}"] * 2, "sample": [0, 1]}
            entropy = [[1.0, 0.5], [0.25]]
            path = store.shard_path(store.folder(root, "rollouts", run=run_id, **names), shard)
            write_shard(path, {**keys, "entropy": entropy, "finish_reason": ["stop"] * 2})
            rollouts.append(path)
            vectors = np.random.default_rng(shard).normal(size=(2, 4))
            embedded += write_embeddings(
                root, "e", run_id, shard, keys["prompt_id"], keys["sample"], vectors
            )
            path = store.shard_path(store.folder(root, "scores", scorer_id="s", run=run_id), shard)
            sums = {
                "policy": [store.canonical(POLICY)] * 2,
                "entropy": entropy,
                "entropy_sum": [1.5, 0.25],
            }
            store.write_rows(path, "scores", {**keys, **sums})
            scored.append(path)
        prompts = store.add_prompts(root, "t", [{"prompt_id": f"p{n}"} for n in range(shards)])
        policy = store.content_id(POLICY)
        store.commit(root, "embeddings", {"embedder": "e", "run": run_id}, embedded, {})
        store.commit(root, "scores", {"scorer_id": "s", "policy": policy, "run": run_id}, scored, {})
        row = {"run_id": run_id, "model_id": "f/base", **names, "rendering": "import"}
        row |= {"engine": "import", "settings": store.canonical(settings), "versions": "{}"}
        store.complete_run(root, rollouts, row, settings, prompts)


class Watch:
    """Counts the files of a store that this process opens, by inotify."""

    def __init__(self, root: Path) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self.libc.inotify_init1(os.O_NONBLOCK)
        for folder, _, names in os.walk(root):
            if any(name.endswith(".parquet") for name in names):
                self.libc.inotify_add_watch(self.descriptor, os.fsencode(folder), 0x20)  # IN_OPEN
        self.opened()

    def opened(self) -> int:
        """How many different Parquet files were opened since the last call."""
        names = set()
        while True:
            try:
                data = os.read(self.descriptor, 1 << 20)
            except BlockingIOError:
                return len(names)
            at = 0
            while at < len(data):
                watch, _, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0")
                if name.endswith(b".parquet"):
                    names.add((watch, name))
                at += 16 + length


def measure(root: Path, run_id: str) -> None:
    """Prints what one process takes to open the store and to read one run of it."""
    watch = Watch(root)
    started, worked = time.perf_counter(), time.process_time()
    con = canopy_store.open(root)
    print(time.perf_counter() - started, time.process_time() - worked, watch.opened(), end=" ")
    for table in ("rollouts", "scores", "embeddings"):
        started = time.perf_counter()
        con.sql(
            f"select count(*), any_value(prompt_id) from {table} where run_id = '{run_id}'"
        ).fetchall()
        print(time.perf_counter() - started, time.process_time() - worked, watch.opened(), end=" ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.store, f"run{given.runs // 2:05d}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = given.store or Path(scratch) / "store"
        if not root.exists():
            build(root, given.runs, given.shards)
        again = [sys.executable, __file__, "--measure", "--store", root, "--runs", str(given.runs)]
        rows = [
            [float(x) for x in subprocess.run(again, capture_output=True, check=True).stdout.split()]
            for _ in range(5)
        ]
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"{platform.machine()}, {os.cpu_count()} cores; {given.runs} runs of {given.shards} shards")
    print("| step | seconds | processor seconds | files opened |\n|---|---|---|---|")
    steps = ("open", "rollouts of a run", "scores of a run", "embeddings of a run")
    for at, step in enumerate(steps):
        seconds, worked, opened = medians[3 * at : 3 * at + 3]
        print(f"| {step} | {seconds:.2f} | {worked:.2f} | {opened:.0f} |")


if __name__ == "__main__":
    main()
