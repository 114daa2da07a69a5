-- grain: one row per scorer, baseline scorer, corpus, split and token type
-- keys: scorer_id, baseline_id, corpus, split, token_type
-- source: docs/measures.md, 'By token type'
with token as (
    select family, variant, scorer_id, baseline_id, corpus, split,
        unnest(tokens) as token, unnest(delta) as delta
    from paired_documents
),
type as (
    -- each token that occurs is told once: patterns are slow, and a vocabulary is small
    select token, token_type(token) as token_type
    from (select distinct token from token)
),
summed as (
    select family, variant, scorer_id, baseline_id, corpus, split, token_type,
        count(*) as n_tokens, sum(delta) as delta_sum
    from token
    join type using (token)
    group by all
)
select * exclude (delta_sum),
    delta_sum / n_tokens as delta_nll,
    delta_sum / sum(n_tokens) over whole as contribution,
    sum(delta_sum) over whole / sum(n_tokens) over whole as total
from summed
window whole as (partition by scorer_id, baseline_id, corpus, split)
