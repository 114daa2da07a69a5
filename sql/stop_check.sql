-- grain: one row per run and selection
-- keys: run_id, selection
-- source: docs/measures.md, 'Self-check of logged data'
with excess as (
    select family, variant, task, run_id, selection,
        (finish_reason = 'stop')::double
            - list_sum(list_transform(eos_logprob::double[], lambda e: exp(e))) as x
    from selected_rollouts
    where eos_logprob is not null and finish_reason is not null
),
summed as (
    select family, variant, task, run_id, selection,
        -- in one order, so that the last bits do not depend on how the files are cut
        count(*) as n_rollouts, avg(x order by x) as mean_excess, stddev_samp(x order by x) as sd
    from excess
    group by all
)
select *,
    mean_excess / nullif(sd, 0) * sqrt(n_rollouts) as z,
    student_p(z, n_rollouts) as p,
    passes(p, mean_excess) as ok
from summed
