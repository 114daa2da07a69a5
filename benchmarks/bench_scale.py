"""24 runs x 10,000 rollouts, 60 million tokens: opening, model_metrics, and the cost of many shards.

    python benchmarks/bench_scale.py [--store DIR]

The same numbers in 120 shards, in 2,016, and in those that a compaction makes of them; five rounds in
turn, medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from bench_query import bare_scan, machine, make_store, query, timed

import canopy_store
from canopy_store.upkeep.compact import compact

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
        folder = Path(arguments.store or scratch)
        roots = {f"{n * RUNS:,}": folder / f"shards-{n * RUNS}" for n in SHARDS}
        for n, root in zip(SHARDS, roots.values(), strict=True):
            if not (root / "canopy.duckdb").exists():
                make_store(root, PROMPTS, SAMPLES, RUNS, n)
        few, many = roots
        roots["compacted"] = folder / "compacted"
        if not roots["compacted"].exists():
            shutil.copytree(roots[many], roots["compacted"])
            print(f"compaction: {timed(lambda: compact(roots['compacted'])):.0f} s")
        tokens = {int(query(root)["n_tokens"].sum()) for root in roots.values()}
        works = {"open": opened, "model_metrics": query, "bare scan": bare_scan}
        times: dict[tuple[str, str], list[float]] = {}
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
            print(f"| {shards} | {first:.2f} | {second:.2f} | {third:.2f} | {second / third:.1f} |")
        base = median[few, "model_metrics"]
        taken = {shards: median[shards, "model_metrics"] / base for shards in roots}
        print(
            f"{many} shards take {taken[many]:.2f} times as long, compacted {taken['compacted']:.2f}; "
            "aim: at most 2"
        )


if __name__ == "__main__":
    main()
