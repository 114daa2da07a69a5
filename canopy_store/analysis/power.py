"""How many prompts and samples a study needs, from a pilot store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
import polars as pl

from canopy_store.analysis.bootstrap import MEASURES, ROLLOUT_LEVEL
from canopy_store.analysis.comparable import store_panel
from canopy_store.analysis.comparison import SEED, compare
from canopy_store.analysis.pairing import widest
from canopy_store.errors import DataError, FitError, UsageError

SAMPLES = (4, 8, 16, 32, 64, 128)
FEWEST = 5  # prompts: with fewer, the spread between prompts is not known when the study is done
_UPPER = 0.8  # of the variance that a pilot estimates, the limit that it exceeds so seldom


@dataclass(frozen=True)
class Pilot:
    """The variance of a prompt's paired difference, as a pilot has it: V(M) = τ² + σ² / (M - lost).

    Parameters
    ----------
    prompts, tasks, samples : of the pilot; its variance has prompts - tasks degrees of freedom
    total : V at the pilot's own M, in the metric's unit squared
    within : σ², the noise of a rollout
    lost : what a correlation loses of its M, 3 by Fisher's z; else 0
    """

    prompts: int
    tasks: int
    samples: float
    total: float
    within: float
    lost: int = 0

    def between(self, factor: float = 1.0) -> float:
        """τ², what differs between prompts, where V is ``factor`` times its estimate."""
        return max(0.0, factor * self.total - self.within / (self.samples - self.lost))

    def variance(self, samples: float, factor: float = 1.0) -> float:
        """V at M = ``samples``, where it is ``factor`` times its estimate at the pilot's M."""
        return self.between(factor) + self.within / (samples - self.lost)

    @property
    def upper(self) -> float:
        """The upper 80% limit of V as a multiple of its estimate, df / χ²(0.2, df)."""
        from scipy import stats

        freedom = self.prompts - self.tasks
        return float(freedom / stats.chi2.ppf(1 - _UPPER, freedom))

    @property
    def fewest(self) -> int:
        """The fewest prompts that a study of as many tasks may have."""
        return max(FEWEST, self.tasks + 2)


@dataclass(frozen=True)
class Aim:
    """The change to detect, the chance to detect it, and the two-sided level of the test."""

    delta: float
    power: float = 0.8
    alpha: float = 0.05


