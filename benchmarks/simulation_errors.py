"""Do slopes of measured rates, and their ratio, hold the truth? Without and with each correction.

    python benchmarks/simulation_errors.py [--simulations 400] [--samples 16 40 100]
        [--reliability 0.3 0.5 0.8 0.95] [--prompts 160] [--ways none moments split] [--workers 2]

Rollouts are drawn, not panels: rates (heavier tails than the normal, of a spread that differs from
prompt to prompt), lengths that go along with them, and a diversity that is a mean over pairs, with a
part of each rollout's own, independent of its rate or correlated with it by 0.5, and a part of each
pair. From them come R_bar, N_bar, D and the errors, as the view ``panel`` has them. The true ratio of
the slopes is 2.5 where both variants are equally reliable; in the rows "0.8 and 0.2" it is 1, and
rates have a within-prompt sd of 0.8 in the base and 0.2 after tuning. Prints a markdown table: the
median ratio and slope over the fits that are not refused, the share of their 95% intervals that hold
the truth, the share of intervals of the ratio that are infinite, and the share refused.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import NamedTuple

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # before numpy: a worker is one core

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402

from canopy_store.analysis.regression.errors import by_moments, corrected_slopes  # noqa: E402
from canopy_store.analysis.regression.linear import best_ratio, linear_design, profile  # noqa: E402
from canopy_store.analysis.regression.panel import PanelData, one_panel, panel_data  # noqa: E402
from canopy_store.analysis.regression.scores import Bootstrap  # noqa: E402
from canopy_store.analysis.regression.slopes import slopes_and_tests  # noqa: E402
from canopy_store.analysis.regression.splits import by_splits, draw_halves  # noqa: E402
from canopy_store.analysis.seeds import as_variants  # noqa: E402
from canopy_store.errors import FitError  # noqa: E402

VARIANTS = ("base", "sft")
SPREAD = 0.25  # sd of a prompt's true rate, in nats per token
SPLITS = 20


class Scenario(NamedTuple):
    """One cell: true slopes of the two variants, and their rates' sd within a prompt."""

    name: str
    prompts: int
    samples: int
    within: tuple[float, float]
    slopes: tuple[float, float]
    correlation: float
    spread: float = SPREAD


class Rollouts(NamedTuple):
    """Rates, lengths and what gives distances, (P, 2, M) each: own parts g, and vectors a (.., K)."""

    rate: np.ndarray
    length: np.ndarray
    level: np.ndarray  # (P, 2) true diversity
    own: np.ndarray
    pair: np.ndarray

    def distances(self) -> np.ndarray:
        """(P, 2, M) of each rollout: level + its own part + the others' mean part − pair products."""
        others = self.rate.shape[-1] - 1
        own = self.own + (self.own.sum(-1, keepdims=True) - self.own) / others
        total = self.pair.sum(2, keepdims=True)
        pair = (self.pair * (total - self.pair)).sum(-1) / others
        return self.level[..., None] + own - pair

    def of(self, chosen: np.ndarray) -> Rollouts:
        """The same with the rollouts (P, 2, m) chosen of each prompt."""
        rate, length, own = (
            np.take_along_axis(x, chosen, -1) for x in (self.rate, self.length, self.own)
        )
        pair = np.take_along_axis(self.pair, chosen[..., None], 2)
        return Rollouts(rate, length, self.level, own, pair)


