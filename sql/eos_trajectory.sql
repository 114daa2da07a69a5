-- grain: one row per run, selection and position
-- keys: run_id, selection, position
-- source: docs/measures.md, 'Stop and content'
with step as (
    select family, variant, task, run_id, selection, n_tokens, finish_reason,
        unnest(entropy)::double as h, unnest(eos_logprob)::double as e,
        generate_subscripts(entropy, 1)::integer as position
    from selected_rollouts
    where eos_logprob is not null
)
select family, variant, task, run_id, selection, position,
    count(*) as active,
    avg(exp(e)) as stop_probability,
    count(*) filter (finish_reason = 'stop' and position = n_tokens) as stopped,
    avg(stop_entropy_of(e)) as stop_entropy,
    avg(h - stop_entropy_of(e)) as content_entropy
from step
group by all
