-- grain: one row per run, scorer, policy and position
-- keys: run_id, scorer_id, policy, position
-- source: docs/measures.md, 'Two logs of the same tokens'
with step as (
    select family, variant, task, run_id, prompt_id, sample, scorer_id, policy, same_policy, same_model,
        generate_subscripts(log_ratios, 1)::integer as position,
        unnest(log_ratios) as ratio
    from logged_twice
),
finite as (
    select *, case when not isinf(ratio) then ratio end as d from step
)
select family, variant, task, run_id, scorer_id, policy, same_policy, same_model, position,
    count(*) as active,
    count(*) - count(d) as n_outside,
    avg(d order by prompt_id, sample) as mean_log_ratio,
    -avg(d order by prompt_id, sample) as k1,
    avg(k3_of(d) order by prompt_id, sample) as k3,
    avg(exp(2 * d) - 1 order by prompt_id, sample) as chi2,
    avg((abs(d) > 0.2)::double order by prompt_id, sample) as share_out_of_band,
    max(abs(d)) as max_abs_log_ratio
from finite
group by all
