"""What the report shows, read from a store's views: aggregated in SQL, sampled where it is long."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

from canopy_store import sql, store
from canopy_store.errors import StoreError, UsageError
from canopy_store.upkeep.status import status

MAX_PANELS = 24  # more small charts than this are no longer read
MAX_POINTS = 2400  # prompts in the scatter
MAX_POSITIONS = 240  # positions of a trajectory
MIN_ACTIVE = 0.1  # share of a run's rollouts that must reach a position for it to be drawn
EXPLORER_BYTES = 2_500_000
ROLLOUTS_PER_PROMPT = 6


@dataclass
class Facts:
    """A store as the report sees it.

    ``shown`` has one row per (family, variant, task): the latest complete run of it, with its pooled
    metrics. ``prompts`` has one row per prompt of those runs. Measures that rest on embeddings are NULL
    in both where the run has none by ``embedder``.
    """

    con: duckdb.DuckDBPyConnection
    baseline: str
    selection: str
    embedder: str | None
    seed: int
    runs: pl.DataFrame
    metrics: pl.DataFrame
    shown: pl.DataFrame
    prompts: pl.DataFrame
    notes: list[str] = field(default_factory=list)

    @property
    def variants(self) -> list[str]:
        """The baseline first, the others in alphabetical order."""
        names = self.shown["variant"].unique().to_list()
        return sorted(names, key=lambda name: (name != self.baseline, name))

    @property
    def families(self) -> list[str]:
        """In alphabetical order."""
        return sorted(self.shown["family"].unique().to_list())

    @property
    def treated(self) -> list[str]:
        """The variants that are compared with the baseline; none when it is not there."""
        names = self.variants
        return names[1:] if self.baseline in names else []

    @property
    def panels(self) -> list[str]:
        """One small chart each: a task, with its family in front where there are several."""
        return self.shown["panel"].unique().sort().to_list()[:MAX_PANELS]

    def query(self, text: str, **parameters: Any) -> pl.DataFrame:
        """A frame from SQL with $parameters."""
        return self.con.sql(text, params=parameters).pl()


def gather(root: str | Path, *, baseline: str, selection: str, embedder: str | None, seed: int) -> Facts:
    """The facts of a store.

    Raises
    ------
    StoreError
        No store there, or nothing in it.
    UsageError
        No such selection or embedder.
    """
    root = store.require(root)
    runs = status(root)
    if runs.is_empty():
        raise StoreError(
            f"{root}: the store is empty; fill it with canopy ingest rollouts or canopy import"
        )
    con = sql.connect(root)
    try:
        return _gather(con, runs, baseline, selection, embedder, seed)
    except BaseException:
        con.close()
        raise


def _gather(
    con: duckdb.DuckDBPyConnection,
    runs: pl.DataFrame,
    baseline: str,
    selection: str,
    embedder: str | None,
    seed: int,
) -> Facts:
    con.execute("create temp table metrics as from model_metrics")
    metrics = con.sql("from metrics order by family, task, variant, run_id, embedder").pl()
    if not metrics.is_empty():
        _check("selection", selection, metrics["selection"].unique().to_list())
    embedder = _embedder(con, embedder, selection)
    asked = {"selection": selection, "embedder": embedder}
    con.execute(_SHOWN, asked)
    con.execute(_PROMPT, asked)
    shown = con.sql("from shown order by family, task, variant").pl()
    facts = Facts(
        con,
        baseline,
        selection,
        embedder,
        seed,
        runs,
        metrics,
        shown,
        con.sql("from prompt order by family, task, variant, prompt_id").pl(),
    )
    facts.notes = _notes(facts)
    return facts


# Several runs of one model and task differ in how they sampled: the latest speaks for the model.
_SHOWN = """
create temp table shown as
with best as (
    select * from metrics where selection = $selection
    qualify row_number() over (
        partition by run_id order by coalesce(embedder = $embedder, false) desc, embedder
    ) = 1
),
latest as (
    select b.* from best b join runs r using (run_id)
    qualify row_number() over (
        partition by b.family, b.variant, b.task order by r.finished_at desc, b.run_id desc
    ) = 1
)
select * replace (
        case when embedder = $embedder then semantic_diversity end as semantic_diversity,
        case when embedder = $embedder then vendi_score end as vendi_score
    ),
    case when count(distinct family) over () > 1 then family || ' · ' || task else task end as panel
