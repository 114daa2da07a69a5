-- grain: one row per rollout and selection
-- keys: run_id, prompt_id, sample, selection
-- source: docs/measures.md, 'Information density'; arXiv 2109.11635
with surprisals as (
    select family, variant, task, run_id, prompt_id, sample, selection, n_tokens,
        list_transform(logprob::double[], lambda p: -p) as s
    from selected_rollouts
    where logprob is not null
),
centred as (
    -- one step has neither a variance nor a slope
    select *, list_sum(s) / n_tokens as surprisal_rate, nullif(n_tokens, 1)::double as n,
        list_transform(s, lambda x: x - surprisal_rate) as d
    from surprisals
)
select * exclude (s, n, d),
    list_sum(list_transform(d, lambda x: x * x)) / (n - 1) as surprisal_variance,
    list_sum(list_transform(d, lambda x, t: x * (t - (n + 1) / 2))) / (n * (n * n - 1) / 12)
        as surprisal_slope
from centred
