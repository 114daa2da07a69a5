-- grain: one row per prompt of a run, embedder and selection, as the regressions take it
-- keys: run_id, prompt_id, embedder, selection
-- source: docs/measures.md, 'Panel' and 'Errors in variables'
with errors as (
    -- what other rollouts of the prompt would change in its means, which all come from the same ones
    select run_id, prompt_id, embedder, selection,
        count(*) as m,
        var_samp(entropy_rate) / m as var_R,
        var_samp(n_tokens) / m as var_N,
        covar_samp(entropy_rate, n_tokens) / m as cov_RN,
        covar_with_diversity(covar_samp(entropy_rate, semantic_distance), m) as cov_RD,
        covar_with_diversity(covar_samp(n_tokens, semantic_distance), m) as cov_ND
    from rollout_metrics
    group by run_id, prompt_id, embedder, selection
),
row as materialized (
    select p.task, p.prompt_id, p.family, p.variant, run_id, embedder, selection,
        p.semantic_diversity as D,
        p.entropy_rate as R_bar,
        p.mean_length as N_bar,
        p.vendi_score,
        p.vendi_score / p.n_rollouts as vendi_share,
        (p.vendi_score - 1) / nullif(p.n_rollouts - 1, 0) as vendi_norm,
        p.n_rollouts,
        e.var_R, e.var_N, e.cov_RN, e.cov_RD, e.cov_ND
    from prompt_metrics p
    join errors e using (run_id, prompt_id, embedder, selection)
),
variants as (
    select variant, embedder, selection, reliability_of(var_R, R_bar) as reliability
    from row
    group by variant, embedder, selection
)
select row.*, v.reliability
from row
join variants v using (variant, embedder, selection)
