-- grain: one row per complete run, with its cap where that is lower than `horizon`
-- keys: run_id
-- source: docs/measures.md, 'A common cap'
select * replace (
    least(max_new_tokens, horizon)::integer as max_new_tokens,
    -- those of selected_rollouts_at, and not counted here
    null::bigint as n_tokens
)
from runs
