"""A comparison in plain words: its first line, a verdict a row, and what a row must be read with.

Nothing is computed here: every number and every reason stands in the frame that `compare` gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from canopy_store.analysis.bootstrap import AT_K, ESTIMATED, MEANINGS, MEASURES
from canopy_store.analysis.pairing import POOLED, widest
from canopy_store.sql.columns import column_of

CUT = 0.05  # share of rollouts cut, or difference of two shares, from which a row is marked
LABELS = {
    "ce_star": "CE*",
    "ce_star_cv": "CE* (control variate)",
    "surprisal_mean": "mean surprisal",
    "canopy_size_log10": "log10 canopy size",
    "entropy_rate": "entropy rate",
    "mean_length": "mean length",
    "branching_factor": "branching factor",
    "gen_ppl": "generation perplexity",
    "rho_pearson": "ρ",
    "rho_spearman": "ρ Spearman",
    "rho_kendall": "ρ Kendall",
    "rho_pooled": "ρ pooled",
    "cov_length_rate": "covariance of length and rate",
    "truncation_rate": "share cut",
    "semantic_diversity": "semantic diversity",
    "diversity_number": "diversity number",
    "vendi_score": "Vendi score",
    "accuracy_sum": "accuracy",
    "accuracy_token": "accuracy per token",
    "accuracy_char": "accuracy per character",
    "accuracy_pmi": "accuracy by PMI",
    "nll": "NLL",
    "expected_nll": "expected NLL",
    "rse": "relaxed semantic entropy",
    "rse_norm": "relaxed semantic entropy / ln m",
    "n_meanings": "number of meanings",
}
# the views that say in what a unit's measures are measured
_VIEWS = {"prompt": "model_metrics", "item": "item_metrics", "document": "perplexity"}
_WITHIN = {"prompt": "rollouts", "item": "items", "document": "documents"}
# Sums over the rollout: of a cut one they are those of its first tokens, of a subset no entropy.
OF_THE_WHOLE = ("ce_star", "ce_star_cv", "surprisal_mean", "canopy_size_log10", "gen_ppl")
_FIRST = ("ce_star", "entropy_rate", "accuracy_sum", "nll")
_SECOND = ("rho_pearson", "rho_pooled", "semantic_diversity")
_VARIANTS = 3  # sentences of the headline

Row = Mapping[str, Any]


def label(row: Row) -> str:
    """The metric's name as people write it; of a sum over the rollout with the tokens it covers."""
    plain = row["metric"].replace("_at_", "@").replace("_hat_", "^").replace("_", " ")
    name = LABELS.get(row["metric"], plain)
    if row["metric"] in OF_THE_WHOLE and row.get("horizon") is not None:
        return f"{name} (first {row['horizon']} tokens)"
    return name


def unit(metric: str) -> str:
    """The metric's unit; '' where it has none."""
    if metric == "accuracy" or metric in AT_K:
        return ""
    # an estimate of CE* is no column of a view, and in its unit
    name = "ce_star" if metric in ESTIMATED else metric
    view = "option_accuracy" if metric.startswith("accuracy_") else _VIEWS[MEASURES[metric].unit]
    return column_of("meaning_metrics" if metric in MEANINGS else view, name).unit


def counted(row: Row, number: int) -> str:
    """So many of what a row is over: prompts, items, documents, or clusters of these."""
    noun = row.get("unit", "prompt")
    if noun != "prompt" and row["baseline_n_samples"] != 1:
        return f"{number} cluster{'s' * (number != 1)} of {noun}s"
    return f"{number} {noun}{'s' * (number != 1)}"


def marks(row: Row) -> list[str]:
    """What the row must be read with: rollouts cut, a subset, a difference allowed; often nothing."""
    out = []
    cut = [share for share in (row["baseline_cut"], row["treated_cut"]) if share is not None]
    if row["metric"] != "truncation_rate" and cut and max(cut) > CUT:
        if _cut_apart(row):
            out.append(f"cut shares differ: {cut[0]:.0%} and {cut[1]:.0%}")
        else:
            out.append(f"{max(cut):.0%} cut")
    if row["selection"] != "all" and row["metric"] in OF_THE_WHOLE:
        out.append("subset mean, not an entropy")
    if row.get("selection_rule") == "lengths":
        out.append("conditions on length, an outcome")
    if row["rarefied_to"] is not None:
        out.append(f"at {row['rarefied_to']} rollouts a prompt")
    if row["allowed"]:
        out.append(f"allowed: {row['allowed']}")
    if row.get("reason"):
        out.append(row["reason"])
    return out


def _cut_apart(row: Row) -> bool:
    shares = row["baseline_cut"], row["treated_cut"]
    return None not in shares and abs(shares[0] - shares[1]) > CUT


def verdict(row: Row) -> str:
    """A few words for one row: falls, rises, no change can be told, equivalent; and its marks."""
    text = _direction(row)
    read_with = marks(row)
    return f"{text} ({'; '.join(read_with)})" if read_with else text


def _direction(row: Row) -> str:
    if row["delta"] is None:
        return "not defined"
    if row["p"] is None:
        return f"too few {counted(row, 0).removeprefix('0 ')} to tell"
    if _told(row):
        return "falls" if row["delta"] < 0 else "rises"
    if row["equivalent"]:
        return f"equivalent within ±{row['margin']:.3g}"
    return "no change can be told"


def _told(row: Row) -> bool:
    """Whether the change is told from none, after the adjustment over all rows where there is one."""
    p = row["p"] if row["p_holm"] is None else row["p_holm"]
    return p is not None and p < 1 - row["confidence"]


