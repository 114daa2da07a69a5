"""The first screen: what is compared, and a card a measure with interval, verdict and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from canopy_store.analysis import nats
from canopy_store.analysis.pairing import widest
from canopy_store.analysis.words import headline, label, marks, notes, verdict
from canopy_store.report.facts import Facts, place

# The measures that have a card, with the name and unit there.
KEY_FIGURES = {
    "ce_star": ("Canopy entropy", "nats"),
    "entropy_rate": ("Entropy rate", "nats per token"),
    "mean_length": ("Mean length", "tokens"),
    "rho_pearson": ("Length–rate correlation", ""),
    "semantic_diversity": ("Semantic diversity", ""),
}
_NAMED = {"ce_star", "rho_pearson"}  # whose symbol stands behind the name


def cards(facts: Facts) -> list[dict[str, Any]]:
    """One entry a measure: the rows of `compare` that pool the most, one a variant.

    Each row with its ``verdict`` and ``marks`` in words; those of CE* with what the nats mean
    (``answers``). Where nothing can be compared, the rows of `estimate`: ``value`` in place of
    ``baseline``, ``treated`` and their changes, and no verdict.
    """
    frame = facts.alone if facts.changes.is_empty() else facts.changes
    if frame.is_empty():
        return []
    value = "value" if facts.changes.is_empty() else "delta"
    rows = widest(frame).drop_nulls(value).sort(place(facts)).to_dicts()
    lengths = {row["variant"]: row for row in rows if row["metric"] == "mean_length"}
    out = []
    for metric, (name, unit) in KEY_FIGURES.items():
        own = [row for row in rows if row["metric"] == metric]
        if own:
            entries = [_row(facts, row, lengths.get(row["variant"])) for row in own]
            title = f"{name},\u00a0{_symbol(facts, own[0])}" if metric in _NAMED else name
            out.append({"metric": metric, "name": title, "unit": unit, "rows": entries})
    return out


def _symbol(facts: Facts, row: Mapping[str, Any]) -> str:
    """CE* or ρ, CE* with the tokens it covers."""
    covers = facts.covers if row["metric"] == "ce_star" and "horizon" not in row else ""
    return label(row) + covers


def _row(facts: Facts, row: dict[str, Any], length: Mapping[str, Any] | None) -> dict[str, Any]:
    out = dict(row)
    if "delta" in row:
        read_with = marks(row)
        # the marks stand on lines of their own
        out["verdict"] = verdict(row).removesuffix(f" ({'; '.join(read_with)})")
        out["marks"] = read_with
    if row["metric"] == "ce_star":
        out["answers"] = _answers(facts, row, length or {})
    return out


def _answers(facts: Facts, row: Mapping[str, Any], length: Mapping[str, Any]) -> list[str]:
    """What the nats of a row mean: of each side how many answers, and how many times as many."""
    if facts.selection != "all":
        return [f"Of the selection {facts.selection}: a subset's mean, not an entropy of answers."]
    if "value" in row:
        return [f"As open as {nats.size(row['value'], length.get('value'))}."]
    sides = {row["baseline_variant"]: "baseline", row["variant"]: "treated"}
    said = [f"{name}: {nats.size(row[side], length.get(side))}." for name, side in sides.items()]
    return [*said, f"{nats.ratio(row)}."]


def counts(facts: Facts) -> dict[str, int]:
    """Models, prompts, rollouts and tokens of the runs that are shown."""
    shown = facts.shown
    return {
        "models": shown.select("family", "variant").n_unique() if len(shown) else 0,
        "prompts": facts.prompts.select("task", "prompt_id").n_unique() if len(shown) else 0,
        "rollouts": int(shown["n_rollouts"].sum()),
        "tokens": int(shown["n_tokens"].sum()),
    }


def fine_print(facts: Facts) -> list[str]:
    """What is true of many of the changes, a sentence each."""
    said = [] if facts.changes.is_empty() else notes(facts.changes)
    return [f"{line[:1].upper()}{line[1:]}." for line in said]


def first_line(facts: Facts) -> str:
    """What was found, in plain words; '' where nothing is compared."""
    return "" if facts.changes.is_empty() else headline(facts.changes)
