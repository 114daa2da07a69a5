-- grain: one row per rollout, embedder and selection
-- keys: run_id, prompt_id, sample, embedder, selection
-- source: metrics of a single rollout; arXiv 2605.30844, section on conditional entropy rate
with distances as materialized (
    -- stored beside the spectrum, so that no embedding is read; read once, for a store of many files
    select run_id, prompt_id, embedder, selection,
        unnest(samples) as sample, unnest(semantic_distances) as semantic_distance
    from embedding_spectra
),
run_embedders as (
    select distinct run_id, embedder from distances
)
select
    r.family, r.variant, r.task, r.run_id, r.prompt_id, r.sample,
    coalesce(m.embedder, 'none') as embedder,
    r.selection,
    r.n_tokens,
    r.finish_reason,
    r.entropy_sum,
    r.surprisal_sum,
    r.stop_entropy_sum,
    r.entropy_sum - r.stop_entropy_sum as content_entropy_sum,
    r.entropy_sum / r.n_tokens as entropy_rate,
    r.log_mass_sum,
    r.log_mass_sum / r.n_tokens as log_mass_mean,
    d.semantic_distance
from selected_rollouts r
left join run_embedders m using (run_id)
left join distances d
    on d.run_id = r.run_id and d.prompt_id = r.prompt_id and d.sample = r.sample
    and d.embedder = m.embedder and d.selection = r.selection
