"""The parametric bootstrap of the beta model's test that every eta is 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from canopy_store.analysis.regression.beta import Array, highest_likelihood
from canopy_store.analysis.regression.beta_model import CLIP, BetaProblem


class EtaTest(NamedTuple):
    """The likelihood ratio of the data, and those of panels drawn with every eta 0."""

    statistic: float
    df: int
    drawn: Array  # (replicates,)

    @property
    def p(self) -> float:
        """(1 + replicates at or above the statistic) / (replicates + 1)."""
        return float((1 + (self.drawn >= self.statistic).sum()) / (1 + len(self.drawn)))


def bootstrap_eta(
    problem: BetaProblem,
    replicates: int,
    seed: int,
    advance: Callable[[int], None] | None = None,
) -> EtaTest:
    """Return the likelihood-ratio test of every eta being 0, with its parametric bootstrap.

    The model without R_sc:variant in its mean is fitted; panels are drawn from it, with new prompt and
    family effects; both models are fitted to each. The asymptotic tests take the precision's terms as
    free of charge and err too often with few prompts; here the panels have as few.

    Parameters
    ----------
    replicates : panels to draw
    seed : replicate i draws from (seed, i), so more replicates begin with the same ones
    advance : called with 1 after each replicate
    """
    etas = [name for name in problem.mean if name.startswith("R_sc:variant[")]
    without = replace(problem, mean={k: x for k, x in problem.mean.items() if k not in etas})
    statistic, null = _likelihood_ratio(problem, without)
    drawn = []
    for y in _panels(without, null, replicates, seed):
        drawn.append(_likelihood_ratio(replace(problem, y=y), replace(without, y=y))[0])
        if advance is not None:
            advance(1)
    return EtaTest(statistic, len(etas), np.array(drawn))


def bootstrap_row(
    problem: BetaProblem, replicates: int, seed: int, advance: Callable[[int], None] | None = None
) -> tuple[str, float, int, float]:
    """Return the row that `bootstrap_eta` adds to the tests: name, statistic, df, p."""
    test = bootstrap_eta(problem, replicates, seed, advance)
    name = f"every eta is 0 (likelihood ratio, parametric bootstrap of {replicates})"
    return name, test.statistic, test.df, test.p


def _likelihood_ratio(full: BetaProblem, null: BetaProblem) -> tuple[float, Array]:
    """Return twice the difference of the log-likelihoods, and theta of the null model."""
    tops = [
        highest_likelihood(one.y, *one.matrices(), one.prompt, one.family, one.with_family)
        for one in (full, null)
    ]
    return max(2 * (tops[0][0] - tops[1][0]), 0.0), tops[1][1]


def _panels(problem: BetaProblem, theta: Array, replicates: int, seed: int) -> Iterator[Array]:
    X, W = problem.matrices()
    p = X.shape[1]
    eta, phi = X @ theta[:p], np.exp(W @ theta[p:-2])
    sd_prompt, sd_family = np.exp(theta[-2:])
    for replicate in range(replicates):
        rng = np.random.default_rng([seed, replicate])
        u = rng.normal(0, sd_prompt, problem.prompt.max() + 1)[problem.prompt]
        v = rng.normal(0, sd_family, problem.family.max() + 1)[problem.family]
        mu = expit(eta + u + v)
        yield np.clip(rng.beta(mu * phi, (1 - mu) * phi), CLIP, 1 - CLIP)
