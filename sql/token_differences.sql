-- grain: one row per rollout, scorer, policy, selection and position
-- keys: run_id, prompt_id, sample, scorer_id, policy, selection, position
-- source: docs/measures.md, 'Under another model'
with step as (
    select s.family, s.variant, s.task, s.run_id, s.prompt_id, s.sample, s.scorer_id, s.policy,
        s.same_policy, s.selection,
        generate_subscripts(s.scorer_logprob, 1)::integer as position,
        unnest(r.token_ids) as token_id,
        unnest(r.token_chars) as chars,
        r.text,
        unnest(s.logprob)::double as token_logprob,
        unnest(s.scorer_logprob)::double as scorer_token_logprob,
        unnest(s.entropy)::double as token_entropy,
        unnest(s.scorer_entropy)::double as scorer_token_entropy
    from scored_rollouts s
    join rollouts r using (run_id, prompt_id, sample)
),
placed as (
    select *,
        sum(chars) over (
            partition by run_id, prompt_id, sample, scorer_id, policy, selection order by position
        ) as read
    from step
)
select * exclude (chars, text, read),
    scorer_token_logprob - token_logprob as logprob_difference,
    scorer_token_entropy - token_entropy as entropy_difference,
    text[(read - chars + 1)::bigint : read::bigint] as token
from placed