def power(
    root: str | Path,
    *,
    metric: str,
    delta: float | None = None,
    prompts: int | None = None,
    samples: Sequence[int] = SAMPLES,
    power: float = 0.8,
    alpha: float = 0.05,
    cost_prompt: float | None = None,
    cost_rollout: float = 1.0,
    baseline: str = "base",
    selection: str = "all",
    embedder: str | None = None,
    grader: str | None = None,
    runs: Sequence[str] = (),
    allow: Sequence[str] = (),
    seed: int = SEED,
    clusters: str | None = None,
) -> pl.DataFrame:
    """One row per variant and number of samples: the prompts that detect ``delta``, and rollouts.

    The pilot's variance of a prompt's paired difference splits in two: what differs between prompts,
    and the noise of its rollouts, which falls as 1/samples (1/(samples - 3) for a correlation). Both
    come from the pilot: its bootstrap over prompts, and over rollouts with the prompts held fixed,
    each made unbiased. The test is Student's t with the prompts less one a task as its degrees of
    freedom, its power by the noncentral t.

    A pilot of few prompts may well show too small a variance, and a plan by it then fails. So there
    are two plans: by the best estimate, and by its upper 80% limit, V · df / χ²(0.2, df).

    Parameters
    ----------
    root : the pilot store
    metric : one that rollouts can be drawn anew for: ce_star, entropy_rate, rho_pearson, …; or one of
        items or documents, whose clusters are then what a plan counts, as large as the pilot's
    delta : the change to detect, in the metric's unit, either way
    prompts : instead of ``delta``: the prompts there are, of which the change that they detect is told
    samples : numbers of rollouts per prompt to answer for
    power, alpha : chance to detect it, and two-sided level of the test
    cost_prompt, cost_rollout : what a prompt costs, and one more rollout of it by both variants
        together, in any one unit. By default only rollouts cost, and then the fewest samples are
        always cheapest; with a cost of prompts there is a row for the best number of samples
    grader : of accuracy; needed where the store has several
    allow : settings in which the pilot's runs may differ, as in `compare`
    clusters : as in `compare`; the samples of a measure of meaning are the rollouts judged

    Returns
    -------
    variant, metric, delta, n_samples; n_prompts, n_rollouts (per variant) and cost by the best
    estimate, and the same with ``_upper`` by the upper limit; power (of n_prompts where the estimate
    is right), power_if_upper (of n_prompts where the upper limit is), power_upper (of n_prompts_upper
    there); sd_prompts and sd_rollouts (the two parts, in the metric's unit), pilot_prompts,
    pilot_samples, optimal (the row of the best number of samples), cheapest.

    With ``prompts`` instead: variant, metric, n_prompts, n_samples, n_rollouts, delta and delta_upper
    (what is detected by the estimate, and by the upper limit), sd_prompts, sd_rollouts, pilot_prompts,
    pilot_samples.

    Raises
    ------
    DataError, UsageError
        As `compare`; or a pilot too small for an estimate.
    """
    of_units = [name for name, measure in MEASURES.items() if measure.unit != "prompt"]
    if metric not in (*ROLLOUT_LEVEL, *of_units):
        raise UsageError(f"--metric {metric}: one of {', '.join((*ROLLOUT_LEVEL, *of_units))}")
    if (delta is None) == (prompts is None):
        raise UsageError("give either --delta, the change to detect, or --prompts, those there are")
    if delta is not None and not (delta and math.isfinite(delta)):
        raise UsageError(
            f"--delta {delta:g}: no study detects it; give the smallest change that matters"
        )
    if not 0 < power < 1 or not 0 < alpha < 1:
        raise UsageError("--power and --alpha: need more than 0 and less than 1")
    if power <= alpha:
        raise UsageError(f"--power {power:g}: needs more than --alpha, {alpha:g}")
    for option, cost in (("--cost-prompt", cost_prompt), ("--cost-rollout", cost_rollout)):
        if cost is not None and not 0 < cost < math.inf:
            raise UsageError(f"{option} {cost:g}: needs more than 0")
    fixed = metric in of_units
    if cost_prompt is not None and fixed:
        raise UsageError(f"--cost-prompt: of rollouts alone; {metric} has clusters of one size")
    lost = 3 if MEASURES[metric].weight == "fisher" else 0
    if any(m <= lost for m in samples):
        raise UsageError(f"--samples: {metric} needs more than {lost} rollouts a prompt")
    options: dict[str, Any] = {"baseline": baseline, "selection": selection, "embedder": embedder}
    options |= {"runs": runs, "allow": allow, "seed": seed, "grader": grader, "clusters": clusters}
    rows: list[dict[str, Any]] = []
    for variant, pilot in _pilots(root, metric, lost, options).items():
        of = {"variant": variant, "metric": metric}
        samples = [int(pilot.samples)] if fixed else samples
        if prompts is not None:
            rows += ({**of, **row} for row in _detected(pilot, prompts, samples, power, alpha))
        else:
            aim = Aim(abs(delta or 0.0), power, alpha)
            rows += ({**of, **row} for row in _plans(pilot, aim, samples, cost_prompt, cost_rollout))
    frame = pl.DataFrame(rows, infer_schema_length=None)
    if prompts is not None:
        return frame
    cheapest = pl.col("cost") == pl.col("cost").min().over("variant")
    return frame.with_columns(cheapest.alias("cheapest"))


def _pilots(root: str | Path, metric: str, lost: int, options: Mapping[str, Any]) -> dict[str, Pilot]:
    """The pilot of each variant, from the two bootstraps of `compare`."""
    if MEASURES[metric].unit != "prompt":
        return _pilots_of_clusters(root, metric, options)
    frames = [compare(root, metrics=[metric], resample=r, **options) for r in ("prompts", "rollouts")]
    both = (widest(frame).sort("variant").iter_rows(named=True) for frame in frames)
    pilots = {}
    for total, fixed in zip(*both, strict=True):
        variant, prompts, at = (total[key] for key in ("variant", "n_prompts", "n_tasks"))
        samples = harmonic_mean([total["baseline_n_samples"], total["treated_n_samples"]])
        if None in (total["delta_se"], fixed["delta_se"]) or prompts <= at or samples <= max(lost, 1):
            raise DataError(
                f"{metric} of {variant}: the pilot has too few prompts or rollouts; it needs more than "
                f"one prompt a task, and more than {max(lost, 1)} rollouts a prompt"
            )
        # a bootstrap of n draws from the n there are: its variance is short by the degrees of freedom
        spread = prompts * total["delta_se"] ** 2 * prompts / (prompts - at)
        noise = prompts * fixed["delta_se"] ** 2
        # but not a correlation's: on few rollouts its bootstrap is too wide rather
        noise = min(noise, spread) if lost else noise * samples / (samples - 1)
        pilots[variant] = Pilot(prompts, at, samples, spread, noise * (samples - lost), lost)
    return pilots


