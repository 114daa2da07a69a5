-- grain: one row per child, its parent, a corpus gained on and another that may be forgotten
-- keys: scorer_id, parent_scorer_id, corpus, split, other_corpus, other_split
-- source: docs/measures.md, 'Gain and forgetting'
with change as (
    select family, variant, scorer_id, ancestor_scorer_id as parent_scorer_id, corpus, split,
        transfer, transfer_per_byte
    from forgetting
    where distance = 1
),
pair as (
    select g.family, g.variant, g.scorer_id, g.parent_scorer_id, g.corpus, g.split,
        o.corpus as other_corpus, o.split as other_split,
        g.transfer as gain,
        -o.transfer as forgotten,
        g.transfer_per_byte as gain_per_byte,
        -o.transfer_per_byte as forgotten_per_byte
    from change g
    join change o using (scorer_id, parent_scorer_id)
    where g.corpus <> o.corpus
)
select p.*,
    not exists (
        select 1 from pair q
        where q.parent_scorer_id = p.parent_scorer_id
            and q.corpus = p.corpus and q.split = p.split
            and q.other_corpus = p.other_corpus and q.other_split = p.other_split
            and q.gain >= p.gain and q.forgotten <= p.forgotten
            and (q.gain > p.gain or q.forgotten < p.forgotten)
    ) as frontier
from pair p
