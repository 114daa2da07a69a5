"""Densities of rollout length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from canopy_store.analysis.bootstrap import Array
from canopy_store.sql.connection import Connection


def length_densities(
    con: Connection, runs: Sequence[str], *, selection: str = "all", points: int = 90
) -> pl.DataFrame:
    """One row per run and grid point: run_id, length (tokens), density (share per token).

    A Gaussian kernel with Silverman's bandwidth (Density Estimation, 1986, equation 3.31; at least half
    a token), reflected at one token and, where rollouts were cut, at the longest, so that no mass leaks
    to lengths that cannot be. Runs of one family and task share a grid.

    Parameters
    ----------
    runs : run ids
    points : of the grid, from one token to the longest rollout
    """
    counted = con.sql(
        """
        select family, task, run_id, n_tokens::double as n, count(*)::double as w,
            coalesce(bool_or(finish_reason = 'length'), false) as cut
        from selected_rollouts
        where selection = $selection and run_id in (select unnest($runs))
        group by all
        order by all
        """,
        params={"runs": list(runs), "selection": selection},
    ).pl()
    rows: list[dict[str, Any]] = []
    for _, group in counted.group_by(["family", "task"], maintain_order=True):
        grid = np.linspace(1, max(float(group["n"].max()), 2.0), points)  # type: ignore[arg-type]
        for (run_id,), one in group.group_by(["run_id"], maintain_order=True):
            cut = float(one["n"].max()) if one["cut"].any() else None  # type: ignore[arg-type]
            density = _density(one["n"].to_numpy(), one["w"].to_numpy(), grid, cut)
            rows += [
                {"run_id": run_id, "length": float(x), "density": float(y)}
                for x, y in zip(grid, density, strict=True)
            ]
    return pl.DataFrame(rows, schema={"run_id": pl.String, "length": pl.Float64, "density": pl.Float64})


def _density(n: Array, w: Array, grid: Array, cut: float | None) -> Array:
    total = w.sum()
    spread = np.sqrt(np.average((n - np.average(n, weights=w)) ** 2, weights=w))
    width = max(0.9 * spread * total**-0.2, 0.5)
    out = np.zeros(len(grid))
    for image in (n, 1 - n, *([] if cut is None else [2 * cut + 1 - n])):
        z = (grid[:, None] - image[None, :]) / width  # (grid, lengths)
        out += (np.exp(-0.5 * z**2) * w).sum(axis=1)
    if cut is not None:
        out[grid > cut + 0.5] = 0
    return out / (total * width * np.sqrt(2 * np.pi))