from latest
"""

_PROMPT = """
create temp table prompt as
select p.family, p.variant, p.task, p.run_id, p.prompt_id, s.panel, p.n_rollouts, p.ce_star,
    p.mean_length, p.entropy_rate, p.rho_pearson,
    case when p.embedder = $embedder then p.semantic_diversity end as semantic_diversity,
    case when p.embedder = $embedder then p.vendi_score end as vendi_score
from prompt_metrics p
join shown s on p.run_id = s.run_id and p.embedder = s.embedder and p.selection = $selection
"""


def _check(what: str, asked: str, there: list[str]) -> None:
    if asked not in there:
        raise UsageError(f"no {what} {asked!r} in the store; there is {', '.join(sorted(there))}")


def _embedder(con: duckdb.DuckDBPyConnection, asked: str | None, selection: str) -> str | None:
    """The one asked for, or the one that has embedded the most runs."""
    rows = con.execute(
        "select embedder from embedding_spectra where selection = ?"
        " group by embedder order by count(distinct run_id) desc, embedder",
        [selection],
    ).fetchall()
    there = [name for (name,) in rows]
    if asked is not None:
        if not there:
            raise UsageError(f"no embedder {asked!r} in the store: nothing is embedded yet")
        _check("embedder", asked, there)
        return asked
    return there[0] if there else None


def _notes(facts: Facts) -> list[str]:
    """What a reader must know before the charts: what is missing, what stands for what."""
    notes = []
    unfinished = facts.runs.filter(~pl.col("complete"))["run_id"].to_list()
    if unfinished:
        named = ", ".join(unfinished[:6]) + (" and more" if len(unfinished) > 6 else "")
        notes.append(f"Not complete, and left out until the same ingest is run again: {named}.")
    if facts.shown.is_empty():
        return ["No run is complete yet, so there is nothing to measure.", *notes]
    names = facts.variants
    if facts.baseline not in names:
        notes.append(
            f"No variant is named {facts.baseline}: nothing can be compared with it. "
            f"There is {', '.join(names)}; choose one as the baseline."
        )
    elif len(names) == 1:
        notes.append(f"The only variant is {names[0]}: a second one is needed to compare.")
    if facts.embedder is None:
        notes.append("Nothing is embedded: run canopy ingest embed for semantic diversity.")
    elif facts.shown["semantic_diversity"].null_count():
        notes.append(f"Not every run is embedded by {facts.embedder}.")
    complete = facts.runs["complete"].sum()
    if complete > len(facts.shown):
        notes.append(
            f"{complete} runs are complete; where a model has several on one task, charts show the "
            f"latest ({len(facts.shown)} runs). The table lists all."
        )
    panels = facts.shown["panel"].n_unique()
    if panels > MAX_PANELS:
        notes.append(f"Charts with one panel a task show the first {MAX_PANELS} of {panels}.")
    return notes


def trajectory(facts: Facts) -> pl.DataFrame:
    """One row per run and position: mean_entropy and mean_entropy_rate, in nats and nats per token.

    Cut where fewer than MIN_ACTIVE of the run's rollouts are still going; long ones are thinned to
    every k-th position.
    """
    return facts.query(
        """
        with reach as (
            select t.*, s.panel, max(active) over (partition by run_id) as started
            from entropy_trajectory t join shown s using (run_id)
            where t.selection = $selection
        ),
        kept as (
            select *, greatest(1, ceil(max(position) over () / $most))::integer as every
            from reach where active >= greatest(least(started, 3), $share * started)
        )
        select panel, variant, position, active,
            round(mean_entropy, 4) as mean_entropy, round(mean_entropy_rate, 4) as mean_entropy_rate
        from kept where position % every = 1 % every
        order by panel, variant, position
        """,
        selection=facts.selection,
        share=MIN_ACTIVE,
        most=MAX_POSITIONS,
    )


def lengths(facts: Facts, points: int = 90) -> pl.DataFrame:
    """One row per run and grid point: the density of n_tokens there, per token.

    A Gaussian kernel with Silverman's bandwidth (at least half a token), reflected at one token and,
    where rollouts were cut, at the longest, so that no mass leaks to lengths that cannot be.
    """
    counted = facts.query(
        """
        select s.panel, r.variant, r.n_tokens::double as n, count(*)::double as w,
            coalesce(bool_or(finish_reason = 'length'), false) as cut
        from rollout_metrics r
        join shown s on r.run_id = s.run_id and r.embedder = s.embedder
        where r.selection = $selection group by all order by all
        """,
        selection=facts.selection,
    )
    rows: list[dict[str, Any]] = []
    for (panel,), group in counted.group_by(["panel"], maintain_order=True):
        grid = np.linspace(1, max(float(group["n"].max()), 2.0), points)  # type: ignore[arg-type]
        for (variant,), one in group.group_by(["variant"], maintain_order=True):
            cut = float(one["n"].max()) if one["cut"].any() else None  # type: ignore[arg-type]
            density = _density(one["n"].to_numpy(), one["w"].to_numpy(), grid, cut)
            rows += [
                {"panel": panel, "variant": variant, "length": round(float(x), 2), "density": float(y)}
                for x, y in zip(grid, density, strict=True)
            ]
    return pl.DataFrame(rows)


def _density(n: np.ndarray, w: np.ndarray, grid: np.ndarray, cut: float | None) -> np.ndarray:
    total = w.sum()
    spread = np.sqrt(np.average((n - np.average(n, weights=w)) ** 2, weights=w))
    width = max(0.9 * spread * total**-0.2, 0.5)
    out = np.zeros(len(grid))
    for image in (n, 1 - n, *([] if cut is None else [2 * cut + 1 - n])):
        z = (grid[:, None] - image[None, :]) / width  # (grid, lengths)
        out += (np.exp(-0.5 * z**2) * w).sum(axis=1)
    if cut is not None:
        out[grid > cut + 0.5] = 0
    return (out / (total * width * np.sqrt(2 * np.pi))).round(6)


def diversity_points(facts: Facts) -> tuple[pl.DataFrame, int]:
    """Prompts of the scatter with the ends of each fitted line, and how many prompts there are.

    Lines are least squares over every prompt, whether its point is drawn or not.
    """
    there = facts.prompts.drop_nulls(["semantic_diversity", "entropy_rate"])
    there = there.filter(pl.col("panel").is_in(facts.panels))
    columns = ["panel", "variant", "prompt_id", "entropy_rate", "semantic_diversity"]
    points = there.select(columns)
    if len(points) > MAX_POINTS:
        points = points.sample(MAX_POINTS, seed=facts.seed).sort(columns[:3])
    lines = facts.query(
        """
        with fit as (
            select panel, variant, min(entropy_rate) as low, max(entropy_rate) as high,
                regr_slope(semantic_diversity, entropy_rate) as slope,
                regr_intercept(semantic_diversity, entropy_rate) as start
            from prompt where semantic_diversity is not null group by all having count(*) > 2
        )
        select panel, variant, '' as prompt_id, unnest([low, high]) as entropy_rate,
            start + slope * unnest([low, high]) as semantic_diversity
        from fit where isfinite(slope) order by all
        """
    )
    lines = lines.filter(pl.col("panel").is_in(facts.panels))
    both = pl.concat(
        [
            points.with_columns(kind=pl.lit("prompt")),
            lines.with_columns(kind=pl.lit("line")),
        ]
    )
    return both.with_columns(pl.col("entropy_rate", "semantic_diversity").round(5)), len(there)


def explorer(facts: Facts, rollouts: int) -> dict[str, Any]:
    """Prompts, models and a sample of rollouts with every step, ready for JSON.

    Prompts that most models answered come first; which of them, and which rollouts, the seed decides.
    Steps are whole hundredths of a nat, which halves the page.
    """
    models = facts.shown.select("run_id", "family", "variant", "task").to_dicts()
    if not models:
        return {"prompts": [], "models": [], "rollouts": [], "of": 0}
    each = max(1, min(ROLLOUTS_PER_PROMPT, rollouts // len(models)))
    per_task = max(1, rollouts // (each * len(models)))
    asked = {"seed": str(facts.seed), "each": each, "prompts": per_task}
    facts.con.execute(_PICKED, {**asked, "selection": facts.selection})
    picked = facts.query(_PICKED_ROLLOUTS, selection=facts.selection)
    places = {m["run_id"]: i for i, m in enumerate(models)}
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    kept: list[dict[str, Any]] = []
    size = 0
    for row in picked.iter_rows(named=True):
        key = (row["task"], row["prompt_id"])
        one = _rollout(row, places[row["run_id"]])
        size += len(json.dumps(one))
        if size > EXPLORER_BYTES or len(kept) >= rollouts:
            break
        prompts.setdefault(key, {"place": len(prompts), "task": row["task"], "text": _prompt_text(row)})
        kept.append({**one, "p": prompts[key]["place"]})
    total = int(facts.shown["n_rollouts"].sum())
    return {"prompts": list(prompts.values()), "models": models, "rollouts": kept, "of": total}


# md5 orders the same on every machine and version, which DuckDB's sample and hash do not promise.
_PICKED = """
create or replace temp table picked as
with paired as (
    select task, prompt_id, count(*) as models from prompt group by all
),
placed as (
    select *, row_number() over (
        partition by task order by models desc, md5(concat_ws('|', $seed, task, prompt_id))
    ) as place
    from paired
)
select r.run_id, r.prompt_id, r.sample, p.place, row_number() over (
        partition by r.run_id, r.prompt_id order by md5(concat_ws('|', $seed, r.prompt_id, r.sample))
    ) as turn
