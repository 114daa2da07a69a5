"""24 runs x 10,000 rollouts, 60 million tokens: opening, model_metrics, and the cost of many shards.

    python benchmarks/bench_scale.py [--store DIR]

The same numbers in 120 shards and in 2,016; five rounds in turn, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from bench_query import bare_scan, machine, make_store, query, timed

import canopy_store

RUNS, PROMPTS, SAMPLES = 24, 100, 100
SHARDS = (5, 84)  # of a run


def opened(root: Path) -> None:
    """Opening, up to the first answer."""
    with canopy_store.open(root) as con:
        con.sql("select count(*) from runs").fetchall()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="keep the stores here and use them again")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        roots = {n * RUNS: Path(arguments.store or scratch) / f"shards-{n * RUNS}" for n in SHARDS}
        for shards, root in roots.items():
            if not (root / "canopy.duckdb").exists():
                make_store(root, PROMPTS, SAMPLES, RUNS, shards // RUNS)
        tokens = {int(query(root)["n_tokens"].sum()) for root in roots.values()}
        works = {"open": opened, "model_metrics": query, "bare scan": bare_scan}
        times: dict[tuple[int, str], list[float]] = {}
        for _ in range(arguments.rounds):
            for shards, root in roots.items():
                for name, work in works.items():
                    times.setdefault((shards, name), []).append(timed(lambda w=work, r=root: w(r)))
        print(f"{machine()}; {RUNS} runs x {PROMPTS * SAMPLES:,} rollouts, {min(tokens):,} tokens")
        print("| shards | open, s | model_metrics, s | bare scan, s | model_metrics to scan |")
        print("|---|---|---|---|---|")
        median = {key: statistics.median(values) for key, values in times.items()}
        for shards in roots:
            first, second, third = (median[shards, name] for name in works)
            print(f"| {shards:,} | {first:.2f} | {second:.2f} | {third:.2f} | {second / third:.1f} |")
        few, many = (median[shards, "model_metrics"] for shards in roots)
        print(f"many shards take {many / few:.2f} times as long; aim: at most 2")


if __name__ == "__main__":
    main()
