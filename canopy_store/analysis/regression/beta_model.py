"""The beta mixed model of a panel: its designs, and what `beta.fit_beta` makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import expit

from canopy_store.analysis.regression.beta import Array, BetaFit, Codes, fit_beta
from canopy_store.analysis.regression.design import (
    cross,
    formula_of,
    intercept,
    matrix_of,
    natural_spline,
)
from canopy_store.analysis.regression.fit import Solved
from canopy_store.analysis.regression.panel import Columns, PanelData
from canopy_store.errors import FitError

Precision = Literal["full", "crossed", "variant"]

_PRECISIONS: dict[Precision, str] = {
    "full": "variant*task + ns(invN_sc, 3) + R_sc*variant + family",
    "crossed": "variant*task + ns(invN_sc, 4)*variant + R_sc*variant + family",
    "variant": "variant",
}
SDS = ["sd(prompt)", "sd(family)"]
CLIP = 1e-6  # the beta distribution has no mass at 0 and 1


def _standardised(x: Array, unit: float | None = None) -> Array:
    return (x - x.mean()) / (unit or x.std(ddof=1))


def _beta_designs(data: PanelData, precision: Precision, unit: float | None) -> tuple[Columns, Columns]:
    r, inverse = {"R_sc": _standardised(data.r, unit)}, _standardised(1 / data.n)
    variant, task, family = (data.dummies(f) for f in ("variant", "task", "family"))
    four, three = (
        natural_spline(inverse, 4, "ns(invN_sc, 4)"),
        natural_spline(inverse, 3, "ns(invN_sc, 3)"),
    )
    one = intercept(len(data.y))
    mean = one | r | variant | four | task | cross(r, variant) | cross(four, variant)
    if precision == "variant":
        return mean, one | variant
    inverse_length = four | cross(four, variant) if precision == "crossed" else three
    by_rate = inverse_length | r | cross(r, variant)
    return mean, one | variant | task | cross(variant, task) | by_rate | family


@dataclass(frozen=True)
class BetaProblem:
    """What `beta.fit_beta` takes: outcome, designs by the names of their terms, levels of the rows."""

    y: Array
    mean: Columns
    precision: Columns
    prompt: Codes
    family: Codes
    with_family: bool

    def fit(self) -> BetaFit:
        """Return the maximum likelihood fit; a design that is singular is a FitError."""
        X, W = self.matrices()
        names = [f"{term} (conditional)" for term in self.mean]
        names += [f"{term} (dispersion)" for term in self.precision] + SDS
        return fit_beta(self.y, X, W, self.prompt, self.family, names, self.with_family)

    def matrices(self) -> tuple[Array, Array]:
        """Return the designs of the logit mean and of the log precision."""
        return matrix_of(self.mean, "beta"), matrix_of(self.precision, "beta, log precision")


def beta_problem(data: PanelData, precision: Precision, unit: float | None = None) -> BetaProblem:
    """Return the beta model of a panel, not fitted yet; an outcome it cannot take is a FitError.

    ``unit`` is what R_sc counts R_bar in, by default its standard deviation.
    """
    if np.any(data.n <= 0):
        raise FitError("beta: N_bar must be positive, 1/N_bar is a term")
    size = np.abs(data.y)
    if size.max() > 1:
        raise FitError(
            f"beta: {data.outcome} must lie between 0 and 1, and its largest value is "
            f"{size.max():.4g}; vendi_share is vendi_score on that scale"
        )
    if data.outcome != "D" and data.y.min() < 0:
        raise FitError(f"beta: {data.outcome} must lie between 0 and 1, its least is {data.y.min():.4g}")
    mean, log_precision = _beta_designs(data, precision, unit)
    several = len(data.levels["family"]) > 1
    y, prompt, family = np.clip(size, CLIP, 1 - CLIP), data.codes["prompt"], data.codes["family"]
    return BetaProblem(y, mean, log_precision, prompt, family, several)


def solve_beta(
    data: PanelData, problem: BetaProblem, precision: Precision, fit: BetaFit | None = None
) -> tuple[Solved, str, list[str]]:
    """Return the fit, by default that of the problem, its formula and the terms with nothing to tell."""
    y, prompt, family, with_family = problem.y, problem.prompt, problem.family, problem.with_family
    X, W = problem.matrices()
    terms = [("conditional", t) for t in problem.mean] + [("dispersion", t) for t in problem.precision]
    fit = fit or problem.fit()
    p, m = X.shape[1], len(terms)
    spread, errors = np.exp(fit.theta[m:]), np.sqrt(np.diag(fit.cov)[m:])
    random = [
        (s, 0.0 if s in fit.zero_sd else float(v), float(e))
        for s, v, e in zip(SDS, spread, errors, strict=True)
    ][: 1 + with_family]
    eta = X @ fit.theta[:p] + fit.family_effects[family]
    phi = np.exp(W @ fit.theta[p:m])

    def simulate(rng: np.random.Generator) -> Array:
        mu = expit(eta + rng.normal(0, random[0][1], len(fit.prompt_effects))[prompt])
        return np.clip(rng.beta(mu * phi, (1 - mu) * phi), CLIP, 1 - CLIP)

    left, dropped = formula_of(data, "R_sc*variant + ns(invN_sc, 4)*variant + task", ("task",))
    right, more = formula_of(data, _PRECISIONS[precision], ("task", "family"))
    effects = "(1|prompt)" + " + (1|family)" * with_family
    dropped += [f"log precision {note}" for note in more]
    if not with_family:
        dropped.append("(1|family)")
    solved = Solved(terms, fit.theta[:m], fit.cov[:m, :m], random, fit.loglik, fit.zero_sd, y, simulate)
    y_name = "|D|" if data.outcome == "D" else data.outcome
    return solved, f"{y_name} ~ {left} + {effects}, log precision ~ {right}", dropped
