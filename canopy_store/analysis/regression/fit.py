"""A fitted model and its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
from scipy import stats

from canopy_store.analysis.regression.beta import Array
from canopy_store.analysis.regression.checkpoints import ACROSS
from canopy_store.analysis.regression.panel import PanelData
from canopy_store.analysis.regression.residuals import quantile_residuals
from canopy_store.analysis.regression.slopes import Z95, slopes_and_tests

Model = Literal["main", "interaction", "quadratic", "beta"]


@dataclass(frozen=True)
class Fit:
    """One fitted model.

    Attributes
    ----------
    coefficients : part (conditional, dispersion or random), term, estimate, se, z, p, ci_low, ci_high;
        Wald tests and 95% intervals. A random term is a standard deviation: no test, and its interval
        (beta model only) is symmetric in the logarithm.
    slopes : variant, name, estimate, se, ci_low, ci_high. ``beta`` is the baseline's slope of R_bar,
        ``beta+eta`` that of a variant, ``ratio`` is (beta+eta)/beta: its se is by the delta method, its
        interval is Fieller's, infinite both ways when beta itself is not distinguishable from 0.
        Units: outcome per nat; in the beta model, logit per standard deviation of R_bar.
    tests : name, statistic, df, p: the joint Wald test of every eta, and the likelihood-ratio test of
        the quadratic model.
    fit : loglik, method, rows, prompts, families, converged, sds, levels, what was dropped, and
        ``zero_sd``: the random effects whose best standard deviation is 0.
    residuals : tests of the simulated quantile residuals, as in DHARMa: uniformity (Kolmogorov–Smirnov),
        dispersion, outliers. Simulated with new prompt effects, family effects at their estimates; the
        p values are Monte Carlo, so they allow for the rows of a prompt being dependent.
    quantile_residuals : (rows,) uniform on (0, 1) under the model, in the order of the rows kept.
    nested : the model without the quadratic terms.
    across : what each variant adds beyond these checkpoints: over (families or seeds), variant, name
        (beta, beta+eta, eta, ratio; tau in the model main), units, estimate, se, ci_low, ci_high, p.
        Means of the checkpoints' own slopes, each family alike; see `checkpoints`. Empty where nothing
        can be told, and ``fit['holds_for']`` says what the statements hold for.
    errors : how the errors of R_bar, N_bar and D were taken out: none, moments or split. Corrected fits
        have intervals and p values by a bootstrap over prompts (the beta model by a jackknife), and
        neither random terms nor residuals.
    reliability : `reliability` of the panel; no rows where it has no columns of errors.
    warnings : what to know before the slopes are believed.
    """

    model: Model
    formula: str
    coefficients: pl.DataFrame
    slopes: pl.DataFrame
    tests: pl.DataFrame
    fit: dict[str, Any]
    residuals: dict[str, float]
    quantile_residuals: Array
    nested: Fit | None = None
    across: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=ACROSS))
    errors: str = "none"
    reliability: pl.DataFrame = field(default_factory=pl.DataFrame)
    warnings: tuple[str, ...] = ()


def as_object(fit: Fit) -> dict[str, Any]:
    """A fit as lists and numbers, for JSON: its tables as lists of rows, everything else as it is.

    Keys: model, formula, errors, warnings, coefficients, slopes, tests, across, reliability, fit,
    residuals, and of the quadratic model ``nested``.
    """
    tables = {
        name: getattr(fit, name).to_dicts()
        for name in ("coefficients", "slopes", "tests", "across", "reliability")
    }
    head = {"model": fit.model, "formula": fit.formula, "errors": fit.errors}
    rest = {"warnings": list(fit.warnings), **tables, "fit": fit.fit, "residuals": fit.residuals}
    nested = {} if fit.nested is None else {"nested": as_object(fit.nested)}
    return head | rest | nested


@dataclass(frozen=True)
class Solved:
    """What a fit hands to the tables: the terms of each part, in the order of the covariance."""

    terms: list[tuple[str, str]]
    estimates: Array
    cov: Array
    random: list[tuple[str, float, float]]  # name, sd, se of log sd
    loglik: float
    zero_sd: list[str]
    observed: Array  # the outcome as it was fitted
    simulate: Callable[[np.random.Generator], Array]
    df: float = np.inf  # degrees of freedom of the covariance


def tables(
    model: Model,
    data: PanelData,
    solved: Solved,
    formula: str,
    dropped: list[str],
    seed: int,
    rate: str,
    method: str,
) -> Fit:
    residuals, scaled = quantile_residuals(solved.observed, solved.simulate, seed)
    fit = {
        "loglik": solved.loglik,
        "method": method,
        "rows": len(data.y),
        "rows_left_out": data.left_out,
        "prompts": len(data.levels["prompt"]),
        "families": len(data.levels["family"]),
        "converged": True,  # anything else is a FitError
        "reference": {f: data.levels[f][0] for f in ("variant", "task", "family")},
        **{name: sd for name, sd, _ in solved.random},
        "zero_sd": solved.zero_sd,
        "dropped": dropped,
    }
    baseline, *treated = data.levels["variant"]
    slopes, tests = slopes_and_tests(
        solved.terms,
        solved.estimates,
        solved.cov,
        rate=rate,
        baseline=baseline,
        treated=treated,
        df=solved.df,
    )
    return Fit(model, formula, _coefficients(solved), slopes, tests, fit, residuals, scaled)


def _coefficients(solved: Solved) -> pl.DataFrame:
    se = np.sqrt(np.diag(solved.cov))
    z = solved.estimates / se
    half, of = float(stats.t.ppf(0.975, solved.df)), stats.t(solved.df)
    rows: list[tuple[Any, ...]] = [
        (part, term, b, s, t, 2 * of.sf(abs(t)), b - half * s, b + half * s)
        for (part, term), b, s, t in zip(solved.terms, solved.estimates, se, z, strict=True)
    ]
    for name, sd, log_se in solved.random:
        known = np.isfinite(log_se) and name not in solved.zero_sd
        ends = (sd * np.exp(-Z95 * log_se), sd * np.exp(Z95 * log_se)) if known else (None, None)
        rows.append(("random", name, sd, sd * log_se if known else None, None, None, *ends))
    numbers = ("estimate", "se", "z", "p", "ci_low", "ci_high")
    return pl.DataFrame(
        rows,
        schema={"part": pl.String, "term": pl.String, **dict.fromkeys(numbers, pl.Float64)},
        orient="row",
    )
