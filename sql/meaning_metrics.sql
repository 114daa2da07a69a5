-- grain: one row per prompt of a run under a clustering by meaning
-- keys: run_id, prompt_id, clustering
-- source: docs/measures.md, 'Meaning'
with per_prompt as (
    select run_id, prompt_id, clustering,
        any_value(family) as family, any_value(variant) as variant, any_value(task) as task,
        sum(n_rollouts)::bigint as n_judged,
        count(*) as n_meanings,
        abs(sum(share * ln(share) order by cluster)) as rse,
        case when count(class_logprob) = count(*)
            then abs(sum(exp(class_logprob) * class_logprob order by cluster)) end as semantic_entropy,
        -- each of a pair counts the other
        (sum(n_unlike) / 2)::bigint as n_intransitive
    from meanings
    group by run_id, prompt_id, clustering
),
labelled as (
    select run_id, prompt_id, clustering, list(cluster order by sample) as labels
    from clusters
    group by run_id, prompt_id, clustering
)
select family, variant, task, run_id, prompt_id, clustering,
    n_judged,
    n_meanings,
    rse,
    case when n_judged > 1 then rse / ln(n_judged) end as rse_norm,
    semantic_entropy,
    rse as discrete_semantic_entropy,
    distinct_k(labels, 10) as distinct_10,
    utility_k(labels, 10) as utility_10,
    n_intransitive,
    labels
from per_prompt
join labelled using (run_id, prompt_id, clustering)
