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
from canopy_store.analysis.regression.beta_model import BetaProblem, Precision, beta_problem, solve_beta
from canopy_store.analysis.regression.calibration import calibrated_fit, fit_calibrated
from canopy_store.analysis.regression.checkpoints import ACROSS, ALONE, across, checkpoint_design
from canopy_store.analysis.regression.design import cross, formula_of, intercept
from canopy_store.analysis.regression.errors import by_moments, corrected, corrected_estimates
from canopy_store.analysis.regression.eta_bootstrap import bootstrap_row
from canopy_store.analysis.regression.fit import Fit, Model, tables
from canopy_store.analysis.regression.linear import estimates_of, linear_design, solve_mixed
from canopy_store.analysis.regression.measurement import (
    KNOWN,
    SIMULATED,
    Errors,
    reliability_of,
    warnings_of,
    way_of,
)
from canopy_store.analysis.regression.panel import (
    FACTORS,
    KEYS,
    NOT_OUTCOMES,
    NUMBERS,
    Columns,
    PanelData,
    one_panel,
    panel_data,
)
from canopy_store.analysis.regression.slopes import TESTS
from canopy_store.analysis.regression.splits import by_splits, store_halves
from canopy_store.analysis.seeds import as_variants
from canopy_store.errors import FitError, UsageError


