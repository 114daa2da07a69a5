"""What a fit says beyond its own checkpoints: over other families, or over other training seeds.

A checkpoint is one trained model: a family, a variant, and a training seed where there are several. Each
has a slope of its own, and the intervals of the regression take those slopes as given: they would hold
for the same checkpoints and other prompts. Here every checkpoint gets its own level and slope, and what
a variant adds is judged by how much it differs between families (paired with the family's baseline), or
between the checkpoints of one family and variant.

With x_u the estimates of the U units, S their sample covariance and V_uw the covariance that the
regression gives them, the mean of the units has the covariance S/U + mean of V_uw over u ≠ w: S holds
what units differ by and the errors that are their own, the second term the errors that they share (the
prompts, the one baseline). S is known up to a χ² on U − 1 degrees of freedom, so a standardised mean is
a normal one over that mixture of variances (Behrens and Fisher's problem with one variance given):
Student's t where nothing is shared, the normal where nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import polars as pl
from scipy import optimize, special, stats

from canopy_store.analysis.regression.beta import Array
from canopy_store.analysis.regression.design import cross
from canopy_store.analysis.regression.panel import Columns, PanelData
from canopy_store.analysis.regression.slopes import fieller

ALONE = "these checkpoints alone"
_NUMBERS = ("estimate", "se", "ci_low", "ci_high", "p")
_GRID = 4_000  # values of a χ²
ACROSS = {
    "over": pl.String,
    "variant": pl.String,
    "name": pl.String,
    "units": pl.Int64,
    **dict.fromkeys(_NUMBERS, pl.Float64),
}


@dataclass(frozen=True)
class Means:
    """The means over units of (the variant, its baseline), and what their covariance is made of.

    ``parts`` are estimates of covariances (2, 2) with their degrees of freedom; ``shared`` (2, 2) is
    the part that the regression gives.
    """

    over: str
    units: int
    values: Array
    parts: list[tuple[Array, int]]
    shared: Array

    def se(self, weights: Array) -> float:
        """Return the standard error of a weighted sum of the two means."""
        covariance = sum((part for part, _ in self.parts), self.shared)
        return float(np.sqrt(weights @ covariance @ weights))

    def _variances(self, weights: Array) -> Array:
        """Return a sample of the variances that the sum may have, given the estimates of its parts."""
        total = np.array([float(weights @ self.shared @ weights)])
        points = _GRID if len(self.parts) == 1 else int(_GRID**0.5)
        for part, df in self.parts:
            own = float(weights @ part @ weights) * df / _chi2(df, points)
            total = np.add.outer(total, own).ravel()
        return total

    def p(self, weights: Array) -> float:
        """Return the two-sided p value of the weighted sum being 0."""
        spreads = np.sqrt(self._variances(weights))
        return float(2 * special.ndtr(-abs(weights @ self.values) / spreads).mean())

    def quantile(self, weights: Array) -> float:
        """Return the half width of the 95% interval of the weighted sum, in standard errors."""
        spreads = np.sqrt(self._variances(weights)) / self.se(weights)

        def excess(half: float) -> float:
            return float(2 * special.ndtr(-half / spreads).mean()) - 0.05

        return float(optimize.brentq(excess, 0.1, 100.0))


@cache
def _chi2(df: int, points: int) -> Array:
    """Return evenly spaced quantiles of the χ² distribution: its sample without the noise."""
    return np.asarray(stats.chi2.ppf((np.arange(points) + 0.5) / points, df))


def checkpoint_design(data: PanelData, design: Columns, rate: str, *, slopes: bool) -> Columns:
    """Return the design with a level, and a slope of ``rate``, for each checkpoint.

    They come first, levels before slopes, and take the place of the terms of family and variant.
    """
    codes = data.codes["checkpoint"]
    levels: Columns = {
        f"checkpoint[{'/'.join(names)}]": (codes == i) * 1.0 for i, names in enumerate(data.checkpoints)
    }
    own = levels | (cross({rate: design[rate]}, levels) if slopes else {})
    replaced = ("(Intercept)", "variant[", "family[", *([f"{rate}:variant["] if slopes else []))
    rest = {
        name: column
        for name, column in design.items()
        if not name.startswith(replaced) and not (slopes and name == rate)
    }
    return own | rest


def across(data: PanelData, values: Array, cov: Array, *, slopes: bool) -> pl.DataFrame:
    """Return what each variant adds, over families and over training seeds, as far as can be told.

    Columns: over (families or seeds), variant, name, units, estimate, se, ci_low, ci_high, p.
    ``eta`` is what the variant adds to the baseline's slope ``beta``; where levels are compared instead
    of slopes the one row is ``tau``. A variant with one checkpoint in one family has no row.

    Parameters
    ----------
    values, cov : (C,) and (C, C) of the checkpoints, in the order of ``data.checkpoints``
    slopes : whether the values are slopes, or levels
    """
    rows = [
        row
        for variant in data.levels["variant"][1:]
        for means in unit_means(data.checkpoints, data.levels["variant"][0], variant, values, cov)
        for row in _rows(means, variant, slopes)
    ]
    return pl.DataFrame(rows, schema=ACROSS, orient="row")


def unit_means(
    checkpoints: Sequence[tuple[str, str, str]], baseline: str, variant: str, values: Array, cov: Array
) -> Iterator[Means]:
    """Yield the means over families and over seeds, each where the panel has several.

    Parameters
    ----------
    checkpoints : family, variant and checkpoint of each value
    values, cov : (C,) and (C, C)
    """
    place: dict[tuple[str, str], list[int]] = {}
    for i, (family, name, _) in enumerate(checkpoints):
        place.setdefault((family, name), []).append(i)
    families = [f for f, name in place if name == variant and (f, baseline) in place]
    if not families:
        return
    # (2, F, C): for the variant and the baseline, the weights of each family's mean.
    cells = np.zeros((2, len(families), len(values)))
    for q, name in enumerate((variant, baseline)):
        for f, family in enumerate(families):
            members = place[family, name]
            cells[q, f, members] = 1 / len(members)
    weights = cells.mean(axis=1)  # (2, C)
    if len(families) > 1:
        yield _over_families(cells, weights, values, cov)
    if any(len(place[f, variant]) > 1 for f in families):
        groups = [[place[f, name] for f in families] for name in (variant, baseline)]
        yield _over_seeds(groups, weights, values, cov)


def _over_families(cells: Array, weights: Array, values: Array, cov: Array) -> Means:
    n = cells.shape[1]
    scatter = np.cov(cells @ values)  # (2, 2)
    blocks = np.einsum("qfc,cd,rgd->qrfg", cells, cov, cells)
    total, own = blocks.sum(axis=(2, 3)), np.einsum("qrff->qr", blocks)
    shared = (total - own) / (n * (n - 1))
    return Means("families", n, weights @ values, [(scatter / n, n - 1)], _not_negative(shared))


def _over_seeds(groups: list[list[list[int]]], weights: Array, values: Array, cov: Array) -> Means:
    """The means over checkpoints, these families and a baseline with one checkpoint taken as they are.

    ``groups`` lists the checkpoints of each family, for the variant and for the baseline.
    """
    shared = weights @ cov @ weights.T
    parts = []
    for q, cells in enumerate(groups):
        df = sum(len(cell) - 1 for cell in cells)
        if not df:
            continue
        squares = sum(float(((values[c] - values[c].mean()) ** 2).sum()) for c in cells)
        blocks = [cov[np.ix_(c, c)] for c in cells]
        expected = sum(float(np.trace(block) - block.sum() / len(block)) for block in blocks)
        share = sum(1 / len(cell) for cell in cells) / len(cells) ** 2
        part = np.zeros((2, 2))
        part[q, q] = squares / df * share
        parts.append((part, df))
        shared[q, q] -= expected / df * share
    units = sum(len(cell) for cell in groups[0])
    return Means("seeds", units, weights @ values, parts, _not_negative(shared))


def _not_negative(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.maximum(values, 0)) @ vectors.T


def _rows(means: Means, variant: str, slopes: bool) -> Iterator[tuple[Any, ...]]:
    contrasts = {"tau": (1.0, -1.0)}
    if slopes:
        contrasts = {"beta": (0.0, 1.0), "beta+eta": (1.0, 0.0), "eta": (1.0, -1.0)}
    for name, pair in contrasts.items():
        weights = np.array(pair)
        value, se = float(weights @ means.values), means.se(weights)
        half = means.quantile(weights) * se
        p = means.p(weights) if name in ("eta", "tau") else None
        yield means.over, variant, name, means.units, value, se, value - half, value + half, p
    if slopes:
        total, beta = means.values
        gradient = np.array([1.0, -total / beta])
        cov = sum((part for part, _ in means.parts), means.shared)
        ends = fieller(total, beta, cov, means.quantile(gradient))
        se = means.se(gradient) / abs(beta)
        yield means.over, variant, "ratio", means.units, total / beta, se, *ends, None
