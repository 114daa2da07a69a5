-- grain: one row per prompt's rollouts under an embedder and selection
-- keys: run_id, prompt_id, embedder, selection
-- source: docs/measures.md, 'A common cap'
with longest as (
    select run_id, prompt_id, selection, max(n_tokens) as n_tokens
    from selected_rollouts
    group by all
)
-- an embedding is of the whole text: where a rollout of the prompt is cut there is none
select s.* replace (
    case when l.n_tokens <= horizon then embedding_sum end as embedding_sum,
    case when l.n_tokens <= horizon then eigenvalues end as eigenvalues,
    case when l.n_tokens <= horizon then semantic_distances
        else list_transform(semantic_distances, lambda d: null::double) end as semantic_distances
)
from embedding_spectra s
join longest l using (run_id, prompt_id, selection)