Level = Callable[[Scenario, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def linear_level(
    cell: Scenario, true: np.ndarray, length: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(P, 2) true diversities of the linear model."""
    level = 0.2 + np.array(cell.slopes) * true + 2e-4 * length + rng.normal(0, 0.04, (len(true), 1))
    return level + rng.normal(0, 0.04, true.shape)


def draw(cell: Scenario, rng: np.random.Generator, level_of: Level = linear_level) -> Rollouts:
    """The rollouts of one study."""
    P, M = cell.prompts, cell.samples
    shape = (P, 2, M)
    shared, alone = rng.normal(size=(P, 1)), rng.normal(size=(P, 2))
    true = 1.2 + np.array([0.0, -0.4]) + cell.spread * (shared + alone) / np.sqrt(2)
    log_sd = rng.normal(0, 0.4, (P, 2))
    sd = np.array(cell.within) * np.exp(log_sd - 0.16)  # mean square: within²
    wave = rng.standard_t(8, shape) / np.sqrt(8 / 6)
    length = np.exp(5 - 0.1 * true + 0.2 * rng.normal(size=(P, 2)))
    lengths = length[..., None] * (1 + 0.3 * (0.4 * wave + 0.9 * rng.normal(size=shape)))
    level = level_of(cell, true, length, rng)
    c = cell.correlation
    own = 0.04 * (c * wave + np.sqrt(1 - c**2) * rng.normal(size=shape))
    pair = rng.normal(0, np.sqrt(0.1 / 6), (*shape, 6))
    return Rollouts(true[..., None] + sd[..., None] * wave, lengths, level, own, pair)


def panel(rollouts: Rollouts) -> pl.DataFrame:
    """The rows of the view ``panel``."""
    P, _, M = rollouts.rate.shape
    r, n, d = rollouts.rate, rollouts.length, rollouts.distances()

    def cov(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a - a.mean(-1, keepdims=True)) * (b - b.mean(-1, keepdims=True))).sum(-1) / (M - 1)

    twice = 2 * (M - 1) / (M - 2)
    values = {
        "D": d.mean(-1),
        "R_bar": r.mean(-1),
        "N_bar": n.mean(-1),
        "var_R": cov(r, r) / M,
        "var_N": cov(n, n) / M,
        "cov_RN": cov(r, n) / M,
        "cov_RD": twice * cov(r, d) / M,
        "cov_ND": twice * cov(n, d) / M,
    }
    return pl.DataFrame(
        {
            "family": ["f"] * (2 * P),
            "variant": list(VARIANTS) * P,
            "task": ["t"] * (2 * P),
            "prompt_id": np.repeat(np.arange(P), 2).astype(str),
            "n_rollouts": [M] * (2 * P),
            **{name: value.ravel() for name, value in values.items()},
        }
    )


def halves(rollouts: Rollouts, rng: np.random.Generator) -> np.ndarray:
    """(rows, S, 2, 3) D, R_bar and N_bar of the halves of each split."""
    P, _, M = rollouts.rate.shape
    sides = []
    for _ in range(SPLITS):
        first = draw_halves(M, 2 * P, rng).reshape(P, 2, M)
        order = np.argsort(-first, axis=-1, kind="stable")
        cut = int(first[0, 0].sum())
        both = [rollouts.of(order[..., :cut]), rollouts.of(order[..., cut:])]
        means = [
            np.stack([h.distances().mean(-1), h.rate.mean(-1), h.length.mean(-1)], -1) for h in both
        ]
        sides.append(np.stack(means, 2).reshape(2 * P, 2, 3))
    return np.stack(sides, 1)


def slopes(
    way: str, data: PanelData, rollouts: Rollouts, rng: np.random.Generator, replicates: int
) -> pl.DataFrame:
    """The table of slopes of one fit of the interaction model."""
    if way == "none":
        design = linear_design(data, "interaction")[0]
        X, prompt = np.column_stack(list(design.values())), data.codes["prompt"]
        best, _ = best_ratio(data.y / data.y.std(), X, prompt, True)
        _, b, cov, _ = profile(data.y, X, prompt, best, True)  # as REML has it; no residuals are wanted
        terms = [("conditional", term) for term in design]
        return slopes_and_tests(terms, b, cov, rate="R_bar", baseline="base", treated=["sft"])[0]
    if way == "moments":
        equations = by_moments(data, "interaction")
    else:
        equations = by_splits(data, "interaction", halves(rollouts, rng))
    bootstrap = Bootstrap(len(equations.left), replicates, int(rng.integers(2**32)))
    return corrected_slopes(data, way, equations, bootstrap)[2]


def data_of(rows: pl.DataFrame) -> PanelData:
    """What the fits take, of a panel of one task and family."""
    frame = as_variants(one_panel(rows, "panel"), {})
    return panel_data(frame, "D", "base", None, ("task", "family"))


Row = dict[str, tuple[float, float, float]]


def one(job: tuple[Scenario, tuple[str, ...], int, list[int]]) -> dict[str, Row | None]:
    """Estimate and interval of each slope, by way; None where the fit is refused."""
    cell, ways, replicates, seed = job
    rng = np.random.default_rng(seed)
    rollouts = draw(cell, rng)
    data = data_of(panel(rollouts))
    out: dict[str, Row | None] = {}
    for way in ways:
        try:
            table = slopes(way, data, rollouts, rng, replicates)
        except FitError:
            out[way] = None
            continue
        rows = table.select("name", "estimate", "ci_low", "ci_high").iter_rows()
        out[way] = {name: (value, low, high) for name, value, low, high in rows}
    return out


def cells(options: argparse.Namespace) -> list[Scenario]:
    """Every combination of samples, reliability and correlation, and the two unequal ones."""
    P = options.prompts
    out = []
    for m in options.samples:
        for rho in options.reliability:
            sd = SPREAD * np.sqrt(m * (1 - rho) / rho)
            for c in (0.0, 0.5):
                out.append(Scenario(f"{rho:g}", P, m, (sd, sd), (0.1, 0.25), c))
    for m in (8, *options.samples):
        for c in (0.0, 0.5):
            out.append(Scenario("0.8 and 0.2", P, m, (0.8, 0.2), (0.2, 0.2), c, spread=0.21))
    return out


def line(cell: Scenario, way: str, results: list[Row | None]) -> str:
    """One row of the table."""
    truths = {"beta": cell.slopes[0], "ratio": cell.slopes[1] / cell.slopes[0]}
    kept = [r for r in results if r is not None]
    parts = []
    for name, truth in truths.items():
        values = np.array([r[name] for r in kept]).reshape(-1, 3)
        covered = np.mean((values[:, 1] <= truth) & (truth <= values[:, 2])) if len(kept) else np.nan
        middle = np.median(values[:, 0]) if len(kept) else np.nan
        finite = np.isfinite(values[:, 1:]).all(axis=1).mean() if len(kept) else np.nan
        parts.append(f"{truth:g} | {middle:.2f} | {covered:.3f}")
    return (
        f"| {cell.samples} | {cell.name} | {cell.correlation:g} | {way} | {' | '.join(parts)} "
        f"| {1 - finite:.2f} | {1 - len(kept) / len(results):.2f} |"
    )


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--simulations", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 40, 100])
    parser.add_argument("--reliability", type=float, nargs="+", default=[0.3, 0.5, 0.8, 0.95])
    parser.add_argument("--ways", nargs="+", default=["none", "moments", "split"])
    parser.add_argument("--replicates", type=int, default=500, help="of each fit's bootstrap")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    start = time.perf_counter()
    print(f"{options.simulations} simulations a cell, {options.prompts} prompts")
    print(
        "| M | reliability | correlation of errors | --errors | true β | median | coverage | true ratio "
        "| median | coverage | unbounded | refused |\n" + "|---" * 12 + "|"
    )
    with get_context("spawn").Pool(options.workers) as pool:
        for number, cell in enumerate(cells(options)):
            jobs = [
                (cell, tuple(options.ways), options.replicates, [number, seed])
                for seed in range(options.simulations)
            ]
            results = pool.map(one, jobs, chunksize=10)
            for way in options.ways:
                print(line(cell, way, [r[way] for r in results]), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s, {options.workers} workers")


if __name__ == "__main__":
    main()
