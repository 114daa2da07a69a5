"""Bootstrap intervals over prompts, as `canopy compare` draws them: of ρ and of the percent change."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from canopy_store.analysis import bootstrap

REPLICATES = 2000
# What is compared with the baseline, and its name on the page.
_CHANGES = {
    "ce_star": "CE*",
    "mean_length": "Length",
    "entropy_rate": "Entropy rate",
    "semantic_diversity": "Semantic diversity",
    "vendi_score": "Vendi score",
}
_PAIRED = ["family", "task", "prompt_id"]
_ORDER = (pl.col("prompt_id").str.len_chars(), "prompt_id")


def rho_intervals(
    prompts: pl.DataFrame, *, replicates: int = REPLICATES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """One row per run: ρ (Pearson) of length and entropy rate, pooled over prompts, with an interval.

    Percentile bootstrap over whole prompts. A run no prompt of which has ρ is left out.

    Parameters
    ----------
    prompts : rows of `prompt_metrics`
    replicates : draws of the bootstrap
    level : share of the draws inside the interval
    """
    rows = []
    there = prompts.drop_nulls("rho_pearson").filter(pl.col("n_rollouts") > 3).sort(*_ORDER)
    for (run_id,), group in there.group_by(["run_id"], maintain_order=True):
        value, drawn = _pooled(group, ["rho_pearson"], replicates, seed)
        low, high = np.quantile(drawn[:, 0], [(1 - level) / 2, (1 + level) / 2])
        rows.append(
            {
                "run_id": run_id,
                "rho_pearson": float(value[0]),
                "low": float(low),
                "high": float(high),
                "n_prompts": len(group),
            }
        )
    kinds = {"run_id": pl.String, "rho_pearson": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(rows, schema={**kinds, "n_prompts": pl.Int64})


def changes(
    prompts: pl.DataFrame, baseline: str, *, replicates: int = REPLICATES, seed: int = 0
) -> pl.DataFrame:
    """One row per family, task, treated variant and metric: percent change from the baseline.

    Over the prompts that both answered; 95% percentile bootstrap, the same draw of prompts for both.
    """
    rows = []
    base = prompts.filter(pl.col("variant") == baseline)
    treated = prompts.filter(pl.col("variant") != baseline)
    for metric, name in _CHANGES.items():
        known = treated.drop_nulls(metric).join(
            base.drop_nulls(metric).select(*_PAIRED), on=_PAIRED, how="semi"
        )
        for (family, task, variant), after in known.sort(*_ORDER).group_by(
            ["family", "task", "variant"], maintain_order=True
        ):
            before = base.join(after, on=_PAIRED, how="semi").sort(*_ORDER)
            value, spread = _percent(
                _pooled(before, [metric], replicates, seed), _pooled(after, [metric], replicates, seed)
            )
            if not np.isfinite(value) or not np.isfinite(spread).all():
                continue  # the baseline is zero: there is no percentage of it
            low, high = np.quantile(spread, [0.025, 0.975])
            rows.append(
                {
                    "family": family,
                    "task": task,
                    "variant": variant,
                    "panel": after["panel"][0],
                    "metric": name,
                    "percent": round(float(value), 3),
                    "low": round(float(low), 3),
                    "high": round(float(high), 3),
                    "n_prompts": len(after),
                }
            )
    order = {name: i for i, name in enumerate(_CHANGES.values())}
    return pl.DataFrame(
        sorted(rows, key=lambda r: (order[r["metric"]], r["family"], r["task"], r["variant"]))
    )


def _pooled(group: pl.DataFrame, names: list[str], replicates: int, seed: int) -> tuple[Any, Any]:
    """Point estimates (K,) and replicates (B, K) of the measures over a group's prompts."""
    top, bottom = bootstrap.weighted_values(bootstrap.columns_of(group), names)
    counts = bootstrap.counts_of(bootstrap.draw_prompts(len(group), replicates, seed))
    return (
        bootstrap.pooled(top.sum(0), bottom.sum(0), names),
        bootstrap.pooled(counts @ top, counts @ bottom, names),
    )


def _percent(before: tuple[Any, Any], after: tuple[Any, Any]) -> tuple[Any, Any]:
    """The change in percent: of the point estimates, and of each replicate (B,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, spread = (100 * (a / b - 1) for a, b in zip(after, before, strict=True))
    return value[0], spread[:, 0]
