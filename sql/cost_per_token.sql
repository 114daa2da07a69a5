-- grain: one row per job: its kind, its name and the run, task or corpus that it was over
-- keys: kind, name, run_id
-- source: docs/measures.md, 'Cost'
with summed as (
    select kind, name, run_id,
        string_agg(distinct device, ', ' order by device) as device,
        string_agg(distinct energy_method, ', ' order by energy_method) as energy_method,
        count(*) as n_shards,
        sum_of_all(tokens)::bigint as tokens,
        sum_of_all(seconds) as seconds,
        -- counters of different scope do not add up to one energy
        case when count(distinct energy_method) <= 1 then sum_of_all(energy_j) end as energy_j
    from work
    group by all
)
select kind, name, run_id, device, n_shards, tokens, seconds,
    tokens / nullif(seconds, 0) as tokens_per_second,
    energy_method, energy_j,
    energy_j / nullif(tokens, 0) as joules_per_token
from summed
