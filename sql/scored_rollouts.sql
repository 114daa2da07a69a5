-- grain: one row per rollout, scorer, policy and selection
-- keys: run_id, prompt_id, sample, scorer_id, policy, selection
-- source: docs/measures.md, 'Under another model'
select r.family, r.variant, r.task, r.run_id, r.prompt_id, r.sample, s.scorer_id, s.policy,
    same_policy(s.policy, u.temperature, u.top_k, u.top_p,
            u.min_p, u.typical_p, u.repetition_penalty) as same_policy,
    r.selection,
    r.n_tokens,
    r.entropy,
    r.logprob,
    r.surprisal_sum,
    s.logprob as scorer_logprob,
    s.entropy as scorer_entropy,
    s.surprisal_sum as scorer_surprisal_sum,
    s.entropy_sum as scorer_entropy_sum,
    s.surprisal_sum - r.surprisal_sum as log_ratio
from selected_rollouts r
join scores s using (run_id, prompt_id, sample)
join runs u using (run_id)
