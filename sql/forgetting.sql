-- grain: one row per scorer, scorer of an ancestor of its model, corpus and split
-- keys: scorer_id, ancestor_scorer_id, corpus, split
-- source: docs/measures.md, 'Forgetting'
with recursive lineage as (
    select model_id, parent_id as ancestor_id, 1 as distance
    from models
    where parent_id is not null
    union
    select l.model_id, m.parent_id, l.distance + 1
    from lineage l
    join models m on m.model_id = l.ancestor_id
    -- a lineage that bites its tail ends
    where m.parent_id is not null and l.distance < 1000
),
nearest as (
    select model_id, ancestor_id, min(distance)::integer as distance
    from lineage
    where model_id <> ancestor_id
    group by all
),
stage as (
    select p.*, c.model_id, c.context_sha256, c.number_format, c.template
    from perplexity p
    join scorers c using (scorer_id)
)
select t.family, t.variant, t.scorer_id, a.variant as ancestor_variant,
    a.scorer_id as ancestor_scorer_id,
    n.distance, t.corpus, t.split,
    -t.nll as r,
    -a.nll as r_ancestor,
    -- of other tokens, or bytes, a mean is another thing: a text's first token, which one may not score
    case when t.n_tokens = a.n_tokens then difference(a.nll, t.nll) end as transfer,
    case when t.n_bytes = a.n_bytes
        then difference(a.bits_per_byte, t.bits_per_byte) * ln(2) end as transfer_per_byte
from stage t
join nearest n using (model_id)
join stage a on a.model_id = n.ancestor_id and a.corpus = t.corpus and a.split = t.split
where t.template = a.template
    and t.context_sha256 is not distinct from a.context_sha256
    and t.number_format is not distinct from a.number_format
