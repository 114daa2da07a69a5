"""Slopes of entropy rate: of the baseline, of each variant, and the ratio of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from canopy_store.analysis.regression.beta import Array

Z95 = float(stats.norm.ppf(0.975))
TESTS = {"name": pl.String, "statistic": pl.Float64, "df": pl.Int64, "p": pl.Float64}
SLOPES = {
    "variant": pl.String,
    "name": pl.String,
    **dict.fromkeys(("estimate", "se", "ci_low", "ci_high"), pl.Float64),
}


def fieller(num: float, den: float, cov: Array, quantile: float = Z95) -> tuple[float, float]:
    """Return the interval of num/den, cov (2, 2) their covariance (Fieller 1954); 95% by default.

    Infinite both ways when den is within its own interval of 0: then every ratio of some sign fits.
    """
    a = den**2 - quantile**2 * cov[1, 1]
    b = num * den - quantile**2 * cov[0, 1]
    c = num**2 - quantile**2 * cov[0, 0]
    if a <= 0:
        return -np.inf, np.inf
    root = np.sqrt(max(b**2 - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


def slopes_and_tests(
    terms: Sequence[tuple[str, str]],
    estimates: Array,
    covariance: Array,
    *,
    rate: str,
    baseline: str,
    treated: Sequence[str],
    df: float = np.inf,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the table of slopes and the joint Wald test of the etas.

    Parameters
    ----------
    terms : part and name of each estimate (K,), in the order of the covariance (K, K)
    rate : the term that is the baseline's slope
    df : degrees of freedom of the covariance
    """
    place = {term: i for i, (part, term) in enumerate(terms) if part == "conditional"}
    at = place[rate]
    etas = [place[f"{rate}:variant[{v}]"] for v in treated if f"{rate}:variant[{v}]" in place]
    quantile = float(stats.t.ppf(0.975, df))
    beta, variance = float(estimates[at]), float(covariance[at, at])

    def wald(variant: str, name: str, value: float, se: float) -> tuple[Any, ...]:
        return variant, name, value, se, value - quantile * se, value + quantile * se

    rows = [wald(baseline, "beta", beta, np.sqrt(variance))]
    for eta, variant in zip(etas, treated, strict=False):
        both = np.ix_([at, eta], [at, eta])
        to_slopes = np.array([[1.0, 1.0], [1.0, 0.0]])  # (beta + eta, beta) from (beta, eta)
        cov = to_slopes @ covariance[both] @ to_slopes.T
        total = beta + float(estimates[eta])
        ratio = total / beta
        gradient = np.array([1.0, -ratio]) / beta
        rows.append(wald(variant, "beta+eta", total, np.sqrt(cov[0, 0])))
        se = float(np.sqrt(gradient @ cov @ gradient))
        rows.append((variant, "ratio", ratio, se, *fieller(total, beta, cov, quantile)))
    slopes = pl.DataFrame(rows, schema=SLOPES, orient="row")
    tests = []
    if etas:
        values = estimates[etas]
        statistic = float(values @ np.linalg.solve(covariance[np.ix_(etas, etas)], values))
        of = stats.chi2(len(etas)) if np.isinf(df) else stats.f(len(etas), df, scale=len(etas))
        tests = [("every eta is 0 (Wald)", statistic, len(etas), float(of.sf(statistic)))]
    return slopes, pl.DataFrame(tests, schema=TESTS, orient="row")
