"""The report's sections: key figures, charts with the sentence that explains each, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from canopy_store.report import charts as draw
from canopy_store.report import facts as read
from canopy_store.report import intervals
from canopy_store.report.facts import Facts
from canopy_store.sql.columns import column_of

_EMBED = "Nothing is embedded yet. Run: canopy ingest embed --store … --embedder …"
_NAMED_ARROWS = 16
_KEY_FIGURES = (
    ("ce_star", "Canopy entropy CE*", "nats"),
    ("entropy_rate", "Entropy rate", "nats per token"),
    ("mean_length", "Mean length", "tokens"),
    ("rho_pearson", "Length–rate correlation ρ", ""),
    ("semantic_diversity", "Semantic diversity", ""),
)
_METRICS = (
    "family",
    "variant",
    "task",
    "n_prompts",
    "n_rollouts",
    "ce_star",
    "mean_length",
    "entropy_rate",
    "rho_pearson",
    "semantic_diversity",
    "vendi_score",
    "gen_ppl",
    "branching_factor",
    "canopy_size_log10",
    "rho_spearman",
    "rho_kendall",
    "cov_length_rate",
    "truncation_rate",
    "surprisal_mean",
    "rho_length_diversity_pearson",
    "embedder",
    "selection",
    "run_id",
)
_LOGGING = (
    "family",
    "variant",
    "task",
    "selection",
    "n_rollouts",
    "mean_excess",
    "sd",
    "z",
    "ok",
    "run_id",
)
_RUNS = (
    "family",
    "variant",
    "task",
    "complete",
    "shards",
    "rollouts",
    "tokens",
    "bytes",
    "embedders",
    "run_id",
)
_DOCS = {  # columns of canopy status, which are no columns of the store
    "complete": "Whether every rollout asked for is stored.",
    "shards": "Parquet files of the run's rollouts.",
    "rollouts": "Rollouts stored.",
    "tokens": "Tokens stored.",
    "bytes": "Size of the run's rollouts.",
    "embedders": "Embedders, with the share done where not all is.",
}


def key_figures(facts: Facts) -> list[dict[str, Any]]:
    """One entry a measure: its mean over tasks (and families) by the baseline and by each variant.

    Compared over the (family, task) pairs that the baseline and the variant both have.
    """
    entries = []
    for metric, name, unit in _KEY_FIGURES:
        there = facts.shown.drop_nulls(metric).select("family", "task", "variant", metric)
        rows = []
        base = there.filter(pl.col("variant") == facts.baseline)
        for variant in facts.treated:
            both = there.filter(pl.col("variant") == variant).join(
                base, on=["family", "task"], suffix="_base"
            )
            if len(both):
                before, after = _mean(both[f"{metric}_base"]), _mean(both[metric])
                rows.append({"variant": variant, "before": before, "after": after})
        if not rows and len(there):
            for (variant,), group in there.group_by(["variant"], maintain_order=True):
                rows.append({"variant": variant, "before": None, "after": _mean(group[metric])})
        if rows:
            entries.append({"metric": metric, "name": name, "unit": unit, "rows": rows})
    return entries


def _mean(values: pl.Series) -> float:
    return round(float(values.mean()), 7)  # type: ignore[arg-type]


def counts(facts: Facts) -> dict[str, int]:
    """Models, prompts, rollouts and tokens of the runs that are shown."""
    shown = facts.shown
    return {
        "models": shown.select("family", "variant").n_unique() if len(shown) else 0,
        "prompts": facts.prompts.select("task", "prompt_id").n_unique() if len(shown) else 0,
        "rollouts": int(shown["n_rollouts"].sum()),
        "tokens": int(shown["n_tokens"].sum()),
    }


def charts(facts: Facts) -> list[dict[str, Any]]:
    """One entry a chart: id, title, how to read it, and its ``spec`` or what is ``missing``."""
    return [
        _entry({"id": identity, "short": short, "title": title, "how": how}, make, facts)
        for identity, short, title, how, make in _CHARTS
    ]


def _entry(entry: dict[str, Any], make: Callable[[Facts], Any], facts: Facts) -> dict[str, Any]:
    made = "No run is complete yet." if facts.shown.is_empty() else make(facts)
    if isinstance(made, str):
        return {**entry, "missing": made}
    spec, shown = made if isinstance(made, tuple) else (made, "")
    return {**entry, "spec": {**spec, "title": entry["title"]}, "shown": shown}


def _pooled(facts: Facts) -> pl.DataFrame:
    frame = facts.query(
        "select d.*, s.panel from ce_star_decomposition d join shown s using (run_id)"
        " where d.selection = $selection",
        selection=facts.selection,
    )
    return frame.filter(pl.col("panel").is_in(facts.panels)).sort("panel", "variant")


def _length_pieces(facts: Facts) -> Any:
    return draw.length_pieces(_pooled(facts), facts.variants, facts.panels)


def _stop_pieces(facts: Facts) -> Any:
    frame = _pooled(facts).drop_nulls("stop_entropy")
    if frame.is_empty():
        return "The runs hold no eos_logprob: the chance of ending at each step was not logged."
    return draw.stop_pieces(frame, facts.variants, _in(facts.panels, frame))


def _trajectory(facts: Facts) -> Any:
    frame = read.trajectory(facts).filter(pl.col("panel").is_in(facts.panels))
    if frame.is_empty():
        return f"There is no trajectory of the selection {facts.selection}."
    return draw.trajectory(frame, facts.variants, _in(facts.panels, frame))


def _lengths(facts: Facts) -> Any:
    frame = read.lengths(facts).filter(pl.col("panel").is_in(facts.panels))
    return draw.lengths(frame, facts.variants, facts.panels)


def _rho(facts: Facts) -> Any:
    frame = intervals.rho_intervals(facts.prompts, seed=facts.seed)
    if frame.is_empty():
        return "ρ needs at least four rollouts a prompt whose lengths differ."
    placed = frame.join(facts.shown.select("run_id", "panel", "variant"), on="run_id").drop("run_id")
    placed = placed.filter(pl.col("panel").is_in(facts.panels)).sort("panel", "variant")
    return draw.rho(placed, facts.variants, _in(facts.panels, placed))


def _diversity(facts: Facts) -> Any:
    frame, total = read.diversity_points(facts)
    if frame.is_empty():
        return _EMBED if facts.embedder is None else "Diversity needs two rollouts a prompt."
    drawn = int((frame["kind"] == "prompt").sum())
    shown = f"{drawn:,} of {total:,} prompts are drawn; lines are fitted to all." * (drawn < total)
    return draw.diversity(frame, facts.variants, _in(facts.panels, frame)), shown


def _arrows(facts: Facts) -> Any:
    if not facts.treated:
        return _alone(facts)
    there = facts.shown.drop_nulls(["semantic_diversity", "entropy_rate"])
    base = there.filter(pl.col("variant") == facts.baseline)
    both = there.filter(pl.col("variant") != facts.baseline).join(
        base, on=["family", "task"], suffix="_b"
    )
    if both.is_empty():
        return _EMBED if facts.embedder is None else "No task is embedded for both variants."
    label = pl.col("task") if len(facts.treated) == 1 else pl.format("{} → {}", "task", "variant")
    named = len(both) <= _NAMED_ARROWS
    frame = both.select(
        "family",
        "task",
        "variant",
        label=label if named else pl.lit(""),
        rate_from=pl.col("entropy_rate_b").round(5),
        rate_to=pl.col("entropy_rate").round(5),
        diversity_from=pl.col("semantic_diversity_b").round(5),
        diversity_to=pl.col("semantic_diversity").round(5),
    ).sort("family", "task", "variant")
    shown = "" if named else "Too many arrows to name: point at one, or see the numbers."
    return draw.arrows(frame, facts.families), shown


def _changes(facts: Facts) -> Any:
    if not facts.treated:
        return _alone(facts)
    frame = intervals.changes(facts.prompts, facts.baseline, seed=facts.seed)
    if frame.is_empty():
        return f"No prompt was answered both by {facts.baseline} and by another variant."
    frame = frame.filter(pl.col("panel").is_in(facts.panels)).drop("family", "task")
    return draw.changes(frame, facts.variants, _in(facts.panels, frame))


def _alone(facts: Facts) -> str:
    if facts.baseline not in facts.variants:
        return f"No variant is named {facts.baseline}, so there is nothing to compare with."
    return f"{facts.baseline} is the only variant: sample a fine-tuned one to compare."


def _in(panels: Sequence[str], frame: pl.DataFrame) -> list[str]:
    there = set(frame["panel"])
    return [name for name in panels if name in there]


# id, name in the contents, title, how to read it, what makes it
_CHARTS: tuple[tuple[str, str, str, str, Callable[[Facts], Any]], ...] = (
    (
        "changes",
        "Changes",
        "What fine-tuning changed",
        "Each dot is the change from the baseline, in percent, over the prompts both answered; the bar "
        "is a 95% bootstrap interval over prompts. A bar that misses the dashed line is a change beyond "
        "the spread between prompts.",
        _changes,
    ),
    (
        "arrows",
        "Arrows",
        "From baseline to fine-tuned",
        "Each arrow is one task of one family: its ring is the baseline, its head the fine-tuned model. "
        "To the left means fewer nats per token; down means rollouts that say more alike things.",
        _arrows,
    ),
    (
        "ce-star-length",
        "Length and rate",
        "CE*, by length and rate",
        "CE* is the entropy of a whole rollout, in nats. One piece is mean length times mean entropy "
        "rate; the other, their covariance, is negative where longer rollouts are more certain per "
        "token. The upright mark is CE*, the sum of both.",
        _length_pieces,
    ),
    (
        "ce-star-stop",
        "Say and stop",
        "CE*, by what to say and when to stop",
        "The same CE*, in nats, split otherwise: uncertainty about the next token given that the "
        "rollout goes on, and uncertainty about ending at each step.",
        _stop_pieces,
    ),
    (
        "trajectory",
        "Along the rollout",
        "Entropy along the rollout",
        "The thick line is the mean entropy rate so far, in nats per token; the faint one the entropy "
        "of the step itself. Lines end where fewer than a tenth of the rollouts are still going. Each "
        "task has its own scale.",
        _trajectory,
    ),
    (
        "lengths",
        "Lengths",
        "How long rollouts are",
        "Share of rollouts by length in tokens, the end token included. A line that drops at the right "
        "edge is where rollouts were cut. Each task has its own scale.",
        _lengths,
    ),
    (
        "rho",
        "ρ",
        "Length against entropy rate: ρ",
        "Left of zero, a prompt's longer rollouts are more certain per token; right of it, less. The "
        "dot pools prompts; the bar is a 95% bootstrap interval over prompts.",
        _rho,
    ),
    (
        "diversity",
        "Diversity",
        "Semantic diversity against entropy rate",
        "Each point is one prompt: how uncertain its tokens are, in nats per token, and how different "
        "its rollouts are in meaning (1 − mean cosine similarity). A steep line: uncertainty that "
        "turns into different meanings.",
        _diversity,
    ),
)


def tables(facts: Facts) -> list[dict[str, Any]]:
    """One entry a table: id, title, a sentence, columns with their meaning, rows."""
    keys = ["family", "task", "variant", "run_id"]
    logging = facts.con.sql("from logging_check").pl()
    return [
        _table(
            "metrics",
            "Measures",
            "Every measure",
            "One row per run, embedder and selection, pooled over prompts.",
            "model_metrics",
            facts.metrics.select(_METRICS).sort([*keys, "embedder", "selection"]),
        ),
        _table(
            "logging",
            "Logging",
            "Were the numbers logged honestly?",
            "Had entropies been logged from another distribution than the one sampled from, z would "
            "not look standard normal; ok means |z| ≤ 5. Runs without log-probabilities are not listed.",
            "logging_check",
            logging.sort("family", "task", "variant", "selection").select(_LOGGING),
        ),
        _table(
            "runs",
            "Runs",
            "Runs",
            "Every run begun; one that is not complete is left out of all measures.",
            "runs",
            facts.runs.sort(keys).select(_RUNS),
        ),
    ]


def _table(
    identity: str, short: str, title: str, how: str, relation: str, frame: pl.DataFrame
) -> dict[str, Any]:
    columns = []
    for name, kind in frame.schema.items():
        if name in _DOCS:
            doc = _DOCS[name]
        else:
            column = column_of(relation, name)
            doc = f"{column.doc} {column.unit}".strip()
        columns.append({"name": name, "doc": doc, "number": kind.is_numeric()})
    rounded = frame.with_columns(pl.col(pl.Float64).round(7).round_sig_figs(6))
    return {
        "id": identity,
        "short": short,
        "title": title,
        "how": how,
        "columns": columns,
        "rows": [list(row) for row in rounded.iter_rows()],
    }
