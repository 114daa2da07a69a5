"""The report's charts: what each draws, with the sentence that explains it or why it is empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from canopy_store.analysis.lines import fitted_lines
from canopy_store.analysis.pass_at_k import crossing
from canopy_store.analysis.regression.reliability import ENOUGH
from canopy_store.analysis.studies import values_of
from canopy_store.analysis.words import CUT, marks
from canopy_store.report import charts as draw
from canopy_store.report import forests
from canopy_store.report.facts import MAX_PANELS, Facts, few, place
from canopy_store.report.study_sections import study_charts
from canopy_store.report.tables import CORRECTS

_EMBED = "Nothing is embedded yet. Run: canopy ingest embed --store … --embedder …"
MAX_POINTS = 2400  # prompts in the scatter
# What the chart of changes shows, and its name there.
_CHANGES = {
    "ce_star": "CE*",
    "mean_length": "Length",
    "entropy_rate": "Entropy rate",
    "semantic_diversity": "Semantic diversity",
    "vendi_score": "Vendi score",
    "accuracy": "Accuracy",
}
_SHORT = pl.col(pl.Float64).round(7).round_sig_figs(6)


def charts(facts: Facts) -> list[dict[str, Any]]:
    """One entry a chart: id, title, how to read it, and its ``spec`` or what is ``missing``."""
    of_rollouts = []
    for identity, short, title, how, make in () if facts.runs.is_empty() else _CHARTS:
        made = "No run is complete yet." if facts.shown.is_empty() else make(facts)
        if made is not None:
            entry = {"id": identity, "short": short, "title": title, "how": how}
            of_rollouts.append(_entry(entry, made))
    return [*of_rollouts, *study_charts(facts.study, _entry)]


def _entry(entry: dict[str, Any], made: Any) -> dict[str, Any]:
    """A chart's entry, from what it draws, that with what is said beneath it, or why it is empty."""
    if isinstance(made, str):
        return {**entry, "missing": made}
    spec, shown = made if isinstance(made, tuple) else (made, "")
    return {**entry, "spec": {**spec, "title": entry["title"]}, "shown": shown}


def _pieces(facts: Facts) -> pl.DataFrame:
    number = pl.format("{}", pl.col("ce_star").round_sig_figs(3))
    frame = facts.placed(facts.decomposition).join(
        facts.shown.select("run_id", "truncation_rate"), on="run_id", maintain_order="left"
    )
    cut = pl.when(pl.col("truncation_rate") > CUT)
    share = pl.format(" · {}% cut", (100 * pl.col("truncation_rate")).round(0).cast(pl.Int64))
    return (
        frame.with_columns(number=pl.concat_str(number, cut.then(share).otherwise(pl.lit(""))))
        .with_columns(_SHORT)
        .sort("panel", "variant")
    )


def _length_pieces(facts: Facts) -> Any:
    return draw.length_pieces(_pieces(facts), facts.variants, facts.panels, f"CE*{facts.covers}, nats")


def _stop_pieces(facts: Facts) -> Any:
    every = _pieces(facts)
    frame = every.drop_nulls("stop_entropy")
    lacks = "The runs hold no eos_logprob: the chance of ending at each step was not logged."
    if frame.is_empty():
        return lacks
    panels = _in(facts.panels, frame)
    drawn = draw.stop_pieces(frame, facts.variants, panels, f"CE*{facts.covers}, nats")
    return drawn, _left_out(facts, frame, "no eos_logprob is stored")


def _trajectory(facts: Facts) -> Any:
    frame = facts.placed(facts.trajectory).with_columns(_SHORT).drop("run_id")
    if frame.is_empty():
        return f"No rollout of the selection {facts.selection} has entropies."
    drawn = draw.trajectory(frame, facts.variants, _in(facts.panels, frame))
    return drawn, _left_out(facts, frame, f"no rollout of the selection {facts.selection} has entropies")


def _lengths(facts: Facts) -> Any:
    frame = facts.placed(facts.lengths).join(
        facts.shown.select("run_id", "truncation_rate"), on="run_id", maintain_order="left"
    )
    cut = facts.placed(facts.shown.select("run_id", "truncation_rate"))
    words = {panel: _cut(facts, rows) for (panel,), rows in cut.group_by("panel")}
    last = pl.col("length") == pl.col("length").max().over("run_id")
    first = pl.int_range(pl.len()).over("panel") == 0  # the words are drawn once a panel
    frame = frame.with_columns(last=last, cut=pl.when(first).then(pl.col("panel").replace_strict(words)))
    return draw.lengths(
        frame.with_columns(_SHORT).drop("run_id", "truncation_rate"), facts.variants, facts.panels
    )


