-- grain: one row per run, grader, selection and k, pooled over prompts
-- keys: run_id, grader, selection, k
-- source: docs/measures.md, 'Right and wrong'
select family, variant, task, run_id, grader, selection, k,
    count(*) as n_prompts,
    count(pass_at_k) as n_counted,
    avg(pass_at_k) as pass_at_k,
    avg(pass_hat_k) as pass_hat_k
from pass_at_k
group by all
