-- grain: one row per document under a scorer and a scorer of its family's base
-- keys: corpus, document_id, scorer_id, baseline_id
-- source: docs/measures.md, 'By token type'
with scored as (
    select s.*, c.family, c.variant, c.template, c.context_sha256, c.number_format, d.split, d.cluster
    from document_scores s
    join scorers c using (scorer_id)
    join documents d using (corpus, document_id)
)
select v.family, v.variant, v.corpus, v.document_id, v.split, v.cluster, v.scorer_id,
    b.scorer_id as baseline_id,
    v.n_tokens::bigint as n_tokens,
    b.logprob_sum - v.logprob_sum as delta_sum,
    list_slice(v.tokens, len(v.tokens) - v.n_tokens + 1, len(v.tokens)) as tokens,
    list_transform(list_zip(b.logprob, v.logprob), lambda p: p[1]::double - p[2]::double) as delta
from scored v
join scored b using (corpus, document_id)
where v.family = b.family and v.scorer_id <> b.scorer_id
    -- the plain base, and the same tokens, else no difference is one token's
    and b.variant = 'base' and b.context_sha256 is null and b.number_format is null
    and v.token_ids = b.token_ids and v.n_tokens = b.n_tokens
