"""Straight lines through the prompts of each model."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl


def fitted_lines(
    rows: pl.DataFrame, x: str, y: str, *, by: Sequence[str], fewest: int = 3
) -> pl.DataFrame:
    """Two rows per group, the ends of its least-squares line over the range of x: by, x, y.

    Groups of fewer than ``fewest`` rows with both values, or of one value of x, have no line.
    """
    slope = pl.cov(x, y) / pl.var(x)
    fits = (
        rows.drop_nulls([x, y])
        .group_by(by)
        .agg(
            pl.len().alias("rows"),
            slope.alias("slope"),
            (pl.mean(y) - slope * pl.mean(x)).alias("start"),
            pl.min(x).alias("low"),
            pl.max(x).alias("high"),
        )
        .filter(pl.col("rows") >= fewest, pl.col("slope").is_finite())
    )
    ends = fits.unpivot(["low", "high"], index=[*by, "slope", "start"], value_name=x)
    return (
        ends.with_columns((pl.col("start") + pl.col("slope") * pl.col(x)).alias(y))
        .select(*by, x, y)
        .sort(*by, x)
    )
