"""Do the intervals of canopy compare cover, do its tests err as often as they say, and what misleads?

    python benchmarks/simulation_compare.py [--simulations 1000]

Rollouts are drawn from known distributions: prompts differ, two variants share them, lengths and
entropy rates of a prompt are correlated. Per number of prompts: how often the 95% interval of the
delta holds the truth, by Student's t and by percentiles, how often p < 0.05 where nothing changed, and
how often any of the metrics, Holm-adjusted, is below 0.05 then (the family-wise error). `skewed` is a
measure of which a prompt's change is log-normal. Then training seeds: whether the interval of a change
over three checkpoints holds the mean over all that could be trained. Last, two stores that mislead:
one model under two caps and numbers of rollouts, and a change that a cap reverses.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import canopy_store
from canopy_store.analysis import bootstrap
from canopy_store.analysis.checkpoints import two_way
from canopy_store.analysis.intervals import Units, summary
from canopy_store.analysis.pairing import Side, evaluate
from canopy_store.errors import ConflictError

METRICS = ["ce_star", "entropy_rate", "mean_length", "rho_pearson", "surprisal_mean"]
NAMES = ["ce_star", "entropy_rate", "mean_length", "rho_pearson", "skewed"]
SAMPLES = 16
REPLICATES = 500


def draw_side(
    rng: np.random.Generator, level: np.ndarray, shift: float, skewed: float
) -> dict[str, np.ndarray]:
    """Per-prompt columns (P,) of one variant: rates around ``level`` (P,) + shift, in nats per token."""
    prompts = len(level)
    common = rng.normal(size=(prompts, SAMPLES))  # what makes length and rate go together
    own = rng.normal(0, 0.1, (prompts, 1))  # a prompt answers a treatment in its own way
    n = np.exp(3.5 + 0.4 * (0.3 * common + np.sqrt(1 - 0.09) * rng.normal(size=common.shape)))
    n = np.maximum(np.round(n), 1)
    r = level[:, None] + shift + own + 0.25 * (0.5 * common + np.sqrt(0.75) * rng.normal(size=n.shape))
    dn, dr = n - n.mean(1, keepdims=True), r - r.mean(1, keepdims=True)
    return {
        "n_rollouts": np.full(prompts, float(SAMPLES)),
        "ce_star": (n * r).mean(1),
        "entropy_rate": r.mean(1),
        "mean_length": n.mean(1),
        "rho_pearson": (dn * dr).sum(1) / np.sqrt((dn**2).sum(1) * (dr**2).sum(1)),
        # mean 1 where the treatment changes it, 0 in the baseline
        "surprisal_mean": 5 + skewed * (np.exp(rng.normal(-0.5, 1, prompts))),
    }


def one(rng: np.random.Generator, prompts: int, shift: float) -> dict[str, list[dict]]:
    """One simulated comparison, through the code that compare runs on a store's numbers."""
    level = rng.normal(2.0, 0.4, prompts)
    names = [str(p) for p in range(prompts)]
    each = np.full(prompts, SAMPLES)
    sides = [
        Side("r", names, each, np.zeros(prompts), bootstrap.weighted_values(columns, METRICS))
        for columns in (
            draw_side(rng, level, 0.0, 0.0 if shift else 1.0),
            draw_side(rng, level, shift, 1.0),
        )
    ]
    seed = int(rng.integers(2**32))
    drawn = bootstrap.draw_prompts(prompts, REPLICATES, seed)
    counts = bootstrap.counts_of(drawn)
    values, replicates, _ = evaluate(
        {("f", "v", "t"): (sides[0], sides[1])},
        METRICS,
        lambda *_: (drawn, counts),
        REPLICATES,
        seed,
        {},
    )
    return {
        interval: [
            summary(
                name,
                values[:, k],
                replicates[..., k],
                Units(prompts, prompts - 1, interval=interval),
            )
            for k, name in enumerate(METRICS)
        ]
        for interval in ("t", "percentile")
    }


def truth(shift: float) -> list[float]:
    """The deltas, by a very large draw."""
    rng = np.random.default_rng(1)
    level = rng.normal(2.0, 0.4, 200_000)
    both = [draw_side(np.random.default_rng(s), level, x, 0.0) for s, x in ((2, 0.0), (3, shift))]
    sums = [bootstrap.weighted_values(columns, METRICS).sum(1) for columns in both]
    base, treated = (bootstrap.pooled(total, METRICS) for total in sums)
    # the treatment here moves the rate alone: length and correlation do not change
    moved = dict(zip(METRICS, treated - base, strict=True))
    return [moved["ce_star"], moved["entropy_rate"], 0.0, 0.0, 1.0]


