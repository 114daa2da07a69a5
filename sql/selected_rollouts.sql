-- grain: one row per rollout and selection
-- keys: run_id, prompt_id, sample, selection
-- source: docs/measures.md, 'Selections'; 'all' is every rollout
with own as (
    -- where an engine gave less than the whole record: its own model's statistics, under its policy
    select s.* replace (
        -- a token that rounding puts outside top-k or top-p has no surprisal: the rollout has none
        case when not isinf(s.surprisal_sum) then s.logprob end as logprob,
        case when not isinf(s.surprisal_sum) then s.surprisal_sum end as surprisal_sum
    )
    from scores s
    join runs u using (run_id)
    where not u.logged
        and s.scorer_id = u.model_id
        and same_policy(s.policy, u.temperature, u.top_k, u.top_p,
            u.min_p, u.typical_p, u.repetition_penalty)
),
whole as (
    -- part of a run would be another run
    select run_id
    from (select run_id, count(*) as scored from own group by all)
    join runs using (run_id)
    where scored = n_rollouts
),
recorded as (
    select r.* replace (
        coalesce(r.logprob, o.logprob) as logprob,
        coalesce(r.entropy, o.entropy) as entropy,
        coalesce(r.eos_logprob, o.eos_logprob) as eos_logprob,
        coalesce(r.entropy_sum, o.entropy_sum) as entropy_sum,
        coalesce(r.surprisal_sum, o.surprisal_sum) as surprisal_sum,
        coalesce(r.stop_entropy_sum, o.stop_entropy_sum) as stop_entropy_sum,
        coalesce(r.log_mass, o.log_mass) as log_mass,
        coalesce(r.n_kept, o.n_kept) as n_kept,
        coalesce(r.log_mass_sum, o.log_mass_sum) as log_mass_sum
    )
    from rollouts r
    left join (select own.* from own semi join whole using (run_id)) o using (run_id, prompt_id, sample)
)
select *, 'all' as selection
from recorded
union all by name
select r.*, s.selection
from recorded r
join selections s using (run_id, prompt_id, sample)
