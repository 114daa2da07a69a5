"""How many prompts and samples a study needs, from a pilot store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from canopy_store.analysis.bootstrap import MEASURES, ROLLOUT_LEVEL
from canopy_store.analysis.comparison import SEED, compare
from canopy_store.analysis.pairing import widest
from canopy_store.errors import DataError, UsageError


def power(
    root: str | Path,
    *,
    metric: str,
    delta: float,
    samples: Sequence[int] = (4, 8, 16, 32, 64, 128),
    power: float = 0.8,
    alpha: float = 0.05,
    baseline: str = "base",
    selection: str = "all",
    embedder: str | None = None,
    runs: Sequence[str] = (),
    allow: Sequence[str] = (),
    seed: int = SEED,
) -> pl.DataFrame:
    """One row per variant and number of samples: the prompts that detect ``delta``, and rollouts.

    The pilot's variance of a prompt's paired difference splits in two: what differs between prompts,
    and the noise of its rollouts, which falls as 1/samples (1/(samples - 3) for a correlation). Both
    come from the pilot: its bootstrap over prompts, and over rollouts with the prompts held fixed.

    Parameters
    ----------
    root : the pilot store
    metric : one that rollouts can be drawn anew for: ce_star, entropy_rate, rho_pearson, …
    delta : the change to detect, in the metric's unit, either way
    samples : numbers of rollouts per prompt to answer for
    power, alpha : chance to detect it, and two-sided level of the test
    allow : settings in which the pilot's runs may differ, as in `compare`

    Returns
    -------
    variant, metric, delta, n_samples, n_prompts (needed, at least 2), n_rollouts (per variant),
    sd_prompts and sd_rollouts (the two parts, in the metric's unit), cheapest.

    Raises
    ------
    DataError, UsageError
        As `compare`; or a pilot too small for an estimate.
    """
    from scipy import stats

    if metric not in ROLLOUT_LEVEL:
        raise UsageError(f"--metric {metric}: one of {', '.join(ROLLOUT_LEVEL)}")
    if not delta:
        raise UsageError("--delta 0: no study detects no change; give the smallest that matters")
    if not 0 < power < 1 or not 0 < alpha < 1:
        raise UsageError("--power and --alpha: need more than 0 and less than 1")
    lost = 3 if MEASURES[metric].weight == "fisher" else 0
    if any(m <= lost for m in samples):
        raise UsageError(f"--samples: {metric} needs more than {lost} rollouts a prompt")
    both = [
        widest(
            compare(
                root,
                metrics=[metric],
                resample=resample,
                baseline=baseline,
                seed=seed,
                selection=selection,
                embedder=embedder,
                runs=runs,
                allow=allow,
            )
        ).sort("variant")
        for resample in ("prompts", "rollouts")
    ]
    reached = stats.norm.isf(alpha / 2) + stats.norm.ppf(power)
    rows = []
    for total, fixed in zip(*(frame.iter_rows(named=True) for frame in both), strict=True):
        if total["delta_se"] is None or fixed["delta_se"] is None:
            raise DataError(f"{metric} of {total['variant']}: the pilot has too few prompts or rollouts")
        prompts, pilot = total["n_prompts"], total["n_samples"]
        within = prompts * (pilot - lost) * fixed["delta_se"] ** 2
        between = max(0.0, prompts * (total["delta_se"] ** 2 - fixed["delta_se"] ** 2))
        for m in samples:
            variance = between + within / (m - lost)
            needed = max(2, math.ceil(variance * (reached / delta) ** 2))
            rows.append(
                {
                    "variant": total["variant"],
                    "metric": metric,
                    "delta": delta,
                    "n_samples": m,
                    "n_prompts": needed,
                    "n_rollouts": needed * m,
                    "sd_prompts": math.sqrt(between),
                    "sd_rollouts": math.sqrt(within),
                }
            )
    frame = pl.DataFrame(rows)
    fewest = pl.col("n_rollouts") == pl.col("n_rollouts").min().over("variant")
    return frame.with_columns(fewest.alias("cheapest"))
