-- grain: one row per scorer, task and split
-- keys: scorer_id, task, split
-- source: docs/measures.md, 'Options'
with centred as (
    select *,
        correct_sum - avg(correct_sum) over split_of as d_sum,
        correct_token - avg(correct_token) over split_of as d_token,
        correct_char - avg(correct_char) over split_of as d_char,
        correct_pmi - avg(correct_pmi) over split_of as d_pmi
    from item_metrics
    window split_of as (partition by scorer_id, task, split)
),
cluster_sums as (
    select family, variant, scorer_id, task, split, cluster,
        count(*) as items, sum(chance) as chances, sum(margin) as margins,
        sum_of_all(correct_sum) as right_sum, sum_of_all(correct_token) as right_token,
        sum_of_all(correct_char) as right_char, sum_of_all(correct_pmi) as right_pmi,
        sum_of_all(d_sum) as d_sum, sum_of_all(d_token) as d_token,
        sum_of_all(d_char) as d_char, sum_of_all(d_pmi) as d_pmi
    from centred
    group by all
)
select family, variant, scorer_id, task, split,
    sum(items)::bigint as n_items,
    count(*) as n_clusters,
    sum(chances) / sum(items) as chance,
    sum_of_all(right_sum) / sum(items) as accuracy_sum,
    clustered_se(d_sum, items) as accuracy_sum_se,
    sum_of_all(right_token) / sum(items) as accuracy_token,
    clustered_se(d_token, items) as accuracy_token_se,
    sum_of_all(right_char) / sum(items) as accuracy_char,
    clustered_se(d_char, items) as accuracy_char_se,
    sum_of_all(right_pmi) / sum(items) as accuracy_pmi,
    clustered_se(d_pmi, items) as accuracy_pmi_se,
    sum(margins) / sum(items) as margin
from cluster_sums
group by all
