-- grain: one row per run, selection and position
-- keys: run_id, selection, position
-- source: docs/measures.md, 'Along the rollout'
with step as (
    select family, variant, task, run_id, selection, n_tokens,
        unnest(entropy)::double as h, generate_subscripts(entropy, 1)::integer as position
    from selected_rollouts
),
by_length as (
    -- summed by rollout length first: what is active at a position is what is at least that long
    select family, variant, task, run_id, selection, n_tokens, position, sum(h) as h, count(*) as rollouts
    from step
    group by all
),
running as (
    select *, sum(h) over (
        partition by run_id, selection, n_tokens order by position
    ) / position as rate_so_far
    from by_length
)
select family, variant, task, run_id, selection, position,
    sum(rollouts)::bigint as active,
    sum(h) / sum(rollouts) as mean_entropy,
    sum(rate_so_far) / sum(rollouts) as mean_entropy_rate
from running
group by all
