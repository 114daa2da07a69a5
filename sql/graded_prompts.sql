-- grain: one row per prompt of a run, grader and selection
-- keys: run_id, prompt_id, grader, selection
-- source: docs/measures.md, 'Right and wrong'
with graded as (
    select run_id, prompt_id, sample, grader, answer, correct, score from grades
    where correct is not null
),
chosen as (
    select *, 'all' as selection from graded
    union all by name
    select g.*, s.selection from graded g join selections s using (run_id, prompt_id, sample)
)
select u.family, u.variant, u.task, run_id, c.prompt_id, c.grader, c.selection,
    count(*) as n_graded,
    count_if(c.correct)::bigint as n_correct,
    avg(c.correct::integer) as accuracy,
    case when count(c.score) = count(*) then avg(c.score) end as mean_score,
    -- a grader that names no answer where it finds one right says nothing by naming none
    case when count_if(c.correct and c.answer is null) = 0
        then avg((c.answer is null)::integer) end as no_answer
from chosen c
join runs u using (run_id)
group by all
