"""What a comparison takes from a store: the rows of its prompts, like with like, and their rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from canopy_store import store
from canopy_store.analysis import bootstrap
from canopy_store.analysis.bootstrap import Rollouts
from canopy_store.analysis.comparable import comparable, view_rows
from canopy_store.analysis.likeness import run_settings
from canopy_store.analysis.rarefaction import at_common_m
from canopy_store.sql.connection import Connection

_RUN_COLUMNS = ("n_tokens", "entropy_sum", "surprisal_sum", "entropy_rate", "cut")


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
) -> tuple[pl.DataFrame, str]:
    """The rows of ``prompt_metrics`` to compare, like with like; and the embedder.

    Runs that were not sampled alike are refused unless ``allow`` names what differs. Vendi scores of a
    prompt that has more rollouts in one variant than in another are those of as many: `at_common_m`.

    Parameters
    ----------
    root : path of the store that the connection shows
    horizon : a common cap, in tokens: every measure is then of the first so many tokens

    The others, and errors, are those of `comparable`.

    Returns
    -------
    Beside the columns of the view: ``cap``, ``allowed`` and ``unrecorded`` (`require_alike`),
    ``rarefied_to`` and ``vendi_reason`` (`at_common_m`), ``selection_rule`` ('reward', 'lengths', NULL)
    and, with ``seeds``, ``checkpoint``.
    """
    view = "prompt_metrics" if horizon is None else f"prompt_metrics_at({int(horizon)})"
    rows, embedder = comparable(
        view_rows(con, view),
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
    rule = pl.lit(_selection_rule(root, selection), dtype=pl.String)
    return rows.with_columns(selection_rule=rule), embedder


def _selection_rule(root: str | Path, selection: str) -> str | None:
    path = store.plan_path(store.require(root), "selection", selection)
    if selection == "all" or not store.exists(path):
        return None
    return store.read_plan(path)["settings"].get("rule")


def rollouts_of(
    con: Connection, prompts: pl.DataFrame, selection: str, embedder: str
) -> dict[tuple[str, str], Rollouts]:
    """The rollouts of each run and prompt, with kernels where the run has embeddings by the embedder."""
    runs = prompts.select("run_id", "embedder").unique().sort("run_id")
    frame = con.sql(
        "with chosen as (select unnest($runs) as run_id, unnest($embedders) as embedder) "
        "select m.run_id, m.prompt_id, m.n_tokens, m.entropy_sum, m.surprisal_sum, m.entropy_rate, "
        "(m.finish_reason = 'length')::double as cut, e.embedding "
        "from rollout_metrics m join chosen using (run_id, embedder) "
        "left join embeddings e on e.run_id = m.run_id and e.prompt_id = m.prompt_id "
        "and e.sample = m.sample and e.embedder = m.embedder and e.embedder = $embedder "
        "where m.selection = $selection order by m.sample",
        params={
            "runs": runs["run_id"].to_list(),
            "embedders": runs["embedder"].to_list(),
            "embedder": embedder,
            "selection": selection,
        },
    ).pl()
    rollouts = {}
    for (run_id, prompt_id), group in frame.group_by(["run_id", "prompt_id"], maintain_order=True):
        columns = bootstrap.columns_of(group)
        kernel = None
        if not group["embedding"].null_count():
            unit = np.array(group["embedding"].to_list(), np.float64)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            kernel = unit @ unit.T
        rollouts[str(run_id), str(prompt_id)] = Rollouts(
            **{name: columns[name] for name in _RUN_COLUMNS}, kernel=kernel
        )
    return rollouts
