-- grain: one row per rollout and selection, cut to its first `horizon` tokens
-- keys: run_id, prompt_id, sample, selection
-- source: docs/measures.md, 'A common cap'
select r.* replace (
    -- a text cannot be cut by tokens here: a rollout that is cut has none
    case when n_tokens <= horizon then text end as text,
    case when n_tokens <= horizon then token_chars end as token_chars,
    token_ids[1:horizon] as token_ids,
    least(n_tokens, horizon)::integer as n_tokens,
    case when n_tokens <= horizon then finish_reason else 'length' end as finish_reason,
    logprob[1:horizon] as logprob,
    entropy[1:horizon] as entropy,
    eos_logprob[1:horizon] as eos_logprob,
    case when n_tokens <= horizon then entropy_sum
        else list_sum(entropy[1:horizon]::double[]) end as entropy_sum,
    case when n_tokens <= horizon then surprisal_sum
        else -list_sum(logprob[1:horizon]::double[]) end as surprisal_sum,
    case when n_tokens <= horizon then stop_entropy_sum
        else list_sum(list_transform(eos_logprob[1:horizon]::double[], lambda e: stop_entropy_of(e)))
        end as stop_entropy_sum,
    top_token_ids[1:horizon] as top_token_ids,
    top_logprobs[1:horizon] as top_logprobs
)
from selected_rollouts r
where case when horizon >= 1 then true else error('a horizon is a number of tokens, at least 1') end
