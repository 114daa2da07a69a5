-- grain: one row per rollout and selection
-- keys: run_id, prompt_id, sample, selection
-- source: docs/measures.md, 'Selections'; 'all' is every rollout
select *, 'all' as selection
from rollouts
union all by name
select r.*, s.selection
from rollouts r
join selections s using (run_id, prompt_id, sample)
