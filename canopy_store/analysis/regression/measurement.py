"""How well R_bar is measured: which correction a fit gets, what it warns of, and what a refusal says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from canopy_store.analysis.regression.panel import PanelData
from canopy_store.analysis.regression.reliability import (
    ENOUGH,
    ERRORS,
    no_errors,
    reliability,
    samples_for,
)
from canopy_store.analysis.regression.slopes import Z95
from canopy_store.errors import DataError, UsageError

Errors = Literal["none", "moments", "split"]
CORRECTED = ("main", "interaction")
# What a row must have for each way; two rollouts in either half are the fewest that have a diversity.
KNOWN: dict[str, tuple[str, ...]] = {"none": (), "moments": ERRORS, "split": ERRORS}


def way_of(errors: str | None, model: str, outcome: str, panel: pl.DataFrame, of_store: bool) -> Errors:
    """How the errors are taken out: as asked, else by moments where that can be done, else not at all.

    Raises
    ------
    UsageError, DataError
        What is asked for is not known for the model or the outcome, or the panel has no errors.
    """
    if errors not in (None, *get_args(Errors)):
        raise UsageError(f"--errors {errors}: one of {', '.join(get_args(Errors))}")
    missing = [c for c in (*ERRORS, "n_rollouts") if c not in panel.columns]
    empty = not missing and panel.select(pl.all_horizontal(pl.col(ERRORS).is_null()).all()).item()
    if errors is None:
        possible = model in CORRECTED and outcome == "D" and not missing and not empty
        return "moments" if possible else "none"
    if errors == "none":
        return "none"
    if model == "beta" and errors == "split":
        raise UsageError("--errors split: not for the model beta, which has --errors moments")
    if model not in (*CORRECTED, "beta"):
        raise UsageError(
            f"--errors {errors}: not for the model {model}, which has no correction that was shown to "
            f"work; --model interaction has one, and --errors none shows {model} as it is"
        )
    if outcome != "D":
        raise UsageError(
            f"--errors {errors}: the errors of {outcome} are not known, only those of D; "
            "choose --errors none"
        )
    if errors == "split" and not of_store:
        raise UsageError(
            "--errors split: needs the rollouts, so --store DIR; a panel has --errors moments"
        )
    if missing:
        raise DataError(f"--errors {errors}: {no_errors(missing)}")
    if empty:
        raise DataError(f"--errors {errors}: needs 3 rollouts a prompt or more, and their embeddings")
    return errors  # type: ignore[return-value]


def reliability_of(data: PanelData) -> pl.DataFrame:
    """`reliability` of a fit's rows, and the column ``partial``; no rows where errors are not known.

    ``partial`` is the same share of what N_bar, task and family leave of the variance of R_bar: that
    is what draws a slope towards 0.
    """
    if not {"var_R", "n_rollouts"} <= set(data.errors):
        return pl.DataFrame()
    names = {key: np.array(data.levels[key])[data.codes[key]] for key in ("variant", "prompt")}
    rows = pl.DataFrame({**names, "R_bar": data.r, **data.errors}).fill_nan(None)
    partial = {v: _partial(data, code)[0] for code, v in enumerate(data.levels["variant"])}
    shares = pl.col("variant").replace_strict(partial, return_dtype=pl.Float64)
    return reliability(rows).with_columns(partial=shares.fill_nan(None))


def warnings_of(
    table: pl.DataFrame, model: str, outcome: str, way: str, root: str | None, drop: Sequence[str]
) -> tuple[str, ...]:
    """What a reader has to know before an uncorrected slope is believed: one line, or none."""
    if way != "none":
        return ()
    source = f"--store {root}" if root is not None else "--panel FILE"
    source += "".join(f" --drop {factor}" for factor in drop)
    possible = model if model != "quadratic" else "interaction"
    command = f"canopy regress --model {possible} {source} --errors moments"
    if model != "quadratic" and outcome == "D":
        remedy = f"corrected: {command}"
    else:
        what = "the model quadratic" if model == "quadratic" else f"the outcome {outcome}"
        remedy = f"{what} has no correction; of D, the model {possible} has one: {command}"
    if table.is_empty():
        return (
            "R_bar, N_bar and D are taken as exact: the panel has no columns of their errors, so how "
            "reliable R_bar is cannot be told",
        )
    least = pl.min_horizontal("reliability", "partial")
    low = table.filter((least < ENOUGH) | least.is_null())
    if low.is_empty():
        return ()
    shown = ", ".join(
        f"{v} {_two(r)} ({_two(p)} given the other terms)"
        for v, r, p in low.select("variant", "reliability", "partial").iter_rows()
    )
    return (
        f"R_bar is taken as exact, but its reliability is below {ENOUGH}: {shown}. Its error draws "
        "slopes towards 0, the more the larger it is, and so makes ratios of its own: these are no "
        f"findings. {remedy[0].upper()}{remedy[1:]}",
    )


def _two(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.2f}"


def refusal(data: PanelData) -> str:
    """What to say where errors leave too little of R_bar: of which variant, and what would do."""
    parts = {v: _partial(data, code) for code, v in enumerate(data.levels["variant"])}
    variant = min(parts, key=lambda v: parts[v][0])
    left, upper, samples, prompts = parts[variant]
    # a share that stands out from 0 when it is estimated from so many prompts
    wanted = min(0.9, 1.5 * max(left, Z95 * np.sqrt(2 / prompts)))
    share, about = (left, "about") if left > 0.05 else (max(upper, 0.05), "at least")
    return (
        f"of the variance of R_bar in {variant} that other terms do not explain, errors leave a share "
        f"of {max(left, 0):.2g}, too little with {samples} rollouts a prompt and {prompts} prompts; "
        f"{about} {samples_for(share, samples, wanted)} rollouts a prompt would do (see: canopy power)"
    )


def least_partial(data: PanelData) -> float:
    """The least reliability of R_bar in a variant, given N_bar, task and family."""
    return min(_partial(data, code)[0] for code in range(len(data.levels["variant"])))


def _partial(data: PanelData, code: int) -> tuple[float, float, int, int]:
    """Reliability of R_bar in a variant given other terms, its upper limit, samples and prompts."""
    of = data.codes["variant"] == code
    others: Sequence[Any] = [data.n, *data.dummies("task").values(), *data.dummies("family").values()]
    X = np.column_stack([np.ones(of.sum()), *(column[of] for column in others)])
    r, error = data.r[of], float(np.nanmean(data.errors["var_R"][of]))
    rest = r - X @ np.linalg.lstsq(X, r, rcond=None)[0]
    between = float((rest**2).sum()) / max(len(r) - np.linalg.matrix_rank(X), 1)
    if not between > 0:
        return np.nan, np.nan, 0, 0
    prompts = len(np.unique(data.codes["prompt"][of]))
    largest = between * (1 + Z95 * np.sqrt(2 / prompts))
    samples = round(float(1 / (1 / data.errors["n_rollouts"][of]).mean()))
    return 1 - error / between, 1 - error / largest, samples, prompts
