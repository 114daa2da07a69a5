-- grain: one row per scorer, scorer of its model's parent, and two corpora with a split of each
-- keys: scorer_id, parent_scorer_id, in_corpus, in_split, out_corpus, out_split
-- source: docs/measures.md, 'Gain and forgetting'
with point as (
    select i.family, i.variant, i.scorer_id, i.ancestor_variant as parent_variant,
        i.ancestor_scorer_id as parent_scorer_id,
        i.corpus as in_corpus, i.split as in_split, o.corpus as out_corpus, o.split as out_split,
        i.transfer as gain,
        0 - o.transfer as forgetting,
        i.transfer_per_byte as gain_per_byte,
        0 - o.transfer_per_byte as forgetting_per_byte
    from forgetting i
    join forgetting o using (scorer_id, ancestor_scorer_id)
    where i.distance = 1 and i.corpus <> o.corpus
)
select *,
    count(*) over pair as n_children,
    case when gain is not null and forgetting is not null then not exists (
        from point q
        where q.parent_scorer_id = p.parent_scorer_id
            and q.in_corpus = p.in_corpus and q.in_split = p.in_split
            and q.out_corpus = p.out_corpus and q.out_split = p.out_split
            and q.gain >= p.gain and q.forgetting <= p.forgetting
            and (q.gain > p.gain or q.forgetting < p.forgetting)
    ) end as on_frontier
from point p
window pair as (partition by parent_scorer_id, in_corpus, in_split, out_corpus, out_split)