def headline(frame: pl.DataFrame) -> str:
    """The first line in plain words of what `compare` gives: a sentence a variant, over all it pools."""
    pooled = frame.filter(pl.col("level") != "seed")
    # the order of the frame is that of the variants
    order = list(dict.fromkeys(pooled["variant"]))
    rows = widest(pooled).to_dicts()
    said = []
    for variant in order[:_VARIANTS]:
        own = {row["metric"]: row for row in rows if row["variant"] == variant}
        first = next((own[name] for name in (*_FIRST, *own) if name in own), None)
        if first is None:
            continue
        second = next((own[n] for n in _SECOND if n in own and own[n] is not first), None)
        alike = {name: first[name] for name in ("level", "variant", "metric")}
        several = pooled.filter(**alike).to_dicts()
        said.append(_sentence(first, second) if len(several) == 1 else _several(several))
    if len(order) > _VARIANTS:
        said.append(f"{len(order) - _VARIANTS} more variants below.")
    return " ".join(said)


def _sentence(first: Row, second: Row | None) -> str:
    change = _change(first)
    where = _where(first)
    if first["delta"] is None:
        text = f"{first['variant']}: {label(first)} is not defined on both sides"
    elif _told(first):
        text = f"{first['variant']} changes {label(first)} by {change}, {where}"
    elif first["equivalent"]:
        text = (
            f"{first['variant']} leaves {label(first)} within ±{first['margin']:.3g} of "
            f"{first['baseline_variant']}: {change}, {where}"
        )
    else:
        holm = " after Holm" if first["p"] is not None and first["p"] < 1 - first["confidence"] else ""
        text = f"{first['variant']}: no change of {label(first)} can be told{holm}: {change}, {where}"
    if second is not None and second["delta"] is not None:
        rises = "falls" if second["delta"] < 0 else "rises"
        told = "" if _told(second) else ", not distinguishable from 0 after Holm"
        few = f", with too few {counted(second, 0).removeprefix('0 ')} to tell"
        told = few if second["p"] is None else told
        amount = f"{abs(second['delta']):.2g} {unit(second['metric'])}".strip()
        text += f"; {label(second)} {rises} by {amount}{told}"
    text += "."
    if _cut_apart(first) and first["metric"] != "truncation_rate":
        text += (
            f" Cut shares differ ({first['baseline_cut']:.0%} and {first['treated_cut']:.0%}): the "
            "change may be the cap's; see it at a smaller one with --horizon."
        )
    return text


def _several(rows: Sequence[Row]) -> str:
    """One measure of a variant in rows that nothing pools."""
    first, told = rows[0], [row["delta"] for row in rows if row["delta"] is not None and _told(row)]
    text = f"{first['variant']}: of {len(rows)} changes of {label(first)}"
    fall, rise = sum(delta < 0 for delta in told), sum(delta > 0 for delta in told)
    text += f" {fall} fall and {rise} rise"
    if len(told) < len(rows):
        text += f", {len(rows) - len(told)} cannot be told from 0 after Holm"
    return text + "."


def _change(row: Row) -> str:
    if row["delta"] is None:
        return ""
    text = f"{row['delta']:+.3g} {unit(row['metric'])}".strip()
    low, high = row["percent_delta_ci_low"], row["percent_delta_ci_high"]
    # of the two intervals the one that agrees with p: with few prompts they may differ
    apart = low is not None and low * high > 0
    agrees = row["p"] is None or apart == (row["p"] < 1 - row["confidence"])
    if row["percent_delta"] is not None and low is not None and agrees:
        return f"{text}, {row['percent_delta']:+.1f}% [{low:.0f}, {high:.0f}]"
    if row["delta_ci_low"] is not None:
        return f"{text} [{row['delta_ci_low']:.3g}, {row['delta_ci_high']:.3g}]"
    return text


def _where(row: Row) -> str:
    prompts = f"over {counted(row, row['n_prompts'])}"
    if row["task"] != POOLED:
        return f"{prompts} of {row['task']}"
    return f"{prompts} of {row['n_tasks']} tasks"


def notes(frame: pl.DataFrame) -> list[str]:
    """What is true of many rows of a comparison and said once, a line each."""
    out = []
    rows = widest(frame)
    uneven = rows.filter(pl.col("baseline_n_samples") != pl.col("treated_n_samples"))
    for row in uneven.unique("variant", maintain_order=True).to_dicts():
        out.append(
            f"rollouts a prompt: {row['baseline_n_samples']} in {row['baseline_variant']}, "
            f"{row['treated_n_samples']} in {row['variant']}"
        )
    lost = rows.filter(pl.col("n_left_out") > 0).sort("n_left_out", descending=True)
    if len(lost):
        told = [
            f"{label({**row, 'horizon': None})} {counted(row, row['n_left_out'])} "
            f"({row['left_out_share']:.0%} of the {_WITHIN[row.get('unit', 'prompt')]})"
            for row in lost.unique("metric", maintain_order=True).to_dicts()
        ]
        out.append("left out, as one variant lacks them or has no value of them: " + ", ".join(told))
    for text in frame["without_baseline"].drop_nulls().unique():
        out.append(f"not compared, as there is no baseline of the same family and task: {text}")
    unrecorded = [name for text in frame["unrecorded"].drop_nulls() for name in text.split(", ")]
    if unrecorded:
        names = ", ".join(dict.fromkeys(unrecorded))
        out.append(f"not recorded, so not known to be alike on both sides: {names}")
    if (frame["selection"] != "all").any():
        out.append("over a selection CE* and what rests on it are means of a subset, not entropies")
    if (frame["selection_rule"] == "lengths").any():
        out.append(
            "the selection matches lengths, which the treatment changes too: a difference in it is no "
            "effect of the treatment by itself"
        )
    if frame["n_checkpoints"].max() == 1:
        out.append(
            "each variant is one checkpoint: what is told is of it, not of what its training does; "
            "several go with --seeds"
        )
    return out
