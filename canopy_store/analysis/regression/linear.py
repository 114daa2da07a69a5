"""Regressions of semantic diversity on entropy rate and length, over a panel of prompts and variants.

A panel has one row per (task, prompt, family, variant): the outcome D (semantic diversity), R_bar
(entropy rate, nats per token) and N_bar (mean length, tokens). Four models:

    main         D ~ R_bar + N_bar + task + family*variant + (1|prompt), REML
    interaction  D ~ R_bar*variant + N_bar + task + family + (1|prompt), REML
    quadratic    interaction on centred R_bar with and without (R_bar², R_bar²:variant), ML
    beta         logit mean of |D| ~ R_sc*variant + ns(invN_sc, 4)*variant + task
                     + (1|prompt) + (1|family),
                 log precision ~ variant*task + ns(invN_sc, 3) + R_sc*variant + family, ML

beta (the slope of R_bar in the baseline) and eta (what a variant adds to it) are the quantities of
interest: "Fine-Tuning Improves Information Conveyance in Language Models" (arXiv 2605.30844).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from scipy import optimize, stats
from scipy.interpolate import CubicSpline
from scipy.special import expit

from canopy_store.analysis.bootstrap import varies
from canopy_store.analysis.regression.beta import Array, Codes, fit_beta
from canopy_store.errors import DataError, FitError, UsageError

Model = Literal["main", "interaction", "quadratic", "beta"]
Columns = dict[str, Array]  # the columns of a design, by the name of the term

FEWEST_PROMPTS = 5  # below, the variance between prompts is not an estimate of anything
CLIP = 1e-6  # the beta distribution has no mass at 0 and 1
SIMULATIONS = 250
Z95 = float(stats.norm.ppf(0.975))
_OTHER_NAMES = {"model_name": "family", "model_variant": "variant"}
_KEYS = ("family", "variant", "task", "prompt")
_NUMBERS = ("R_bar", "N_bar")
FACTORS = ("task", "family")  # those that can be left out
_SLOPES = ("estimate", "se", "ci_low", "ci_high")
_TESTS = {"name": pl.String, "statistic": pl.Float64, "df": pl.Int64, "p": pl.Float64}


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


@dataclass(frozen=True)
class _Data:
    """A panel as arrays; the first level of each factor is its reference."""

    outcome: str
    y: Array
    r: Array
    n: Array
    levels: dict[str, list[str]]
    codes: dict[str, Codes]
    left_out: int  # rows with a NULL

    def dummies(self, factor: str) -> Columns:
        """Treatment contrasts of a factor: none when it has one level."""
        names = self.levels[factor][1:]
        return {f"{factor}[{name}]": (self.codes[factor] == i + 1) * 1.0 for i, name in enumerate(names)}


@dataclass(frozen=True)
class _Solved:
    """What a fit hands to the tables: the terms of each part, in the order of the covariance."""

    terms: list[tuple[str, str]]
    estimates: Array
    cov: Array
    random: list[tuple[str, float, float]]  # name, sd, se of log sd
    loglik: float
    zero_sd: list[str]
    simulate: Callable[[np.random.Generator], Array]


def read_panel(
    path: str | Path, *, embedder: str | None = None, selection: str | None = None
) -> pl.DataFrame:
    """Return the panel of a CSV or Parquet file.

    Columns: family, variant, task, prompt, R_bar, N_bar, then every other number of the file: D,
    vendi_score, … The file has those of the view ``panel``, or model_name and model_variant for family
    and variant. ``prompt`` is task/prompt_id.

    Parameters
    ----------
    embedder, selection : the rows to keep, where the file holds several

    Raises
    ------
    DataError
        The file cannot be read, misses a column, or holds several embedders or selections and none
        was named.
    """
    try:
        if Path(path).suffix == ".parquet":
            frame = pl.read_parquet(path)
        else:
            frame = pl.read_csv(path, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: not a readable panel ({str(error).splitlines()[0]})") from error
    for column, wanted in (("embedder", embedder), ("selection", selection)):
        frame = _keep(frame, column, wanted, str(path))
    return _normalise(frame, str(path))


def _keep(frame: pl.DataFrame, column: str, wanted: str | None, where: str) -> pl.DataFrame:
    if column not in frame.columns:
        if wanted is not None:
            raise DataError(f"{where}: no column {column}")
        return frame
    there = frame[column].drop_nulls().unique().sort().to_list()
    if wanted is not None and wanted not in there:
        raise DataError(f"{where}: no {column} {wanted!r}; there is {', '.join(map(str, there))}")
    if wanted is None and len(there) > 1:
        raise DataError(f"{where}: several values of {column}, name one of {', '.join(map(str, there))}")
    return frame if wanted is None else frame.filter(pl.col(column) == wanted)


def _normalise(frame: pl.DataFrame, where: str) -> pl.DataFrame:
    frame = frame.rename({a: b for a, b in _OTHER_NAMES.items() if a in frame.columns})
    if "prompt" not in frame.columns and {"task", "prompt_id"} <= set(frame.columns):
        frame = frame.with_columns(prompt=pl.format("{}/{}", "task", "prompt_id"))
    missing = [c for c in _KEYS + _NUMBERS if c not in frame.columns]
    if missing:
        raise DataError(f"{where}: no column {', '.join(missing)}")
    try:
        keys = (*_KEYS, "prompt_id", *_NUMBERS)
        others = [c for c, kind in frame.schema.items() if kind.is_numeric() and c not in keys]
        numbers = [*_NUMBERS, *others]
        return frame.select(pl.col(_KEYS).cast(pl.String), pl.col(numbers).cast(pl.Float64))
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{where}: {str(error).splitlines()[0]}") from error


def regress(
    panel: pl.DataFrame,
    model: Model,
    *,
    baseline: str = "base",
    outcome: str = "D",
    reference_task: str | None = None,
    drop: Sequence[str] = (),
    seed: int = 0,
) -> Fit:
    """Return the fit of one of the four models to a panel, every other variant against the baseline.

    Parameters
    ----------
    panel : as ``read_panel`` returns it, or the view ``panel`` itself; rows with a NULL drop out
    baseline : the variant that is the reference level
    outcome : column to explain; the beta model needs values between 0 and 1 (it takes |D|)
    reference_task : reference level of task; ``completion`` where there is one, else the first by name
    drop : factors left out, of task and family; one that has a single level must be
    seed : of the simulated residuals; the fit itself draws nothing

    Raises
    ------
    UsageError
        An unknown model or outcome.
    FitError
        The panel cannot carry the model (the term or the level is named), one task or one family only
        that is not dropped, or the fit did not converge.
    DataError
        The panel misses a column.

    Notes
    -----
    ``fit['dropped']`` lists the terms that ``drop`` takes out.
    """
    if model not in get_args(Model):
        raise UsageError(f"no model {model!r}; there is {', '.join(get_args(Model))}")
    for factor in drop:
        if factor not in FACTORS:
            raise UsageError(f"--drop {factor}: one of {', '.join(FACTORS)}")
    frame = _normalise(panel, "panel")
    if outcome not in frame.columns or outcome in _KEYS:
        numbers = [c for c in frame.columns if c not in (*_KEYS, *_NUMBERS)]
        raise UsageError(f"--outcome {outcome}: the panel has {', '.join(numbers)}")
    data = _data(frame, outcome, baseline, reference_task, drop)
    if model == "quadratic":
        return _quadratic(data, seed)
    if model == "beta":
        solved, formula, dropped = _solve_beta(data)
        return _tables("beta", data, solved, formula, dropped, seed, "R_sc", "ML")
    design, formula, dropped = _linear_design(data, model)
    solved = _solve_mixed(data.y, design, data.codes["prompt"], model, reml=True)
    return _tables(model, data, solved, formula, dropped, seed, "R_bar", "REML")


# ------------------------------------------------------------------------------------ panel to arrays


def _data(
    frame: pl.DataFrame, outcome: str, baseline: str, reference_task: str | None, drop: Sequence[str]
) -> _Data:
    finite = pl.all_horizontal(pl.col(outcome, "R_bar", "N_bar").is_finite().fill_null(False))
    kept = frame.filter(finite)
    there = {f: kept[f].unique().sort().to_list() for f in _KEYS}
    variants = ", ".join(there["variant"]) or "none"
    if baseline not in there["variant"]:
        raise FitError(f"no rows of the baseline variant {baseline!r}; there is {variants}")
    if len(there["variant"]) < 2:
        raise FitError(f"nothing to compare: {variants} is the only variant with a value of {outcome}")
    if reference_task is not None and reference_task not in there["task"]:
        raise FitError(f"no rows of the task {reference_task!r}; there is {', '.join(there['task'])}")
    if len(there["prompt"]) < FEWEST_PROMPTS:
        raise FitError(f"too few prompts: {len(there['prompt'])}, and {FEWEST_PROMPTS} are the fewest")
    if kept["prompt"].value_counts()["count"].max() == 1:
        raise FitError("every prompt has one row, so (1|prompt) is not told from the residual")
    twice = kept.filter(pl.struct(_KEYS).is_duplicated())
    if len(twice):
        row = "/".join(twice.select(_KEYS).row(0))
        raise FitError(f"more than one row of {row}: keep one embedder and one selection")
    for column in (outcome, "R_bar", "N_bar"):
        if not varies(kept[column].min(), kept[column].max()):
            raise FitError(f"{column} is constant: nothing to regress")
    for factor in FACTORS:
        if len(there[factor]) == 1 and factor not in drop:
            raise FitError(
                f"one {factor} only ({there[factor][0]}): a {factor} effect cannot be told from the "
                f"intercept; leave it out with --drop {factor}"
            )
    task = reference_task or ("completion" if "completion" in there["task"] else there["task"][0])
    levels = {
        **there,
        "variant": _first(baseline, there["variant"]),
        "task": _first(task, there["task"]),
    }
    codes = {
        f: kept[f].replace_strict(levels[f], range(len(levels[f])), return_dtype=pl.Int64).to_numpy()
        for f in _KEYS
    }
    for factor in drop:  # one level: its terms vanish
        levels[factor], codes[factor] = ["(dropped)"], np.zeros_like(codes[factor])
    y, r, n = (kept[c].to_numpy() for c in (outcome, "R_bar", "N_bar"))
    return _Data(outcome, y, r, n, levels, codes, len(frame) - len(kept))


def _first(name: str, names: list[str]) -> list[str]:
    return [name, *(other for other in names if other != name)]


def _cross(a: Columns, b: Columns) -> Columns:
    return {f"{x}:{y}": a[x] * b[y] for x in a for y in b}


def _one(n: int) -> Columns:
    return {"(Intercept)": np.ones(n)}


def _matrix(design: Columns, model: str) -> Array:
    """Return the design as (rows, terms); a term that the earlier ones determine is a FitError."""
    matrix = np.column_stack(list(design.values()))
    if matrix.shape[0] <= matrix.shape[1]:
        raise FitError(f"{model}: {matrix.shape[0]} rows for {matrix.shape[1]} terms")
    norms = np.linalg.norm(matrix, axis=0)
    own = np.abs(np.diag(np.linalg.qr(matrix / np.where(norms > 0, norms, 1.0), mode="r")))
    for name, share, norm in zip(design, own, norms, strict=True):
        if share < 1e-7 or norm == 0:
            raise FitError(f"{model}: the term {name} is a combination of the others (singular design)")
    return matrix


def _formula(data: _Data, text: str, factors: Sequence[str]) -> tuple[str, list[str]]:
    """Return a formula without the terms of one-level factors, and the list of those."""
    single = [f for f in factors if len(data.levels[f]) == 1]
    kept, dropped = [], []
    for term in text.split(" + "):
        parts = [p for p in term.split("*") if p not in single]
        if parts:
            kept.append("*".join(parts))
        if "*".join(parts) != term:
            dropped.append(term)
    return " + ".join(kept), dropped


# ------------------------------------------------------------------------------------- linear models


def _linear_design(data: _Data, model: str) -> tuple[Columns, str, list[str]]:
    r: Columns = {"R_bar": data.r}
    variant, task, family = (data.dummies(f) for f in ("variant", "task", "family"))
    if model == "main":
        design = r | {"N_bar": data.n} | task | family | variant | _cross(family, variant)
        text = "R_bar + N_bar + task + family*variant"
    else:
        design = r | variant | _cross(r, variant) | {"N_bar": data.n} | task | family
        text = "R_bar*variant + N_bar + task + family"
    right, dropped = _formula(data, text, ("task", "family"))
    return _one(len(data.y)) | design, f"{data.outcome} ~ {right} + (1|prompt)", dropped


def _quadratic(data: _Data, seed: int) -> Fit:
    """Both fits by ML on centred R_bar, and their likelihood-ratio test."""
    centred: Columns = {"R_c": data.r - data.r.mean()}
    square: Columns = {"R_c^2": centred["R_c"] ** 2}
    variant, task, family = (data.dummies(f) for f in ("variant", "task", "family"))
    linear = _one(len(data.y)) | centred | variant | _cross(centred, variant)
    linear = linear | {"N_bar": data.n} | task | family
    fits: list[Fit] = []
    for extra, text in (({}, ""), (square | _cross(square, variant), "R_c^2*variant + ")):
        right, dropped = _formula(data, f"R_c*variant + {text}N_bar + task + family", ("task", "family"))
        formula = f"{data.outcome} ~ {right} + (1|prompt)"
        solved = _solve_mixed(data.y, linear | extra, data.codes["prompt"], "quadratic", reml=False)
        fits.append(_tables("quadratic", data, solved, formula, dropped, seed, "R_c", "ML"))
    nested, full = fits
    statistic = max(2 * (full.fit["loglik"] - nested.fit["loglik"]), 0.0)
    df = len(data.levels["variant"])
    row = ("quadratic terms (likelihood ratio)", statistic, df, float(stats.chi2.sf(statistic, df)))
    tests = pl.concat([full.tests, pl.DataFrame([row], schema=_TESTS, orient="row")])
    return Fit(**{**full.__dict__, "tests": tests, "nested": nested})


def _profile(
    y: Array, X: Array, prompt: Codes, ratio: float, reml: bool
) -> tuple[float, Array, Array, float]:
    """Return log-likelihood, b, its covariance and sd_residual² at sd_prompt²/sd_residual² = ratio.

    Taking a share of each prompt's mean from its rows makes them independent (Fuller and Battese 1973).
    """
    sizes, (n, p) = np.bincount(prompt), X.shape
    share = (1 - 1 / np.sqrt(1 + sizes * ratio)) / sizes
    Z = np.column_stack([a - (share * np.bincount(prompt, a))[prompt] for a in (y, *X.T)])
    y, X = Z[:, 0], Z[:, 1:]
    inverse = np.linalg.inv(X.T @ X)
    b = inverse @ (X.T @ y)
    df = n - p if reml else n
    scale = float(((y - X @ b) ** 2).sum()) / df
    loglik = -df / 2 * (np.log(2 * np.pi * scale) + 1) - np.log1p(sizes * ratio).sum() / 2
    loglik += np.linalg.slogdet(inverse)[1] / 2 if reml else 0.0
    return float(loglik), b, scale * inverse, scale


def _best_ratio(y: Array, X: Array, prompt: Codes, reml: bool) -> tuple[float, float]:
    """Return where ``_profile`` is largest, 0 included, and its value there."""

    def down(log_ratio: float) -> float:
        return -_profile(y, X, prompt, np.exp(log_ratio), reml)[0]

    found = optimize.minimize_scalar(down, bounds=(-14, 14), method="bounded", options={"xatol": 1e-6})
    at_zero = _profile(y, X, prompt, 0.0, reml)[0]
    return (0.0, at_zero) if at_zero >= -found.fun - 1e-6 else (float(np.exp(found.x)), -found.fun)


def _solve_mixed(y: Array, design: Columns, prompt: Codes, model: str, *, reml: bool) -> _Solved:
    """Return the fit of a linear model with an intercept for each prompt, by statsmodels.

    statsmodels stops short, or fails, near an sd_prompt of 0. So it starts from the maximum of the exact
    profile, must end at it, and is not asked where the maximum is at 0: there least squares is the fit.
    """
    X, names = _matrix(design, model), list(design)
    unit = float(y.std())  # its tolerances are absolute
    y = y / unit
    least = np.linalg.lstsq(X, y, rcond=None)[0]
    if float(np.var(y - X @ least)) <= 1e-20:
        raise FitError(f"{model}: the terms give the outcome exactly, so there is no error to estimate")
    ratio, best = _best_ratio(y, X, prompt, reml)
    if ratio > 0:
        loglik, b, cov, scale, ratio = _statsmodels(y, X, prompt, ratio, reml, model)
        if not abs(loglik - best) < 1e-4:  # nan included
            raise FitError(
                f"{model}: no convergence, statsmodels ends {best - loglik:.2g} below the maximum"
            )
    else:
        loglik, b, cov, scale = _profile(y, X, prompt, 0.0, reml)
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
    return _Solved(terms, unit * b, unit**2 * cov, random, float(loglik), zero, simulate)


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


# ---------------------------------------------------------------------------------------- beta model


def _standardised(x: Array) -> Array:
    return (x - x.mean()) / x.std(ddof=1)


def natural_spline(x: Array, df: int, name: str) -> Columns:
    """Return a basis of the natural cubic splines of ``df`` columns, to stand beside an intercept.

    Knots are the ends of the range and df − 1 quantiles between. The columns are cardinal splines: 1 at
    one knot and 0 at the others. They span what R's ``splines::ns`` spans, in another basis.
    """
    knots = np.quantile(x, np.linspace(0, 1, df + 1))
    if np.any(np.diff(knots) <= 1e-9 * (knots[-1] - knots[0])):
        raise FitError(
            "N_bar takes too few distinct values for the spline of 1/N_bar (two knots coincide)"
        )
    basis = CubicSpline(knots, np.eye(df + 1), bc_type="natural")(x)
    return {f"{name}[{j}]": basis[:, j] for j in range(1, df + 1)}  # all df + 1 sum to the intercept


def _beta_designs(data: _Data) -> tuple[Columns, Columns]:
    r, inverse = {"R_sc": _standardised(data.r)}, _standardised(1 / data.n)
    variant, task, family = (data.dummies(f) for f in ("variant", "task", "family"))
    four, three = (
        natural_spline(inverse, 4, "ns(invN_sc, 4)"),
        natural_spline(inverse, 3, "ns(invN_sc, 3)"),
    )
    one = _one(len(data.y))
    mean = one | r | variant | four | task | _cross(r, variant) | _cross(four, variant)
    precision = one | variant | task | _cross(variant, task) | three | r | _cross(r, variant) | family
    return mean, precision


def _solve_beta(data: _Data) -> tuple[_Solved, str, list[str]]:
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
    X, W = _matrix(mean, "beta"), _matrix(precision, "beta, log precision")
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

    left, dropped = _formula(data, "R_sc*variant + ns(invN_sc, 4)*variant + task", ("task",))
    right, more = _formula(
        data, "variant*task + ns(invN_sc, 3) + R_sc*variant + family", ("task", "family")
    )
    effects = "(1|prompt)" + " + (1|family)" * with_family
    dropped += [f"log precision {note}" for note in more]
    if not with_family:
        dropped.append("(1|family)")
    solved = _Solved(terms, fit.theta[:m], fit.cov[:m, :m], random, fit.loglik, fit.zero_sd, simulate)
    y_name = "|D|" if data.outcome == "D" else data.outcome
    return solved, f"{y_name} ~ {left} + {effects}, log precision ~ {right}", dropped


# -------------------------------------------------------------------------------------------- tables


def _tables(
    model: Model,
    data: _Data,
    solved: _Solved,
    formula: str,
    dropped: list[str],
    seed: int,
    rate: str,
    method: str,
) -> Fit:
    y = np.clip(np.abs(data.y), CLIP, 1 - CLIP) if model == "beta" else data.y
    residuals, scaled = _residuals(y, solved.simulate, seed)
    treated = data.levels["variant"][1:]
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
    slopes, tests = _slopes(solved, rate, data.levels["variant"][0], treated)
    return Fit(model, formula, _coefficients(solved), slopes, tests, fit, residuals, scaled)


def _coefficients(solved: _Solved) -> pl.DataFrame:
    se = np.sqrt(np.diag(solved.cov))
    z = solved.estimates / se
    rows: list[tuple[Any, ...]] = [
        (part, term, b, s, t, 2 * stats.norm.sf(abs(t)), b - Z95 * s, b + Z95 * s)
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


def fieller(num: float, den: float, cov: Array) -> tuple[float, float]:
    """Return the 95% interval of num/den, cov (2, 2) their covariance (Fieller 1954).

    Infinite both ways when den is within its own interval of 0: then every ratio of some sign fits.
    """
    a = den**2 - Z95**2 * cov[1, 1]
    b = num * den - Z95**2 * cov[0, 1]
    c = num**2 - Z95**2 * cov[0, 0]
    if a <= 0:
        return -np.inf, np.inf
    root = np.sqrt(max(b**2 - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


def _slopes(
    solved: _Solved, rate: str, baseline: str, treated: list[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the table of slopes and the joint Wald test of the etas."""
    place = {term: i for i, (part, term) in enumerate(solved.terms) if part == "conditional"}
    at = place[rate]
    etas = [place[f"{rate}:variant[{v}]"] for v in treated if f"{rate}:variant[{v}]" in place]
    beta, variance = float(solved.estimates[at]), float(solved.cov[at, at])

    def wald(variant: str, name: str, value: float, se: float) -> tuple[Any, ...]:
        return variant, name, value, se, value - Z95 * se, value + Z95 * se

    rows = [wald(baseline, "beta", beta, np.sqrt(variance))]
    for eta, variant in zip(etas, treated, strict=False):
        both = np.ix_([at, eta], [at, eta])
        to_slopes = np.array([[1.0, 1.0], [1.0, 0.0]])  # (beta + eta, beta) from (beta, eta)
        cov = to_slopes @ solved.cov[both] @ to_slopes.T
        total = beta + float(solved.estimates[eta])
        ratio = total / beta
        gradient = np.array([1.0, -ratio]) / beta
        rows.append(wald(variant, "beta+eta", total, np.sqrt(cov[0, 0])))
        se = float(np.sqrt(gradient @ cov @ gradient))
        rows.append((variant, "ratio", ratio, se, *fieller(total, beta, cov)))
    schema = {"variant": pl.String, "name": pl.String, **dict.fromkeys(_SLOPES, pl.Float64)}
    slopes = pl.DataFrame(rows, schema=schema, orient="row")
    tests = []
    if etas:
        values = solved.estimates[etas]
        statistic = float(values @ np.linalg.solve(solved.cov[np.ix_(etas, etas)], values))
        tests = [
            ("every eta is 0 (Wald)", statistic, len(etas), float(stats.chi2.sf(statistic, len(etas))))
        ]
    return slopes, pl.DataFrame(tests, schema=_TESTS, orient="row")


def _residuals(
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
