"""Reliability of R_bar: the share of its variance between prompts that is not the error of rollouts."""

from __future__ import annotations

import math

import duckdb
import polars as pl

from canopy_store import sql
from canopy_store.errors import DataError, UsageError

ENOUGH = 0.8  # below, a table that takes R_bar as exact says that its slopes are drawn towards 0
ERRORS = ("var_R", "var_N", "cov_RN", "cov_RD", "cov_ND")  # columns of the view `panel`


def reliability(panel: pl.DataFrame) -> pl.DataFrame:
    """One row per variant: how much of the spread of R_bar over its rows is not error.

    Parameters
    ----------
    panel : rows of the view ``panel``, of one embedder and one selection

    Returns
    -------
    variant, n_prompts, n_samples (harmonic mean of the rollouts a row, rounded), var_error (mean
    squared standard error of R_bar), var_between (variance of R_bar over rows, divisor rows - 1), both
    in (nats per token)², and reliability = 1 - var_error / var_between. NULL of fewer than 2 rows with
    more than one rollout each, or where R_bar is constant; below 0 where the errors alone would spread
    the rows more.

    Raises
    ------
    DataError
        The panel has no columns of errors.
    """
    missing = [c for c in ("var_R", "n_rollouts") if c not in panel.columns]
    if missing:
        raise DataError(no_errors(missing))
    prompt = "prompt" if "prompt" in panel.columns else "concat(task, '/', prompt_id)"
    with duckdb.connect() as con:
        con.execute(sql.source("macros"))
        con.register("panel", panel.to_arrow())
        return con.sql(
            f"""select variant, count(distinct {prompt}) as n_prompts,
                round(count(n_rollouts) / sum(1 / n_rollouts))::bigint as n_samples,
                avg(var_R) as var_error,
                var_samp(R_bar) filter (where var_R is not null) as var_between,
                reliability_of(var_R, R_bar) as reliability
            from panel
            where isfinite(R_bar)
            group by variant
            order by variant"""
        ).pl()


def require_possible(panel: pl.DataFrame) -> None:
    """Raises DataError for errors that no rollouts have: a variance below 0, rollouts that are none."""
    known = pl.col("var_R").is_finite().fill_null(False)
    rollouts = (pl.col("n_rollouts") >= 1) & pl.col("n_rollouts").is_finite()
    checks = [
        ("n_rollouts", known & ~rollouts.fill_null(False), "with var_R it needs 1 or more"),
        *(
            (
                name,
                (pl.col(name) < 0) | pl.col(name).is_infinite(),
                "a variance is 0 or more, and finite",
            )
            for name in ("var_R", "var_N")
            if name in panel.columns
        ),
    ]
    for name, wrong, rule in checks:
        rows = panel.with_row_index("row").filter(wrong)
        if len(rows):
            place, value = rows.select("row", name).row(0)
            shown = "is missing" if value is None else f"is {value:g}"
            raise DataError(f"row {place + 1} of the panel: {name} {shown}; {rule}")


def no_errors(missing: list[str]) -> str:
    """What to say of a panel without the columns of errors."""
    return (
        f"the panel has no column {', '.join(missing)}, so the error of R_bar is not known; write it "
        'anew from its store: canopy sql "from panel" --store S --format csv > panel.csv'
    )


def samples_for(reliability: float, n_samples: int, wanted: float) -> int | None:
    """Rollouts a prompt at which the reliability is as wanted (Spearman 1910; Brown 1910).

    None where no number would do: the reliability found is 0 or below.

    Parameters
    ----------
    reliability : found at n_samples rollouts a prompt
    wanted : reliability to reach, above 0 and below 1
    """
    if not 0 < wanted < 1:
        raise UsageError(f"a reliability of {wanted:g}: needs more than 0 and less than 1")
    if not reliability > 0:
        return None
    needed = n_samples * wanted * (1 - reliability) / (reliability * (1 - wanted))
    return max(1, math.ceil(needed - 1e-9))
