"""Which prompts change: a row per prompt, the largest changes first."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from canopy_store.analysis.bootstrap import MEASURES
from canopy_store.analysis.pairing import variant_order

_KEYS = ["family", "task", "prompt_id"]
_MEASURED = (
    ("value", pl.Float64),
    ("n_samples", pl.Int64),
    ("cut", pl.Float64),
)


def prompt_changes(
    prompts: pl.DataFrame,
    models: pl.DataFrame,
    names: Sequence[str],
    *,
    baseline: str,
    texts: pl.DataFrame,
) -> pl.DataFrame:
    """One row per prompt, variant and metric, by metric and variant with the largest |delta| first.

    Columns: those of `compare` that a single prompt has, ``level`` 'prompt', and prompt_id, ``rank``
    (from 1) and the prompt's ``text``. There is no p: the noise of a prompt's rollouts is not told
    from a change, and the largest of many changes is large by chance.

    Parameters
    ----------
    prompts : rows as `prompt_rows` gives them
    models : rows of ``models``
    texts : task, prompt_id and text of prompts
    """
    order = variant_order(models, prompts, baseline)
    shared = [
        "selection",
        "selection_rule",
        "cap",
        "allowed",
        "rarefied_to",
        "vendi_reason",
        "checkpoint",
    ]
    parts = []
    for number, name in enumerate(names):
        columns = {
            "value": pl.col(name).cast(pl.Float64),
            "n_samples": pl.col("n_rollouts").cast(pl.Int64),
            "cut": pl.col("truncation_rate").cast(pl.Float64),
        }
        base = prompts.filter(variant=baseline).select(
            *_KEYS, base_cap="cap", **{f"baseline_{end}": column for end, column in columns.items()}
        )
        treated = prompts.filter(pl.col("variant") != baseline).select(
            *_KEYS,
            "variant",
            *(column for column in shared if column in prompts.columns),
            **{f"treated_{end}": column for end, column in columns.items()},
        )
        pairs = treated.join(base, on=_KEYS, how="inner", maintain_order="left")
        parts.append(pairs.with_columns(metric=pl.lit(name), _metric=pl.lit(number)))
    delta = pl.col("treated") - pl.col("baseline")
    positive = pl.col("metric").is_in([name for name in names if MEASURES[name].positive])
    vendi = pl.col("metric") == "vendi_score"
    place = pl.col("variant").replace_strict(order, range(len(order)), return_dtype=pl.Int64)
    frame = (
        pl.concat(parts)
        .rename({"baseline_value": "baseline", "treated_value": "treated"})
        .with_columns(
            level=pl.lit("prompt"),
            baseline_variant=pl.lit(baseline),
            delta=delta,
            percent_delta=pl.when(positive & (pl.col("baseline") > 0)).then(
                100 * delta / pl.col("baseline")
            ),
            horizon=pl.when(pl.col("cap") == pl.col("base_cap")).then("cap"),
            rarefied_to=pl.when(vendi).then("rarefied_to"),
            reason=pl.when(vendi).then("vendi_reason"),
        )
        .join(texts, on=["task", "prompt_id"], how="left", maintain_order="left")
    )
    frame = frame.sort(
        "_metric",
        place,
        pl.col("delta").abs(),
        *_KEYS,
        descending=[False, False, True, *[False] * 3],
        nulls_last=True,
    )
    rank = pl.int_range(1, pl.len() + 1).over("metric", "variant")
    return frame.with_columns(rank=rank).select(
        "level",
        "family",
        "task",
        "baseline_variant",
        "variant",
        *(["checkpoint"] if "checkpoint" in frame.columns else []),
        "selection",
        "selection_rule",
        "metric",
        "rank",
        "prompt_id",
        "text",
        "baseline",
        "treated",
        "delta",
        "percent_delta",
        "baseline_n_samples",
        "treated_n_samples",
        "baseline_cut",
        "treated_cut",
        "horizon",
        "rarefied_to",
        "allowed",
        "reason",
    )
