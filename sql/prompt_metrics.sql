-- grain: one row per prompt of a run, embedder and selection
-- keys: run_id, prompt_id, embedder, selection
-- source: docs/measures.md, 'Per prompt'
with rollout as materialized (
    -- one number for the prompt: windows and the join over pairs are many times faster on it;
    -- rounded values decide ties, so that the last bits of a sum never make or break one
    select *, n_tokens::double as n,
        round(entropy_rate, 12) as r, round(semantic_distance, 12) as d,
        dense_rank() over (order by run_id, prompt_id, embedder, selection) as place
    from rollout_metrics
),
ranked as (
    -- mid-ranks, doubled: the first place among equals plus the last
    select *,
        rank() over by_n + cume_dist() over by_n * count(*) over (partition by place) as rank_n,
        rank() over by_r + cume_dist() over by_r * count(*) over (partition by place) as rank_r,
        rank() over by_d + cume_dist() over by_d * count(*) over (partition by place) as rank_d
    from rollout
    window by_n as (partition by place order by n),
        by_r as (partition by place order by r),
        by_d as (partition by place order by d)
),
per_prompt as (
    select place,
        any_value(family) as family, any_value(variant) as variant, any_value(task) as task,
        any_value(run_id) as run_id, any_value(prompt_id) as prompt_id,
        any_value(embedder) as embedder, any_value(selection) as selection,
        count(*) as n_rollouts,
        sum(n_tokens)::bigint as n_tokens,
        avg(entropy_sum) as ce_star,
        case when count(surprisal_sum) = count(*) then avg(surprisal_sum) end as surprisal_mean,
        avg(n) as mean_length,
        avg(entropy_rate) as entropy_rate,
        varies(min(n), max(n)) and varies(min(entropy_rate), max(entropy_rate)) as rate_varies,
        varies(min(n), max(n)) and varies(min(semantic_distance), max(semantic_distance))
            as distance_varies,
        corr(n, entropy_rate) as pearson_r,
        corr(rank_n, rank_r) as spearman_r,
        covar_samp(n, entropy_rate) as cov_length_rate,
        var_samp(n) as var_length,
        var_samp(entropy_rate) as var_rate,
        case when count(finish_reason) = count(*)
            then avg((finish_reason = 'length')::double) end as truncation_rate,
        corr(n, semantic_distance) as pearson_d,
        corr(rank_n, rank_d) as spearman_d,
        covar_samp(n, semantic_distance) as cov_length_diversity,
        case when count(log_mass_mean) = count(*) then avg(log_mass_mean) end as log_mass_mean
    from ranked
    group by place
),
kendall as (
    -- tau-b over the pairs of a prompt's rollouts
    select a.place,
        sum(sign(a.n - b.n) * sign(a.r - b.r))
            / nullif(sqrt(sum(abs(sign(a.n - b.n))) * sum(abs(sign(a.r - b.r)))), 0) as tau_r,
        sum(sign(a.n - b.n) * sign(a.d - b.d))
            / nullif(sqrt(sum(abs(sign(a.n - b.n))) * sum(abs(sign(a.d - b.d)))), 0) as tau_d
    from rollout a
    join rollout b on a.place = b.place and a.sample < b.sample
    group by a.place
)
select p.family, p.variant, p.task, p.run_id, p.prompt_id, p.embedder, p.selection,
    p.n_rollouts,
    p.n_tokens,
    p.ce_star,
    p.surprisal_mean,
    p.mean_length,
    p.entropy_rate,
    exp(p.ce_star / p.mean_length) as gen_ppl,
    exp(p.entropy_rate) as branching_factor,
    p.ce_star / ln(10) as canopy_size_log10,
    case when p.rate_varies then p.pearson_r end as rho_pearson,
    case when p.rate_varies then p.spearman_r end as rho_spearman,
    case when p.rate_varies then k.tau_r end as rho_kendall,
    p.cov_length_rate,
    p.var_length,
    p.var_rate,
    p.truncation_rate,
    -- the engine's product of a list that is NULL may fail, as it reads what stands beneath
    diversity_of_sum(case when s.embedding_sum is not null
        then list_inner_product(s.embedding_sum, s.embedding_sum) end, s.n) as semantic_diversity,
    case when p.distance_varies then p.pearson_d end as rho_length_diversity_pearson,
    case when p.distance_varies then p.spearman_d end as rho_length_diversity_spearman,
    case when p.distance_varies then k.tau_d end as rho_length_diversity_kendall,
    p.cov_length_diversity,
    vendi_score(s.eigenvalues, 1) as vendi_score,
    -- the kernel's squares sum to n^2 times those of its eigenvalues / n
    1 - diversity_of_sum(case when s.eigenvalues is not null
        then s.n::double * s.n * list_inner_product(s.eigenvalues, s.eigenvalues) end, s.n)
        as squared_similarity,
    number_of(squared_similarity) as diversity_number,
    p.log_mass_mean,
    1 - exp(p.log_mass_mean) as mass_cut
from per_prompt p
left join kendall k using (place)
left join embedding_spectra s using (run_id, prompt_id, embedder, selection)
