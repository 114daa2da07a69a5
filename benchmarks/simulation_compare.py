"""Do the intervals of canopy compare cover, and do its tests err as often as they say?

    python benchmarks/simulation_compare.py [--simulations 1000]

Rollouts are drawn from known distributions: prompts differ, two variants share them, lengths and
entropy rates of a prompt are correlated. Per number of prompts: how often the 95% interval of the
delta holds the truth, how often p < 0.05 where nothing changed, and how often any of the metrics,
Holm-adjusted, is below 0.05 then (the family-wise error).
"""

from __future__ import annotations

import argparse

import numpy as np

from canopy_store.analysis import bootstrap, comparison
from canopy_store.analysis.pairing import Side, evaluate

METRICS = ["ce_star", "entropy_rate", "mean_length", "rho_pearson"]
SAMPLES = 16


def draw_side(rng: np.random.Generator, level: np.ndarray, shift: float) -> dict[str, np.ndarray]:
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
    }


def one(rng: np.random.Generator, prompts: int, shift: float) -> list[dict]:
    """One simulated comparison, through the code that compare runs on a store's numbers."""
    level = rng.normal(2.0, 0.4, prompts)
    names = [str(p) for p in range(prompts)]
    sides = [
        Side("r", names, prompts * SAMPLES, bootstrap.weighted_values(columns, METRICS))
        for columns in (draw_side(rng, level, 0.0), draw_side(rng, level, shift))
    ]
    seed = int(rng.integers(2**32))
    drawn = bootstrap.draw_prompts(prompts, 1000, seed)
    counts = bootstrap.counts_of(drawn)
    values, replicates, _ = evaluate(
        {("f", "v", "t"): (sides[0], sides[1])}, METRICS, lambda *_: (drawn, counts), 1000, seed, {}
    )
    rows = []
    for k, name in enumerate(METRICS):
        summary = comparison._summary(name, values[:, k], replicates[..., k], 0.95)
        rows.append({**summary, **comparison._tests(summary, prompts, prompts - 1, None)})
    return rows


def truth(shift: float) -> list[float]:
    """The deltas, by a very large draw."""
    rng = np.random.default_rng(1)
    level = rng.normal(2.0, 0.4, 200_000)
    both = [draw_side(np.random.default_rng(s), level, x) for s, x in ((2, 0.0), (3, shift))]
    sums = [bootstrap.weighted_values(columns, METRICS).sum(1) for columns in both]
    base, treated = (bootstrap.pooled(each, METRICS) for each in sums)
    # the treatment here moves the rate alone: length and correlation do not change
    return [
        float(d) if name in ("ce_star", "entropy_rate") else 0.0
        for name, d in zip(METRICS, treated - base, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    simulations = parser.parse_args().simulations
    deltas = truth(0.1)
    print(f"{simulations} simulations, {SAMPLES} rollouts a prompt")
    print("| prompts | metric | coverage of the 95% interval | p < 0.05 under no change |")
    print("|---|---|---|---|")
    for prompts in (8, 25, 100):
        rng = np.random.default_rng(prompts)
        covered, rejected, any_rejected = np.zeros(len(METRICS)), np.zeros(len(METRICS)), 0
        for _ in range(simulations):
            for k, row in enumerate(one(rng, prompts, 0.1)):
                covered[k] += row["delta_ci_low"] <= deltas[k] <= row["delta_ci_high"]
            p = np.array([row["p"] for row in one(rng, prompts, 0.0)])
            rejected += p < 0.05
            # Holm rejects something exactly where the smallest p, times their number, is below
            any_rejected += p.min() * len(p) < 0.05
        for k, name in enumerate(METRICS):
            print(
                f"| {prompts} | `{name}` | {covered[k] / simulations:.3f} | "
                f"{rejected[k] / simulations:.3f} |"
            )
        print(f"| {prompts} | any, Holm-adjusted | | {any_rejected / simulations:.3f} |")


if __name__ == "__main__":
    main()
