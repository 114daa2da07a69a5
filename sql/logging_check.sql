-- grain: one row per run and selection
-- keys: run_id, selection
-- source: docs/measures.md, 'Self-check of logged data'
with excess as (
    select family, variant, task, run_id, selection,
        surprisal_sum - entropy_sum as x
    from selected_rollouts
    where surprisal_sum is not null and entropy_sum is not null
),
summed as (
    select family, variant, task, run_id, selection,
        count(*) as n_rollouts, avg(x) as mean_excess, stddev_samp(x) as sd
    from excess
    group by all
)
select *,
    mean_excess / nullif(sd, 0) * sqrt(n_rollouts) as z,
    student_p(z, n_rollouts) as p,
    passes(p, mean_excess) as ok
from summed
