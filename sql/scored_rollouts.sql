-- grain: one row per rollout, scorer, policy and selection
-- keys: run_id, prompt_id, sample, scorer_id, policy, selection
-- source: docs/measures.md, 'Under another model'
with scored as (
    select s.*, s.scorer_id = u.model_id as own_model,
        coalesce((s.policy ->> '$.temperature')::double = u.temperature
            and (s.policy ->> '$.top_k')::integer = u.top_k
            and (s.policy ->> '$.top_p')::double = u.top_p, false) as same_policy
    from scores s
    join runs u using (run_id)
)
select r.family, r.variant, r.task, r.run_id, r.prompt_id, r.sample, s.scorer_id, s.policy,
    s.same_policy, r.selection,
    r.n_tokens,
    r.entropy,
    -- what the sampler logged, or what its own model says where an engine logged none
    coalesce(r.logprob, o.logprob) as logprob,
    coalesce(r.surprisal_sum, o.surprisal_sum) as surprisal_sum,
    s.logprob as scorer_logprob,
    s.entropy as scorer_entropy,
    s.surprisal_sum as scorer_surprisal_sum,
    s.entropy_sum as scorer_entropy_sum,
    s.surprisal_sum - coalesce(r.surprisal_sum, o.surprisal_sum) as log_ratio
from selected_rollouts r
join scored s using (run_id, prompt_id, sample)
left join scored o on o.own_model and o.same_policy and o.run_id = r.run_id
    and o.prompt_id = r.prompt_id and o.sample = r.sample