from rollout_metrics r
join shown s on r.run_id = s.run_id and r.embedder = s.embedder and r.selection = $selection
join placed p on p.task = s.task and p.prompt_id = r.prompt_id
where p.place <= $prompts
qualify turn <= $each
"""

_PICKED_ROLLOUTS = """
select k.place, k.turn, r.task, r.run_id, r.prompt_id, r.sample, r.text, r.n_tokens, r.finish_reason,
    r.entropy, r.logprob, m.entropy_rate,
    case when m.embedder <> 'none' then m.semantic_distance end as semantic_distance,
    p.text as prompt_text, p.messages
from picked k
join rollouts r using (run_id, prompt_id, sample)
join shown s using (run_id)
join rollout_metrics m on m.run_id = k.run_id and m.prompt_id = k.prompt_id and m.sample = k.sample
    and m.embedder = s.embedder and m.selection = $selection
left join prompts p on p.task = r.task and p.prompt_id = r.prompt_id
order by k.place, r.task, r.prompt_id, k.turn, r.run_id
"""


def _rollout(row: Mapping[str, Any], model: int) -> dict[str, Any]:
    def hundredths(values: list[float] | None, sign: int) -> list[int] | None:
        # JSON has no infinity, which is the surprisal of a token of probability zero
        return None if values is None else [round(min(sign * x, 1e6) * 100) for x in values]

    distance = row["semantic_distance"]
    return {
        "m": model,
        "sample": row["sample"],
        "text": row["text"],
        "n": row["n_tokens"],
        "end": row["finish_reason"],
        "rate": round(row["entropy_rate"], 4),
        "distance": None if distance is None else round(distance, 4),
        "entropy": hundredths(row["entropy"], 1),
        "surprisal": hundredths(row["logprob"], -1),
    }


def _prompt_text(row: Mapping[str, Any]) -> str:
    """The prompt as text: of a chat, its turns; where it is not stored, its id."""
    if row["prompt_text"]:
        return str(row["prompt_text"])
    try:
        turns = json.loads(row["messages"] or "[]")
        text = "\n".join(str(turn["content"]) for turn in turns)
    except (ValueError, TypeError, KeyError):
        text = ""
    return text or str(row["prompt_id"])
