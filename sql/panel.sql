-- grain: one row per prompt of a run, embedder and selection, as the regressions take it
-- keys: run_id, prompt_id, embedder, selection
-- source: docs/measures.md, 'Panel'
select task, prompt_id, family, variant, run_id, embedder, selection,
    semantic_diversity as D,
    entropy_rate as R_bar,
    mean_length as N_bar,
    vendi_score,
    vendi_score / n_rollouts as vendi_share
from prompt_metrics
