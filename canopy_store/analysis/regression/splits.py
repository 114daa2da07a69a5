"""Split halves: D and R_bar of one half of a prompt's rollouts, instruments from the other half.

Two halves share no rollout, so the errors of one are independent of those of the other. Each split gives
equations both ways, Z_b'(z_a − Z_a b) and Z_a'(z_b − Z_b b); all splits' equations are added before
they are solved. The mean over every possible split is what `errors.by_moments` writes in closed form,
for both are unbiased and built from the same rollouts; fewer splits add noise, and nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from canopy_store import sql
from canopy_store.analysis.bootstrap import diversity_of_sum
from canopy_store.analysis.regression.beta import Array
from canopy_store.analysis.regression.design import matrix_of
from canopy_store.analysis.regression.errors import by_prompt
from canopy_store.analysis.regression.linear import less_share, linear_design, share_of
from canopy_store.analysis.regression.panel import PanelData
from canopy_store.analysis.regression.scores import Equations
from canopy_store.errors import DataError

FEWEST = 4  # rollouts a row: two in each half, for a diversity


def halves_of(rates: Array, lengths: Array, kernel: Array, chosen: Array) -> Array:
    """(S, 2, 3) D, R_bar and N_bar of each half.

    Parameters
    ----------
    rates, lengths : (M,) of a prompt's rollouts
    kernel : (M, M) their cosines
    chosen : (S, M) which rollouts are in the first half of each split
    """
    sides = np.stack([chosen, 1 - chosen], axis=1)  # (S, 2, M)
    size = sides.sum(axis=-1)
    diversity = diversity_of_sum(((sides @ kernel) * sides).sum(axis=-1), size)
    return np.stack([diversity, sides @ rates / size, sides @ lengths / size], axis=-1)


def draw_halves(samples: int, splits: int, rng: np.random.Generator) -> Array:
    """(S, M) a random half of the rollouts in each split, as 1 and 0; of an odd number the smaller."""
    first = np.arange(samples) < samples // 2
    return rng.permuted(np.tile(first, (splits, 1)), axis=1).astype(float)


def store_halves(
    root: str | Path, panel: pl.DataFrame, data: PanelData, splits: int, seed: int
) -> Array:
    """(rows, S, 2, 3) the halves of a panel's rows, from the store's rollouts.

    ``panel`` is the frame of `store_panel` that the data was made of.
    """
    rows = panel[data.rows].with_row_index("place")
    halves = np.empty((len(rows), splits, 2, 3))
    with sql.connect(root, relations=("rollout_metrics",)) as con:
        for (run,), of_run in rows.group_by(["run_id"], maintain_order=True):
            places = dict(of_run.select("prompt_id", "place").iter_rows())
            rollouts = con.sql(
                "select m.prompt_id, m.n_tokens, m.entropy_rate, e.embedding from rollout_metrics m "
                "join embeddings e using (run_id, prompt_id, sample, embedder) "
                "where m.run_id = $run and m.embedder = $embedder and m.selection = $selection "
                "order by m.prompt_id, m.sample",
                params={"run": run, **of_run.select("embedder", "selection").row(0, named=True)},
            ).pl()
            for (prompt,), group in rollouts.group_by(["prompt_id"], maintain_order=True):
                if prompt not in places:
                    continue
                unit = np.array(group["embedding"].to_list(), np.float64)
                unit /= np.linalg.norm(unit, axis=1, keepdims=True)
                rng = np.random.default_rng([seed, places[prompt]])
                halves[places[prompt]] = halves_of(
                    group["entropy_rate"].to_numpy(),
                    group["n_tokens"].to_numpy().astype(float),
                    unit @ unit.T,
                    draw_halves(len(unit), splits, rng),
                )
    return halves


def by_splits(data: PanelData, model: str, halves: Array) -> Equations:
    """The equations of both directions of every split, added up and divided by their number.

    ``halves`` is (rows, S, 2, 3): D, R_bar and N_bar.
    """
    if data.errors and float(data.errors["n_rollouts"].min()) < FEWEST:
        raise DataError(f"--errors split: needs {FEWEST} rollouts a prompt")
    prompt = data.codes["prompt"]
    design = linear_design(data, model)[0]
    share = share_of(data, matrix_of(design, model))

    def side(values: Array) -> tuple[Array, Array]:
        half = replace(data, y=values[:, 0], r=values[:, 1], n=values[:, 2])
        columns = np.column_stack([*linear_design(half, model)[0].values(), half.y])
        columns = less_share(columns, share, prompt)
        return columns[:, :-1], columns[:, -1]

    n, p = len(data.y), len(design)
    left, right, plain = np.zeros((n, p, p)), np.zeros((n, p)), np.zeros((p, p))
    splits = halves.shape[1]
    for split in range(splits):
        (Z_a, z_a), (Z_b, z_b) = side(halves[:, split, 0]), side(halves[:, split, 1])
        crossed = Z_a[:, :, None] * Z_b[:, None, :]
        left = left + (crossed + crossed.transpose(0, 2, 1)) / (2 * splits)
        right = right + (Z_b * z_a[:, None] + Z_a * z_b[:, None]) / (2 * splits)
        plain = plain + (Z_a.T @ Z_a + Z_b.T @ Z_b) / (2 * splits)
    return Equations(list(design), by_prompt(left, prompt), by_prompt(right, prompt), plain, n)
