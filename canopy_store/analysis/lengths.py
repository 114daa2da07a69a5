"""How long rollouts are: the share that goes on after each length."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from canopy_store.sql.connection import Connection


def length_shares(
    con: Connection, runs: Sequence[str], *, selection: str = "all", points: int = 120
) -> pl.DataFrame:
    """One row per run and length: run_id, length (tokens), going_on.

    ``going_on`` is the mean over prompts of the share of their rollouts that have not ended by
    themselves within ``length`` tokens: one less the empirical distribution function, from 1 at no
    token down to the share cut, at the last length, which is the run's ``max_new_tokens``, or its
    longest rollout where that is not recorded. A rollout whose ``finish_reason`` is unknown counts as
    ended.

    Parameters
    ----------
    runs : run ids
    points : the most lengths of a run, the last one apart; every k-th where ``max_new_tokens`` is more
    """
    return con.sql(
        """
        with lengths as (
            select run_id, n_tokens, coalesce(finish_reason = 'length', false) as cut,
                1.0 / count(*) over (partition by run_id, prompt_id) as weight
            from selected_rollouts
            where selection = $selection and run_id in (select unnest($runs))
        ),
        counted as (
            select run_id, n_tokens, cut, sum(weight) as weight
            from lengths
            group by all
        ),
        longest as (
            select run_id, coalesce(any_value(r.max_new_tokens), max(c.n_tokens)) as last
            from counted c
            join runs r using (run_id)
            group by run_id
        ),
        grid as (
            select run_id, unnest(range(0, last, ceil(last / $points)::integer)) as length from longest
            union
            select run_id, last from longest
        )
        select run_id, length::integer as length,
            coalesce(sum(weight) filter (cut or n_tokens > length), 0) / sum(weight) as going_on
        from grid
        join counted using (run_id)
        group by all
        order by run_id, length
        """,
        params={"runs": list(runs), "selection": selection, "points": points},
    ).pl()
