"""canopy compare over 24 runs x 100 prompts with 2,000 replicates: python benchmarks/bench_compare.py

Prints the median of five runs: the whole comparison, and its bootstrap alone, without reading.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from bench_query import machine

import canopy_store
from canopy_store import sql
from canopy_store.analysis.comparable import comparable, view_rows
from canopy_store.analysis.comparison import compare_prompts

FAMILIES, TASKS, PROMPTS, SAMPLES = 3, 4, 100, 8


def make_store(root: Path) -> None:
    """24 runs: three families, base and sft, four tasks; short rollouts, 8-d embeddings."""
    rng = np.random.default_rng(0)
    frames = []
    for family in range(FAMILIES):
        for variant in ("base", "sft"):
            for task in range(TASKS):
                n = PROMPTS * SAMPLES
                lengths = rng.integers(4, 40, n)
                frames.append(
                    pl.DataFrame(
                        {
                            "family": [f"f{family}"] * n,
                            "variant": [variant] * n,
                            "task": [f"t{task}"] * n,
                            "prompt_id": np.repeat(np.arange(PROMPTS), SAMPLES),
                            "sample": np.tile(np.arange(SAMPLES), PROMPTS),
                            "entropy": [rng.gamma(2, 0.5, k).tolist() for k in lengths],
                            "embedding": rng.normal(size=(n, 8)).tolist(),
                        }
                    )
                )
    file = root.parent / "rollouts.parquet"
    pl.concat(frames).write_parquet(file)
    canopy_store.import_rollouts(root, file, max_new_tokens=64)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "store"
        make_store(root)
        canopy_store.compare(root)
        with sql.connect(root) as con:
            prompts, _ = comparable(view_rows(con, "prompt_metrics"), root)
            models = view_rows(con, "models")
        whole, alone = [], []
        for _ in range(5):
            began = time.perf_counter()
            frame = canopy_store.compare(root)
            whole.append(time.perf_counter() - began)
            began = time.perf_counter()
            compare_prompts(prompts, models)
            alone.append(time.perf_counter() - began)
        print(f"{machine()}; 24 runs x {PROMPTS} prompts, 2,000 replicates, {len(frame)} rows")
        print(f"the whole comparison: {statistics.median(whole):.2f} s")
        print(f"without reading the store: {statistics.median(alone):.2f} s")


if __name__ == "__main__":
    main()
