-- grain: one row per run, scorer, policy, selection and position
-- keys: run_id, scorer_id, policy, selection, position
-- source: docs/measures.md, 'Under another model'
with step as (
    select family, variant, task, run_id, scorer_id, policy, same_policy, selection,
        generate_subscripts(scorer_logprob, 1)::integer as position,
        unnest(entropy)::double as h,
        unnest(logprob)::double as p,
        unnest(scorer_logprob)::double as q
    from scored_rollouts
),
finite as (
    -- no average takes an infinity: a step that the scorer cannot give is counted instead
    select * replace (case when not isinf(q) then q end as q)
    from step
)
select family, variant, task, run_id, scorer_id, policy, same_policy, selection, position,
    count(*) as active,
    count(*) - count(q) as n_outside,
    avg(h) as mean_entropy,
    -avg(q) as cross_entropy,
    case when count(p - q) = count(q) then avg(p - q) end as kl,
    case when count(p - q) = count(q) then stddev_samp(p - q) / sqrt(count(p - q)) end as kl_se
from finite
group by all
