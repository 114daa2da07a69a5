"""Simulated quantile residuals and their tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from canopy_store.analysis.regression.beta import Array

SIMULATIONS = 250


def quantile_residuals(
    y: Array, simulate: Callable[[np.random.Generator], Array], seed: int
) -> tuple[dict[str, float], Array]:
    """Return tests of the simulated quantile residuals, and the residuals.

    Panels are drawn from the fitted model with new prompt effects; the family effects stay at their
    estimates. A residual is the share of simulations below the observed value, ties drawn. As in DHARMa
    (Hartig): ``uniformity_p`` by the Kolmogorov–Smirnov distance from the uniform, ``dispersion_p`` by
    the variance around the simulated mean (ratio to that of the simulations), ``outliers_p`` by the rows
    beyond every simulation. Rows of a prompt are dependent, so each p value comes from the same
    statistic of the simulated panels themselves, never from a table for independent rows.
    """
    rng = np.random.default_rng(seed)
    panels = np.stack([y, *(simulate(rng) for _ in range(SIMULATIONS))])  # (1 + simulations, rows)
    order = np.lexsort(np.stack([rng.random(panels.shape), panels]), axis=0)  # the last key leads
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(len(panels))[:, None], axis=0)
    scaled = (ranks + rng.random(panels.shape)) / len(panels)
    rows = scaled.shape[1]
    ordered = np.sort(scaled, axis=1)
    grid = np.arange(rows)
    distance = np.maximum((grid + 1) / rows - ordered, ordered - grid / rows).max(axis=1)
    variance = ((panels - panels.mean(axis=0)) ** 2).mean(axis=1)
    beyond = ((ranks == 0) | (ranks == SIMULATIONS)).sum(axis=1)
    diagnostics = {
        "uniformity_ks": float(distance[0]),
        "uniformity_p": float((distance >= distance[0]).mean()),
        "dispersion_ratio": float(variance[0] / variance[1:].mean()),
        "dispersion_p": _two_sided(variance),
        "outliers": int(beyond[0]),
        "outliers_p": _two_sided(beyond),
        "simulations": SIMULATIONS,
        "seed": seed,
    }
    return diagnostics, scaled[0]


def _two_sided(statistic: np.ndarray[Any, Any]) -> float:
    """Return the Monte Carlo p value of the first value among all of them."""
    above, below = (statistic >= statistic[0]).mean(), (statistic <= statistic[0]).mean()
    return float(min(1.0, 2 * min(above, below)))
