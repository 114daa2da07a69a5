"""Regression calibration: the beta model of rates that are means over few rollouts.

Each row's R_bar and N_bar give way to their best linear prediction from those of all rows of the prompt
(Carroll, Ruppert, Stefanski and Crainiceanu, Measurement Error in Nonlinear Models, 2006, ch. 4): with w
the deviations of a prompt's rows from the means of their checkpoint and task, T the covariance of the
true values and E that of their errors,

    predicted = mean + T (T + E)⁻¹ w,   T = cov(w) − E,   |D| less C (T + E)⁻¹ w,

C the covariance of the error of |D| with those of its row: what |D| shares with R_bar by chance. E and C
are means over a checkpoint's rows, because those of a single row are too noisy to shrink by. A row alone
would not do: the random effect of the prompt compares rows, and one tells of the other's true rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from canopy_store.analysis.regression.beta import Array, BetaFit, Codes, Laplace
from canopy_store.analysis.regression.beta_model import (
    BetaProblem,
    Precision,
    beta_problem,
    solve_beta,
)
from canopy_store.analysis.regression.fit import Fit, tables
from canopy_store.analysis.regression.measurement import least_partial, refusal
from canopy_store.analysis.regression.panel import PanelData
from canopy_store.errors import FitError

GROUPS = 40  # of prompts, left out in turn
LEAST = 0.4  # share of R_bar's variance, given the other terms, that is not error


def calibrated(data: PanelData) -> PanelData:
    """The panel with R_bar, N_bar and the outcome as predicted; the outcome is then |D|."""
    e, prompt, task = data.errors, data.codes["prompt"], data.codes["task"]
    _, first, cell = np.unique(data.codes["checkpoint"], return_index=True, return_inverse=True)
    cells, prompts, tasks = len(first), int(prompt.max()) + 1, int(task.max()) + 1
    w = np.column_stack([data.r, data.n])
    scale = w.std(axis=0)
    w = w / scale
    means = _means(w, cell * tasks + task)
    wide, there = np.zeros((prompts, cells, 2)), np.zeros((prompts, cells))
    wide[prompt, cell], there[prompt, cell] = w - means, 1
    error = np.stack([e["var_R"], e["cov_RN"], e["cov_RN"], e["var_N"]], -1).reshape(-1, 2, 2)
    error = _means(error / np.outer(scale, scale), cell)[first]
    shared = np.column_stack([e["cov_RD"], e["cov_ND"]]) / scale * np.sign(data.y)[:, None]
    shared = _means(shared, cell)[first]
    true = _true_covariance(wide, there, error, data, first)
    both = there[:, :, None, None, None] * there[:, None, None, :, None]  # (P, K, 1, K, 1)
    of_prompt, total = true * both, true * both
    for k in range(cells):
        total[:, k, :, k] += np.where(there[:, k, None, None] > 0, error[k], np.eye(2))
    square = (prompts, 2 * cells, 2 * cells)
    weights = np.linalg.solve(total.reshape(square), wide.reshape(prompts, -1, 1))
    predicted = (of_prompt.reshape(square) @ weights).reshape(wide.shape)[prompt, cell]
    by_chance = (shared[cell] * weights.reshape(wide.shape)[prompt, cell]).sum(axis=-1)
    r, n = ((means + predicted) * scale).T
    size = np.abs(data.y)
    y = np.clip(size - by_chance, size.min() / 2, (1 + size.max()) / 2)  # one row must not be all
    return replace(data, y=y, r=r, n=np.maximum(n, data.n.min() / 2))


def _means(values: Array, group: Codes) -> Array:
    """Each row's mean of its group."""
    _, of, count = np.unique(group, return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), *values.shape[1:]))
    np.add.at(sums, of, values)
    return np.asarray((sums.T / count).T[of])


