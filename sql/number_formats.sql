-- grain: one row per scorer in an emulated number format, plain scorer of its model, corpus and split
-- keys: scorer_id, baseline_id, corpus, split
-- source: docs/measures.md, 'Number formats'
with scored as (
    select s.*, d.split, d.cluster
    from document_scores s
    join documents d using (corpus, document_id)
),
cluster_sums as (
    select f.scorer_id, p.scorer_id as baseline_id, s.corpus, s.split, s.cluster,
        count(*) as documents, sum(s.n_tokens) as tokens,
        sum(b.logprob_sum - s.logprob_sum) as deltas, sum(s.kl_sum) as kls
    from scorers f
    join scorers p on p.model_id = f.model_id and p.weights_sha256 = f.weights_sha256
    join scored s on s.scorer_id = f.scorer_id
    join scored b on b.scorer_id = p.scorer_id and b.corpus = s.corpus and b.document_id = s.document_id
    where f.number_format is not null and p.number_format is null
        and f.template is not distinct from p.template
        and f.context_sha256 is not distinct from p.context_sha256
        and s.token_ids is not distinct from b.token_ids and s.n_tokens = b.n_tokens
    group by all
),
pooled as (
    select *, sum(deltas) over whole / nullif(sum(tokens) over whole, 0) as delta,
        sum(kls) over whole / nullif(sum(tokens) over whole, 0) as kl
    from cluster_sums
    window whole as (partition by scorer_id, baseline_id, corpus, split)
),
-- picojoules of a multiplication and an addition at 45 nm (Horowitz 2014), and bits a weight
cost (number_format, picojoules, bits) as (
    values ('fp16', 1.1 + 0.9, 16), ('bf16', null, 16), ('e4m3', null, 8),
        ('e5m2', null, 8), ('int8', 0.2 + 0.1, 8), ('int4', null, 4)
),
priced as (
    select s.*,
        case when starts_with(s.number_format, 'lmul-')
            then 0.1 + 0.9  -- an addition of integers, and one of float32
            else c.picojoules
        end as picojoules,
        case when starts_with(s.number_format, 'lmul-')
            then 9 + substr(s.number_format, 6)::integer
            else c.bits
        end as bits
    from scorers s
    left join cost c using (number_format)
)
select f.family, f.variant, p.scorer_id, p.baseline_id, f.number_format, p.corpus, p.split,
    sum(p.documents)::bigint as n_documents,
    count(*) as n_clusters,
    sum(p.tokens)::bigint as n_tokens,
    any_value(p.delta) as delta_nll,
    case when count(*) > 1 and count(p.delta) = count(*)
        then sqrt(count(*) / (count(*) - 1) * sum((p.deltas - p.delta * p.tokens) ** 2)) / sum(p.tokens)
    end as delta_nll_se,
    any_value(p.kl) as kl,
    case when count(*) > 1 and count(p.kl) = count(*)
        then sqrt(count(*) / (count(*) - 1) * sum((p.kls - p.kl * p.tokens) ** 2)) / sum(p.tokens)
    end as kl_se,
    any_value(f.macs * f.picojoules) * 1e-9 as modelled_mj,
    any_value(f.macs) * (3.7 + 0.9) * 1e-9 as modelled_mj_float32,
    -- 640 picojoules for 32 bits from DRAM, each weight once a token
    any_value(f.macs * f.bits) / 32 * 640 * 1e-9 as modelled_reading_mj
from pooled p
join priced f using (scorer_id)
group by all
