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

-- Whether a policy, as JSON, is sampling at this temperature, top-k and top-p, with these others, which are
-- off where they are NULL or not named.
create or replace macro same_policy(policy_json, at_temperature, at_top_k, at_top_p,
        at_min_p := null, at_typical_p := null, at_penalty := null) as
    coalesce((policy_json ->> '$.temperature')::double = at_temperature
        and (policy_json ->> '$.top_k')::integer = at_top_k
        and (policy_json ->> '$.top_p')::double = at_top_p
        and coalesce((policy_json ->> '$.min_p')::double, 0) = coalesce(at_min_p, 0)
        and coalesce((policy_json ->> '$.typical_p')::double, 1) = coalesce(at_typical_p, 1)
        and coalesce((policy_json ->> '$.repetition_penalty')::double, 1) = coalesce(at_penalty, 1), false);

-- One token's, or rollout's, part of the k3 estimate of a KL, from its log ratio: never
-- below 0, where rounding alone would take it.
create or replace macro k3_of(log_ratio) as abs(exp(log_ratio) - 1 - log_ratio);

-- Simpson's rule over an odd number of values, a step apart.
create or replace macro simpson(vals, step) as
    step / 3 * list_sum(list_transform(vals, lambda y, k: y * case
        when k = 1 or k = len(vals) then 1 when k % 2 = 0 then 4 else 2 end));

-- The integral of cos^(f - 1) over a quarter turn.
create or replace macro student_whole(f) as
    sqrt(pi()) / 2 * exp(lgamma(f / 2) - lgamma((f + 1) / 2));

-- Two-sided p of Student's t with n - 1 degrees of freedom f; NULL of one. The tail is an integral over
-- x = exp(-v^2) in place of cos^f; where t is small, 1 - the integral over the angle. Simpson's rule.
create or replace macro student_p(t, n) as
    case when n < 2 then null
    when abs(t) < 1 then 1 - simpson(
        list_transform(range(0, 401), lambda i: pow(cos(atan(abs(t) / sqrt(n - 1)) * i / 400), n - 2)),
        atan(abs(t) / sqrt(n - 1)) / 400) / student_whole(n - 1.0)
    else simpson(
        list_transform(range(0, 1001), lambda i: 2 * (i * 0.007) * exp(-((i * 0.007) ** 2))
            / sqrt(1 - exp(-2 * (i * 0.007) ** 2 / (n - 1)) / (1 + t * t / (n - 1)))), 0.007)
        * exp(-(n - 1) / 2.0 * ln(1 + t * t / (n - 1))) / (n - 1) / student_whole(n - 1.0) end;

-- The order-2 number of distinct rollouts; NULL where none resemble each other: it would be infinite.
create or replace macro number_of(squared_similarity) as
    case when squared_similarity > 1e-12 then 1 / squared_similarity end;

-- Whether a mean that must be 0 may be 0, by its p: five standard errors of a normal. What has no p, as
-- nothing varies or as there is one alone, passes only where it is 0 (greedy).
create or replace macro passes(p, excess) as coalesce(p >= 5.7e-7, abs(excess) < 1e-6);

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

-- The kind of text that a token stands for, by the first pattern that all of it matches. Spaces around it
-- do not count, and case does not. A piece of a word is content; half a character, or a mix, is the rest.
create or replace macro token_type(token) as
    case
        when regexp_full_match(token, '\s*\n\s*') then 'newline'
        when regexp_full_match(token, '\s+') then 'space'
        when regexp_full_match(token, '\s*\p{N}[\p{N}.,:/]*\s*') then 'number'
        when regexp_full_match(token, '\s*[\p{P}\p{S}]+\s*') then 'punctuation'
        when regexp_full_match(token, '(?i)\s*(a|about|above|across|after|again|against|all|also|although|am'
            || '|among|an|and|another|any|are|aren''t|around|as|at|be|because|been|before|being|below|between'
            || '|both|but|by|can|cannot|can''t|could|couldn''t|did|didn''t|do|does|doesn''t|doing|don''t|down'
            || '|during|each|either|else|every|few|for|from|further|had|has|have|having|he|her|here|hers'
            || '|herself|him|himself|his|how|however|i|if|in|into|is|isn''t|it|its|itself|just|may|me|might'
            || '|mine|more|most|must|my|myself|neither|no|nor|not|of|off|on|once|one|only|onto|or|other|others'
            || '|ought|our|ours|ourselves|out|over|own|per|same|shall|she|should|shouldn''t|since|so|some|such'
            || '|than|that|the|their|theirs|them|themselves|then|there|these|they|this|those|though|through'
            || '|to|too|toward|towards|under|until|up|upon|us|very|was|wasn''t|we|were|weren''t|what|when'
            || '|where|whether|which|while|who|whom|whose|why|will|with|within|without|won''t|would|wouldn''t'
            || '|yet|you|your|yours|yourself|yourselves|''s|''t|''re|''ve|''ll|''d|''m)\s*') then 'function word'
        when regexp_full_match(token, '\s*[\p{L}\p{M}''’-]+\s*') then 'content'
        else 'rest'
    end;

