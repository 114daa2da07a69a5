"""What a comparison takes from a store: the rows of its prompts, like with like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from canopy_store import store
from canopy_store.analysis.comparable import comparable, view_rows
from canopy_store.analysis.grades import with_accuracy
from canopy_store.analysis.likeness import run_settings
from canopy_store.analysis.rarefaction import at_common_m, at_horizon, rollouts_of
from canopy_store.sql.connection import Connection


def prompt_rows(
    con: Connection,
    root: str | Path,
    *,
    baseline: str = "base",
    selection: str = "all",
    embedder: str | None = None,
    runs: Sequence[str] = (),
    families: Sequence[str] = (),
    tasks: Sequence[str] = (),
    variants: Sequence[str] = (),
    seeds: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
    horizon: int | None = None,
    grader: str | None = None,
) -> tuple[pl.DataFrame, str]:
    """The rows of ``prompt_metrics`` to compare, like with like; and the embedder.

    Runs that were not sampled alike are refused unless ``allow`` names what differs. Vendi scores of a
    prompt that has more rollouts in one variant than in another are those of as many: `at_common_m`.

    Parameters
    ----------
    root : path of the store that the connection shows
    horizon : a common cap, in tokens: every measure is then of the first so many tokens
    grader : whose grades the accuracy is of; needed to have one where the store has several

    The others, and errors, are those of `comparable`.

    Returns
    -------
    Beside the columns of the view: ``cap``, ``allowed`` and ``unrecorded`` (`require_alike`),
    ``accuracy`` and ``grader`` (`with_accuracy`), ``rarefied_to`` and ``vendi_reason`` (`at_common_m`),
    ``selection_rule`` ('reward', 'lengths', NULL) and, with ``seeds``, ``checkpoint``.
    """
    rows, embedder = comparable(
        view_rows(con, at_horizon("prompt_metrics", horizon)),
        root,
        selection=selection,
        embedder=embedder,
        runs=runs,
        families=families,
        tasks=tasks,
        variants=variants,
        seeds=seeds,
        baseline=baseline,
        settings=run_settings(con),
        allow=allow,
        horizon=horizon,
    )
    rows = at_common_m(rows, baseline, lambda part: rollouts_of(con, part, selection, embedder))
    rows = with_accuracy(con, rows, grader, horizon)
    rule = pl.lit(_selection_rule(root, selection), dtype=pl.String)
    return rows.with_columns(selection_rule=rule), embedder


def _selection_rule(root: str | Path, selection: str) -> str | None:
    path = store.plan_path(store.require(root), "selection", selection)
    if selection == "all" or not store.exists(path):
        return None
    return store.read_plan(path)["settings"].get("rule")
