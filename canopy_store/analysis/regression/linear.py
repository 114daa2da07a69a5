"""Linear models with an intercept for each prompt, by maximum likelihood or REML."""

from __future__ import annotations

import warnings

import numpy as np
from scipy import optimize

from canopy_store.analysis.regression.beta import Array, Codes
from canopy_store.analysis.regression.design import cross, formula_of, intercept, matrix_of
from canopy_store.analysis.regression.fit import Solved
from canopy_store.analysis.regression.panel import Columns, PanelData
from canopy_store.errors import FitError


def linear_design(data: PanelData, model: str) -> tuple[Columns, str, list[str]]:
    r: Columns = {"R_bar": data.r}
    variant, task, family = (data.dummies(f) for f in ("variant", "task", "family"))
    if model == "main":
        design = r | {"N_bar": data.n} | task | family | variant | cross(family, variant)
        text = "R_bar + N_bar + task + family*variant"
    else:
        design = r | variant | cross(r, variant) | {"N_bar": data.n} | task | family
        text = "R_bar*variant + N_bar + task + family"
    right, dropped = formula_of(data, text, ("task", "family"))
    return intercept(len(data.y)) | design, f"{data.outcome} ~ {right} + (1|prompt)", dropped


def shares(sizes: Codes, ratio: float) -> Array:
    """(P,) the share of a prompt's sum, of its size's rows, that makes them independent.

    Fuller and Battese 1973; ratio is sd_prompt²/sd_residual².
    """
    return np.asarray((1 - 1 / np.sqrt(1 + sizes * ratio)) / sizes)


def profile(
    y: Array, X: Array, prompt: Codes, ratio: float, reml: bool
) -> tuple[float, Array, Array, float]:
    """Return log-likelihood, b, its covariance and sd_residual² at sd_prompt²/sd_residual² = ratio.

    Taking a share of each prompt's sum from its rows makes them independent.
    """
    sizes, (n, p) = np.bincount(prompt), X.shape
    share = shares(sizes, ratio)
    Z = np.column_stack([a - (share * np.bincount(prompt, a))[prompt] for a in (y, *X.T)])
    y, X = Z[:, 0], Z[:, 1:]
    inverse = np.linalg.inv(X.T @ X)
    b = inverse @ (X.T @ y)
    df = n - p if reml else n
    scale = float(((y - X @ b) ** 2).sum()) / df
    loglik = -df / 2 * (np.log(2 * np.pi * scale) + 1) - np.log1p(sizes * ratio).sum() / 2
    loglik += np.linalg.slogdet(inverse)[1] / 2 if reml else 0.0
    return float(loglik), b, scale * inverse, scale


def best_ratio(y: Array, X: Array, prompt: Codes, reml: bool) -> tuple[float, float]:
    """Return where ``profile`` is largest, 0 included, and its value there."""

    def down(log_ratio: float) -> float:
        return -profile(y, X, prompt, np.exp(log_ratio), reml)[0]

    found = optimize.minimize_scalar(down, bounds=(-14, 14), method="bounded", options={"xatol": 1e-6})
    at_zero = profile(y, X, prompt, 0.0, reml)[0]
    return (0.0, at_zero) if at_zero >= -found.fun - 1e-6 else (float(np.exp(found.x)), -found.fun)


def share_of(data: PanelData, X: Array) -> Array:
    """(P,) the share of REML's fit that takes the regressors as exact."""
    y, prompt = data.y / data.y.std(), data.codes["prompt"]
    return shares(np.bincount(prompt), best_ratio(y, X, prompt, True)[0])


def less_share(columns: Array, share: Array, prompt: Codes) -> Array:
    """(rows, k) columns less the share (P,) of their prompt's sum."""
    sums = np.stack([np.bincount(prompt, column, len(share)) for column in columns.T], axis=-1)
    return np.asarray(columns - (share[:, None] * sums)[prompt])


