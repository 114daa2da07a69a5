"""What a comparison takes from clusters by meaning: columns of its prompts, labels of its rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from canopy_store.analysis.bootstrap import MEANINGS, MEASURES, Rollouts
from canopy_store.analysis.one_of import one_of
from canopy_store.errors import DataError, UsageError
from canopy_store.sql.connection import Connection

_PROMPT = ["family", "task", "prompt_id"]


def one_clustering(con: Connection, root: str | Path, wanted: str | None) -> str:
    """The clustering to use: the one wanted, or the only one stored.

    Raises
    ------
    DataError
        None is stored, or not that one.
    UsageError
        Several and none wanted.
    """
    rows = con.sql("select distinct clustering from clusters order by 1").fetchall()
    names = [name for (name,) in rows]
    if not names:
        raise DataError(
            f"{root}: no clusters; make them first: canopy ingest judge, canopy ingest cluster"
        )
    return one_of("--clusters", names, wanted)


def with_meanings(
    con: Connection,
    prompts: pl.DataFrame,
    root: str | Path,
    names: Sequence[str],
    clusters: str | None = None,
    horizon: int | None = None,
) -> tuple[pl.DataFrame, str | None]:
    """Rows of prompt_metrics or panel, with the columns of meaning_metrics named; and the clustering.

    Measures of meaning grow with the rollouts judged: a prompt has them only where all its variants that
    are judged have as many. Where nothing else is asked for, n_rollouts counts those judged.

    Parameters
    ----------
    root : path of the store, for messages
    names : measures; where none is of meaning, the rows are as they were, and the clustering is None
    clusters : needed where the store has several

    Raises
    ------
    UsageError
        Several clusterings and none named; or a selection or horizon, of which there are none.
    DataError
        No such clustering.
    """
    added = list(dict.fromkeys(MEASURES[name].column for name in names if name in MEANINGS))
    if not added:
        if clusters is not None:
            raise UsageError(f"--clusters {clusters}: with {', '.join(MEANINGS)} alone")
        return prompts, None
    if horizon is not None or set(prompts["selection"]) != {"all"}:
        option = "--selection" if horizon is None else "--horizon"
        raise UsageError(f"{option}: not with {added[0]}: clusters are of all rollouts, as they are")
    clusters = one_clustering(con, root, clusters)
    columns = list(dict.fromkeys(["n_judged", *added]))
    found = con.sql(
        f"select run_id, prompt_id, {', '.join(columns)} from meaning_metrics where clustering = $name",
        params={"name": clusters},
    ).pl()
    keys = ["run_id", "prompt_id"]
    prompts = prompts.join(found, on=keys, how="left", maintain_order="left")
    alike = pl.col("n_judged").drop_nulls().n_unique().over(_PROMPT) == 1
    prompts = prompts.with_columns(pl.when(alike).then(pl.col(name)).alias(name) for name in added)
    if set(names) <= set(MEANINGS) and "n_rollouts" in prompts.columns:
        judged = pl.coalesce("n_judged", "n_rollouts").cast(prompts.schema["n_rollouts"])
        prompts = prompts.with_columns(n_rollouts=judged)
    return prompts.drop("n_judged"), clusters


def with_labels(
    con: Connection, rollouts: Mapping[tuple[str, str], Rollouts], clusters: str
) -> dict[tuple[str, str], Rollouts]:
    """The rollouts of each run and prompt, with the cluster and log-probability of each judged one."""
    frame = con.sql(
        "select c.run_id, c.prompt_id, list(c.cluster order by c.sample) as labels, "
        "list(-r.surprisal_sum order by c.sample) as logprobs from clusters c "
        "join selected_rollouts r on r.run_id = c.run_id and r.prompt_id = c.prompt_id "
        "and r.sample = c.sample and r.selection = 'all' "
        "where c.clustering = $name group by all",
        params={"name": clusters},
    ).pl()
    out = dict(rollouts)
    for run_id, prompt_id, labels, logprobs in frame.iter_rows():
        if (run_id, prompt_id) in out:
            own = out[run_id, prompt_id]
            out[run_id, prompt_id] = replace(
                own, labels=np.array(labels), logprobs=np.array(logprobs, np.float64)
            )
    return out
