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

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import polars as pl
from scipy import stats

from canopy_store.analysis.comparable import store_panel
from canopy_store.analysis.regression.beta_model import solve_beta
from canopy_store.analysis.regression.design import cross, formula_of, intercept
from canopy_store.analysis.regression.errors import by_moments, corrected
from canopy_store.analysis.regression.fit import Fit, Model, tables
from canopy_store.analysis.regression.linear import linear_design, solve_mixed
from canopy_store.analysis.regression.measurement import (
    KNOWN,
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
from canopy_store.errors import UsageError


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
    errors: Errors | None = None,
    splits: int = 20,
    replicates: int = 2000,
    seed: int = 0,
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
    errors : how the errors of R_bar, N_bar and D, means over the same rollouts, are taken out of the
        models main and interaction of D: moments (`errors.by_moments`), split (`splits.by_splits`, of a
        store) or none. By default moments where the panel has the columns for it
    splits : random halvings of each prompt's rollouts, for split
    replicates : of the bootstrap over prompts that gives a corrected fit its intervals
    seed : of the bootstrap and the splits, or of the simulated residuals

    Raises
    ------
    UsageError
        An unknown model or outcome, or errors that are not known for either.
    FitError
        The panel cannot carry the model (the term or the level is named), one task or one family only
        that is not dropped, the fit did not converge, or errors leave too little of R_bar: then it says
        how many rollouts a prompt would do.
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
    rows: dict[str, Any] = {"embedder": embedder, "runs": runs}
    if isinstance(panel, pl.DataFrame):
        of_store, frame = None, one_panel(panel, "panel", selection=selection, **rows)
    else:
        of_store = store_panel(panel, selection=selection or "all", **rows)
        frame = one_panel(of_store, str(panel))
    if outcome not in frame.columns or outcome in (*KEYS, *NOT_OUTCOMES):
        numbers = [c for c in frame.columns if c not in (*KEYS, *NUMBERS, *NOT_OUTCOMES)]
        raise UsageError(f"--outcome {outcome}: the panel has {', '.join(numbers)}")
    for option, value in (("--splits", splits), ("--replicates", replicates)):
        if value < 1:
            raise UsageError(f"{option} {value}: needs 1 or more")
    way = way_of(errors, model, outcome, frame, of_store is not None)
    data = panel_data(frame, outcome, baseline, reference_task, drop, known=KNOWN[way])
    if way == "none":
        fit = _uncorrected(data, model, seed)
    elif way == "moments" or of_store is None:
        fit = corrected(data, model, way, by_moments(data, model), replicates, seed)
    else:
        equations = by_splits(data, model, store_halves(str(panel), of_store, data, splits, seed))
        fit = corrected(data, model, way, equations, replicates, seed)
    table = reliability_of(data)
    root = None if of_store is None else str(panel)
    warnings = warnings_of(table, model, outcome, way, root, drop)
    return replace(fit, reliability=table, warnings=(*fit.warnings, *warnings))


def _uncorrected(data: PanelData, model: Model, seed: int) -> Fit:
    """The fit that takes R_bar, N_bar and D as exact."""
    if model == "quadratic":
        return _quadratic(data, seed)
    if model == "beta":
        solved, formula, dropped = solve_beta(data)
        return tables("beta", data, solved, formula, dropped, seed, "R_sc", "ML")
    design, formula, dropped = linear_design(data, model)
    solved = solve_mixed(data.y, design, data.codes["prompt"], model, reml=True)
    return tables(model, data, solved, formula, dropped, seed, "R_bar", "REML")


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
    return Fit(**{**full.__dict__, "tests": tests, "nested": nested})
