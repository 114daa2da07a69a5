-- grain: one row per scorer, baseline scorer, corpus, split and token type
-- keys: scorer_id, baseline_id, corpus, split, token_type
-- source: docs/measures.md, 'By token type'
with token as (
    select family, variant, scorer_id, baseline_id, corpus, split, cluster,
        unnest(tokens) as token, unnest(delta) as delta
    from paired_documents
),
type as (
    -- each token that occurs is told once: patterns are slow, and a vocabulary is small
    select token, token_type(token) as token_type
    from (select distinct token from token)
),
of_cluster as (
    select family, variant, scorer_id, baseline_id, corpus, split, cluster, token_type,
        count(*) as n_tokens, sum(delta) as delta_sum
    from token
    join type using (token)
    group by all
),
summed as (
    select family, variant, scorer_id, baseline_id, corpus, split, token_type,
        sum(n_tokens)::bigint as n_tokens, sum(delta_sum) as delta_sum
    from of_cluster
    group by all
),
shared as (
    select *,
        delta_sum / n_tokens as delta_nll,
        delta_sum / sum(n_tokens) over whole as contribution,
        sum(delta_sum) over whole / sum(n_tokens) over whole as total
    from summed
    window whole as (partition by scorer_id, baseline_id, corpus, split)
),
cluster_size as (
    select scorer_id, baseline_id, corpus, split, cluster, sum(n_tokens) as n_tokens
    from of_cluster
    group by all
),
error as (
    -- a cluster without tokens of a type counts too: its sum of them is 0
    select scorer_id, baseline_id, corpus, split, s.token_type,
        count(*) as n_clusters,
        clustered_se(coalesce(o.delta_sum, 0) - s.contribution * c.n_tokens, c.n_tokens) as contribution_se
    from shared s
    join cluster_size c using (scorer_id, baseline_id, corpus, split)
    left join of_cluster o using (scorer_id, baseline_id, corpus, split, cluster, token_type)
    group by all
)
select s.* exclude (delta_sum, total), e.contribution_se, e.n_clusters, s.total
from shared s
join error e using (scorer_id, baseline_id, corpus, split, token_type)