def _pilots_of_clusters(root: str | Path, metric: str, options: Mapping[str, Any]) -> dict[str, Pilot]:
    """The pilot of each arm: nothing within a cluster is sampled, all the variance is between them."""
    pilots = {}
    for row in widest(compare(root, metrics=[metric], **options)).sort("variant").to_dicts():
        clusters, tasks = row["n_prompts"], row["n_tasks"]
        if row["delta_se"] is None or clusters <= tasks:
            raise DataError(
                f"{metric} of {row['variant']}: the pilot has too few clusters; it needs more than one "
                "a task"
            )
        spread = clusters * row["delta_se"] ** 2 * clusters / (clusters - tasks)
        pilots[row["variant"]] = Pilot(clusters, tasks, row["n_samples"], spread, 0.0)
    return pilots


def power_of_regression(
    root: str | Path,
    reliability: float,
    *,
    selection: str = "all",
    embedder: str | None = None,
    runs: Sequence[str] = (),
) -> pl.DataFrame:
    """One row per variant: the reliability of its entropy rates, and the samples that reach another.

    A regression takes R_bar as exact; where it is noisy its slopes are drawn towards 0.

    Parameters
    ----------
    root : the pilot store
    reliability : to reach, above 0 and below 1

    The others are those of `power`.

    Returns
    -------
    variant, n_prompts, n_samples, reliability and partial (those of the store, as `regress` shows them:
    partial is what the other terms leave, which a slope is made from); wanted, and the rollouts a prompt
    that reach it by the formula of Spearman and Brown, samples_wanted for reliability and
    samples_wanted_partial for partial. NULL where the store shows no difference between prompts that
    more samples could bring out; partial needs embeddings, too.

    Raises
    ------
    DataError, UsageError
        No such selection, embedder or run; a reliability that none can be.
    """
    from canopy_store.analysis.regression.reliability import reliability as reliability_of
    from canopy_store.analysis.regression.reliability import samples_for  # slow to import

    if not 0 < reliability < 1:
        raise UsageError(f"--reliability {reliability:g}: needs more than 0 and less than 1")
    panel = store_panel(root, selection=selection, embedder=embedder, runs=runs)
    rows = reliability_of(panel).select("variant", "n_prompts", "n_samples", "reliability")
    shares = _partials(panel, root)
    partial = pl.Series("partial", [shares.get(v) for v in rows["variant"]], pl.Float64)
    rows = rows.with_columns(partial, pl.lit(reliability).alias("wanted"))
    for needed, of in (("samples_wanted", "reliability"), ("samples_wanted_partial", "partial")):
        samples = [
            None if r is None or not 0 < r <= 1 else samples_for(r, m, reliability)
            for m, r in rows.select("n_samples", of).iter_rows()
        ]
        rows = rows.with_columns(pl.Series(needed, samples, pl.Int64))
    return rows


def _partials(panel: pl.DataFrame, root: str | Path) -> dict[str, float]:
    """The share of R_bar that is no error, given the other terms of a regression; {} where not known."""
    from canopy_store.analysis.regression.measurement import reliability_of
    from canopy_store.analysis.regression.panel import FACTORS, one_panel, panel_data
    from canopy_store.analysis.seeds import as_variants

    frame = as_variants(one_panel(panel, str(root)), {})
    one_level = [factor for factor in FACTORS if frame[factor].n_unique() == 1]
    try:
        data = panel_data(frame, "D", frame["variant"][0], None, one_level)
    except FitError:
        return {}
    table = reliability_of(data)
    return {} if table.is_empty() else dict(table.select("variant", "partial").iter_rows())


# ---------------------------------------------------------------- plans


def _plans(
    pilot: Pilot, aim: Aim, samples: Sequence[int], cost_prompt: float | None, cost_rollout: float
) -> list[dict[str, Any]]:
    """A row for each number of samples, and one for the best where prompts have a cost."""
    best = None
    if cost_prompt is not None:
        best = best_samples(pilot, aim, cost_prompt / cost_rollout)
    rows = []
    for m in sorted({*samples, *([] if best is None else [best])}):
        row: dict[str, Any] = {"delta": aim.delta, "n_samples": m}
        variances = pilot.variance(m), pilot.variance(m, pilot.upper)
        needed = [prompts_for(variance, aim, pilot.tasks, pilot.fewest) for variance in variances]
        for end, prompts in zip(("", "_upper"), needed, strict=True):
            row[f"n_prompts{end}"], row[f"n_rollouts{end}"] = prompts, prompts * m
            row[f"cost{end}"] = float(prompts * ((cost_prompt or 0.0) + m * cost_rollout))
        of = (("power", 0, 0), ("power_if_upper", 0, 1), ("power_upper", 1, 1))
        row |= {key: power_of(needed[p], variances[v], aim, pilot.tasks) for key, p, v in of}
        rows.append({**row, **_parts(pilot), "optimal": m == best})
    return rows


