"""Measures that depend on how many rollouts a prompt has, at a common number of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import polars as pl

from canopy_store.analysis.bootstrap import Array, Rollouts

SUBSETS = 64
_SEED = 0
_PROMPT = ["family", "task", "prompt_id"]
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
    rows : of ``prompt_metrics``
    kernels : gives the rollouts of rows, with kernels

    Returns
    -------
    With ``rarefied_to``, the number of rollouts, where it is not the row's own or another variant's; and
    ``vendi_reason`` where there are no embeddings to draw fewer from, and the score is NULL.
    """
    fewest = pl.col("n_rollouts").min().over(_PROMPT)
    uneven = (pl.col("n_rollouts").max().over(_PROMPT) > fewest) & (
        (pl.col("variant") == baseline).any().over(_PROMPT)
    )
    to = pl.when(uneven & pl.col("vendi_score").is_not_null()).then(fewest).cast(pl.Int64)
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
    return rows.with_columns(
        vendi_score=pl.when(lacks).then(None).when(drawn).then("_fewer").otherwise("vendi_score"),
        rarefied_to=pl.when(~lacks).then("rarefied_to"),
        vendi_reason=pl.when(lacks).then(
            pl.lit("other numbers of rollouts, and no embeddings to draw fewer from")
        ),
    ).drop("_fewer")
