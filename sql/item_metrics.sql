-- grain: one row per item under a scorer
-- keys: task, item_id, scorer_id
-- source: docs/measures.md, 'Options'
with options as (
    select s.scorer_id, s.task, s.item_id, i.correct, i.split, i.cluster,
        s.logprob_sum as by_sum,
        s.logprob_sum / s.n_tokens as by_token,
        s.logprob_sum / nullif(i.n_chars, 0) as by_char,
        s.logprob_sum - s.neutral_sum as by_pmi
    from option_scores s
    join items i on i.task = s.task and i.item_id = s.item_id and i."option" = s."option"
),
best as (
    select *,
        max(by_sum) over item as top_sum,
        max(by_token) over item as top_token,
        max(by_char) over item as top_char,
        max(by_pmi) over item as top_pmi
    from options
    window item as (partition by scorer_id, task, item_id)
)
select c.family, c.variant, b.scorer_id, b.task, b.item_id, b.split, b.cluster,
    count(*) as n_options,
    1 / count(*)::double as chance,
    share_of_best(b.by_sum, b.top_sum, b.correct) as correct_sum,
    share_of_best(b.by_token, b.top_token, b.correct) as correct_token,
    share_of_best(b.by_char, b.top_char, b.correct) as correct_char,
    share_of_best(b.by_pmi, b.top_pmi, b.correct) as correct_pmi,
    margin_of(b.by_sum, b.correct) as margin,
    margin_of(b.by_token, b.correct) as margin_token,
    margin_of(b.by_pmi, b.correct) as margin_pmi
from best b
join scorers c on c.scorer_id = b.scorer_id
group by all
