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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl
from scipy import stats

from canopy_store.analysis.comparable import store_panel
from canopy_store.analysis.regression.beta_model import Precision, beta_problem, solve_beta
from canopy_store.analysis.regression.checkpoints import ACROSS, ALONE, across, checkpoint_design
from canopy_store.analysis.regression.design import cross, formula_of, intercept
from canopy_store.analysis.regression.eta_bootstrap import bootstrap_row
from canopy_store.analysis.regression.fit import Fit, Model, tables
from canopy_store.analysis.regression.linear import estimates_of, linear_design, solve_mixed
from canopy_store.analysis.regression.panel import (
    FACTORS,
    KEYS,
    NUMBERS,
    Columns,
    PanelData,
    one_panel,
    panel_data,
)
from canopy_store.analysis.regression.slopes import TESTS
from canopy_store.analysis.seeds import as_variants
from canopy_store.errors import FitError, UsageError


def regress(
    panel: pl.DataFrame | str | Path,
    model: Model,
    *,
    selection: str | None = None,
    embedder: str | None = None,
    runs: Sequence[str] = (),
    baseline: str = "base",
    outcome: str = "D",
    reference_task: str | None = None,
    drop: Sequence[str] = (),
    seeds: Mapping[str, str] | None = None,
    checkpoints: Literal["random", "fixed"] = "random",
    precision: Precision = "full",
    bootstrap: int = 0,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Fit:
    """Return the fit of one of the four models to a panel, every other variant against the baseline.

    Parameters
    ----------
    panel : path of a store; or a frame, the view ``panel`` or what ``read_panel`` returns. Rows with a
        NULL drop out
    selection, embedder : the rows to keep; by default selection all of a store, and what the frame or
        the store holds where that is one
    runs : only these runs, needed where a model and task have several
    baseline : the variant that is the reference level
    outcome : column to explain; the beta model needs values between 0 and 1 (it takes |D|)
    reference_task : reference level of task; ``completion`` where there is one, else the first by name
    drop : factors left out, of task and family; one that has a single level must be
    seeds : pattern of the checkpoints of each variant that was trained several times, by its name:
        ``{"sft": "sft-*"}``, as in `as_variants`
    checkpoints : ``random`` judges what a variant adds by how families, or training seeds, differ too
        (`Fit.across`); ``fixed`` leaves that out, as the paper does
    precision : terms of the beta model's log precision, all of them or the variant alone: fewer, for few
        prompts
    bootstrap : replicates of the parametric bootstrap of the beta model's test of the etas; 0 for none
    seed : of the simulated residuals and the bootstrap; the fit itself draws nothing
    advance : called with 1 after each replicate

    Raises
    ------
    UsageError
        An unknown model or outcome, an option of another model, or ``seeds`` that `as_variants` refuses.
    FitError
        The panel cannot carry the model (the term or the level is named), one task or one family only
        that is not dropped, or the fit did not converge.
    DataError
        The panel misses a column, or holds several selections, embedders, or runs of one model and
        task, and none was named; or the store is empty.

    Notes
    -----
    ``fit['dropped']`` lists the terms that ``drop`` takes out.
    """
    if model not in get_args(Model):
        raise UsageError(f"no model {model!r}; there is {', '.join(get_args(Model))}")
    for factor in drop:
        if factor not in FACTORS:
            raise UsageError(f"--drop {factor}: one of {', '.join(FACTORS)}")
    _require_model(model, seeds, precision, bootstrap)
    rows: dict[str, Any] = {"embedder": embedder, "runs": runs}
    if isinstance(panel, pl.DataFrame):
        frame = one_panel(panel, "panel", selection=selection, **rows)
    else:
        frame = one_panel(store_panel(panel, selection=selection or "all", **rows), str(panel))
    frame = as_variants(frame, seeds or {}, baseline=baseline)
    if outcome not in frame.columns or outcome in KEYS:
        numbers = [c for c in frame.columns if c not in (*KEYS, *NUMBERS)]
        raise UsageError(f"--outcome {outcome}: the panel has {', '.join(numbers)}")
    data = panel_data(frame, outcome, baseline, reference_task, drop)
    if model == "quadratic":
        fit = _quadratic(data, seed)
    elif model == "beta":
        problem = beta_problem(data, precision)
        solved, formula, dropped = solve_beta(data, problem, precision)
        fit = tables("beta", data, solved, formula, dropped, seed, "R_sc", "ML")
        if bootstrap:
            row = bootstrap_row(problem, bootstrap, seed, advance)
            test = pl.DataFrame([row], schema=TESTS, orient="row")
            fit = replace(fit, tests=pl.concat([fit.tests, test]))
    else:
        design, formula, dropped = linear_design(data, model)
        solved = solve_mixed(data.y, design, data.codes["prompt"], model, reml=True)
        fit = tables(model, data, solved, formula, dropped, seed, "R_bar", "REML")
    table, holds_for = fit.across, ALONE
    if checkpoints == "random" and model != "quadratic":
        table, holds_for = beyond(data, model, precision)
    return replace(fit, across=table, fit={**fit.fit, "holds_for": holds_for})


def _require_model(model: str, seeds: Mapping[str, str] | None, precision: str, bootstrap: int) -> None:
    """Raises UsageError for an option of another model."""
    if bootstrap < 0:
        raise UsageError(f"--bootstrap {bootstrap}: needs a number of replicates, as in 199")
    if model != "beta" and precision != "full":
        raise UsageError("--precision: for --model beta, which has a precision")
    if model != "beta" and bootstrap:
        raise UsageError("--bootstrap: for --model beta; the linear models need none")
    if model == "quadratic" and seeds:
        raise UsageError("--seeds: for --model main, interaction or beta")


def beyond(data: PanelData, model: str, precision: Precision) -> tuple[pl.DataFrame, str]:
    """Return the table of `across`, and in words what the statements of the fit hold for."""
    nothing, slopes, count = pl.DataFrame(schema=ACROSS), model != "main", len(data.checkpoints)
    several = {name for _, name, _ in data.checkpoints}
    if count == len(several):  # one checkpoint a variant
        return nothing, ALONE
    try:
        if model == "beta":
            problem = beta_problem(data, precision)
            own = checkpoint_design(data, problem.mean, "R_sc", slopes=True)
            fit = replace(problem, mean=own, with_family=False).fit()
            values, cov = fit.theta, fit.cov
        else:
            own = checkpoint_design(data, linear_design(data, model)[0], "R_bar", slopes=slopes)
            values, cov = estimates_of(data.y, own, data.codes["prompt"], model)
    except FitError as error:
        return nothing, f"{ALONE}: no slope for each of them ({error})"
    at = slice(count, 2 * count) if slopes else slice(0, count)
    table = across(data, values[at], cov[at, at], slopes=slopes)
    alone = [v for v in data.levels["variant"][1:] if v not in table["variant"]]
    kinds = " and ".join(table["over"].unique(maintain_order=True))
    return table, f"{kinds}; of {', '.join(alone)} {ALONE}" if kinds and alone else kinds or ALONE


def _quadratic(data: PanelData, seed: int) -> Fit:
    """Both fits by ML on centred R_bar, and their likelihood-ratio test."""
    centred: Columns = {"R_c": data.r - data.r.mean()}
    square: Columns = {"R_c^2": centred["R_c"] ** 2}
    variant, task, family = (data.dummies(f) for f in ("variant", "task", "family"))
    linear = intercept(len(data.y)) | centred | variant | cross(centred, variant)
    linear = linear | {"N_bar": data.n} | task | family
    fits: list[Fit] = []
    for extra, text in (({}, ""), (square | cross(square, variant), "R_c^2*variant + ")):
        right, dropped = formula_of(
            data, f"R_c*variant + {text}N_bar + task + family", ("task", "family")
        )
        formula = f"{data.outcome} ~ {right} + (1|prompt)"
        solved = solve_mixed(data.y, linear | extra, data.codes["prompt"], "quadratic", reml=False)
        fits.append(tables("quadratic", data, solved, formula, dropped, seed, "R_c", "ML"))
    nested, full = fits
    statistic = max(2 * (full.fit["loglik"] - nested.fit["loglik"]), 0.0)
    df = len(data.levels["variant"])
    row = ("quadratic terms (likelihood ratio)", statistic, df, float(stats.chi2.sf(statistic, df)))
    tests = pl.concat([full.tests, pl.DataFrame([row], schema=TESTS, orient="row")])
    return replace(full, tests=tests, nested=nested)
