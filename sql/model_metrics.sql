-- grain: one row per run, embedder and selection, pooled over prompts
-- keys: run_id, embedder, selection
-- source: docs/measures.md, 'Pooled over prompts'
with weighted as (
    select *,
        -- a prompt without the correlation drops out, its weight too
        case when rho_pearson is not null then greatest(n_rollouts - 3, 0) end as w_pearson,
        case when rho_spearman is not null then greatest(n_rollouts - 3, 0) end as w_spearman,
        case when rho_kendall is not null then n_rollouts * (n_rollouts - 1) / 2 end as w_kendall,
        case when cov_length_rate is not null then n_rollouts - 1 end as w_cov,
        case when rho_length_diversity_pearson is not null
            then greatest(n_rollouts - 3, 0) end as w_pearson_d,
        case when rho_length_diversity_spearman is not null
            then greatest(n_rollouts - 3, 0) end as w_spearman_d,
        case when rho_length_diversity_kendall is not null
            then n_rollouts * (n_rollouts - 1) / 2 end as w_kendall_d,
        case when cov_length_diversity is not null then n_rollouts - 1 end as w_cov_d
    from prompt_metrics
)
select family, variant, task, run_id, embedder, selection,
    count(*) as n_prompts,
    sum(n_rollouts)::bigint as n_rollouts,
    sum(n_tokens)::bigint as n_tokens,
    avg(ce_star) as ce_star,
    avg(surprisal_mean) as surprisal_mean,
    avg(mean_length) as mean_length,
    avg(entropy_rate) as entropy_rate,
    exp(avg(ce_star) / avg(mean_length)) as gen_ppl,
    exp(avg(entropy_rate)) as branching_factor,
    avg(ce_star) / ln(10) as canopy_size_log10,
    tanh(sum(w_pearson * fisher_z(rho_pearson)) / nullif(sum(w_pearson), 0)) as rho_pearson,
    tanh(sum(w_spearman * fisher_z(rho_spearman)) / nullif(sum(w_spearman), 0)) as rho_spearman,
    sum(w_kendall * rho_kendall) / nullif(sum(w_kendall), 0) as rho_kendall,
    case when count(rho_pearson) > 0
        then sum(cov_length_rate) / sqrt(sum(var_length) * sum(var_rate)) end as rho_pooled,
    sum(w_cov * cov_length_rate) / nullif(sum(w_cov), 0) as cov_length_rate,
    avg(truncation_rate) as truncation_rate,
    avg(semantic_diversity) as semantic_diversity,
    tanh(sum(w_pearson_d * fisher_z(rho_length_diversity_pearson)) / nullif(sum(w_pearson_d), 0))
        as rho_length_diversity_pearson,
    tanh(sum(w_spearman_d * fisher_z(rho_length_diversity_spearman)) / nullif(sum(w_spearman_d), 0))
        as rho_length_diversity_spearman,
    sum(w_kendall_d * rho_length_diversity_kendall) / nullif(sum(w_kendall_d), 0)
        as rho_length_diversity_kendall,
    sum(w_cov_d * cov_length_diversity) / nullif(sum(w_cov_d), 0) as cov_length_diversity,
    exp(avg(ln(vendi_score))) as vendi_score,
    avg(squared_similarity) as squared_similarity,
    number_of(avg(squared_similarity)) as diversity_number,
    avg(log_mass_mean) as log_mass_mean,
    1 - exp(avg(log_mass_mean)) as mass_cut
from weighted
group by all
