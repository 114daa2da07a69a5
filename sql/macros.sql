-- Small pieces the views share. Sources: docs/measures.md.

-- Vendi score of any order q from the eigenvalues of the cosine kernel / n (Friedman and Dieng 2023;
-- orders: Pasarkar and Dieng 2024). q = 0 counts the eigenvalues above rounding, 1 is exp(Shannon),
-- 'inf' is 1 / the largest.
create or replace macro vendi_score(eigenvalues, q) as
    case
        when eigenvalues is null or len(eigenvalues) = 0 then null
        when isinf(q::double) then 1 / list_max(eigenvalues::double[])
        when q::double = 1 then exp(-list_sum(list_transform(eigenvalues::double[],
            lambda x: case when x > 0 then x * ln(x) else 0 end)))
        when q::double = 0 then len(list_filter(eigenvalues::double[], lambda x: x > 1e-12))::double
        else pow(list_sum(list_transform(list_filter(eigenvalues::double[], lambda x: x > 1e-12),
            lambda x: pow(x, q::double))), 1 / (1 - q::double))
    end;

-- Whether values between lo and hi vary by more than rounding: a correlation with a constant is NULL.
create or replace macro varies(lo, hi) as
    coalesce(hi - lo > 1e-12 * greatest(1, abs(lo), abs(hi)), false);

-- Binary entropy, in nats, of an event of log-probability e.
create or replace macro stop_entropy_of(e) as
    case when e is null then null when e >= 0 or e = '-inf'::double or exp(e::double) = 0
              or exp(e::double) >= 1 then 0
         else -(exp(e::double) * e + (1 - exp(e::double)) * ln(1 - exp(e::double))) end;

-- Fisher's z of a correlation, clipped as the paper's code clips it.
create or replace macro fisher_z(r) as atanh(greatest(least(r, 0.999999), -0.999999));

-- Whether a policy, as JSON, is sampling at this temperature, top-k and top-p.
create or replace macro same_policy(policy_json, at_temperature, at_top_k, at_top_p) as
    coalesce((policy_json ->> '$.temperature')::double = at_temperature
        and (policy_json ->> '$.top_k')::integer = at_top_k
        and (policy_json ->> '$.top_p')::double = at_top_p, false);

-- 1 - the mean cosine similarity over the pairs of n unit vectors, from the squared norm of their sum.
create or replace macro diversity_of_sum(squared_norm, n) as
    case when n > 1 then 1 - (squared_norm - n) / (n * (n - 1.0)) end;

-- Covariance of a mean over n rollouts with the semantic diversity of the same rollouts, from the sample
-- covariance of the rollouts' values and semantic distances. Diversity is a mean over pairs, so each
-- rollout is in it twice over; a rollout's distance rests on the others too, which n - 2 takes out.
create or replace macro covar_with_diversity(covariance, n) as
    case when n > 2 then 2 * (n - 1.0) / (n - 2.0) * covariance / n end;

-- Reliability of means: the share of their variance that is not the error of their rollouts.
create or replace macro reliability_of(error_variance, value) as
    case when varies(min(value), max(value))
        then 1 - avg(error_variance) / var_samp(value) filter (where error_variance is not null) end;
