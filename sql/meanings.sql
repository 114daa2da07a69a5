-- grain: one row per cluster of a prompt's judged rollouts, under a clustering by meaning
-- keys: run_id, prompt_id, clustering, cluster
-- source: docs/measures.md, 'Meaning'; class probabilities: Farquhar et al. 2024
with judged as (
    select c.run_id, c.prompt_id, c.clustering, c.cluster, c.sample, c.n_unlike,
        r.family, r.variant, r.task,
        -r.surprisal_sum as logprob
    from clusters c
    join selected_rollouts r
        on r.run_id = c.run_id and r.prompt_id = c.prompt_id and r.sample = c.sample
        and r.selection = 'all'
),
scaled as (
    -- the largest is taken out before exp, so that no sum is 0
    select *,
        max(logprob) over class as largest,
        count(*) over prompt as m,
        count(logprob) over prompt = count(*) over prompt as known
    from judged
    window prompt as (partition by run_id, prompt_id, clustering),
        class as (partition by run_id, prompt_id, clustering, cluster)
),
classes as (
    select run_id, prompt_id, clustering, cluster,
        any_value(family) as family, any_value(variant) as variant, any_value(task) as task,
        any_value(m) as m,
        count(*) as n_rollouts,
        min(sample) as first_sample,
        sum(n_unlike)::bigint as n_unlike,
        case when bool_and(known) then max(largest) + ln(sum(exp(logprob - largest) order by sample)) end as logprob
    from scaled
    group by run_id, prompt_id, clustering, cluster
),
against as (
    select *, max(logprob) over (partition by run_id, prompt_id, clustering) as largest
    from classes
)
select family, variant, task, run_id, prompt_id, clustering, cluster,
    n_rollouts,
    n_rollouts / m::double as share,
    logprob - largest
        - ln(sum(exp(logprob - largest)) over classes_in_order) as class_logprob,
    first_sample,
    n_unlike
from against
-- all of them, added up in one order
window classes_in_order as (partition by run_id, prompt_id, clustering order by cluster
    rows between unbounded preceding and unbounded following)
