"""How often does the beta model find an eta that is not there, by each of its tests?

    python benchmarks/simulation_precision.py [--simulations 300] [--workers 1] [--prompts 40]

The panels are those of `simulation.py` with eta = 0: three families, four tasks, a precision that
depends on variant, task, family and rate. Per number of prompts: how often p < 0.05 by the Wald test of
the full model, by that of `--precision variant`, by the full model's likelihood ratio against χ², and by
its parametric bootstrap. The bootstrap is judged by one replicate a panel, all replicates pooled: the
share of panels whose likelihood ratio lies above the pooled 95% quantile (Giacomini, Politis and White
2013, doi:10.1017/S0266466612000655). A panel that a model refuses is counted, never replaced.
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
import simulation  # noqa: E402
from scipy import stats  # noqa: E402

from canopy_store.analysis.regression import regress  # noqa: E402
from canopy_store.analysis.regression.beta_model import Precision, beta_problem  # noqa: E402
from canopy_store.analysis.regression.eta_bootstrap import bootstrap_eta  # noqa: E402
from canopy_store.analysis.regression.panel import one_panel, panel_data  # noqa: E402
from canopy_store.analysis.seeds import as_variants  # noqa: E402
from canopy_store.errors import FitError  # noqa: E402

PRECISIONS: tuple[Precision, ...] = ("full", "variant")


class Tests(NamedTuple):
    """Of one panel: the p values by Wald (None: refused), the likelihood ratio and one drawn."""

    full: float | None
    variant: float | None
    statistic: float
    drawn: float


def one(job: tuple[int, int]) -> Tests:
    """Return the tests of one simulated panel."""
    prompts, number = job
    scenario = simulation.Scenario("beta", prompts, 0.25, 0.0)
    frame = simulation.panel(scenario, np.random.default_rng([prompts, number]))
    p: dict[str, float | None] = {}
    for precision in PRECISIONS:
        try:
            p[precision] = regress(frame, "beta", precision=precision, checkpoints="fixed").tests["p"][0]
        except FitError:
            p[precision] = None
    rows = as_variants(one_panel(frame, "panel"), {})
    problem = beta_problem(panel_data(rows, "D", "base", None, ()), "full")
    test = bootstrap_eta(problem, 1, number)
    return Tests(p["full"], p["variant"], test.statistic, float(test.drawn[0]))


def row(prompts: int, results: list[Tests]) -> str:
    """Return the row of a number of prompts."""
    statistic = np.array([r.statistic for r in results])
    edge = np.quantile([r.drawn for r in results], 0.95)
    cells = [str(prompts)]
    for values in ([r.full for r in results], [r.variant for r in results]):
        kept = [p for p in values if p is not None]
        refused = len(values) - len(kept)
        cells.append(f"{np.mean(np.array(kept) < 0.05):.3f}" + f" ({refused} refused)" * (refused > 0))
    cells += [f"{(statistic > stats.chi2.ppf(0.95, 1)).mean():.3f}", f"{(statistic > edge).mean():.3f}"]
    return f"| {' | '.join(cells)} | {len(results)} |"


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--simulations", type=int, default=300, help="panels of each number of prompts")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--prompts", type=int, nargs="+", default=[40, 160], help="prompts of a panel")
    options = parser.parse_args()
    start = time.perf_counter()
    print(
        "| prompts | Wald, full precision | Wald, --precision variant | likelihood ratio, χ² "
        "| likelihood ratio, bootstrap | panels |\n" + "|---" * 6 + "|"
    )
    with get_context("spawn").Pool(options.workers) as pool:
        for prompts in options.prompts:
            jobs = [(prompts, number) for number in range(options.simulations)]
            print(row(prompts, pool.map(one, jobs, chunksize=5)), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s, {options.workers} workers")


if __name__ == "__main__":
    main()
