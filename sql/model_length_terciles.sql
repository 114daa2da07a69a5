-- grain: one row per run, embedder, selection and length tercile, pooled over prompts
-- keys: run_id, embedder, selection, tercile
-- source: docs/measures.md, 'Length terciles'
select family, variant, task, run_id, embedder, selection, tercile,
    count(*) as n_prompts,
    sum(n_rollouts)::bigint as n_rollouts,
    avg(mean_length) as mean_length,
    avg(entropy_rate) as entropy_rate,
    avg(semantic_diversity) as semantic_diversity
from length_terciles
group by all
