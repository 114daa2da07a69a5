"""Rows that can be set side by side: one selection, one embedder, one run a family, variant and task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from canopy_store import sql
from canopy_store.analysis.selections import only_runs, require_one_run
from canopy_store.errors import DataError, UsageError
from canopy_store.sql.connection import Connection

NO_EMBEDDER = "none"  # what the views write for a run without embeddings
# Columns of prompt_metrics, model_metrics and panel that depend on the embedder.
_EMBEDDED = (
    "semantic_diversity",
    "vendi_score",
    "rho_length_diversity_pearson",
    "rho_length_diversity_spearman",
    "rho_length_diversity_kendall",
    "cov_length_diversity",
    "D",
    "vendi_share",
    "cov_RD",
    "cov_ND",
)


def view_rows(con: Connection, view: str) -> pl.DataFrame:
    """Every row of a view of the store that the connection shows."""
    return con.sql(f"from {view}").pl()


def comparable(
    rows: pl.DataFrame,
    root: str | Path,
    *,
    selection: str = "all",
    embedder: str | None = None,
    runs: Sequence[str] = (),
) -> tuple[pl.DataFrame, str]:
    """The rows of one selection and embedder, one run a family, variant and task; and the embedder.

    A run that has no embeddings by the embedder keeps its rows, with NULL for what rests on embeddings.

    Parameters
    ----------
    rows : every row of ``prompt_metrics``, ``model_metrics`` or ``panel``
    root : path of the store, for messages
    selection : named subset of the rollouts
    embedder : needed where the store has several
    runs : only these runs

    Raises
    ------
    DataError
        No complete run, no such selection, embedder or run, several runs of one model and task.
    UsageError
        Several embedders and none named.
    """
    if rows.is_empty():
        raise DataError(f"{root}: no complete run; see: canopy status --store {root}")
    if selection not in rows["selection"]:
        names = ", ".join(sorted(rows["selection"].unique()))
        raise DataError(f"--selection {selection}: not in the store; it has {names}")
    embedder = _one_embedder(rows["embedder"], embedder)
    rows = only_runs(rows.filter(selection=selection), runs)
    require_one_run(rows)
    own_first = (pl.col("embedder") != embedder, "embedder")
    of_run = rows.group_by("run_id").agg(pl.col("embedder").sort_by(*own_first).first())
    rows = rows.join(of_run, on=["run_id", "embedder"], how="semi", maintain_order="left")
    own = pl.when(pl.col("embedder") == embedder)
    rows = rows.with_columns(own.then(pl.col(c)).alias(c) for c in _EMBEDDED if c in rows.columns)
    return rows, embedder


def _one_embedder(stored: pl.Series, wanted: str | None) -> str:
    """The embedder to use: the one wanted, or the only one stored."""
    names = sorted(stored.unique())
    if wanted is not None and wanted not in names:
        raise DataError(f"--embedder {wanted}: not in the store; it has {', '.join(names)}")
    real = [name for name in names if name != NO_EMBEDDER]
    if wanted is None and len(real) > 1:
        raise UsageError(f"--embedder: the store has several: {', '.join(real)}")
    return wanted or (real or names)[0]


def store_panel(
    root: str | Path, *, selection: str = "all", embedder: str | None = None, runs: Sequence[str] = ()
) -> pl.DataFrame:
    """The view ``panel`` of one selection and one embedder, one run a family, variant and task.

    Sorted by task, prompt, family and variant: a view has no order, and sums have last bits.

    Raises
    ------
    DataError, UsageError
        As `comparable`.
    """
    with sql.connect(root) as con:
        rows = view_rows(con, "panel")
    panel, _ = comparable(rows, root, selection=selection, embedder=embedder, runs=runs)
    return panel.sort("task", "prompt_id", "family", "variant")
