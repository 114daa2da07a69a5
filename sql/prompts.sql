-- grain: one row per prompt of a task
-- keys: task, prompt_id
-- source: the files of several ingests may hold the same prompt: each value is shown where any row has it
select task, prompt_id,
    arg_min(text, coalesce(source, '') || text) as text,
    arg_min(messages, coalesce(source, '') || messages) as messages,
    coalesce(min(source) filter (text is not null or messages is not null), min(source)) as source,
    min(license) as license,
    arg_min(reference, coalesce(source, '') || reference) as reference
from stored
group by all
