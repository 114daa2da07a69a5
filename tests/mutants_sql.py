"""The faults that `mutants` plants in SQL: by view, what stands there and what takes its place."""

from __future__ import annotations

SQL: dict[str, list[tuple[str, str]]] = {
    "ce_star_decomposition": [
        ("avg(entropy_sum) - avg(n) * avg(r)", "avg(entropy_sum) + avg(n) * avg(r)"),
        ("covar_pop(n, r)", "covar_samp(n, r)"),
        ("count(stop_entropy_sum) = count(*)", "count(stop_entropy_sum) > 0"),
    ],
    "collapse": [
        ("coalesce(d.generator, m.parent_id)", "m.parent_id"),
        ("case when d.generator is null then 0 else m.generation end", "m.generation"),
        ("where l.ancestor_generation > 0", "where l.ancestor_generation > 1"),
        ("order by c.scorer_id <> c.family || '.' || c.variant, c.scorer_id", "order by c.scorer_id"),
        ("and c.number_format is null", ""),
        ("< 0.1 * sum(occurrences)", "<= 0.2 * sum(occurrences)"),
        (" exclude group", ""),
        ("count(*) filter (where c.occurrences <= 2) as rare", "count(*) as rare"),
        ("sum(r.occurrences) as seen", "count(*) as seen"),
        (
            "s.template is not distinct from o.template and s.n_tokens = o.n_tokens\n        then",
            "true then",
        ),
        ("and k.n_outside = 0", ""),
        ("and same_policy(k.policy, 1, 0, 1)", ""),
        ("when u.n_rollouts = v.n_rollouts then", "when true then"),
        ("and r.model_id = m.origin_id as own", "as own"),
    ],
    "cost_per_token": [
        ("sum_of_all(tokens)", "sum(tokens)"),
        ("then sum_of_all(energy_j)", "then sum(energy_j)"),
        ("when count(distinct energy_method) <= 1", "when true"),
        ("nullif(seconds, 0)", "seconds"),
    ],
    "cross_entropy": [
        ("count(*) - count(scorer_surprisal_sum)", "count(scorer_surprisal_sum)"),
        ("sqrt(count(log_ratio))", "sqrt(count(*))"),
        ("stddev_samp(scorer_surprisal_sum)", "stddev_pop(scorer_surprisal_sum)"),
        ("then log_ratio end as log_ratio", "then abs(log_ratio) end as log_ratio"),
    ],
    "entropy_trajectory": [
        (") / position as rate_so_far", ") / n_tokens as rate_so_far"),
        ("sum(h) / sum(rollouts) as mean_entropy,", "avg(h / rollouts) as mean_entropy,"),
    ],
    "eos_trajectory": [
        ("and position = n_tokens", "and position <= n_tokens"),
        ("avg(h - stop_entropy_of(e))", "avg(h)"),
        ("avg(exp(e))", "exp(avg(e))"),
    ],
    "forking_tokens": [
        ("(n_tokens + 4) // 5", "n_tokens // 5 + 1"),
        ("list_reverse_sort(", "list_sort("),
        ("nullif(list_sum(h), 0)", "list_sum(h)"),
        ("'quantile_cont', 0.8", "'quantile_disc', 0.8"),
    ],
    "gain_forgetting": [
        ("where i.distance = 1 and", "where"),
        ("0 - o.transfer as", "o.transfer as"),
        ("q.gain >= p.gain", "q.gain > p.gain"),
        ("q.forgetting <= p.forgetting", "q.forgetting < p.forgetting"),
        ("where q.parent_scorer_id = p.parent_scorer_id\n            and", "where"),
    ],
    "information_density": [
        ("/ (n - 1) as surprisal_variance", "/ n as surprisal_variance"),
        ("(t - (n + 1) / 2)", "t / n"),
        ("(n * n - 1) / 12", "(n * n) / 12"),
        ("nullif(n_tokens, 1)", "n_tokens"),
    ],
    "kl_divergence": [
        ("stddev_samp(kl) / sqrt(count(kl))", "stddev_samp(kl) / sqrt(count(*))"),
        ("sqrt(sum(kl_se ** 2)) / count(kl)", "sqrt(sum(kl_se ** 2) / count(kl))"),
        ("sqrt(sum(cross_entropy_se ** 2))", "sum(cross_entropy_se)"),
        ("sum(n_outside)", "max(n_outside)"),
    ],
    "kl_trajectory": [
        ("-avg(q) as cross_entropy", "avg(q) as cross_entropy"),
        ("count(*) - count(q) as n_outside", "0 as n_outside"),
        ("then avg(p - q) end as kl,", "then avg(q - p) end as kl,"),
        ("sqrt(count(p - q))", "sqrt(count(p - q) - 1)"),
    ],
    "length_terciles": [
        ("order by n_tokens, sample\n", "order by sample\n"),
        (") - 1) * 3 / count(*)", ")) * 3 / count(*)"),
        (
            "diversity_of_sum(s.squared_norm, s.embedded)",
            "diversity_of_sum(s.squared_norm, m.n_rollouts - 1)",
        ),
        ("::double / norm as x", "::double as x"),
    ],
    "logging_check": [
        ("surprisal_sum - entropy_sum as x", "entropy_sum - surprisal_sum as x"),
        ("stddev_samp(x) as sd", "stddev_pop(x) as sd"),
        ("sqrt(n_rollouts) as z", "sqrt(n_rollouts - 1) as z"),
    ],
    "macros": [
        ("coalesce(p >= 5.7e-7,", "coalesce(p >= 5.7e-2,"),
        ("(policy_json ->> '$.top_k')::integer = at_top_k", "at_top_k is not null"),
        ("(policy_json ->> '$.top_p')::double = at_top_p", "at_top_p is not null"),
        ("hi - lo > 1e-12", "hi - lo > 1e-6"),
        ("greatest(least(r, 0.999999), -0.999999)", "greatest(least(r, 0.9999), -0.9999)"),
        ("(n * (n - 1.0))", "(n * n)"),
        ("case when n > 1 then 1 -", "case when n > 2 then 1 -"),
        ("when q::double = 1 then exp(-list_sum", "when q::double = 1 then exp(list_sum"),
    ],
    "model_length_terciles": [
        ("sum(n_rollouts)", "max(n_rollouts)"),
        ("avg(mean_length)", "sum(n_rollouts * mean_length) / sum(n_rollouts)"),
        ("avg(semantic_diversity)", "median(semantic_diversity)"),
    ],
    "model_metrics": [
        (
            "when rho_pearson is not null then greatest(n_rollouts - 3, 0)",
            "when rho_pearson is not null then n_rollouts",
        ),
        ("sum(w_kendall * rho_kendall) / nullif(sum(w_kendall), 0)", "avg(rho_kendall)"),
        ("exp(avg(ce_star) / avg(mean_length))", "exp(avg(ce_star / mean_length))"),
        ("exp(avg(ln(vendi_score)))", "avg(vendi_score)"),
        (
            "when cov_length_rate is not null then n_rollouts - 1",
            "when cov_length_rate is not null then n_rollouts",
        ),
    ],
    "panel": [
        ("p.vendi_score / p.n_rollouts", "p.vendi_score / p.n_tokens"),
        ("mean_length as N_bar", "ce_star as N_bar"),
    ],
    "prompt_metrics": [
        ("case when count(surprisal_sum) = count(*)", "case when count(surprisal_sum) > 0"),
        ("and a.sample < b.sample", "and a.sample <> b.sample and a.n <> b.n"),
        ("covar_samp(n, entropy_rate)", "covar_pop(n, entropy_rate)"),
        ("p.ce_star / ln(10)", "p.ce_star / log10(10)"),
        ("round(entropy_rate, 12) as r", "round(entropy_rate, 2) as r"),
        ("vendi_score(s.eigenvalues, 1)", "vendi_score(s.eigenvalues, 2)"),
        ("case when p.rate_varies then p.pearson_r", "case when p.distance_varies then p.pearson_r"),
    ],
    "prompts": [
        ("arg_min(text, coalesce(source, '') || text)", "any_value(text order by source desc)"),
        ("arg_min(reference, coalesce(source, '') || reference)", "null"),
    ],
    "rollout_metrics": [
        ("r.entropy_sum - r.stop_entropy_sum", "r.entropy_sum + r.stop_entropy_sum"),
        ("and d.selection = r.selection", "and d.selection = 'all'"),
        ("coalesce(m.embedder, 'none')", "m.embedder"),
    ],
    "scored_rollouts": [
        ("s.surprisal_sum - r.surprisal_sum", "r.surprisal_sum - s.surprisal_sum"),
        ("same_policy(s.policy, u.temperature, u.top_k, u.top_p)", "true"),
    ],
    "selected_rollouts": [
        ("where scored = n_rollouts", "where scored > 0"),
        ("and s.scorer_id = u.model_id", ""),
        ("coalesce(r.entropy_sum, o.entropy_sum)", "r.entropy_sum"),
        ("then s.surprisal_sum end as surprisal_sum", "then 0 end as surprisal_sum"),
        (
            "join selections s using (run_id, prompt_id, sample)",
            "join selections s using (run_id, prompt_id)",
        ),
    ],
    "token_differences": [
        ("scorer_token_logprob - token_logprob as", "token_logprob - scorer_token_logprob as"),
        ("read - chars + 1", "read - chars"),
        ("scorer_id, policy, selection order by position", "scorer_id, selection order by position"),
    ],
}
