"""What k rollouts reach, as a curve over k: each variant against its baseline, and where they cross."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from canopy_store import sql
from canopy_store.analysis.bootstrap import AT_K
from canopy_store.analysis.comparison import compare, compare_prompts
from canopy_store.analysis.grades import with_at_k
from canopy_store.errors import DataError, UsageError
from canopy_store.sql.connection import Connection

KINDS = tuple(dict.fromkeys(name.rpartition("_")[0] for name in AT_K))
PLACE = ["level", "family", "task", "variant", "checkpoint"]
_COLUMNS = ("baseline", "treated", "delta")


def pass_at_k_curve(
    root: str | Path,
    *,
    measure: str = "pass_at",
    selection: str = "all",
    grader: str | None = None,
    **options: Any,
) -> pl.DataFrame:
    """One row per family, task, variant and k, a power of two: baseline, treated, delta and intervals.

    Prompts are drawn by the paired bootstrap of `compare`, the same at every k. A prompt that has fewer
    than k graded rollouts in one of the two is left out at this k, so n_prompts may fall along a curve.

    Parameters
    ----------
    root : path of the store
    measure : 'pass_at', one of k is right; 'pass_hat', all are; 'maj_at', the commonest answer is
    selection, grader, options : of `compare`, but for its metrics and its horizon

    Returns
    -------
    level, family, task, baseline_variant, variant, checkpoint, as `compare` has them; k; n_prompts,
    n_left_out; baseline, treated and delta, each with ``_se``, ``_ci_low`` and ``_ci_high``; p, p_holm
    (over all rows); and overtaken_at: of the whole curve the smallest k from which on the baseline is
    ahead, up to the last, where the variant was ahead before; NULL where there is none. It is about the
    values themselves: what can be told apart by the prompts is in p. The crossing is that of
    arXiv 2504.13837.

    Raises
    ------
    DataError, ConflictError, UsageError
        As `compare`; no grades; an unknown measure.
    """
    if measure not in KINDS:
        raise UsageError(f"--measure {measure}: one of {', '.join(KINDS)}")
    with sql.connect(root, relations=("model_pass_at_k",)) as con:
        names = _metrics(con, measure, selection, grader)
    frame = _curve(compare(root, metrics=names, selection=selection, grader=grader, **options))
    if frame.is_empty():
        raise DataError(f"{measure}: no prompt has a graded rollout in both variants")
    return frame


def curve_of_prompts(
    con: Connection, prompts: pl.DataFrame, models: pl.DataFrame, *, baseline: str, seed: int
) -> pl.DataFrame:
    """The curve of pass@k from rows that are read already, as `compare_prompts` takes them.

    No rows where the prompts have no grades, or none is graded in both variants.
    """
    if "grader" not in prompts.columns:
        return pl.DataFrame()
    names = _metrics(con, "pass_at", prompts["selection"][0], prompts["grader"][0])
    prompts = with_at_k(con, prompts, names)
    return _curve(compare_prompts(prompts, models, metrics=names, baseline=baseline, seed=seed))


def _metrics(con: Connection, measure: str, selection: str, grader: str | None) -> list[str]:
    """The metrics of a curve: k up to the most rollouts of a prompt."""
    most = con.sql(
        "select max(k) from model_pass_at_k where selection = $selection "
        "and ($grader is null or grader = $grader)",
        params={"selection": selection, "grader": grader},
    ).fetchall()[0][0]
    # where none is graded so, the comparison says what is
    return [name for name in AT_K if name.rpartition("_")[0] == measure and _k(name) <= (most or 1)]


def _curve(frame: pl.DataFrame) -> pl.DataFrame:
    """What `compare` gives of the metrics of a curve, as `pass_at_k_curve` returns it."""
    frame = frame.with_columns(k=pl.col("metric").str.extract(r"(\d+)$").cast(pl.Int64))
    # of no prompt k rollouts are graded on both sides
    frame = frame.filter(pl.col("delta").is_not_null())
    if frame.is_empty():
        return frame
    parts = [
        rows.with_columns(overtaken_at=pl.lit(overtaken_at(rows["k"], rows["delta"]), pl.Int64))
        for _, rows in frame.group_by(PLACE, maintain_order=True)
    ]
    frame = pl.concat(parts)
    ends = [f"{name}{end}" for name in _COLUMNS for end in ("", "_se", "_ci_low", "_ci_high")]
    place = ["level", "family", "task", "baseline_variant", "variant", "checkpoint"]
    return frame.select(*place, "k", "n_prompts", "n_left_out", *ends, "p", "p_holm", "overtaken_at")


def _k(name: str) -> int:
    return int(name.rpartition("_")[2])


def overtaken_at(k: pl.Series, delta: pl.Series) -> int | None:
    """The smallest k from which on delta is below 0, where it was above 0 at a smaller one, or None."""
    at = None
    for number, change in zip(reversed(k.to_list()), reversed(delta.to_list()), strict=True):
        if not change < 0:
            break
        at = number
    ahead = [number for number, change in zip(k, delta, strict=True) if change > 0]
    return at if at is not None and any(number < at for number in ahead) else None


def crossing(rows: pl.DataFrame, measure: str) -> str:
    """A curve in a line: where the baseline overtakes the variant, or which is ahead, and how surely.

    ``rows`` are those of one place of `pass_at_k_curve`.
    """
    first, last = rows.row(0, named=True), rows.row(-1, named=True)
    base, name = first["baseline_variant"], measure.replace("_at", "@").replace("_hat", "^")
    where = f"{first['checkpoint'] or first['variant']} of {first['family']} on {first['task']}"

    def at(row: dict[str, Any]) -> str:
        p = "" if row["p"] is None else f", p {row['p']:.2g}"
        return f"{row['treated']:.3g} against {row['baseline']:.3g} at {name}{row['k']}{p}"

    if first["overtaken_at"] is not None:
        row = rows.filter(pl.col("k") == pl.col("overtaken_at")).row(0, named=True)
        ahead = rows.filter(pl.col("delta") > 0).row(0, named=True)
        told = "" if last["p"] is not None and last["p"] < 0.05 else "; not told apart at the last k"
        return f"{where}: {at(ahead)}; {base} overtakes at k = {row['k']} ({at(row)}; {at(last)}{told})"
    if (rows["delta"] >= 0).all():
        return f"{where}: {base} does not overtake up to k = {last['k']} ({at(first)}; {at(last)})"
    if (rows["delta"] <= 0).all():
        return f"{where}: never ahead of {base} up to k = {last['k']} ({at(first)}; {at(last)})"
    return f"{where}: crosses {base} otherwise than once to its favour ({at(first)}; {at(last)})"
