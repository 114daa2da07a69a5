"""Measures that depend on how many rollouts a prompt has, at a common number of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import polars as pl

from canopy_store.analysis import bootstrap
from canopy_store.analysis.bootstrap import Array, Rollouts
from canopy_store.errors import UsageError
from canopy_store.sql.connection import Connection

SUBSETS = 64
_SEED = 0
_PROMPT = ["family", "task", "prompt_id"]
_RUN_COLUMNS = ("n_tokens", "entropy_sum", "surprisal_sum", "entropy_rate", "cut")
Kernels = Callable[[pl.DataFrame], Mapping[tuple[str, str], Rollouts]]


def rarefied_vendi(kernel: Array, m: int, subsets: int = SUBSETS) -> float:
    """The Vendi score of m of the rollouts: the geometric mean over seeded random subsets of them.

    A Vendi score grows with the number of rollouts, so scores of 40 and of 16 are not alike. The mean is
    of logarithms, as Vendi scores pool over prompts.

    Parameters
    ----------
    kernel : (M, M), cosine similarities of the rollouts
    m : 1 to M; of M there is one subset, the whole
    subsets : how many are drawn, each without replacement
    """
    rng = np.random.default_rng(_SEED)
    whole = len(kernel)
    drawn = np.arange(whole)[None]
    if m < whole:
        drawn = rng.permuted(np.tile(drawn, (subsets, 1)), axis=1)[:, :m]  # (subsets, m)
    kernels = kernel[drawn[:, :, None], drawn[:, None, :]] / m
    shares = np.clip(np.linalg.eigvalsh(kernels), 0, 1)
    logs = np.log(np.where(shares > 0, shares, 1))
    return float(np.exp(-(shares * logs).sum(-1).mean()))


def at_common_m(rows: pl.DataFrame, baseline: str, kernels: Kernels) -> pl.DataFrame:
    """The rows with a prompt's Vendi scores all of one number of rollouts, the fewest of its variants.

    Only where a prompt's variants have different numbers, and one of them is the baseline.

    Parameters
    ----------
    rows : of ``prompt_metrics``, or of ``panel`` with their n_rollouts
    kernels : gives the rollouts of rows, with kernels

    Returns
    -------
    With ``rarefied_to``, the number of rollouts, where it is not the row's own or another variant's; and
    ``vendi_reason`` where there are no embeddings to draw fewer from, and the score is NULL.
    """
    embedded = pl.col("vendi_score").is_not_null()  # what has no score bounds no other's
    number = pl.when(embedded).then("n_rollouts")
    fewest = number.min().over(_PROMPT)
    uneven = (number.max().over(_PROMPT) > fewest) & (
        (embedded & (pl.col("variant") == baseline)).any().over(_PROMPT)
    )
    to = pl.when(uneven & embedded).then(fewest).cast(pl.Int64)
    rows = rows.with_columns(rarefied_to=to, vendi_reason=pl.lit(None, pl.String))
    more = rows.filter(pl.col("n_rollouts") > pl.col("rarefied_to"))
    if more.is_empty():
        return rows
    rollouts = kernels(more)
    scores: dict[tuple[str, str], float | None] = {}
    for run_id, prompt_id, m in more.select("run_id", "prompt_id", "rarefied_to").iter_rows():
        of = rollouts.get((run_id, prompt_id))
        known = of is not None and of.kernel is not None
        scores[run_id, prompt_id] = rarefied_vendi(of.kernel, m) if known else None  # type: ignore
    values = pl.DataFrame(
        [(*key, score) for key, score in scores.items()],
        schema={"run_id": pl.String, "prompt_id": pl.String, "_fewer": pl.Float64},
        orient="row",
    )
    rows = rows.join(values, on=["run_id", "prompt_id"], how="left", maintain_order="left")
    drawn = pl.col("n_rollouts") > pl.col("rarefied_to")
    lacks = (drawn & pl.col("_fewer").is_null()).any().over(_PROMPT)
    rows = rows.with_columns(
        vendi_score=pl.when(lacks).then(None).when(drawn).then("_fewer").otherwise("vendi_score"),
        rarefied_to=pl.when(~lacks).then("rarefied_to"),
        vendi_reason=pl.when(lacks).then(
            pl.lit("other numbers of rollouts, and no embeddings to draw fewer from")
        ),
    ).drop("_fewer")
    if "vendi_share" in rows.columns:
        m = pl.coalesce("rarefied_to", "n_rollouts")
        norm = pl.when(m > 1).then((pl.col("vendi_score") - 1) / (m - 1))
        rows = rows.with_columns(vendi_share=pl.col("vendi_score") / m, vendi_norm=norm)
    return rows


def at_horizon(view: str, horizon: int | None) -> str:
    """The view, or its macro at a horizon in tokens."""
    if horizon is None:
        return view
    if horizon < 1:
        raise UsageError(f"--horizon {horizon}: needs 1 token or more")
    return f"{view}_at({int(horizon)})"


def rollouts_of(
    con: Connection,
    prompts: pl.DataFrame,
    selection: str,
    embedder: str,
    horizon: int | None = None,
) -> dict[tuple[str, str], Rollouts]:
    """The rollouts of each run and prompt, with kernels where the run has embeddings by the embedder.

    With ``correct`` where the prompts have a column ``grader``.
    """
    grader = prompts["grader"][0] if "grader" in prompts.columns else None
    runs = prompts.select("run_id", "embedder").unique().sort("run_id")
    view = at_horizon("rollout_metrics", horizon)
    frame = con.sql(
        "with chosen as (select unnest($runs) as run_id, unnest($embedders) as embedder) "
        "select m.run_id, m.prompt_id, m.n_tokens, m.entropy_sum, m.surprisal_sum, m.entropy_rate, "
        "(m.finish_reason = 'length')::double as cut, g.correct::integer as correct, e.embedding "
        f"from {view} m join chosen using (run_id, embedder) "
        "left join embeddings e on e.run_id = m.run_id and e.prompt_id = m.prompt_id "
        "and e.sample = m.sample and e.embedder = m.embedder and e.embedder = $embedder "
        "left join grades g on g.run_id = m.run_id and g.prompt_id = m.prompt_id "
        "and g.sample = m.sample and g.grader = $grader "
        "where m.selection = $selection order by m.sample",
        params={
            "runs": runs["run_id"].to_list(),
            "embedders": runs["embedder"].to_list(),
            "embedder": embedder,
            "selection": selection,
            "grader": grader,
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
            **{name: columns[name] for name in _RUN_COLUMNS}, kernel=kernel, correct=columns["correct"]
        )
    return rollouts
