"""How well R_bar is measured: which correction a fit gets, what it warns of, and what a refusal says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import polars as pl

from canopy_store.analysis.regression.design import matrix_of
from canopy_store.analysis.regression.linear import kept_of, less_share, linear_design, share_of
from canopy_store.analysis.regression.panel import PanelData
from canopy_store.analysis.regression.reliability import (
    ENOUGH,
    ERRORS,
    no_errors,
    reliability,
    require_possible,
    samples_for,
)
from canopy_store.analysis.regression.slopes import Z95
from canopy_store.errors import DataError, FitError, UsageError

Errors = Literal["none", "moments", "split"]
CORRECTED = ("main", "interaction")
SIMULATED = 60  # prompts: the fewest with which the coverage of corrected intervals is known
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
    if not missing:
        require_possible(panel)
    whole = pl.all_horizontal(pl.col(ERRORS).is_finite().fill_null(False))
    empty = not missing and not panel.select(whole.any()).item()
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

    ``partial`` is the same share of what the other terms of the model interaction, prompts included,
    leave of R_bar: that is what draws a slope towards 0.
    """
    if not {"var_R", "n_rollouts"} <= set(data.errors):
        return pl.DataFrame()
    names = {key: np.array(data.levels[key])[data.codes[key]] for key in ("variant", "prompt")}
    rows = pl.DataFrame({**names, "R_bar": data.r, **data.errors}).fill_nan(None)
    shares = pl.col("variant").replace_strict(_partials(data), return_dtype=pl.Float64)
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
    parts = _partials(data)
    variant = min(parts, key=lambda v: parts[v])
    left, (samples, prompts) = parts[variant], _size(data, data.levels["variant"].index(variant))
    upper = 1 - (1 - left) / (1 + Z95 * np.sqrt(2 / prompts))
    # a share that stands out from 0 when it is estimated from so many prompts
    wanted = min(0.9, 1.5 * max(left, Z95 * np.sqrt(2 / prompts)))
    share, about = (left, "about") if left > 0.05 else (max(upper, 0.05), "at least")
    return (
        f"of the variance of R_bar in {variant} that other terms do not explain, errors leave a share "
        f"of {max(left, 0):.2g}, too little with {samples} rollouts a prompt and {prompts} prompts; "
        f"{about} {samples_for(share, samples, wanted)} rollouts a prompt would do (see: canopy power)"
    )


def least_partial(data: PanelData) -> float:
    """The least share of R_bar in a variant, given all other terms, that is not error."""
    return min(_partials(data).values())


def _partials(data: PanelData) -> dict[str, float]:
    """The share of R_bar in each variant, given all other terms, that is not error; nan: not known.

    A term of the regression is what the others leave of it, Zv with v their coefficients and Z less a
    share of each prompt's sum. Errors leave of slopes that are alike the share 1 − Σ (A v) / v'Z'Zv, the
    sum over the variants' rates (A as in `errors`).
    """
    names, prompt, variant = data.levels["variant"], data.codes["prompt"], data.codes["variant"]
    own = {name: data.r * (variant == code) for code, name in enumerate(names)}
    design = linear_design(data, "interaction")[0]
    rest = {k: x for k, x in design.items() if k != "R_bar" and not k.startswith("R_bar:variant[")}
    try:
        X = matrix_of({**{f"R_bar in {k}": x for k, x in own.items()}, **rest}, "interaction")
        share = share_of(data, X)
    except (FitError, np.linalg.LinAlgError):
        return dict.fromkeys(names, np.nan)
    Z = less_share(X, share, prompt)
    scale = np.linalg.norm(Z, axis=0)
    inverse = np.linalg.pinv((Z / scale).T @ (Z / scale), hermitian=True) / np.outer(scale, scale)
    zero = np.zeros_like(data.r)
    var_R, cov_RN = (data.errors.get(name, zero).copy() for name in ("var_R", "cov_RN"))
    for code in range(len(names)):  # a row whose errors are not known has those of its variant
        of = variant == code
        for error in (var_R, cov_RN):
            some = error[of & np.isfinite(error)]
            error[of & ~np.isfinite(error)] = some.mean() if some.size else np.nan
    kept = kept_of(share, prompt)
    at_N = [*own, *rest].index("N_bar")
    shares = {}
    for j, name in enumerate(names):
        v = inverse[j] / inverse[j, j]
        shares[name] = 1 - inverse[j, j] * float((kept * (v[variant] * var_R + v[at_N] * cov_RN)).sum())
    return shares


def _size(data: PanelData, code: int) -> tuple[int, int]:
    """Rollouts a prompt, as `reliability` has them, and prompts of a variant."""
    of = data.codes["variant"] == code
    samples = data.errors["n_rollouts"][of]
    return round(float(1 / (1 / samples).mean())), len(np.unique(data.codes["prompt"][of]))