-- The same by patterns of one's own: a list of {'type': …, 'pattern': …}, of which the first that matches
-- all of the token counts, else 'rest'.
create or replace macro token_type_by(token, patterns) as
    coalesce(list_filter(patterns, lambda p: regexp_full_match(token, p.pattern))[1].type, 'rest');

-- A sum that is NULL where a value is.
create or replace macro sum_of_all(x) as case when count(x) = count(*) then sum(x) end;

-- Of an item's options: 1 where the right one has the most, 0 where a wrong one has more, and where k
-- have the most alike, the right one among them, 1 / k. NULL where an option has no value.
create or replace macro share_of_best(x, best, correct) as
    case when count(x) = count(*)
        then coalesce(max((x = best)::integer) filter (where correct), 0)
            / nullif(sum((x = best)::integer), 0)::double end;

-- The right option's value less that of the best wrong one.
create or replace macro margin_of(x, correct) as
    case when count(x) = count(*)
        then max(x) filter (where correct) - max(x) filter (where not correct) end;

-- Standard error of a mean over items, from the sums over clusters of their deviations from it: what other
-- clusters would change. NULL of one cluster.
create or replace macro clustered_se(deviations, items) as
    case when count(*) > 1 and count(deviations) = count(*)
        then sqrt(count(*) / (count(*) - 1.0) * sum(deviations ** 2)) / sum(items) end;

-- A difference; NULL of two that are infinite alike.
create or replace macro difference(a, b) as nullif(a - b, 'nan'::double);

-- The words of a text: letters, marks and digits that stand together, in lower case.
create or replace macro words_of(text) as regexp_extract_all(lower(text), '[\p{L}\p{M}\p{N}]+');

-- The pairs of words that follow each other in a text.
create or replace macro bigrams(text) as
    list_transform(list_zip(words_of(text)[:-2], words_of(text)[2:]), lambda p: p[1] || ' ' || p[2]);

-- Chance that none of k drawn of n, without replacement, is one of the c right ones: C(n - c, k) / C(n, k),
-- as a product of as many factors as the less of k and c, so that nothing overflows. NULL where k > n.
create or replace macro missed_by(k, c, n) as
    case when k <= n then case when k > n - c then 0.0 else coalesce(list_product(
        list_transform(range(0, least(k, c)::bigint), lambda i: 1 - greatest(k, c) / (n - i)::double)), 1.0)
        end end;

-- Chance that all of k drawn are right: C(c, k) / C(n, k). NULL where k > n.
create or replace macro hit_by_all(k, c, n) as
    case when k <= n then case when k > c then 0.0 else list_product(
        list_transform(range(0, k::bigint), lambda i: (c - i) / (n - i)::double)) end end;

-- Distinct meanings among the first k rollouts, from their clusters in order; NULL of fewer than k.
create or replace macro distinct_k(labels, k) as
    case when len(labels) >= k then len(list_distinct(labels[:k]))::double end;

-- Their utility: the mean over the first k of 1 for the first of its meaning and 0 for a repetition,
-- weighted by 0.8^i, i from 0: a reader who goes on with that chance; NULL of fewer than k.
create or replace macro utility_k(labels, k) as
    case when len(labels) >= k then list_sum(list_transform(labels[:k],
            lambda c, i: case when list_position(labels, c) = i then pow(0.8, i - 1) else 0 end))
        / ((1 - pow(0.8, k)) / (1 - 0.8)) end;
