-- grain: one row per scorer, corpus and split, pooled over documents
-- keys: scorer_id, corpus, split
-- source: docs/measures.md, 'Documents'
with cluster_sums as (
    select family, variant, scorer_id, corpus, split, cluster,
        count(*) as documents, sum(n_tokens) as tokens, sum(n_bytes) as bytes,
        sum(nll_sum) as nlls, sum(entropy_sum) as entropies
    from document_metrics
    group by all
),
pooled as (
    select *, sum(nlls) over whole / nullif(sum(tokens) over whole, 0) as rate
    from cluster_sums
    window whole as (partition by scorer_id, corpus, split)
)
select family, variant, scorer_id, corpus, split,
    sum(documents)::bigint as n_documents,
    count(*) as n_clusters,
    sum(tokens)::bigint as n_tokens,
    sum(bytes)::bigint as n_bytes,
    any_value(rate) as nll,
    -- of a ratio of sums, by linearisation: what other clusters would change
    case when count(*) > 1 and count(rate) = count(*) and not isinf(any_value(rate))
        then sqrt(count(*) / (count(*) - 1) * sum((nlls - rate * tokens) ** 2)) / sum(tokens)
    end as nll_se,
    sum(entropies) / nullif(sum(tokens), 0) as expected_nll,
    sum(nlls) / nullif(sum(bytes), 0) / ln(2) as bits_per_byte,
    exp(any_value(rate)) as perplexity
from pooled
group by all
