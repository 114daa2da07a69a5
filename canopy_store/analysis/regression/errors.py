"""Errors in variables: linear models whose R_bar, N_bar and D are means over the same few rollouts.

The errors of a row's means have known (co)variances (the view ``panel``), so what they add to the normal
equations on average is known, too, and is taken out (Fuller, Measurement Error Models, 1987): with Z and
z the design and outcome less the share s of their prompt's sum,

    b = (Z'Z − A)⁻¹ (Z'z − B),   A = Σ t_i L_i Σ_i L_i',   B = Σ t_i L_i σ_i,
    t_i = (1 − s)² + (n − 1) s²,

Σ_i the covariance of the errors of (R_bar, N_bar) of row i, σ_i that with the error of D, L_i what the
row's terms make of both: R_bar and R_bar:variant have one error, not two. An error is (1 − s) in its own
row and −s in the n − 1 others of its prompt, whence t. Any s gives a consistent b; that of REML is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from canopy_store.analysis.regression.beta import Array, Codes
from canopy_store.analysis.regression.design import matrix_of
from canopy_store.analysis.regression.fit import Fit
from canopy_store.analysis.regression.linear import kept_of, less_share, linear_design, share_of
from canopy_store.analysis.regression.measurement import Errors, refusal
from canopy_store.analysis.regression.panel import Columns, PanelData
from canopy_store.analysis.regression.scores import (
    Bootstrap,
    Equations,
    Root,
    contrast,
    covariance,
    information,
    joint,
    ratio,
    solve,
)
from canopy_store.analysis.regression.slopes import SLOPES, TESTS
from canopy_store.errors import FitError

LEAST = 1.2816  # standard errors, one-sided 10%: below, the errors may have left nothing of R_bar


def by_prompt(rows: Array, prompt: Codes) -> Array:
    """(P, ...) the sums of rows (rows, ...) over each prompt."""
    order = np.argsort(prompt, kind="stable")
    starts = np.searchsorted(prompt[order], np.arange(prompt.max() + 1))
    return np.asarray(np.add.reduceat(rows[order], starts, axis=0))


def loadings(data: PanelData, design_of: Callable[[PanelData], Columns]) -> Array:
    """(rows, terms, 2) what one unit of R_bar, and of N_bar, adds to each term of a row."""
    zero = np.zeros_like(data.y)
    at_zero, at_r, at_n = (
        np.column_stack(list(design_of(replace(data, r=r, n=n)).values()))
        for r, n in ((zero, zero), (zero + 1, zero), (zero, zero + 1))
    )
    return np.stack([at_r - at_zero, at_n - at_zero], axis=-1)


def by_moments(
    data: PanelData, model: str, design_of: Callable[[PanelData], Columns] | None = None
) -> Equations:
    """The normal equations of a linear model less what the errors are expected to add.

    ``design_of`` makes the design of a panel; by default it is the model's.
    """
    design_of = design_of or (lambda rows: linear_design(rows, model)[0])
    design = design_of(data)
    X, prompt = matrix_of(design, model), data.codes["prompt"]
    share = share_of(data, X)
    Z = less_share(np.column_stack([X, data.y]), share, prompt)
    e, t = data.errors, kept_of(share, prompt)
    L = loadings(data, design_of)
    sigma = np.stack([e["var_R"], e["cov_RN"], e["cov_RN"], e["var_N"]], -1).reshape(-1, 2, 2)
    with_outcome = np.stack([e["cov_RD"], e["cov_ND"]], axis=-1)
    A = np.einsum("i,ija,iab,ikb->ijk", t, L, sigma, L)
    B = np.einsum("i,ija,ia->ij", t, L, with_outcome)
    Z, z = Z[:, :-1], Z[:, -1]
    plain = Z[:, :, None] * Z[:, None, :]
    left, right = by_prompt(plain - A, prompt), by_prompt(Z * z[:, None] - B, prompt)
    return Equations(list(design), left, right, plain.sum(axis=0), len(z))


def corrected_estimates(equations: Equations) -> tuple[Array, Array]:
    """The root of the equations and its covariance by the prompts' scores; no root is a FitError.

    As in `corrected_slopes` N_bar drops out where it is nothing but error: the terms before it keep
    their places.
    """
    for kept in (equations, equations.without("N_bar")):
        root = solve(kept)
        if root is not None:
            return root.b, covariance(kept, root)
    raise FitError("too little of R_bar is left without its errors")


def corrected(
    data: PanelData, model: Any, errors: Errors, equations: Equations, replicates: int, seed: int
) -> Fit:
    """The tables of a linear model with the errors taken out, from the equations of a method.

    Raises
    ------
    FitError
        The errors leave too little of R_bar to tell its slopes from anything; says how many rollouts do.
    """
    bootstrap = Bootstrap(len(equations.left), replicates, seed)
    root, equations, slopes, tests = corrected_slopes(data, errors, equations, bootstrap)
    _, formula, dropped = linear_design(data, model)
    warnings: list[str] = []
    if "N_bar" not in equations.terms:
        formula, dropped = formula.replace(" + N_bar", ""), [*dropped, "N_bar"]
        warnings.append(
            "N_bar is left out: errors account for all of its variance that other terms do not explain"
        )
    if not np.isfinite(slopes["ci_low"].to_numpy()).all():
        warnings.append(f"an interval without ends: {refusal(data)}")
    fit = {
        "method": f"least squares, errors by {errors}",
        "rows": len(data.y),
        "rows_left_out": data.left_out,
        "prompts": len(data.levels["prompt"]),
        "families": len(data.levels["family"]),
        "converged": True,
        "reference": {f: data.levels[f][0] for f in ("variant", "task", "family")},
        "replicates": replicates,
        "seed": seed,
        "dropped": dropped,
    }
    coefficients, none = _coefficients(equations, root, bootstrap), np.empty(0)
    corrected_fit = Fit(model, formula, coefficients, slopes, tests, fit, {}, none)
    return replace(corrected_fit, errors=errors, warnings=tuple(warnings))


def corrected_slopes(
    data: PanelData, errors: Errors, equations: Equations, bootstrap: Bootstrap
) -> tuple[Root, Equations, pl.DataFrame, pl.DataFrame]:
    """The root, the equations it solves, its table of slopes and the joint test of the etas.

    Where N_bar is nothing but error there is no root with it; the equations are then those without.

    Raises
    ------
    FitError
        As `corrected`: no root; or no interval of a ratio that ends, and the information on a slope does
        not stand out from none.
    """
    root = solve(equations)
    if root is None:
        equations = equations.without("N_bar")
        root = solve(equations)
    at = {term: i for i, term in enumerate(equations.terms)}
    unit, (baseline, *treated) = np.eye(len(at)), data.levels["variant"]
    etas = {v: unit[at[f"R_bar:variant[{v}]"]] for v in treated if f"R_bar:variant[{v}]" in at}
    beta = unit[at["R_bar"]]
    totals = {variant: beta + eta for variant, eta in etas.items()}
    unavailable = FitError(
        f"--errors {errors}: {refusal(data)}; --errors none shows the uncorrected fit"
    )
    if root is None:
        raise unavailable
    rows = [(baseline, "beta", *_without_p(contrast(equations, root, beta, bootstrap)))]
    for variant, q in totals.items():
        rows.append((variant, "beta+eta", *_without_p(contrast(equations, root, q, bootstrap))))
        rows.append((variant, "ratio", *ratio(equations, root, q, beta, bootstrap)))
    ended = any(np.isfinite(low) for _, name, *_, low, _ in rows if not etas or name == "ratio")
    known = min(information(equations, root, q) for q in (beta, *totals.values()))
    if not ended and known < LEAST:
        raise unavailable
    tests = []
    if etas:
        statistic, p = joint(equations, root, np.stack([*etas.values()]), bootstrap)
        tests = [("every eta is 0 (scores)", statistic, len(etas), p)]
    slopes = pl.DataFrame(rows, schema=SLOPES, orient="row")
    return root, equations, slopes, pl.DataFrame(tests, schema=TESTS, orient="row")


def _without_p(values: tuple[float, float, float, float, float]) -> tuple[float, float, float, float]:
    value, se, _, low, high = values
    return value, se, low, high


def _coefficients(equations: Equations, root: Root, bootstrap: Bootstrap) -> pl.DataFrame:
    rows = []
    for term, q in zip(equations.terms, np.eye(len(equations.terms)), strict=True):
        value, se, p, low, high = contrast(equations, root, q, bootstrap)
        rows.append(("conditional", term, value, se, value / se, p, low, high))
    numbers = ("estimate", "se", "z", "p", "ci_low", "ci_high")
    schema = {"part": pl.String, "term": pl.String, **dict.fromkeys(numbers, pl.Float64)}
    return pl.DataFrame(rows, schema=schema, orient="row")