def kept_of(share: Array, prompt: Codes) -> Array:
    """(rows,) how much of the variance of a row's error its prompt's rows keep."""
    s, n = share[prompt], np.bincount(prompt)[prompt]
    return np.asarray((1 - s) ** 2 + (n - 1) * s**2)


def estimates_of(y: Array, design: Columns, prompt: Codes, model: str) -> tuple[Array, Array]:
    """Return the estimates and their covariance by REML, at the maximum of the exact profile."""
    X = matrix_of(design, model)
    ratio, _ = best_ratio(y, X, prompt, True)
    _, b, cov, _ = profile(y, X, prompt, ratio, True)
    return b, cov


def solve_mixed(y: Array, design: Columns, prompt: Codes, model: str, *, reml: bool) -> Solved:
    """Return the fit of a linear model with an intercept for each prompt, by statsmodels.

    statsmodels stops short, or fails, near an sd_prompt of 0. So it starts from the maximum of the exact
    profile, must end at it, and is not asked where the maximum is at 0: there least squares is the fit.
    """
    X, names = matrix_of(design, model), list(design)
    unit = float(y.std())  # its tolerances are absolute
    observed, y = y, y / unit
    least = np.linalg.lstsq(X, y, rcond=None)[0]
    if float(np.var(y - X @ least)) <= 1e-20:
        raise FitError(f"{model}: the terms give the outcome exactly, so there is no error to estimate")
    ratio, best = best_ratio(y, X, prompt, reml)
    if ratio > 0:
        loglik, b, cov, scale, ratio = _statsmodels(y, X, prompt, ratio, reml, model)
        if not abs(loglik - best) < 1e-4:  # nan included
            raise FitError(
                f"{model}: no convergence, statsmodels ends {best - loglik:.2g} below the maximum"
            )
    else:
        loglik, b, cov, scale = profile(y, X, prompt, 0.0, reml)
    if not np.all(np.isfinite([*b, *np.diag(cov)])) or np.any(np.diag(cov) <= 0):
        raise FitError(f"{model}: no standard errors, the covariance of the terms is not positive")
    sd_residual, sd_prompt = unit * np.sqrt(scale), unit * np.sqrt(scale * ratio)
    mean, n_prompts = unit * (X @ b), int(prompt.max()) + 1
    loglik -= (len(y) - len(b) * reml) * np.log(unit)

    def simulate(rng: np.random.Generator) -> Array:
        between = rng.normal(0, sd_prompt, n_prompts)[prompt]
        return mean + between + rng.normal(0, sd_residual, len(mean))

    random = [("sd(prompt)", float(sd_prompt), np.nan), ("sd(residual)", float(sd_residual), np.nan)]
    zero = [] if ratio > 0 else ["sd(prompt)"]
    terms = [("conditional", name) for name in names]
    return Solved(terms, unit * b, unit**2 * cov, random, float(loglik), zero, observed, simulate)


def _statsmodels(
    y: Array, X: Array, prompt: Codes, ratio: float, reml: bool, model: str
) -> tuple[float, Array, Array, float, float]:
    """Return log-likelihood, b, its covariance, sd_residual² and the ratio of MixedLM's fit."""
    from statsmodels.regression import mixed_linear_model as sm  # half a second, and only fits need it

    p = X.shape[1]
    start = sm.MixedLMParams.from_components(np.zeros(p), cov_re=np.array([[ratio]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller compares the result with the maximum instead
        try:
            result = sm.MixedLM(y, X, groups=prompt).fit(start_params=start, reml=reml)
        except (np.linalg.LinAlgError, ValueError) as error:
            raise FitError(f"{model}: statsmodels cannot fit this panel ({error})") from error
    scale = float(result.scale)
    cov = np.asarray(result.cov_params())[:p, :p]
    ratio = float(np.asarray(result.cov_re)[0, 0]) / scale
    return float(result.llf), np.asarray(result.fe_params), cov, scale, ratio
