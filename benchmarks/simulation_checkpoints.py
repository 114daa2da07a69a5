"""Does `canopy regress` err as often as it says where every trained model has a slope of its own?

    python benchmarks/simulation_checkpoints.py [--simulations 200] [--beta 100] [--workers 2]

Panels of a baseline and a tuned variant with one and the same mean slope, so eta is 0. Each tuned
checkpoint (a family and a training seed) adds a slope and a level of its own; a row says how large. Per
row: how often the test of eta = 0 has p < 0.05, for these checkpoints alone (family effects fixed), over
families and over seeds, and how often the interval of the ratio holds the true 1.
"""

from __future__ import annotations

import argparse
import os
import time
from multiprocessing import get_context
from typing import NamedTuple

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # before numpy: small matrices

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
from scipy import special, stats  # noqa: E402

from canopy_store.analysis.regression.beta_model import beta_problem  # noqa: E402
from canopy_store.analysis.regression.linear import estimates_of, linear_design  # noqa: E402
from canopy_store.analysis.regression.models import beyond  # noqa: E402
from canopy_store.analysis.regression.panel import PanelData, panel_data  # noqa: E402
from canopy_store.errors import FitError  # noqa: E402

TASKS = ("completion", "coding", "math", "stories")


class Scenario(NamedTuple):
    """The size of a panel, and the sd of what a checkpoint adds to the slope."""

    model: str
    prompts: int
    families: int
    seeds: int
    sd_slope: float


def panel(scenario: Scenario, rng: np.random.Generator) -> PanelData:
    """Return one panel: a base model a family, and its tuned checkpoints; slopes in the model's unit."""
    cells = [(f, 0, 0) for f in range(scenario.families)]
    cells += [(f, 1, s) for f in range(scenario.families) for s in range(scenario.seeds)]
    family, variant, seed = (np.array(codes) for codes in zip(*cells, strict=True))
    prompt, cell = (a.ravel() for a in np.indices((scenario.prompts, len(cells))))
    own_slope = variant * rng.normal(0, scenario.sd_slope, len(cells))
    own_level = variant * rng.normal(0, 0.02, len(cells))
    shared = rng.normal(size=scenario.prompts)[prompt]  # a prompt's rate is alike in every model
    tuned, of_family = variant[cell], family[cell]
    rate = np.exp(0.2 - 0.7 * tuned + 0.15 * of_family + 0.25 * shared + rng.normal(0, 0.2, cell.size))
    length = np.exp(5 - 0.3 * tuned + rng.normal(0, 0.4, cell.size))
    effect = rng.normal(size=scenario.prompts)[prompt]
    if scenario.model == "beta":
        scaled = (rate - rate.mean()) / rate.std(ddof=1)
        logit = -1.0 + (0.25 + own_slope[cell]) * scaled - 0.3 * tuned + 0.4 * effect
        mu, phi = special.expit(logit + 5 * own_level[cell] + 0.1 * of_family), np.exp(4.0 + 0.2 * tuned)
        d = rng.beta(mu * phi, (1 - mu) * phi)
    else:
        d = 0.15 + (0.08 + own_slope[cell]) * rate - 0.05 * tuned + own_level[cell]
        d += 0.03 * of_family + 0.07 * effect + rng.normal(0, 0.07, cell.size)
    frame = pl.DataFrame(
        {
            "family": [f"f{f}" for f in of_family],
            "variant": np.array(["base", "sft"])[tuned],
            "checkpoint": [f"{v}-{s}" for v, s in zip(tuned, seed[cell], strict=True)],
            "task": np.array(TASKS)[prompt % len(TASKS)],
            "prompt": prompt.astype(str),
            "D": d,
            "R_bar": rate,
            "N_bar": length,
        }
    )
    return panel_data(frame, "D", "base", None, ["family"] if scenario.families == 1 else [])


def alone(data: PanelData, model: str) -> float:
    """Return the p value of eta = 0 for these checkpoints alone, as the table of coefficients has it."""
    if model == "beta":
        problem = beta_problem(data, "full")
        fit, at = problem.fit(), list(problem.mean).index("R_sc:variant[sft]")
        value, variance = fit.theta[at], fit.cov[at, at]
    else:
        design, _, _ = linear_design(data, model)
        values, cov = estimates_of(data.y, design, data.codes["prompt"], model)
        at = list(design).index("R_bar:variant[sft]")
        value, variance = values[at], cov[at, at]
    return float(2 * stats.norm.sf(abs(value) / np.sqrt(variance)))


def one(job: tuple[Scenario, int]) -> dict[str, bool] | None:
    """Return what one simulated panel says, by the columns of the table; None where it is refused."""
    scenario, number = job
    data = panel(scenario, np.random.default_rng([number, scenario.prompts]))
    try:
        said = {"alone": alone(data, scenario.model) < 0.05}
        table, _ = beyond(data, scenario.model)
    except FitError:
        return None
    for line in table.iter_rows(named=True):
        if line["name"] == "eta":
            said[line["over"]] = line["p"] < 0.05
        if line["name"] == "ratio":
            said[f"{line['over']} ratio"] = line["ci_low"] <= 1 <= line["ci_high"]
    return said


def row(scenario: Scenario, results: list[dict[str, bool] | None]) -> str:
    """Return a scenario's row of the table."""
    kept = [said for said in results if said is not None]
    shares = [
        f"{np.mean([said[key] for said in kept]):.3f}" if key in kept[0] else ""
        for key in ("alone", "families", "seeds", "families ratio", "seeds ratio")
    ]
    return f"| {' | '.join([scenario.model, *map(str, scenario[1:]), *shares, str(len(kept))])} |"


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--simulations", type=int, default=200, help="panels of a linear scenario")
    parser.add_argument("--beta", type=int, default=100, help="panels of a beta scenario; 0: none")
    parser.add_argument("--prompts", type=int, nargs="+", default=[40, 160], help="of a linear panel")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    start = time.perf_counter()
    sizes = [(2, 1), (3, 1), (1, 3), (1, 5), (3, 3)]
    scenarios = [
        (Scenario("interaction", prompts, families, seeds, sd_slope), options.simulations)
        for prompts in options.prompts
        for families, seeds in sizes
        for sd_slope in (0.0, 0.03)
    ]
    scenarios += [
        (Scenario("beta", 40, families, seeds, sd_slope), options.beta)
        for families, seeds in ((3, 1), (1, 3))
        for sd_slope in (0.0, 0.1)
        if options.beta
    ]
    print(
        "| model | prompts | families | seeds | sd of slopes | p < 0.05, these alone | over families "
        "| over seeds | ratio held, over families | over seeds | panels |\n" + "|---" * 11 + "|"
    )
    with get_context("spawn").Pool(options.workers) as pool:
        for scenario, panels in scenarios:
            results = pool.map(one, [(scenario, number) for number in range(panels)], chunksize=5)
            print(row(scenario, results), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s, {options.workers} workers")


if __name__ == "__main__":
    main()
