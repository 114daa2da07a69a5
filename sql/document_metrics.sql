-- grain: one row per document under a scorer
-- keys: corpus, document_id, scorer_id
-- source: docs/measures.md, 'Documents'
select c.family, c.variant, d.corpus, d.document_id, d.split, d.cluster, s.scorer_id,
    s.n_tokens::bigint as n_tokens,
    s.n_bytes,
    -s.logprob_sum as nll_sum,
    s.entropy_sum,
    -- of a document of one token that nothing stands before, nothing is scored
    -s.logprob_sum / nullif(s.n_tokens, 0) as nll,
    s.entropy_sum / nullif(s.n_tokens, 0) as expected_nll,
    -s.logprob_sum / nullif(s.n_bytes, 0) / ln(2) as bits_per_byte,
    exp(-s.logprob_sum / nullif(s.n_tokens, 0)) as perplexity
from document_scores s
join documents d using (corpus, document_id)
join scorers c using (scorer_id)