def _detected(
    pilot: Pilot, prompts: int, samples: Sequence[int], power: float, alpha: float
) -> list[dict[str, Any]]:
    """A row for each number of samples, with the change that ``prompts`` prompts detect."""
    if prompts < pilot.fewest:
        raise UsageError(f"--prompts {prompts}: needs at least {pilot.fewest}")
    reached = _noncentrality(prompts - pilot.tasks, power, alpha)
    return [
        {
            "n_prompts": prompts,
            "n_samples": m,
            "n_rollouts": prompts * m,
            "delta": reached * math.sqrt(pilot.variance(m) / prompts),
            "delta_upper": reached * math.sqrt(pilot.variance(m, pilot.upper) / prompts),
            **_parts(pilot),
        }
        for m in samples
    ]


def _parts(pilot: Pilot) -> dict[str, float]:
    return {
        "sd_prompts": math.sqrt(pilot.between()),
        "sd_rollouts": math.sqrt(pilot.within),
        "pilot_prompts": pilot.prompts,
        "pilot_samples": pilot.samples,
    }


def power_of(prompts: int, variance: float, aim: Aim, tasks: int = 1) -> float:
    """The chance that a t-test of this many paired differences of this variance detects the change."""
    if variance == 0:
        return 1.0
    return _chance(aim.delta * math.sqrt(prompts / variance), prompts - tasks, aim.alpha)


def _chance(shift: float, freedom: int, alpha: float) -> float:
    """The power of a two-sided t-test where delta is ``shift`` standard errors."""
    from scipy import stats  # slow to import

    critical = stats.t.isf(alpha / 2, freedom)
    right, wrong = stats.nct.sf(critical, freedom, shift), stats.nct.cdf(-critical, freedom, shift)
    # of a large shift the library knows no value: the test is sure to find it, and on its own side
    return float(np.nan_to_num(right, nan=1.0) + np.nan_to_num(wrong, nan=0.0))


def prompts_for(variance: float, aim: Aim, tasks: int = 1, fewest: int = FEWEST) -> int:
    """The fewest prompts, ``fewest`` or more, with which the test has the power aimed at."""
    from scipy import stats

    known = stats.norm.isf(aim.alpha / 2) + stats.norm.ppf(aim.power)  # where the variance is known
    prompts = max(fewest, math.floor(variance * (known / aim.delta) ** 2))
    while power_of(prompts, variance, aim, tasks) < aim.power:
        prompts += 1
    return prompts


def _noncentrality(freedom: int, power: float, alpha: float) -> float:
    """delta / standard error at which a t-test of this level has this power."""
    from scipy import optimize

    high = 4.0
    while _chance(high, freedom, alpha) < power:
        high *= 2
    return float(optimize.brentq(lambda shift: _chance(shift, freedom, alpha) - power, 0.0, high))


def best_samples(pilot: Pilot, aim: Aim, ratio: float) -> int:
    """M*, the rollouts a prompt at which a plan costs least.

    ``ratio`` is the cost of a prompt, with a rollout's as its unit.
    √(σ² / τ² · ratio); for a correlation 3 + √(σ² / τ² · (ratio + 3)), whose first three rollouts of
    a prompt tell nothing. Where so many would leave fewer prompts than a study needs, as many as the
    fewest prompts take. Few prompts lose power by their degrees of freedom, which the formula does not
    know: where fewer rollouts of more prompts cost less by over 5%, these.
    """
    between, lost = pilot.between(), pilot.lost
    best = math.inf if between == 0 else math.sqrt(pilot.within / between * (ratio + lost))
    # the variance that the fewest prompts can bear: beyond it, more rollouts only cost
    reached = _noncentrality(pilot.fewest - pilot.tasks, aim.power, aim.alpha)
    spare = pilot.fewest * (aim.delta / reached) ** 2 - between
    enough = pilot.within / spare if spare > 0 else math.inf
    if math.isinf(min(best, enough)):  # no noise between prompts and none to spare: cannot be
        raise DataError("the pilot's differences do not vary between prompts nor within them")
    least = 2 if lost == 0 else 1
    most = lost + max(least, round(best) if best < enough else math.ceil(enough))

    def cost(m: int) -> float:
        return prompts_for(pilot.variance(m), aim, pilot.tasks, pilot.fewest) * (ratio + m)

    # every number up to 32, then in steps of 5%
    tried = {lost + least} | {round(most * 0.95**k) for k in range(200)}
    tried = {m for m in tried | set(range(lost + least, 33)) if lost + least <= m < most}
    cheapest = min(tried, key=cost, default=most)
    return cheapest if cost(cheapest) < 0.95 * cost(most) else most
