-- grain: one row per prompt of a run, grader, selection and k
-- keys: run_id, prompt_id, grader, selection, k
-- source: docs/measures.md, 'Right and wrong'; arXiv 2107.03374, section 2.1 (pass@k)
with most as (
    select run_id, grader, selection, max(n_graded) as n
    from graded_prompts
    group by all
),
sizes as (
    -- the powers of two up to the most rollouts of a prompt, and this number itself
    select run_id, grader, selection, unnest(list_distinct(list_append(
        list_filter(list_transform(range(0, 32), lambda i: 1::bigint << i), lambda x: x <= n), n))) as k
    from most
)
select p.family, p.variant, p.task, run_id, p.prompt_id, grader, selection, s.k,
    p.n_graded,
    p.n_correct,
    1 - missed_by(s.k, p.n_correct, p.n_graded) as pass_at_k,
    hit_by_all(s.k, p.n_correct, p.n_graded) as pass_hat_k
from graded_prompts p
join sizes s using (run_id, grader, selection)