def coverage(simulations: int) -> None:
    """Prints the table of coverage and errors, by the number of prompts."""
    deltas = truth(0.1)
    print(f"{simulations} simulations, {SAMPLES} rollouts a prompt")
    print("| prompts | metric | coverage, t | coverage, percentile | p < 0.05 under no change |")
    print("|---|---|---|---|---|")
    for prompts in (8, 25, 100):
        rng = np.random.default_rng(prompts)
        covered = {"t": np.zeros(len(METRICS)), "percentile": np.zeros(len(METRICS))}
        rejected, any_rejected = np.zeros(len(METRICS)), 0
        for _ in range(simulations):
            for interval, rows in one(rng, prompts, 0.1).items():
                for k, row in enumerate(rows):
                    covered[interval][k] += row["delta_ci_low"] <= deltas[k] <= row["delta_ci_high"]
            p = np.array([row["p"] for row in one(rng, prompts, 0.0)["t"]])
            rejected += p < 0.05
            # Holm rejects something exactly where the smallest p, times their number, is below
            any_rejected += p.min() * len(p) < 0.05
        for k, name in enumerate(NAMES):
            both = " | ".join(f"{covered[i][k] / simulations:.3f}" for i in ("t", "percentile"))
            print(f"| {prompts} | `{name}` | {both} | {rejected[k] / simulations:.3f} |")
        print(f"| {prompts} | any, Holm-adjusted | | | {any_rejected / simulations:.3f} |", flush=True)


def seeds(simulations: int) -> None:
    """Prints the coverage of a change over three checkpoints and 40 prompts."""
    from scipy import stats

    print(
        "\n| sd of seeds | checkpoints | coverage over seeds | coverage of one checkpoint's interval |"
    )
    print("|---|---|---|---|")
    rng = np.random.default_rng(0)
    for spread in (0.0, 0.1, 0.3, 1.0):
        several = alone = 0
        for _ in range(simulations):
            table = rng.normal(0, spread, (3, 1)) + rng.normal(0, 1, 40) + rng.normal(0, 0.7, (3, 40))
            se, freedom = two_way(table, np.zeros(40))
            several += abs(table.mean()) <= stats.t.ppf(0.975, freedom) * se
            first = table[0]
            alone += abs(first.mean()) <= stats.t.ppf(0.975, 39) * first.std(ddof=1) / np.sqrt(40)
        print(f"| {spread} | 3 | {several / simulations:.3f} | {alone / simulations:.3f} |", flush=True)


def store_of(
    root: Path, variant: str, samples: int, cap: int, stop: float, rate: float, prompts: int = 40
) -> None:
    """Imports rollouts that end at each step with chance ``stop``, of about ``rate`` nats a step."""
    rng = np.random.default_rng([samples, cap, int(1000 * stop)])
    levels = np.random.default_rng(7).normal(rate, 0.2, prompts)
    rows = []
    for p in range(prompts):
        for i in range(samples):
            ends = int(rng.geometric(stop))
            entropy = np.abs(rng.normal(levels[p], 0.3, min(ends, cap)))
            where = {"family": "f", "variant": variant, "task": "t", "prompt_id": str(p), "sample": i}
            rows.append(
                {
                    **where,
                    "entropy": entropy.tolist(),
                    "embedding": rng.normal(size=8).tolist(),
                    "finish_reason": "stop" if ends <= cap else "length",
                }
            )
    file = root.parent / f"{variant}.parquet"
    pl.DataFrame(rows).write_parquet(file)
    canopy_store.import_rollouts(root, file, max_new_tokens=cap, temperature=1.0)


def situations() -> None:
    """Prints what compare says of the two stores that mislead."""
    print("\n| situation | CE*: change | p | marks |")
    print("|---|---|---|---|")

    def show(what: str, root: Path, metric: str = "ce_star", **options: Any) -> None:
        from canopy_store.analysis.words import marks

        try:
            (row,) = canopy_store.compare(root, metrics=[metric], **options).to_dicts()
        except ConflictError as error:
            print(f"| {what} | refused | | {error} |", flush=True)
            return
        print(f"| {what} | {row['percent_delta']:+.1f}% | {row['p']:.2g} | {'; '.join(marks(row))} |")

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "one"
        store_of(root, "base", 40, 128, 0.015, 1.5)
        store_of(root, "again", 16, 64, 0.015, 1.5)
        show("one model, M 40 and cap 128 against M 16 and cap 64", root)
        show("the same, `--allow cap`", root, allow=["cap"])
        show("the same, `--horizon 64`", root, horizon=64)
        show("its Vendi score, `--allow cap`", root, metric="vendi_score", allow=["cap"])
        root = Path(scratch) / "reversed"
        store_of(root, "base", 16, 2000, 0.008, 1.0)
        store_of(root, "sft", 16, 2000, 0.02, 1.75)
        show("a true change, nothing cut", root)
        show("the same at `--horizon 64`", root, horizon=64)
        show("the same at `--horizon 16`", root, horizon=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    simulations = parser.parse_args().simulations
    situations()
    seeds(2 * simulations)
    print()
    coverage(simulations)


if __name__ == "__main__":
    main()
