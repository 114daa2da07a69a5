"""The report's sections: key figures, charts with the sentence that explains each, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from canopy_store.analysis.lines import fitted_lines
from canopy_store.analysis.pairing import widest
from canopy_store.report import charts as draw
from canopy_store.report.facts import Facts
from canopy_store.sql.columns import column_of

_EMBED = "Nothing is embedded yet. Run: canopy ingest embed --store … --embedder …"
_NAMED_ARROWS = 16
MAX_POINTS = 2400  # prompts in the scatter
_KEY_FIGURES = (
    ("ce_star", "Canopy entropy CE*", "nats"),
    ("entropy_rate", "Entropy rate", "nats per token"),
    ("mean_length", "Mean length", "tokens"),
    ("rho_pearson", "Length–rate correlation ρ", ""),
    ("semantic_diversity", "Semantic diversity", ""),
)
# What the chart of changes shows, and its name there.
_CHANGES = {
    "ce_star": "CE*",
    "mean_length": "Length",
    "entropy_rate": "Entropy rate",
    "semantic_diversity": "Semantic diversity",
    "vendi_score": "Vendi score",
}
_SHORT = pl.col(pl.Float64).round(7).round_sig_figs(6)
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
    "complete": "Whether every planned rollout is stored.",
    "shards": "Parquet files of the run's rollouts.",
    "rollouts": "Rollouts stored.",
    "tokens": "Tokens stored.",
    "bytes": "Size of the run's rollouts.",
    "embedders": "Embedders, with the share done where not all is.",
}


def key_figures(facts: Facts) -> list[dict[str, Any]]:
    """One entry a measure: the rows of `compare` that pool the most, one a variant.

    Where nothing can be compared, the rows of `estimate`: ``value`` in place of ``baseline``,
    ``treated`` and their changes.
    """
    frame = facts.alone if facts.changes.is_empty() else facts.changes
    if frame.is_empty():
        return []
    value = "value" if facts.changes.is_empty() else "delta"
    rows = widest(frame).drop_nulls(value).sort("variant")
    figures = [
        {"metric": metric, "name": name, "unit": unit, "rows": rows.filter(metric=metric).to_dicts()}
        for metric, name, unit in _KEY_FIGURES
    ]
    return [figure for figure in figures if figure["rows"]]


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


def _pieces(facts: Facts) -> pl.DataFrame:
    return facts.placed(facts.decomposition).with_columns(_SHORT).sort("panel", "variant")


def _length_pieces(facts: Facts) -> Any:
    return draw.length_pieces(_pieces(facts), facts.variants, facts.panels)


def _stop_pieces(facts: Facts) -> Any:
    frame = _pieces(facts).drop_nulls("stop_entropy")
    if frame.is_empty():
        return "The runs hold no eos_logprob: the chance of ending at each step was not logged."
    return draw.stop_pieces(frame, facts.variants, _in(facts.panels, frame))


def _trajectory(facts: Facts) -> Any:
    frame = facts.placed(facts.trajectory).with_columns(_SHORT).drop("run_id")
    if frame.is_empty():
        return f"No rollout of the selection {facts.selection} has entropies."
    return draw.trajectory(frame, facts.variants, _in(facts.panels, frame))


def _lengths(facts: Facts) -> Any:
    frame = facts.placed(facts.lengths).with_columns(_SHORT).drop("run_id")
    return draw.lengths(frame, facts.variants, facts.panels)


def _rho(facts: Facts) -> Any:
    """ρ as `compare` gives it: of a baseline compared over other prompts each time, a row each time."""
    sides = [
        _side(facts.changes, "baseline", variant=pl.lit(facts.baseline)),
        _side(facts.changes, "treated"),
        _side(facts.alone, "value"),
    ]
    frame = pl.concat([side for side in sides if len(side)], how="diagonal").drop_nulls("rho_pearson")
    if frame.is_empty():
        return "ρ needs at least four rollouts a prompt whose lengths differ."
    frame = facts.placed(frame, on=("family", "task")).drop("family", "task").unique()
    order = pl.col("variant").replace_strict(
        facts.variants, range(len(facts.variants)), return_dtype=pl.Int64
    )
    frame = frame.sort("panel", order, "rho_pearson").with_columns(
        place=pl.int_range(pl.len()).over("panel")
    )
    return draw.rho(frame, facts.variants, _in(facts.panels, frame))


def _side(frame: pl.DataFrame, part: str, **more: pl.Expr) -> pl.DataFrame:
    """ρ of each family and task from the columns of ``part``, with its interval."""
    if frame.is_empty():
        return frame
    return (
        frame.filter(level="task", metric="rho_pearson")
        .with_columns(**more)
        .select(
            "family",
            "task",
            "variant",
            "n_prompts",
            rho_pearson=part,
            ci_low=f"{part}_ci_low",
            ci_high=f"{part}_ci_high",
        )
    )


def _diversity(facts: Facts) -> Any:
    columns = ["panel", "variant", "prompt_id", "entropy_rate", "semantic_diversity"]
    every = facts.placed(facts.prompts).select(columns).drop_nulls(columns[3:])
    if every.is_empty():
        return _EMBED if facts.embedder is None else "Diversity needs two rollouts a prompt."
    points = every
    if len(every) > MAX_POINTS:
        points = every.sample(MAX_POINTS, seed=facts.seed).sort(columns[:3])
    lines = fitted_lines(every, "entropy_rate", "semantic_diversity", by=columns[:2])
    both = pl.concat(
        [
            points.with_columns(kind=pl.lit("prompt")),
            lines.with_columns(prompt_id=pl.lit(""), kind=pl.lit("line")).select(*columns, "kind"),
        ]
    ).with_columns(_SHORT)
    shown = f"{len(points):,} of {len(every):,} prompts are drawn; lines are fitted to all."
    drawn = draw.diversity(both, facts.variants, _in(facts.panels, both))
    return drawn, shown * (len(points) < len(every))


def _arrows(facts: Facts) -> Any:
    if facts.unpaired is not None:
        return f"Nothing is compared: {facts.unpaired}."
    ends: dict[str, str] = {"baseline": "from", "treated": "to"}
    keys = ["family", "task", "variant"]
    rate, diversity = (
        facts.changes.filter(level="task", metric=metric)
        .drop_nulls(list(ends))
        .select(*keys, **{f"{axis}_{end}": part for part, end in ends.items()})
        for metric, axis in (("entropy_rate", "rate"), ("semantic_diversity", "diversity"))
    )
    frame = rate.join(diversity, on=keys).sort(keys)
    if frame.is_empty():
        return _EMBED if facts.embedder is None else "No task is embedded for both variants."
    label = pl.col("task") if len(facts.treated) == 1 else pl.format("{} → {}", "task", "variant")
    named = len(frame) <= _NAMED_ARROWS
    frame = frame.with_columns(label=label if named else pl.lit(""))
    shown = "" if named else "Too many arrows to name: point at one, or see the numbers."
    return draw.arrows(frame, facts.families), shown


def _changes(facts: Facts) -> Any:
    if facts.unpaired is not None:
        return f"Nothing is compared: {facts.unpaired}."
    order = pl.col("metric").replace_strict(list(_CHANGES), range(len(_CHANGES)), default=None)
    frame = facts.placed(facts.changes.filter(level="task"), on=("family", "task"))
    percent = ["percent_delta", "percent_delta_ci_low", "percent_delta_ci_high"]
    frame = (
        frame.filter(pl.col("metric").is_in(list(_CHANGES)))
        .drop_nulls(percent)
        .sort(order, "panel", "variant")
        .select("panel", "variant", pl.col("metric").replace(_CHANGES), "n_prompts", *percent)
    )
    if frame.is_empty():
        return "No change has an interval: too few prompts are in both variants."
    return draw.changes(frame, facts.variants, _in(facts.panels, frame))


def _in(panels: Sequence[str], frame: pl.DataFrame) -> list[str]:
    drawn = set(frame["panel"])
    return [name for name in panels if name in drawn]


# id, name in the contents, title, how to read it, what makes it
_CHARTS: tuple[tuple[str, str, str, str, Callable[[Facts], Any]], ...] = (
    (
        "changes",
        "Changes",
        "What fine-tuning changed",
        "Each dot is the change from the baseline, in percent, over the prompts that both variants "
        "have; the bar is its 95% bootstrap interval over prompts. A bar that does not reach the dashed "
        "line is a change larger than the spread between prompts explains.",
        _changes,
    ),
    (
        "arrows",
        "Arrows",
        "From baseline to fine-tuned",
        "Each arrow is one task of one family: its ring is the baseline, its head the fine-tuned model. "
        "To the left means fewer nats per token; down means rollouts that are more alike in meaning.",
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
        "Content and stop",
        "CE*, by content and when to stop",
        "The same CE*, in nats, split another way: uncertainty about the next token when the rollout "
        "goes on, and uncertainty about whether it ends at each step.",
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
        "dot pools the prompts that the baseline and the other variant share (all prompts, where a "
        "model is compared with none); the bar is its 95% bootstrap interval over prompts.",
        _rho,
    ),
    (
        "diversity",
        "Diversity",
        "Semantic diversity against entropy rate",
        "Each point is one prompt: how uncertain its tokens are, in nats per token, and how different "
        "its rollouts are in meaning (1 − mean cosine similarity). Where the line is steep, "
        "uncertainty about tokens becomes difference in meaning.",
        _diversity,
    ),
)


def tables(facts: Facts) -> list[dict[str, Any]]:
    """One entry a table: id, title, a sentence, columns with their meaning, rows."""
    keys = ["family", "task", "variant", "run_id"]
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
            "Were entropies and samples logged from one distribution?",
            "If the entropies came from another distribution than the one that was sampled, z would "
            "not look standard normal; ok means p ≥ 5.7e-7, which is |z| ≤ 5 over many rollouts. Runs "
            "without log-probabilities are not listed.",
            "logging_check",
            _logging(facts),
        ),
        _table(
            "runs",
            "Runs",
            "Runs",
            "Every run that was started; one that is not complete is left out of all measures.",
            "runs",
            facts.runs.sort(keys).select(_RUNS),
        ),
    ]


def _logging(facts: Facts) -> pl.DataFrame:
    if facts.logging.is_empty():
        return pl.DataFrame(schema=list(_LOGGING))
    return facts.logging.sort("family", "task", "variant", "selection").select(_LOGGING)


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
    rounded = frame.with_columns(_SHORT)
    return {
        "id": identity,
        "short": short,
        "title": title,
        "how": how,
        "columns": columns,
        "rows": [list(row) for row in rounded.iter_rows()],
    }
