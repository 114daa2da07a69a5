-- grain: one row per prompt of a run, scorer, policy and selection
-- keys: run_id, prompt_id, scorer_id, policy, selection
-- source: docs/measures.md, 'Under another model'
with rollout as (
    -- no average takes an infinity: a rollout that the scorer cannot give is counted instead
    select * replace (
        case when not isinf(scorer_surprisal_sum) then scorer_surprisal_sum end as scorer_surprisal_sum,
        case when not isinf(scorer_surprisal_sum) then log_ratio end as log_ratio
    )
    from scored_rollouts
)
select family, variant, task, run_id, prompt_id, scorer_id, policy, same_policy, selection,
    count(*) as n_rollouts,
    count(*) - count(scorer_surprisal_sum) as n_outside,
    avg(scorer_surprisal_sum) as cross_entropy,
    stddev_samp(scorer_surprisal_sum) / sqrt(count(scorer_surprisal_sum)) as cross_entropy_se,
    case when count(log_ratio) = count(scorer_surprisal_sum) then avg(log_ratio) end as kl,
    case when count(log_ratio) = count(scorer_surprisal_sum)
        then stddev_samp(log_ratio) / sqrt(count(log_ratio)) end as kl_se
from rollout
group by all
