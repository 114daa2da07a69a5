"""The report's charts of studies: what each draws, with the sentence that explains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl

from canopy_store.analysis.studies import Arms, loss_metric
from canopy_store.analysis.words import headline, unit
from canopy_store.report import study_charts as draw
from canopy_store.report.facts import MAX_PANELS
from canopy_store.report.study_facts import Study

_SHORT = pl.col(pl.Float64).round(7).round_sig_figs(6)


def study_charts(study: Study, entry: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a chart that the store has something of; ``entry`` makes it of its texts and chart."""
    out = []
    for identity, short, title, how, make in _CHARTS:
        made = make(study)
        if made is not None:
            out.append(entry({"id": identity, "short": short, "title": title, "how": how}, made))
    return out


def _panelled(frame: pl.DataFrame, *names: str) -> tuple[pl.DataFrame, list[str], str]:
    """The rows of the panels that are drawn, their names, and what is said of those that are not."""
    several = frame["family"].n_unique() > 1
    parts = [pl.col(name) for name in (["family", *names] if several else names)]
    frame = frame.with_columns(panel=pl.concat_str(parts, separator=" · "))
    panels = frame["panel"].unique(maintain_order=True).to_list()
    drawn = panels[:MAX_PANELS]
    said = "" if len(panels) == len(drawn) else f"The first {MAX_PANELS} of {len(panels)} are drawn."
    return frame.filter(pl.col("panel").is_in(drawn)).with_columns(_SHORT), drawn, said


def _said(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def _accuracy(study: Study) -> Any:
    frame = study.items.values(study.baseline, "accuracy_sum")
    if frame.is_empty():
        return study.items.reason
    frame = frame.join(study.chances.rename({"chance": "rule"}), on="task", how="left")
    frame, panels, cut = _panelled(
        frame.rename({"n_prompts": "n_clusters"}).sort("family", "task"), "task"
    )
    drawn = draw.by_arm(frame, study.variants, panels, "accuracy")
    return drawn, _said(_compared(study.items, study.baseline), cut)


def _compared(arms: Arms, baseline: str) -> str:
    """What was found, in words; or why nothing is compared."""
    if len(arms.changes):
        return f"Against {baseline}: {headline(arms.changes)}"
    return f"Nothing is compared: {arms.reason}." if arms.reason else ""


def _loss(study: Study) -> Any:
    if study.documents.changes.is_empty() and study.documents.alone.is_empty():
        return study.documents.reason
    metric = loss_metric(study.documents)
    frame = study.documents.values(study.baseline, metric)
    own = frame.filter(variant=study.baseline).select("family", "task", rule="value")
    frame = (
        frame.join(own, on=["family", "task"], how="left")
        if len(own)
        else frame.with_columns(rule=pl.lit(None, pl.Float64))
    )
    frame, panels, cut = _panelled(
        frame.rename({"n_prompts": "n_clusters"}).sort("family", "task"), "task"
    )
    drawn = draw.by_arm(frame, study.variants, panels, f"loss ({unit(metric)})")
    return drawn, _said(_compared(study.documents, study.baseline), cut)


def _token_types(study: Study) -> Any:
    if study.contributions.is_empty():
        return None
    frame, panels, cut = _panelled(study.contributions.rename({"arm": "variant"}), "variant", "task")
    # a step's interval stands at its end
    frame = frame.with_columns(
        from_low=pl.col("start") + pl.col("low"), from_high=pl.col("start") + pl.col("high")
    )
    return draw.token_types(frame, study.variants, panels), cut


def _frontier(study: Study) -> Any:
    if study.frontier.is_empty():
        return None
    pair = study.frontier.with_columns(
        pair=pl.format("gain on {}, forgetting of {}", "gained", "forgotten")
    )
    frame, panels, cut = _panelled(pair, "pair")
    measured = unit(loss_metric(study.documents))
    return draw.frontier(frame, study.variants, panels, measured), cut


def _training(study: Study) -> Any:
    if study.training.is_empty():
        return None
    frame, panels, cut = _panelled(
        study.training.rename({"step": "at", "loss": "value"}).sort("family", "split", "variant", "at"),
        "split",
    )
    return draw.curves(frame, study.variants, panels, "step", points=False), cut


def _generations(study: Study) -> Any:
    if study.generations.is_empty():
        return None
    named = study.generations.with_columns(measure=pl.format("{}, {}", "measure", "unit"))
    named = named.rename({"variant": "model", "lineage": "variant", "generation": "at"})
    named = named.rename({"ci_low": "low", "ci_high": "high"})
    frame, panels, cut = _panelled(named, "measure")
    return draw.curves(frame, study.variants, panels, "generation", points=True), cut


# id, name in the contents, title, how to read it, what makes it: a chart with what is said beneath it, a
# text where there is something to say in its place, None where the store has nothing of it
_CHARTS: tuple[tuple[str, str, str, str, Callable[[Study], Any]], ...] = (
    (
        "accuracy",
        "Accuracy",
        "Right answers, by arm",
        "The share of items of which the right option is the most probable, with its 95% interval over "
        "clusters of items. The dashed line is what guessing gets. Each small chart is a task and its "
        "split; each arm is a checkpoint, or what it makes of a context or of a number format.",
        _accuracy,
    ),
    (
        "loss",
        "Loss",
        "Loss on documents, by arm",
        "The mean -log-probability of the documents' tokens, with its 95% interval over clusters of "
        "documents. The dashed line is the baseline's: right of it text is predicted worse than before.",
        _loss,
    ),
    (
        "token-types",
        "Types of token",
        "Which tokens the change is of",
        "From 0, each step is what one type of token adds to the change of the loss; the last bar is "
        "their sum. To the left is better predicted. The bar at a step's end is its 95% interval over "
        "clusters of documents.",
        _token_types,
    ),
    (
        "frontier",
        "Gain and forgetting",
        "What is learnt, and what it costs",
        "Each point is an arm: to the right it gained more on one corpus, above it forgot more of "
        "another; both are changes of the loss from the baseline, with their 95% intervals. Of two arms "
        "with equal gain the lower is better; arms of unequal gain cannot be told apart by forgetting "
        "alone.",
        _frontier,
    ),
    (
        "training",
        "Training",
        "Loss along training",
        "Nats per token, on what is trained on (train) and on each corpus that was read during "
        "training. Where a corpus turns upwards while train falls, the model is overfitting. A band is "
        "the 95% interval over training seeds, where they are named.",
        _training,
    ),
    (
        "generations",
        "Generations",
        "Over generations trained on what models wrote",
        "Each line ends at the model that it is named after; generation 0 was trained on text that no "
        "model wrote. The bar is a 95% interval over clusters of documents, or over prompts. A rising "
        "loss on real text is collapse; the sign of CE* depends on the temperature.",
        _generations,
    ),
)
