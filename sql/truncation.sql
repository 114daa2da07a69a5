-- grain: one row per prompt of a run and selection
-- keys: run_id, prompt_id, selection
-- source: docs/measures.md, 'A common cap'
with late as (
    -- the steps of the window's last half: where it ends tells most about what comes after it
    select r.*, u.max_new_tokens,
        list_sum(entropy[u.max_new_tokens // 2 + 1:]::double[]) as late_entropy,
        list_sum(list_transform(eos_logprob[u.max_new_tokens // 2 + 1:]::double[], lambda e: exp(e)))
            as late_stop
    from selected_rollouts r
    join runs u using (run_id)
),
per_prompt as (
    select family, variant, task, run_id, prompt_id, selection, max_new_tokens,
        count(*) as n_rollouts,
        avg(entropy_sum) as ce_star,
        case when count(finish_reason) = count(*)
            then avg((finish_reason = 'length')::double) end as truncation_rate,
        case when count(entropy) = count(*) then coalesce(sum(late_entropy), 0) end as late_entropy,
        case when count(eos_logprob) = count(*) then coalesce(sum(late_stop), 0) end as late_stop
    from late
    group by all
)
select family, variant, task, run_id, prompt_id, selection,
    max_new_tokens,
    n_rollouts,
    truncation_rate,
    ce_star,
    -- after the cap as in the last half: each step is worth the entropy per chance of ending there
    case when truncation_rate = 0 then ce_star
        when max_new_tokens is not null
            then ce_star + truncation_rate * late_entropy / nullif(late_stop, 0) end as ce_star_extrapolated
from per_prompt
