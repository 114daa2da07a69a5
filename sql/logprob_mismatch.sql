-- grain: one row per run, scorer and policy, of rollouts that were logged with log-probabilities
-- keys: run_id, scorer_id, policy
-- source: docs/measures.md, 'Two logs of the same tokens'
with rollout as (
    select *,
        -- a step that the scorer cannot give has no ratio: it is counted, and its rollout left out
        list_filter(log_ratios, lambda d: not isinf(d)) as ratios,
        case when n_outside = 0 then coalesce(list_sum(log_ratios), 0) end as total
    from logged_twice
),
largest as (
    -- weights are taken relative to the largest one, so that none is too large for a number
    select run_id, scorer_id, policy, max(list_max(ratios)) as top_token, max(total) as top_rollout
    from rollout
    group by run_id, scorer_id, policy
),
summed as (
    select r.run_id, r.scorer_id, r.policy,
        any_value(family) as family, any_value(variant) as variant, any_value(task) as task,
        any_value(same_policy) as same_policy, any_value(same_model) as same_model,
        count(*) as n_rollouts,
        sum(len(log_ratios))::bigint as n_tokens,
        sum(n_outside)::bigint as n_outside,
        sum(len(ratios))::bigint as n,
        count(total) as m,
        sum(list_sum(ratios) order by prompt_id, sample) as sum_d,
        max(greatest(list_max(ratios), -list_min(ratios))) as max_abs_log_ratio,
        sum(len(list_filter(ratios, lambda d: abs(d) > 0.2)))::bigint as out_of_band,
        sum(list_sum(list_transform(ratios, lambda d: k3_of(d))) order by prompt_id, sample) as sum_k3,
        sum(list_sum(list_transform(ratios, lambda d: exp(2 * d) - 1)) order by prompt_id, sample) as sum_chi2,
        sum(list_sum(list_transform(ratios, lambda d: exp(d - top_token))) order by prompt_id, sample) as w,
        sum(list_sum(list_transform(ratios, lambda d: exp(2 * (d - top_token)))) order by prompt_id, sample)
            as w2,
        avg(total order by prompt_id, sample) as rollout_log_ratio,
        avg(k3_of(total) order by prompt_id, sample) as rollout_k3,
        avg(exp(2 * total) - 1 order by prompt_id, sample) as rollout_chi2,
        sum(exp(total - top_rollout) order by prompt_id, sample) as rollout_w,
        sum(exp(2 * (total - top_rollout)) order by prompt_id, sample) as rollout_w2
    from rollout r
    join largest using (run_id, scorer_id, policy)
    group by r.run_id, r.scorer_id, r.policy
)
select family, variant, task, run_id, scorer_id, policy, same_policy, same_model,
    n_rollouts, n_tokens, n_outside,
    sum_d / nullif(n, 0) as mean_log_ratio,
    -sum_d / nullif(n, 0) as k1,
    sum_k3 / nullif(n, 0) as k3,
    sum_chi2 / nullif(n, 0) as chi2,
    w * w / w2 / n as ess_share,
    out_of_band / nullif(n, 0) as share_out_of_band,
    max_abs_log_ratio,
    rollout_log_ratio as rollout_mean_log_ratio,
    -rollout_log_ratio as rollout_k1,
    rollout_k3,
    rollout_chi2,
    rollout_w * rollout_w / rollout_w2 / m as rollout_ess_share
from summed
