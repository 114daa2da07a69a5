"""Rows that can be set side by side: one selection, one embedder, one run a family, variant and task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from canopy_store import sql, store
from canopy_store.analysis.bootstrap import MEANINGS
from canopy_store.analysis.grades import with_accuracy
from canopy_store.analysis.likeness import ADDED, require_alike, run_settings
from canopy_store.analysis.meanings import with_meanings
from canopy_store.analysis.one_of import one_of
from canopy_store.analysis.rarefaction import at_common_m, rollouts_of
from canopy_store.analysis.seeds import as_variants
from canopy_store.analysis.selections import only_runs, require_one_run
from canopy_store.errors import DataError
from canopy_store.sql.connection import Connection

NO_EMBEDDER = "none"  # what the views write for a run without embeddings
# Columns of prompt_metrics, model_metrics and panel that depend on the embedder.
_EMBEDDED = (
    "semantic_diversity",
    "vendi_score",
    "squared_similarity",
    "diversity_number",
    "rho_length_diversity_pearson",
    "rho_length_diversity_spearman",
    "rho_length_diversity_kendall",
    "cov_length_diversity",
    "D",
    "vendi_share",
    "vendi_norm",
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
    families: Sequence[str] = (),
    tasks: Sequence[str] = (),
    variants: Sequence[str] = (),
    seeds: Mapping[str, str] | None = None,
    baseline: str = "base",
    settings: pl.DataFrame | None = None,
    allow: Sequence[str] = (),
    horizon: int | None = None,
) -> tuple[pl.DataFrame, str]:
    """The rows of one selection and embedder, one run a family, variant and task; and the embedder.

    A run that has no embeddings by the embedder keeps its rows, with NULL for what rests on embeddings.

    Parameters
    ----------
    rows : every row of ``prompt_metrics``, ``model_metrics`` or ``panel``
    root : path of the store, for messages
    selection : named subset of the rollouts
    embedder : needed where the store has several
    runs, families, tasks : only these
    variants : only these, and the baseline
    seeds : pattern of the checkpoints by the name of their variant, as `as_variants` takes it
    baseline : the variant that the others are held against
    settings : what `run_settings` gives; runs that differ from their baseline's are then refused, and
        the rows get the columns of `require_alike`
    allow : settings that may differ: cap, temperature, top_k, top_p, rendering, template
    horizon : the common cap, in tokens, that the rows are at

    Raises
    ------
    DataError
        No complete run, no such selection, embedder, run, family, task or variant, several runs of one
        model and task.
    ConflictError
        Runs that were not sampled alike.
    UsageError
        Several embedders and none named.
    """
    if rows.is_empty():
        scored = {"item": "option_scores", "document": "document_scores"}
        units = [unit for unit, kind in scored.items() if store.records(store.require(root), kind)]
        hint = f"; {' and '.join(units)}s are compared with --unit {units[0]}" if units else ""
        raise DataError(f"{root}: no complete run; see: canopy status --store {root}{hint}")
    if selection not in rows["selection"]:
        names = ", ".join(sorted(rows["selection"].unique()))
        raise DataError(f"--selection {selection}: not in the store; it has {names}")
    embedder = _one_embedder(rows["embedder"], embedder)
    rows = only_runs(rows.filter(selection=selection), runs)
    if seeds:
        rows = as_variants(rows, seeds, baseline=baseline)
    rows = only(rows, families=families, tasks=tasks, variants=variants, baseline=baseline)
    require_one_run(rows.with_columns(variant="checkpoint") if seeds else rows)
    own_first = (pl.col("embedder") != embedder, "embedder")
    of_run = rows.group_by("run_id").agg(pl.col("embedder").sort_by(*own_first).first())
    rows = rows.join(of_run, on=["run_id", "embedder"], how="semi", maintain_order="left")
    own = pl.when(pl.col("embedder") == embedder)
    rows = rows.with_columns(own.then(pl.col(c)).alias(c) for c in _EMBEDDED if c in rows.columns)
    if settings is not None:
        rows = require_alike(rows, settings, baseline, allow=allow, horizon=horizon)
    return rows, embedder


def only(
    rows: pl.DataFrame,
    *,
    families: Sequence[str],
    tasks: Sequence[str],
    variants: Sequence[str],
    baseline: str,
    splits: Sequence[str] = (),
    task: str = "task",
) -> pl.DataFrame:
    """The rows of these families, tasks, splits and variants, and the baseline's; all if none is named.

    ``task`` is the column that tasks are names of.
    """
    for column, option, names in (
        ("split", "split", splits),
        ("family", "family", families),
        (task, "task", tasks),
        ("variant", "variant", variants),
    ):
        if not names:
            continue
        for name in names:
            if name not in rows[column]:
                there = ", ".join(sorted(rows[column].unique()))
                raise DataError(f"--{option} {name}: not in the store; it has {there}")
        wanted = [*names, baseline] if column == "variant" else names
        rows = rows.filter(pl.col(column).is_in(wanted))
    if rows.is_empty():
        raise DataError("--family, --task, --variant: no run is of all that they name")
    return rows


def _one_embedder(stored: pl.Series, wanted: str | None) -> str:
    """The embedder to use: the one wanted, or the only one stored."""
    names = sorted(stored.unique())
    if wanted is None:
        names = [name for name in names if name != NO_EMBEDDER] or names
    return one_of("--embedder", names, wanted)


def store_panel(
    root: str | Path,
    *,
    selection: str = "all",
    embedder: str | None = None,
    runs: Sequence[str] = (),
    baseline: str = "base",
    allow: Sequence[str] = (),
    grader: str | None = None,
    outcome: str = "D",
    clusters: str | None = None,
) -> pl.DataFrame:
    """The view ``panel`` of one selection and one embedder, one run a family, variant and task.

    With ``accuracy`` where the store has grades by ``grader``, or by one grader alone.
    Vendi scores of a prompt are of the fewest rollouts that it has in any variant (`at_common_m`).
    Sorted by task, prompt, family and variant: a view has no order, and sums have last bits. An outcome
    that is a measure of meaning is joined to it, under the clusters named (`with_meanings`).

    Raises
    ------
    DataError, ConflictError, UsageError
        As `comparable`.
    """
    with sql.connect(root) as con:
        panel, embedder = comparable(
            view_rows(con, "panel"),
            root,
            selection=selection,
            embedder=embedder,
            runs=runs,
            baseline=baseline,
            settings=run_settings(con),
            allow=allow,
        )
        columns = [name for name in panel.columns if name not in ADDED]
        if "n_rollouts" not in columns:
            rollouts = (pl.col("vendi_score") / pl.col("vendi_share")).round().cast(pl.Int64)
            panel = panel.with_columns(n_rollouts=rollouts)
        # a Vendi score grows with the number of rollouts
        panel = at_common_m(panel, baseline, lambda part: rollouts_of(con, part, selection, embedder))
        panel = with_accuracy(con, panel.select(columns), grader).drop("grader", strict=False)
        if outcome in MEANINGS or clusters is not None:
            panel, _ = with_meanings(con, panel, root, [outcome], clusters)
    return panel.sort("task", "prompt_id", "family", "variant")
