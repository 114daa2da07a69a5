-- grain: one row per run, scorer, policy and selection, pooled over prompts
-- keys: run_id, scorer_id, policy, selection
-- source: docs/measures.md, 'Under another model'
select family, variant, task, run_id, scorer_id, policy, same_policy, selection,
    count(*) as n_prompts,
    sum(n_rollouts)::bigint as n_rollouts,
    sum(n_outside)::bigint as n_outside,
    avg(cross_entropy) as cross_entropy,
    case when count(cross_entropy_se) = count(cross_entropy)
        then sqrt(sum(cross_entropy_se ** 2)) / count(cross_entropy) end as cross_entropy_se,
    avg(kl) as kl,
    -- of these prompts: what other rollouts of them would change
    case when count(kl_se) = count(kl) then sqrt(sum(kl_se ** 2)) / count(kl) end as kl_se,
    stddev_samp(kl) / sqrt(count(kl)) as kl_se_prompts
from cross_entropy
group by all