def regress(
    panel: pl.DataFrame | str | Path,
    model: Model,
    *,
    selection: str | None = None,
    embedder: str | None = None,
    grader: str | None = None,
    runs: Sequence[str] = (),
    baseline: str = "base",
    outcome: str = "D",
    reference_task: str | None = None,
    drop: Sequence[str] = (),
    allow: Sequence[str] = (),
    seeds: Mapping[str, str] | None = None,
    checkpoints: Literal["random", "fixed"] = "random",
    precision: Precision = "full",
    bootstrap: int = 0,
    errors: Errors | None = None,
    splits: int = 20,
    replicates: int = 2000,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    clusters: str | None = None,
) -> Fit:
    """Return the fit of one of the four models to a panel, every other variant against the baseline.

    Parameters
    ----------
    panel : path of a store; or a frame, the view ``panel`` or what ``read_panel`` returns. Rows with a
        NULL drop out
    selection, embedder : the rows to keep; by default selection all of a store, and what the frame or
        the store holds where that is one
    grader : of a store: whose grades the column accuracy is of; needed for it where there are several
    runs : only these runs, needed where a model and task have several
    baseline : the variant that is the reference level
    outcome : column to explain; the beta model needs values between 0 and 1 (it takes |D|)
    reference_task : reference level of task; ``completion`` where there is one, else the first by name
    drop : factors left out, of task and family; one that has a single level must be
    allow : settings in which the runs of a store may differ from their baseline's: cap, temperature, …
    seeds : pattern of the checkpoints of each variant that was trained several times, by its name:
        ``{"sft": "sft-*"}``, as in `as_variants`
    checkpoints : ``random`` judges what a variant adds by how families, or training seeds, differ too
        (`Fit.across`); ``fixed`` leaves that out, as the paper does
    precision : terms of the beta model's log precision, all of them or the variant alone: fewer, for few
        prompts
    bootstrap : replicates of the parametric bootstrap of the beta model's test of the etas; 0 for none
    errors : how the errors of R_bar, N_bar and D, means over the same rollouts, are taken out of the
        models main and interaction of D: moments (`errors.by_moments`), split (`splits.by_splits`, of a
        store) or none. By default moments where the panel has the columns for it. The beta model has
        none, the default, and moments (`calibration.calibrated_fit`)
    splits : random halvings of each prompt's rollouts, for split
    replicates : of the bootstrap over prompts that gives a corrected fit its intervals
    seed : of the bootstraps and the splits, or of the simulated residuals
    advance : called with 1 after each replicate of ``bootstrap``
    clusters : of a store, by meaning, for the outcomes rse, rse_norm, semantic_entropy, …; needed where
        it has several

    Raises
    ------
    UsageError
        An unknown model or outcome, an option of another model, errors that are not known for it, or
        ``seeds`` that `as_variants` refuses.
    FitError
        The panel cannot carry the model (the term or the level is named), one task or one family only
        that is not dropped, the fit did not converge, or errors leave too little of R_bar: then it says
        how many rollouts a prompt would do.
    DataError
        The panel misses a column, or holds several selections, embedders, or runs of one model and
        task, and none was named; or the store is empty.
    ConflictError
        Runs of the store that were not sampled alike.

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
        if grader is not None:
            raise UsageError("--grader: of a store; a panel has the columns that it has")
        if clusters is not None:
            raise UsageError(f"--clusters {clusters}: with --store; a panel has its columns")
        of_store, frame = None, one_panel(panel, "panel", selection=selection, **rows)
    else:
        of_store = store_panel(
            panel,
            selection=selection or "all",
            baseline=baseline,
            allow=allow,
            grader=grader,
            outcome=outcome,
            clusters=clusters,
            **rows,
        )
        frame = one_panel(of_store, str(panel))
    frame = as_variants(frame, seeds or {}, baseline=baseline)
    if outcome not in frame.columns or outcome in (*KEYS, *NOT_OUTCOMES, "checkpoint"):
        numbers = [c for c in frame.columns if c not in (*KEYS, *NUMBERS, *NOT_OUTCOMES, "checkpoint")]
        raise UsageError(f"--outcome {outcome}: the panel has {', '.join(numbers)}")
    for option, value in (("--splits", splits), ("--replicates", replicates)):
        if value < 1:
            raise UsageError(f"{option} {value}: needs 1 or more")
    way = way_of(errors, model, outcome, frame, of_store is not None)
    data = panel_data(frame, outcome, baseline, reference_task, drop, known=KNOWN[way])
    if way == "none":
        fit = _uncorrected(data, model, precision, bootstrap, seed, advance)
    elif model == "beta":
        if bootstrap:
            raise UsageError("--bootstrap: with --errors none; it draws panels without errors")
        fit = calibrated_fit(data, precision)
    elif way == "moments" or of_store is None:
        fit = corrected(data, model, way, by_moments(data, model), replicates, seed)
    else:
        equations = by_splits(data, model, store_halves(str(panel), of_store, data, splits, seed))
        fit = corrected(data, model, way, equations, replicates, seed)
    table = reliability_of(data)
    root = None if of_store is None else str(panel)
    warnings = warnings_of(table, model, outcome, way, root, drop)
    if way != "none" and (prompts := len(data.levels["prompt"])) < SIMULATED:
        warnings += (
            f"{prompts} prompts: intervals and p of a corrected fit were checked by simulation with "
            f"{SIMULATED} and more; of fewer they may promise too much",
        )
    fit = replace(fit, reliability=table, warnings=(*fit.warnings, *warnings))
    more, holds_for = fit.across, ALONE
    if checkpoints == "random" and model != "quadratic":
        more, holds_for = beyond(data, model, precision, corrected=way != "none")
    return replace(fit, across=more, fit={**fit.fit, "holds_for": holds_for})


def _uncorrected(
    data: PanelData,
    model: Model,
    precision: Precision,
    bootstrap: int,
    seed: int,
    advance: Callable[[int], None] | None,
) -> Fit:
    """The fit that takes R_bar, N_bar and D as exact."""
    if model == "quadratic":
        return _quadratic(data, seed)
    if model == "beta":
        problem = beta_problem(data, precision)
        solved, formula, dropped = solve_beta(data, problem, precision)
        fit = tables("beta", data, solved, formula, dropped, seed, "R_sc", "ML")
        if not bootstrap:
            return fit
        row = bootstrap_row(problem, bootstrap, seed, advance)
        test = pl.DataFrame([row], schema=TESTS, orient="row")
        return replace(fit, tests=pl.concat([fit.tests, test]))
    design, formula, dropped = linear_design(data, model)
    solved = solve_mixed(data.y, design, data.codes["prompt"], model, reml=True)
    return tables(model, data, solved, formula, dropped, seed, "R_bar", "REML")


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


def beyond(
    data: PanelData, model: str, precision: Precision = "full", *, corrected: bool = False
) -> tuple[pl.DataFrame, str]:
    """Return the table of `across`, and in words what the statements of the fit hold for.

    ``corrected`` takes the errors of R_bar, N_bar and D out, by their moments.
    """
    nothing, slopes, count = pl.DataFrame(schema=ACROSS), model != "main", len(data.checkpoints)
    if count == len({name for _, name, _ in data.checkpoints}):  # one checkpoint a variant
        return nothing, ALONE

    def design_of(rows: PanelData) -> Columns:
        return checkpoint_design(rows, linear_design(rows, model)[0], "R_bar", slopes=slopes)

    def own_slopes(rows: PanelData) -> BetaProblem:
        problem = beta_problem(rows, precision, float(data.r.std(ddof=1)))
        own = checkpoint_design(rows, problem.mean, "R_sc", slopes=True)
        return replace(problem, mean=own, with_family=False)

    try:
        if model == "beta":
            fit = fit_calibrated(data, own_slopes) if corrected else own_slopes(data).fit()
            values, cov = fit.theta, fit.cov
        elif corrected:
            values, cov = corrected_estimates(by_moments(data, model, design_of))
        else:
            values, cov = estimates_of(data.y, design_of(data), data.codes["prompt"], model)
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
