"""One regression over every embedder, or every selection: does the ratio depend on the choice?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from canopy_store import sql
from canopy_store.analysis.comparable import NO_EMBEDDER
from canopy_store.analysis.regression.fit import Fit, Model
from canopy_store.analysis.regression.models import regress
from canopy_store.errors import DataError, FitError, UsageError

Swept = Literal["embedder", "selection"]

SWEEP = {
    "value": pl.String,
    "variant": pl.String,
    "n_prompts": pl.Int64,
    **dict.fromkeys(("beta", "beta+eta", "ratio", "ratio_ci_low", "ratio_ci_high", "p"), pl.Float64),
    "warnings": pl.String,
    "refused": pl.String,
}


def sweep(panel: pl.DataFrame | str | Path, over: Swept, model: Model, **options: Any) -> pl.DataFrame:
    """Return the slopes of one regression for every embedder, or selection: a row each and variant.

    Columns: value (the embedder or selection), variant, n_prompts, beta, beta+eta, ratio, ratio_ci_low,
    ratio_ci_high, p (eta is 0, Wald), warnings (what to know first), refused (why there is no fit). The
    intervals are those of `Fit.slopes`: of these checkpoints alone.

    Parameters
    ----------
    panel : path of a store, or a frame as `panel_file` or the view ``panel`` gives it, with the column
        that is swept
    options : those of `regress`, but for the one that is swept

    Raises
    ------
    UsageError
        A model without slopes, or the swept option given as well.
    DataError, FitError
        Nothing to sweep over, or no value of it that can be fitted.
    """
    if over not in get_args(Swept):
        raise UsageError(f"--sweep {over}: one of {', '.join(get_args(Swept))}")
    if model == "main":
        raise UsageError("--sweep: for --model interaction, quadratic or beta; main has no ratio")
    if options.get(over) is not None:
        raise UsageError(f"--sweep {over}: takes every {over}; leave --{over} out")
    if options.get("bootstrap"):
        raise UsageError("--sweep: without --bootstrap, which is for one fit")
    rows: list[tuple[Any, ...]] = []
    fits, values = 0, _values(panel, over)
    for value in values:
        try:
            fit = regress(panel, model, **{**options, over: value, "checkpoints": "fixed"})
        except (FitError, DataError) as error:
            if value == values[-1] and not fits:  # none can be fitted: then it is not the choice
                raise
            rows.append((value, *[None] * (len(SWEEP) - 2), str(error)))
        else:
            fits += 1
            warned = "; ".join(fit.warnings) or None
            rows.extend((value, *row, warned, None) for row in _slopes(fit))
    return pl.DataFrame(rows, schema=SWEEP, orient="row")


def spread(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the least, median and largest ratio of each variant over a sweep, and how many it has."""
    ratio = pl.col("ratio")
    return (
        rows.drop_nulls("ratio")
        .group_by("variant", maintain_order=True)
        .agg(fits=pl.len(), ratio_min=ratio.min(), ratio_median=ratio.median(), ratio_max=ratio.max())
    )


def _values(panel: pl.DataFrame | str | Path, over: Swept) -> list[str]:
    if isinstance(panel, pl.DataFrame):
        if over not in panel.columns:
            raise DataError(f"--sweep {over}: the panel has no column {over}")
        values = panel[over].drop_nulls().unique()
    else:
        with sql.connect(panel, relations=("panel",)) as con:
            values = con.sql(f"select distinct {over} from panel where {over} is not null").pl()[over]
    named = sorted(str(value) for value in values if value != NO_EMBEDDER)
    if not named:
        raise DataError(f"--sweep {over}: no {over} to sweep over")
    return named


def _slopes(fit: Fit) -> Iterator[tuple[Any, ...]]:
    beta = fit.slopes.row(by_predicate=pl.col("name") == "beta", named=True)["estimate"]
    p = dict(fit.coefficients.filter(part="conditional").select("term", "p").rows())
    rate = {"beta": "R_sc", "quadratic": "R_c"}.get(fit.model, "R_bar")
    for row in fit.slopes.filter(name="ratio").iter_rows(named=True):
        variant = row["variant"]
        yield (
            variant,
            fit.fit["prompts"],
            beta,
            beta * row["estimate"],
            row["estimate"],
            row["ci_low"],
            row["ci_high"],
            p[f"{rate}:variant[{variant}]"],
        )
