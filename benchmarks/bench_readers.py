"""Readers of a store while runs are committed to it: does any of them ever see a part of one?

    python benchmarks/bench_readers.py [--readers 20] [--tries 1000]

One process imports runs of eight rollouts, embeddings with them, as fast as it can; the readers, threads
of another one, open the store and ask for counts and pooled metrics. Prints how many of the tries saw a
run with fewer rollouts, embeddings or spectra than it has.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
import threading
from pathlib import Path

import numpy as np
import polars as pl

import canopy_store
from canopy_store import store

SAMPLES = 8
QUERIES = (
    "select run_id, count(*) from rollouts group by all",
    "select run_id, count(*) from embeddings group by all",
    "select run_id, sum(n)::int from embedding_spectra group by all",
    "select run_id, n_rollouts from model_metrics where semantic_diversity is not null",
    "select run_id, n_rollouts from runs",
)


def write(root: Path, scratch: Path, stop: threading.Event) -> None:
    """Commits runs until it is told to stop; after forty, removes one and commits it again."""
    rng = np.random.default_rng(0)
    for number in itertools.count():
        if stop.is_set():
            return
        rows = {
            "family": "f",
            "variant": "base",
            "task": f"t{number % 40}",
            "prompt_id": "p",
            "sample": range(SAMPLES),
            "entropy": [[0.5] * (n + 1) for n in range(SAMPLES)],
            "embedding": rng.normal(size=(SAMPLES, 3)).tolist(),
        }
        run = f"f.base.t{number % 40}"
        if number >= 40:
            canopy_store.remove_run(root, run)
        pl.DataFrame(rows).write_parquet(scratch / "in.parquet")
        canopy_store.import_rollouts(root, scratch / "in.parquet", max_new_tokens=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", type=int, default=20)
    parser.add_argument("--tries", type=int, default=1000)
    given = parser.parse_args()
    tries = itertools.count()
    parts: list[tuple[str, dict[str, int]]] = []
    gone = itertools.count()
    sizes: set[int] = set()

    def read(root: Path) -> None:
        while (at := next(tries)) < given.tries:
            query = QUERIES[at % len(QUERIES)]
            try:
                counted = dict(canopy_store.open(root).sql(query).fetchall())
            except Exception as error:
                if "No files found" not in str(error) and "No such file" not in str(error):
                    raise
                next(gone)  # of a run that was removed meanwhile: an error, never a part
                continue
            sizes.add(len(counted))
            if set(counted.values()) - {SAMPLES}:
                parts.append((query, counted))

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        store.init(root)
        stop = multiprocessing.Event()
        writer = multiprocessing.Process(target=write, args=(root, Path(folder), stop))
        writer.start()
        threads = [threading.Thread(target=read, args=(root,)) for _ in range(given.readers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        writer.join()
    print(f"{given.tries} tries by {given.readers} readers, of 0 to {max(sizes)} runs at a time")
    print(f"{len(parts)} saw a part of a run; {next(gone)} were told that a file is gone")
    for query, counted in parts[:3]:
        print(query, {run: n for run, n in counted.items() if n != SAMPLES})


if __name__ == "__main__":
    main()
