-- grain: one row per rollout that was logged with log-probabilities, scorer and policy
-- keys: run_id, prompt_id, sample, scorer_id, policy
-- source: docs/measures.md, 'Two logs of the same tokens'
select r.family, r.variant, r.task, r.run_id, r.prompt_id, r.sample, s.scorer_id, s.policy,
    same_policy(s.policy, u.temperature, u.top_k, u.top_p, u.min_p, u.typical_p, u.repetition_penalty)
        as same_policy,
    s.scorer_id = u.model_id as same_model,
    list_transform(list_zip(s.logprob::double[], r.logprob::double[]), lambda x: x[1] - x[2])
        as log_ratios,
    len(list_filter(log_ratios, lambda d: isinf(d)))::integer as n_outside
-- the run's own log, which no score completes
from rollouts r
join scores s using (run_id, prompt_id, sample)
join runs u using (run_id)
where r.logprob is not null and s.logprob is not null
