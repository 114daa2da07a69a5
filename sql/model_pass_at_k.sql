-- grain: one row per run, grader, selection and k, pooled over prompts
-- keys: run_id, grader, selection, k
-- source: docs/measures.md, 'Right and wrong'
select family, variant, task, run_id, grader, selection, k,
    count(*) as n_prompts,
    count(pass_at_k) as n_counted,
    -- in one order, so that the last bit does not depend on how shards are cut
    avg(pass_at_k order by prompt_id) as pass_at_k,
    avg(pass_hat_k order by prompt_id) as pass_hat_k
from pass_at_k
group by all
