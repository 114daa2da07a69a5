"""The beta mixed model of a panel: its designs, and what `beta.fit_beta` makes of them."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from canopy_store.analysis.regression.beta import Array, fit_beta
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

CLIP = 1e-6  # the beta distribution has no mass at 0 and 1


def _standardised(x: Array) -> Array:
    return (x - x.mean()) / x.std(ddof=1)


def _beta_designs(data: PanelData) -> tuple[Columns, Columns]:
    r, inverse = {"R_sc": _standardised(data.r)}, _standardised(1 / data.n)
    variant, task, family = (data.dummies(f) for f in ("variant", "task", "family"))
    four, three = (
        natural_spline(inverse, 4, "ns(invN_sc, 4)"),
        natural_spline(inverse, 3, "ns(invN_sc, 3)"),
    )
    one = intercept(len(data.y))
    mean = one | r | variant | four | task | cross(r, variant) | cross(four, variant)
    precision = one | variant | task | cross(variant, task) | three | r | cross(r, variant) | family
    return mean, precision


def solve_beta(data: PanelData) -> tuple[Solved, str, list[str]]:
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
    mean, precision = _beta_designs(data)
    X, W = matrix_of(mean, "beta"), matrix_of(precision, "beta, log precision")
    terms = [("conditional", t) for t in mean] + [("dispersion", t) for t in precision]
    sds, with_family = ["sd(prompt)", "sd(family)"], len(data.levels["family"]) > 1
    names = [f"{term} ({part})" for part, term in terms] + sds
    y, prompt, family = np.clip(size, CLIP, 1 - CLIP), data.codes["prompt"], data.codes["family"]
    fit = fit_beta(y, X, W, prompt, family, names, with_family)
    p, m = X.shape[1], len(terms)
    spread, errors = np.exp(fit.theta[m:]), np.sqrt(np.diag(fit.cov)[m:])
    random = [
        (s, 0.0 if s in fit.zero_sd else float(v), float(e))
        for s, v, e in zip(sds, spread, errors, strict=True)
    ][: 1 + with_family]
    eta = X @ fit.theta[:p] + fit.family_effects[family]
    phi = np.exp(W @ fit.theta[p:m])

    def simulate(rng: np.random.Generator) -> Array:
        mu = expit(eta + rng.normal(0, random[0][1], len(fit.prompt_effects))[prompt])
        return np.clip(rng.beta(mu * phi, (1 - mu) * phi), CLIP, 1 - CLIP)

    left, dropped = formula_of(data, "R_sc*variant + ns(invN_sc, 4)*variant + task", ("task",))
    right, more = formula_of(
        data, "variant*task + ns(invN_sc, 3) + R_sc*variant + family", ("task", "family")
    )
    effects = "(1|prompt)" + " + (1|family)" * with_family
    dropped += [f"log precision {note}" for note in more]
    if not with_family:
        dropped.append("(1|family)")
    solved = Solved(terms, fit.theta[:m], fit.cov[:m, :m], random, fit.loglik, fit.zero_sd, y, simulate)
    y_name = "|D|" if data.outcome == "D" else data.outcome
    return solved, f"{y_name} ~ {left} + {effects}, log precision ~ {right}", dropped
