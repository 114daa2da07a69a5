"""Simulation study of the regressions: coverage of the 95% intervals, level of the test of eta = 0.

    python benchmarks/simulation.py [--simulations 200] [--workers 2] [--prompts 160 40]

Panels of two variants, three families and four tasks are drawn from known parameters, once with eta and
once with eta = 0, for the beta model and for the linear interaction model; each is fitted and its
intervals compared with the truth. Prints a markdown table; about five minutes on two cores as it stands.
A fit that refuses (FitError) is counted, never replaced.
"""

from __future__ import annotations

import argparse
import os
import time
from multiprocessing import get_context
from typing import NamedTuple

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # before numpy: a worker is one core

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
from scipy import special  # noqa: E402

from canopy_store.analysis.regression import Model, regress  # noqa: E402
from canopy_store.errors import FitError  # noqa: E402

TASKS = ("completion", "coding", "math", "stories")
FAMILIES, VARIANTS = 3, 2


class Scenario(NamedTuple):
    """The truth of a panel: slopes of R_sc in logits (beta), of R_bar in D per nat (interaction)."""

    model: Model
    prompts: int
    beta: float
    eta: float

    def truth(self) -> dict[str, float]:
        """Return the truth of each quantity that the table reports."""
        total = self.beta + self.eta
        return {"beta": self.beta, "eta": self.eta, "beta+eta": total, "ratio": total / self.beta}


class Estimate(NamedTuple):
    """One estimate, with its standard error and its 95% interval."""

    value: float
    se: float
    low: float
    high: float


Estimates = dict[str, Estimate]


def panel(scenario: Scenario, rng: np.random.Generator) -> pl.DataFrame:
    """Return one panel: prompts x families x variants rows, rates and lengths that differ by variant."""
    grid = np.indices((scenario.prompts, FAMILIES, VARIANTS))
    prompt, family, variant = (axis.ravel() for axis in grid)
    task = prompt % len(TASKS)
    shared = rng.normal(size=scenario.prompts)[prompt]  # a prompt's rate is alike in every model
    rate = np.exp(0.2 - 0.7 * variant + 0.15 * family + 0.25 * shared + rng.normal(0, 0.2, prompt.size))
    length = np.exp(5 - 0.3 * variant + rng.normal(0, 0.4, prompt.size))
    at_task = np.array([0.0, -0.1, 0.3, 0.4])[task]
    prompts, families = rng.normal(size=scenario.prompts)[prompt], rng.normal(size=FAMILIES)[family]
    if scenario.model == "beta":
        scaled = (rate - rate.mean()) / rate.std(ddof=1)
        eta = -1.0 + (scenario.beta + scenario.eta * variant) * scaled - 0.3 * variant + at_task
        mu = special.expit(eta + 0.1 * np.log(length / 150) + 0.4 * prompts + 0.2 * families)
        phi = np.exp(4.0 + 0.2 * variant - 0.1 * task - 0.2 * (family == 1) + 0.1 * scaled)
        d = rng.beta(mu * phi, (1 - mu) * phi)
    else:
        slope = scenario.beta + scenario.eta * variant
        d = 0.15 + slope * rate - 0.05 * variant + 0.2 * at_task + 0.07 * (prompts + families)
        d += rng.normal(0, 0.07, prompt.size)
    names = {"family": family, "variant": variant, "task": task, "prompt_id": prompt}
    keys = {key: codes.astype(str) for key, codes in names.items()}
    keys["variant"], keys["task"] = np.array(["base", "sft"])[variant], np.array(TASKS)[task]
    return pl.DataFrame({**keys, "D": d, "R_bar": rate, "N_bar": length})


def one(job: tuple[Scenario, list[int]]) -> Estimates | str:
    """Return the estimates of one simulated panel, or why there are none."""
    scenario, seed = job
    try:
        rows = panel(scenario, np.random.default_rng(seed))
        fit = regress(rows, scenario.model, checkpoints="fixed")
    except FitError as error:
        return str(error)
    numbers = ("estimate", "se", "ci_low", "ci_high")
    found = {
        row["name"]: Estimate(*(row[c] for c in numbers)) for row in fit.slopes.iter_rows(named=True)
    }
    eta = fit.coefficients.filter(
        pl.col("part") == "conditional", pl.col("term").str.contains(r"^R_\w+:variant")
    )
    return found | {"eta": Estimate(*eta.select(numbers).row(0))}


def rows(scenario: Scenario, results: list[Estimates | str]) -> list[str]:
    """Return a scenario's rows of the table."""
    kept = [r for r in results if not isinstance(r, str)]
    lines = []
    for name, truth in scenario.truth().items():
        value, se, low, high = (
            np.array(column) for column in zip(*(r[name] for r in kept), strict=True)
        )
        cover = float(((low <= truth) & (truth <= high)).mean())
        error = np.sqrt(cover * (1 - cover) / len(kept))
        rejected = f"{((low > 0) | (high < 0)).mean():.3f}" if name == "eta" else ""
        lines.append(
            f"| {scenario.model} | {scenario.prompts} | {name} | {truth:.3g} | {value.mean():.4f} "
            f"| {value.std(ddof=1):.4f} | {se.mean():.4f} | {cover:.3f} ± {error:.3f} | {rejected} "
            f"| {len(kept)} | {len(results) - len(kept)} |"
        )
    return lines


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--simulations", type=int, default=200, help="panels of each scenario")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prompts", type=int, nargs="+", default=[160, 40], help="prompts of a panel")
    options = parser.parse_args()
    truths: list[tuple[Model, float, float]] = [("beta", 0.25, 0.35), ("interaction", 0.08, 0.06)]
    scenarios = [
        Scenario(model, prompts, beta, eta)
        for prompts in options.prompts
        for model, beta, slope in truths
        for eta in (slope, 0.0)
    ]
    start = time.perf_counter()
    print(
        "| model | prompts | quantity | truth | mean estimate | sd of estimates | mean se "
        "| coverage of 95% | eta = 0 rejected at 5% | fits | refused |\n" + "|---" * 11 + "|"
    )
    refusals: set[str] = set()
    with get_context("spawn").Pool(options.workers) as pool:
        for number, scenario in enumerate(scenarios):
            jobs = [(scenario, [number, seed]) for seed in range(options.simulations)]
            results = pool.map(one, jobs, chunksize=5)
            print("\n".join(rows(scenario, results)), flush=True)
            refusals |= {r for r in results if isinstance(r, str)}
    for reason in sorted(refusals):
        print(f"refused: {reason}")
    print(f"\n{time.perf_counter() - start:.0f} s, {options.workers} workers")


if __name__ == "__main__":
    main()
