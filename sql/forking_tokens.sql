-- grain: one row per rollout and selection
-- keys: run_id, prompt_id, sample, selection
-- source: docs/measures.md, 'Forking tokens'; arXiv 2506.01939
with sorted as (
    select family, variant, task, run_id, prompt_id, sample, selection, n_tokens,
        list_reverse_sort(entropy::double[]) as h
    from selected_rollouts
    where entropy is not null
)
select * exclude h,
    ((n_tokens + 4) // 5)::integer as n_forking,
    list_sum(h[1:n_forking]) / nullif(list_sum(h), 0) as forking_share,
    h[n_forking] as forking_entropy,
    list_aggregate(h, 'quantile_cont', 0.5) as entropy_p50,
    list_aggregate(h, 'quantile_cont', 0.8) as entropy_p80,
    list_aggregate(h, 'quantile_cont', 0.95) as entropy_p95
from sorted
