-- grain: one row per job and what it was over
-- keys: kind, name, run_id
-- source: docs/measures.md, 'Cost'
with summed as (
    select kind, name, run_id,
        count(*) as n_shards,
        sum(rows)::bigint as n_rows,
        -- a sum over some of the shards would be none of the job's
        case when count(tokens) = count(*) then sum(tokens)::bigint end as n_tokens,
        case when count(seconds) = count(*) then sum(seconds) end as seconds,
        case when count(energy_j) = count(*) and count(distinct energy_method) = 1
            then sum(energy_j) end as energy_j,
        string_agg(distinct energy_method, ', ' order by energy_method) as energy_method,
        string_agg(distinct device, ', ' order by device) as device
    from work
    group by all
)
select kind, name, run_id, n_shards, n_rows, n_tokens, seconds,
    n_tokens / nullif(seconds, 0) as tokens_per_second,
    energy_j,
    energy_j / nullif(n_tokens, 0) as joules_per_token,
    energy_method, device
from summed