def _cut(facts: Facts, rows: pl.DataFrame) -> str:
    """The share cut of each variant of a panel, two a line."""
    shares = dict(rows["variant", "truncation_rate"].iter_rows())
    said = [
        f"{_short(variant)} {_percent(shares[variant])}"
        for variant in facts.variants
        if variant in shares
    ]
    lines = [" · ".join(said[i : i + 2]) for i in range(0, len(said), 2)]
    return "\n".join(["cut: " + lines[0], *lines[1:]])


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.3g}%"


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _rho(facts: Facts) -> Any:
    """ρ as `compare` gives it: of a baseline compared over other prompts each time, a row each time."""
    frame = values_of(facts.changes, facts.alone, facts.baseline, "rho_pearson")
    if frame.is_empty():
        return "ρ needs at least four rollouts a prompt whose lengths differ."
    frame = facts.placed(frame, on=("family", "task")).drop("family", "task").unique()
    frame = frame.rename({"value": "rho_pearson"})
    frame = frame.sort("panel", place(facts), "rho_pearson").with_columns(
        place=pl.int_range(pl.len()).over("panel")
    )
    drawn = forests.rho(frame, facts.variants, _in(facts.panels, frame))
    return drawn, _left_out(facts, frame, "ρ needs four rollouts a prompt whose lengths differ")


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
    left_out = _left_out(facts, every, "not embedded, or one rollout a prompt")
    said = [shown * (len(points) < len(every)), left_out, _reliable(facts)]
    return drawn, " ".join(filter(None, said))


def _reliable(facts: Facts) -> str:
    """Beside the lines, which take the rates as exact: how reliable the rates are."""
    rows = dict(facts.reliability["variant", "reliability"].iter_rows())
    if not rows:
        return ""
    said = ", ".join(f"{name} {rows[name]:.2f}" for name in facts.variants if name in rows)
    low = min(rows.values()) < ENOUGH
    warning = (
        f" Below {ENOUGH:g} the lines are too flat: they take the rates as exact; {CORRECTS} corrects "
        "the slopes."
    )
    return f"Reliability of the entropy rates: {said}.{warning * low}"


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
    frame = facts.placed(frame, on=("family", "task")).drop("family", "task")
    drawn = draw.arrows(frame, facts.baseline, facts.variants, _in(facts.panels, frame))
    return drawn, _left_out(facts, frame, "not compared, or not embedded for both", facts.treated)


def _changes(facts: Facts) -> Any:
    if facts.unpaired is not None:
        return f"Nothing is compared: {facts.unpaired}."
    names = {**_CHANGES, "ce_star": f"CE*{facts.covers}"}
    order = pl.col("metric").replace_strict(list(_CHANGES), range(len(_CHANGES)), default=None)
    rows = facts.changes.filter(pl.col("metric").is_in(list(_CHANGES)), level="task")
    said = pl.Series("marks", ["; ".join(marks(row)) for row in rows.to_dicts()], dtype=pl.String)
    frame = facts.placed(rows.with_columns(said), on=("family", "task"))
    percent = ["percent_delta", "percent_delta_ci_low", "percent_delta_ci_high"]
    frame = (
        frame.drop_nulls(percent)
        .sort(order, "panel", "variant")
        .select("panel", "variant", pl.col("metric").replace(names), "n_prompts", *percent, "marks")
    )
    if frame.is_empty():
        return "No change has an interval: too few prompts are in both variants."
    drawn = forests.changes(frame, facts.variants, _in(facts.panels, frame))
    return drawn, _left_out(facts, frame, "too few prompts are in both variants", facts.treated)