def _true_covariance(wide: Array, there: Array, error: Array, data: PanelData, first: Codes) -> Array:
    """(K, 2, K, 2) of the true R_bar and N_bar, alike for all pairs of the same variants."""
    family, variant = (data.codes[f][first] for f in ("family", "variant"))
    cells, eye = len(first), np.eye(len(first))
    count = there.T @ there
    sums = np.einsum("pai,pbj->abij", wide, wide)
    count = np.maximum(count - len(np.unique(data.codes["task"])), 0)
    kinds = 2 * (family[:, None] == family) + eye
    kinds = (kinds * (variant.max() + 1) + variant[:, None]) * (variant.max() + 1) + variant
    _, kind = np.unique(kinds, return_inverse=True)
    kind = kind.reshape(kinds.shape)
    moments = np.zeros((kind.max() + 1, 2, 2))
    np.add.at(moments, kind, sums)
    counts = np.bincount(kind.ravel(), count.ravel())
    covariance = (moments / np.maximum(counts, 1)[:, None, None])[kind]
    covariance = covariance - eye[:, :, None, None] * error[:, None]
    values, vectors = np.linalg.eigh(covariance.transpose(0, 2, 1, 3).reshape(2 * cells, -1))
    true = (vectors * np.maximum(values, 1e-6)) @ vectors.T
    return np.asarray(true.reshape(cells, 2, cells, 2))


def fit_calibrated(data: PanelData, problem_of: Callable[[PanelData], BetaProblem]) -> BetaFit:
    """The fit of a problem of the calibrated panel.

    Its covariance is the jackknife's over groups of prompts, each calibrated anew and one Newton step
    from the fit of all: it allows for the calibration, which the likelihood takes as known.

    Raises
    ------
    FitError
        R_bar is less reliable than this was shown to work for; says how many rollouts would do.
    """
    if least_partial(data) < LEAST:
        raise FitError(f"--errors moments: {refusal(data)}; --errors none shows the uncorrected fit")
    fit = problem_of(calibrated(data)).fit()
    free, groups = np.isfinite(np.diag(fit.cov)), groups_of(data)
    within = np.random.default_rng(0).permutation(len(data.levels["prompt"])) % groups
    steps = []
    for group in range(groups):
        kept = problem_of(calibrated(_without(data, within[data.codes["prompt"]] == group)))
        X, W = (np.column_stack(list(part.values())) for part in (kept.mean, kept.precision))
        score = Laplace(kept.y, X, W, kept.prompt, kept.family).value_and_gradient(fit.theta)[1]
        steps.append(fit.cov[np.ix_(free, free)] @ score[free] * groups / (groups - 1))
    cov = np.full_like(fit.cov, np.nan)
    cov[np.ix_(free, free)] = np.cov(np.array(steps).T) * (groups - 1) ** 2 / groups
    return replace(fit, cov=cov)


def groups_of(data: PanelData) -> int:
    """How many groups of prompts the jackknife leaves out."""
    return min(GROUPS, len(data.levels["prompt"]))


def calibrated_fit(data: PanelData, precision: Precision) -> Fit:
    """The tables of the beta model, R_sc in units of the sd of R_bar as measured."""

    def problem_of(rows: PanelData) -> BetaProblem:
        return beta_problem(rows, precision, float(data.r.std(ddof=1)))

    beta_problem(data, precision)  # refuses what it refuses of the panel as it is
    found, problem = fit_calibrated(data, problem_of), problem_of(calibrated(data))
    solved, formula, dropped = solve_beta(data, problem, precision, found)
    solved = replace(solved, random=[], df=groups_of(data) - 1)
    method = "ML, errors by moments (regression calibration)"
    fit = tables("beta", data, solved, formula, dropped, 0, "R_sc", method)
    return replace(fit, errors="moments", residuals={}, quantile_residuals=np.empty(0))


def _without(data: PanelData, out: np.ndarray) -> PanelData:
    codes = {f: c[~out] for f, c in data.codes.items()}
    codes["prompt"] = np.unique(codes["prompt"], return_inverse=True)[1]
    errors = {c: x[~out] for c, x in data.errors.items()}
    kept = ~out
    return replace(
        data,
        y=data.y[kept],
        r=data.r[kept],
        n=data.n[kept],
        rows=data.rows[kept],
        codes=codes,
        errors=errors,
    )
