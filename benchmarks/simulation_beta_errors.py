"""Does the beta model with its errors taken out hold the true slopes, and their ratio?

    python benchmarks/simulation_beta_errors.py [--simulations 60] [--samples 16 40]
        [--reliability 0.3 0.5 0.8 0.95] [--prompts 160 80] [--least 0]

Rollouts are drawn as in simulation_errors.py, but diversities come from a beta distribution of precision
130 with logit slopes in the true rate and length and a prompt effect of sd 0.18. The true ratio is 2.5,
and 1 in the rows "0.8 and 0.2". Ways: ``none``; ``likelihood``, the calibrated panel with the
likelihood's own covariance; ``row``, where a row is calibrated by itself; ``D as it is``, where what D
shares with R_bar by chance stays in; and ``moments``, what `regress` does. Prints a markdown table of
medians over the fits that are not refused, coverage of their 95% intervals, the share of the ratio's
that are infinite and the share refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import simulation_errors as rollouts_of
from simulation_errors import SPREAD, Row, Scenario, line

import numpy as np  # isort: skip
from scipy import special

from canopy_store.analysis.regression import calibration
from canopy_store.analysis.regression.beta_model import BetaProblem, beta_problem
from canopy_store.analysis.regression.panel import PanelData
from canopy_store.analysis.regression.slopes import slopes_and_tests
from canopy_store.errors import FitError

WAYS = ("none", "row", "D as it is", "likelihood", "moments")


def logit_level(
    cell: Scenario, true: np.ndarray, length: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(P, 2) true diversities."""
    eta = -0.6 + np.array(cell.slopes) * (true - [1.2, 0.8]) + 1e-3 * (length - 148)
    mu = special.expit(eta + rng.normal(0, 0.18, (len(true), 1)))
    return rng.beta(mu * 130, (1 - mu) * 130)


def row_alone(data: PanelData) -> PanelData:
    """Calibrated with each row as a prompt of its own."""
    alone = {**data.codes, "prompt": np.arange(len(data.y))}
    return replace(calibration.calibrated(replace(data, codes=alone)), codes=data.codes)


def one(cell: Scenario, ways: list[str], seed: list[int]) -> dict[str, Row | None]:
    """Estimate and interval of each slope, in logits per nat, by way; None where it is refused."""
    rng = np.random.default_rng(seed)
    data = rollouts_of.data_of(rollouts_of.panel(rollouts_of.draw(cell, rng, logit_level)))
    data = replace(data, y=np.clip(data.y, 0.001, 0.999))

    def problem_of(rows: PanelData) -> BetaProblem:
        return beta_problem(rows, "full", 1.0)

    without = {c: 0 * x if c in ("cov_RD", "cov_ND") else x for c, x in data.errors.items()}
    fits: dict[str, Callable[[], object]] = {
        "none": lambda: problem_of(data).fit(),
        "row": lambda: problem_of(row_alone(data)).fit(),
        "D as it is": lambda: calibration.fit_calibrated(replace(data, errors=without), problem_of),
        "likelihood": lambda: problem_of(calibration.calibrated(data)).fit(),
        "moments": lambda: calibration.fit_calibrated(data, problem_of),
    }
    terms = [("conditional", name) for name in problem_of(data).mean]
    out: dict[str, Row | None] = {}
    for way in ways:
        try:
            fit = fits[way]()
        except FitError:
            out[way] = None
            continue
        df = calibration.groups_of(data) - 1 if way in ("moments", "D as it is") else np.inf
        table, _ = slopes_and_tests(
            terms, fit.theta, fit.cov, rate="R_sc", baseline="base", treated=["sft"], df=df
        )
        rows = table.select("name", "estimate", "ci_low", "ci_high").iter_rows()
        out[way] = {name: (value, low, high) for name, value, low, high in rows}
    return out


def cells(options: argparse.Namespace) -> list[Scenario]:
    """Every combination of prompts, samples, reliability and correlation of the errors."""
    out = []
    for prompts in options.prompts:
        for m in options.samples:
            for c in (0.0, 0.5):
                unequal = Scenario("0.8 and 0.2", prompts, m, (0.8, 0.2), (0.9, 0.9), c, 0.21)
                for rho in options.reliability:
                    sd = SPREAD * np.sqrt(m * (1 - rho) / rho)
                    out.append(Scenario(f"{rho:g}", prompts, m, (sd, sd), (0.6, 1.5), c))
                out.append(unequal)
    return out


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--simulations", type=int, default=60)
    parser.add_argument("--prompts", type=int, nargs="+", default=[160, 80])
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 40])
    parser.add_argument("--reliability", type=float, nargs="+", default=[0.3, 0.5, 0.8, 0.95])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--least", type=float, default=calibration.LEAST, help="below, refused")
    options = parser.parse_args()
    calibration.LEAST = options.least
    for prompts in options.prompts:
        print(f"\n{options.simulations} simulations a cell, {prompts} prompts")
        print(
            "| M | reliability | correlation of errors | way | true β | median | coverage | true ratio "
            "| median | coverage | unbounded | refused |\n" + "|---" * 12 + "|"
        )
        for number, cell in enumerate(cells(options)):
            if cell.prompts != prompts:
                continue
            results = [one(cell, options.ways, [number, s]) for s in range(options.simulations)]
            for way in options.ways:
                print(line(cell, way, [r[way] for r in results]), flush=True)


if __name__ == "__main__":
    main()