def _pass_at_k(facts: Facts) -> Any:
    """Each variant beside the baseline over the prompts that both have; None where nothing is graded."""
    if facts.grader is None:
        return None
    if facts.unpaired is not None:
        return f"Nothing is compared: {facts.unpaired}."
    if facts.pass_at_k.is_empty():
        return f"No prompt has rollouts of both variants that {facts.grader} graded."
    rows = facts.placed(facts.pass_at_k.filter(level="task"), on=("family", "task"))
    several = rows["variant"].n_unique() > 1
    names = [pl.col("panel"), pl.col("checkpoint").fill_null(pl.col("variant"))]
    rows = rows.sort("panel", place(facts), "k").with_columns(
        panel=pl.concat_str(names if several else names[:1], separator=" · ")
    )
    panels = rows["panel"].unique(maintain_order=True).to_list()[:MAX_PANELS]
    ends = {"value": "", "low": "_ci_low", "high": "_ci_high"}
    frame = pl.concat(
        rows.filter(pl.col("panel").is_in(panels)).select(
            "panel",
            pl.col(of).alias("variant"),
            *("k", "n_prompts"),
            *(pl.col(side + end).alias(name) for name, end in ends.items()),
        )
        for side, of in (("baseline", "baseline_variant"), ("treated", "variant"))
    )
    whole = rows.group_by("panel", maintain_order=True)
    said = " ".join(f"{crossing(one, 'pass_at')}." for _, one in whole)
    return draw.pass_at_k(frame.with_columns(_SHORT), facts.variants, panels), (
        f"Graded by {facts.grader}. {said}"
    )


def _in(panels: Sequence[str], frame: pl.DataFrame) -> list[str]:
    drawn = set(frame["panel"])
    return [name for name in panels if name in drawn]


def _left_out(
    facts: Facts, frame: pl.DataFrame, reason: str, variants: Sequence[str] | None = None
) -> str:
    """Which models of which panels a chart does not draw, and why; '' where it draws all."""
    drawn = set(frame["panel", "variant"].iter_rows())
    every = facts.shown.select("panel", "variant").unique().sort("panel", "variant").iter_rows()
    lacking = [
        f"{variant} on {panel}"
        for panel, variant in every
        if panel in facts.panels
        and variant in (variants or facts.variants)
        and (panel, variant) not in drawn
    ]
    return f"Not drawn: {few(lacking)}: {reason}." if lacking else ""


# id, name in the contents, title, how to read it, what makes it: as in `study_sections`
_CHARTS: tuple[tuple[str, str, str, str, Callable[[Facts], Any]], ...] = (
    (
        "changes",
        "Changes",
        "What fine-tuning changed",
        "Each dot is the change from the baseline, in percent, over the prompts that both variants "
        "have; the bar is its 95% interval over prompts. A bar that does not reach the dashed line is a "
        "change larger than the spread between prompts explains. A hollow dot must be read with "
        "something, such as the shares of rollouts that were cut: point at it. Each measure has its own "
        "scale.",
        _changes,
    ),
    (
        "arrows",
        "Arrows",
        "From baseline to fine-tuned",
        "Each small chart is a task of a family, all on one scale: the ring is the baseline, the "
        "arrow's head the fine-tuned model. To the left means fewer nats per token; down means rollouts "
        "that are more alike in meaning.",
        _arrows,
    ),
    (
        "ce-star-length",
        "Length and rate",
        "CE*, by length and rate",
        "CE* is the entropy of a rollout, up to the most tokens allowed, in nats. The strong piece is "
        "mean length times mean entropy rate; the faint one, their covariance, is negative where "
        "longer rollouts are more certain per token. The upright mark is CE*, the sum of both.",
        _length_pieces,
    ),
    (
        "ce-star-stop",
        "Content and stop",
        "CE*, by content and when to stop",
        "The same CE*, in nats, split another way: uncertainty about the next token when the rollout "
        "goes on (strong), and uncertainty about whether it ends at each step (faint).",
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
        "The share of rollouts that have not ended by themselves after so many tokens, the end token "
        "included: steep where many end. It is drawn to the most tokens allowed; a mark there is the "
        "share that was cut, which stands above in numbers. Each task has its own scale.",
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
    (
        "pass-at-k",
        "pass@k",
        "Right within k rollouts: pass@k",
        "The chance that at least one of k rollouts is right, over the prompts that the baseline and "
        "the variant share, with its 95% interval over prompts. Where a variant is ahead at k = 1 and "
        "behind at a large k, it finds sooner what the baseline finds too, and less besides.",
        _pass_at_k,
    ),
)
