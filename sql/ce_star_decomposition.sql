-- grain: one row per run and selection
-- keys: run_id, selection
-- source: docs/measures.md, 'Decompositions': both are exact identities
with rollout as (
    select family, variant, task, run_id, prompt_id, selection, n_tokens::double as n,
        entropy_sum, entropy_sum / n_tokens as r, stop_entropy_sum
    from selected_rollouts
),
per_prompt as (
    select family, variant, task, run_id, prompt_id, selection,
        avg(entropy_sum) as ce_star, avg(n) as n, avg(r) as r,
        -- population covariance: of a single rollout it is 0
        avg(entropy_sum) - avg(n) * avg(r) as covariance,
        case when count(stop_entropy_sum) = count(*) then avg(stop_entropy_sum) end as stop_entropy
    from rollout
    group by all
)
select family, variant, task, run_id, selection,
    avg(ce_star) as ce_star,
    avg(n) * avg(r) as length_rate_product,
    avg(covariance) as cov_within,
    covar_pop(n, r) as cov_between,
    case when count(stop_entropy) = count(*) then avg(stop_entropy) end as stop_entropy,
    case when count(stop_entropy) = count(*) then avg(ce_star - stop_entropy) end as content_entropy
from per_prompt
group by all
