"""Entropy along the rollout, thinned to what a chart can show."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from canopy_store.sql.connection import Connection


def thin_trajectories(
    con: Connection,
    runs: Sequence[str],
    *,
    selection: str = "all",
    positions: int = 240,
    share: float = 0.1,
) -> pl.DataFrame:
    """One row per run and position: run_id, position, active, mean_entropy, mean_entropy_rate.

    Nats, and nats per token. Rows of the view ``entropy_trajectory``, every k-th where a run is long.

    Parameters
    ----------
    runs : run ids
    positions : the most that are kept of a run
    share : of a run's rollouts, how many must be that long for the position to be kept (at least
        three, where there are three)
    """
    return con.sql(
        """
        with reach as (
            select run_id, position, active, mean_entropy, mean_entropy_rate,
                max(active) over (partition by run_id) as started
            from entropy_trajectory
            where selection = $selection and run_id in (select unnest($runs))
        ),
        kept as (
            select *, greatest(1, ceil(max(position) over () / $positions))::integer as every
            from reach
            where active >= greatest(least(started, 3), $share * started)
        )
        select run_id, position, active, mean_entropy, mean_entropy_rate
        from kept
        where position % every = 1 % every
        order by run_id, position
        """,
        params={"runs": list(runs), "selection": selection, "positions": positions, "share": share},
    ).pl()
