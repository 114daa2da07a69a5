-- grain: one row per prompt of a run, embedder, selection and length tercile
-- keys: run_id, prompt_id, embedder, selection, tercile
-- source: docs/measures.md, 'Length terciles'
with placed as (
    select *, floor((row_number() over (
            partition by run_id, prompt_id, embedder, selection order by n_tokens, sample
        ) - 1) * 3 / count(*) over (
            partition by run_id, prompt_id, embedder, selection
        ))::integer as bucket
    from rollout_metrics
),
unit as (
    select p.run_id, p.prompt_id, p.embedder, p.selection, p.bucket, e.embedding,
        sqrt(list_inner_product(e.embedding::double[], e.embedding::double[])) as norm,
        -- one number for the bucket: thirty million components are grouped by it
        dense_rank() over (order by p.run_id, p.prompt_id, p.embedder, p.selection, p.bucket) as place
    from placed p
    join embeddings e using (run_id, prompt_id, sample, embedder)
),
component as (
    select place, generate_subscripts(embedding, 1) as component, unnest(embedding)::double / norm as x
    from unit
),
summed as (
    select place, component, sum(x) as x
    from component
    group by all
),
squared as (
    select place, sum(x * x) as squared_norm
    from summed
    group by all
),
similarity as (
    select u.run_id, u.prompt_id, u.embedder, u.selection, u.bucket,
        count(*) as embedded, any_value(q.squared_norm) as squared_norm
    from unit u
    join squared q using (place)
    group by all
),
measured as (
    select family, variant, task, run_id, prompt_id, embedder, selection, bucket,
        count(*) as n_rollouts, avg(n_tokens) as mean_length, avg(entropy_rate) as entropy_rate
    from placed
    group by all
)
select m.family, m.variant, m.task, m.run_id, m.prompt_id, m.embedder, m.selection,
    case m.bucket when 0 then 'short' when 1 then 'medium' else 'long' end as tercile,
    m.n_rollouts,
    m.mean_length,
    m.entropy_rate,
    diversity_of_sum(s.squared_norm, s.embedded) as semantic_diversity
from measured m
left join similarity s using (run_id, prompt_id, embedder, selection, bucket)
