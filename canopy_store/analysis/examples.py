"""A few rollouts of a store, to be read one by one."""

from __future__ import annotations

import hashlib

import polars as pl

from canopy_store.sql.connection import Connection


def example_rollouts(
    con: Connection,
    models: pl.DataFrame,
    prompts: pl.DataFrame,
    *,
    embedder: str,
    per_prompt: int,
    prompts_per_task: int,
    selection: str = "all",
    seed: int = 0,
) -> pl.DataFrame:
    """One row per rollout chosen: its steps, text and prompt, the prompts that most models share first.

    Which prompts, and which rollouts of them, the seed decides, the same on every machine.

    Parameters
    ----------
    models, prompts : rows of ``model_metrics`` and ``prompt_metrics``, as `comparable` gives them
    embedder : of the semantic distances; NULL for a run that has none by it
    per_prompt : the most rollouts of a run and prompt
    prompts_per_task : the most prompts of a task

    Returns
    -------
    place (of the prompt in its task), turn (of the rollout in its prompt), task, run_id, prompt_id,
    sample, text, token_chars, n_tokens, finish_reason, entropy and logprob (a list of nats, one a
    token), entropy_rate, semantic_distance, prompt_text, messages; in the order to be read in. A
    rollout without entropies is not chosen.
    """
    places = _placed(prompts, seed).filter(pl.col("place") <= prompts_per_task)
    return con.sql(
        """
        with shown as (select unnest($runs) as run_id, unnest($embedders) as embedder),
        chosen as (
            select unnest($tasks) as task, unnest($prompt_ids) as prompt_id, unnest($places) as place
        ),
        picked as (
            select m.run_id, m.prompt_id, m.sample, c.place, m.entropy_rate,
                case when m.embedder = $embedder then m.semantic_distance end as semantic_distance,
                -- md5 orders the same on every machine and version, which DuckDB's own hash does not
                row_number() over (
                    partition by m.run_id, m.prompt_id
                    order by md5(concat_ws('|', $seed, m.prompt_id, m.sample))
                ) as turn
            from rollout_metrics m
            join shown using (run_id, embedder)
            join chosen c on c.task = m.task and c.prompt_id = m.prompt_id
            where m.selection = $selection and m.entropy_rate is not null
            qualify turn <= $per_prompt
        )
        select k.place, k.turn, r.task, r.run_id, r.prompt_id, r.sample, r.text, r.token_chars,
            r.n_tokens,
            r.finish_reason, r.entropy, r.logprob, k.entropy_rate, k.semantic_distance,
            p.text as prompt_text, p.messages
        from picked k
        join selected_rollouts r
            on r.run_id = k.run_id and r.prompt_id = k.prompt_id and r.sample = k.sample
            and r.selection = $selection
        left join prompts p on p.task = r.task and p.prompt_id = r.prompt_id
        order by k.place, r.task, r.prompt_id, k.turn, r.run_id
        """,
        params={
            "runs": models["run_id"].to_list(),
            "embedders": models["embedder"].to_list(),
            "tasks": places["task"].to_list(),
            "prompt_ids": places["prompt_id"].to_list(),
            "places": places["place"].to_list(),
            "embedder": embedder,
            "selection": selection,
            "seed": str(seed),
            "per_prompt": per_prompt,
        },
    ).pl()


def _placed(prompts: pl.DataFrame, seed: int) -> pl.DataFrame:
    """task, prompt_id and place, from 1 in each task: what most models share first, then by chance."""
    shared = prompts.group_by("task", "prompt_id").len("models")
    keys = [f"{seed}|{task}|{prompt}" for task, prompt in shared["task", "prompt_id"].iter_rows()]
    chance = [hashlib.md5(key.encode(), usedforsecurity=False).hexdigest() for key in keys]
    ordered = shared.with_columns(chance=pl.Series(chance, dtype=pl.String)).sort(
        "task", -pl.col("models").cast(pl.Int64), "chance"
    )
    return ordered.select("task", "prompt_id", place=pl.int_range(1, pl.len() + 1).over("task"))
