"""Intervals and tests of a change, from a bootstrap's replicates: by Student's t, or percentiles.

A change has the standard error of its replicates, se, made unbiased by sqrt(n / freedom) where n units
were drawn and ``freedom`` of them are free; its interval and its p are of one t, so that an interval
leaves out 0 exactly where p is below 1 - confidence. On which scale:

    correlations   Fisher's z: d = z_treated - z_baseline; in units of r, with m the mean of both z,
                   tanh(m + d/2) - tanh(m - d/2), which is 0 at d = 0 and the change itself at its d
    others         delta itself
    percent delta  log(treated / baseline): exp of it, less 1
    one side       the scale on which the measure is a mean: log of an exponential, z of a correlation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from canopy_store.analysis.bootstrap import MEASURES, Array
from canopy_store.errors import UsageError

INTERVALS = ("t", "percentile")
# A measure that is another one on another scale: their tests are one test.
SAME_TEST = {
    "branching_factor": "entropy_rate",
    "canopy_size_log10": "ce_star",
    "perplexity": "nll",
    "bits_per_byte": "nll",
    "discrete_semantic_entropy": "rse",
}
_DEFINED = 0.9  # of the replicates: a spread over the few that happen to be defined would be a wrong one
Columns = dict[str, float | None]


@dataclass(frozen=True)
class Units:
    """What was drawn: n units, of which ``freedom`` are degrees of freedom; how sure, and which way."""

    n: float
    freedom: float
    confidence: float = 0.95
    interval: str = "t"

    def width(self) -> float:
        """Half the interval in standard errors of replicates; NaN where nothing is free."""
        from scipy import stats  # slow to import

        if self.freedom <= 0:
            return np.nan
        quantile = stats.t.ppf((1 + self.confidence) / 2, self.freedom)
        return float(quantile * (self.n / self.freedom) ** 0.5)

    def tail(self, excess: float, se: float) -> float:
        """One-sided p of an excess over the null, ``se`` that of the replicates."""
        from scipy import stats

        if se == 0:
            return 0.0 if excess > 0 else 1.0
        return float(stats.t.sf(excess / (se * (self.n / self.freedom) ** 0.5), self.freedom))


@dataclass(frozen=True)
class Scale:
    """A scale on which a value is taken to be normal, and the way back."""

    to: Callable[[Array], Array]
    back: Callable[[Array], Array]


def to_z(r: Array) -> Array:
    """Fisher's z of correlations, clipped as everywhere."""
    return np.arctanh(np.clip(r, -0.999999, 0.999999))


PLAIN = Scale(np.asarray, np.asarray)
RATIO = Scale(lambda percent: np.log1p(percent / 100), lambda x: 100 * np.expm1(x))
_Z = Scale(to_z, np.tanh)
_LOG = Scale(np.log, np.exp)


def is_correlation(name: str) -> bool:
    """Whether a measure's changes are on Fisher's z."""
    return name.startswith("rho_")


def scale_of(name: str) -> Scale:
    """The scale on which one variant's value of a measure is a mean over prompts."""
    if is_correlation(name):
        return _Z
    return _LOG if MEASURES[name].out is np.exp else PLAIN


def change_of_z(d: Array | float, middle: float) -> Array:
    """The change of a correlation that is ``d`` on Fisher's z, the mean of both z being ``middle``."""
    return np.tanh(middle + np.asarray(d) / 2) - np.tanh(middle - np.asarray(d) / 2)


def z_of_change(size: float, middle: float) -> float:
    """The d >= 0 of which `change_of_z` is ``size``; infinite from 2 on, which no change exceeds."""
    if size >= 2:
        return np.inf
    grow = np.cosh(2 * middle) * size
    return float(np.log((grow + np.sqrt(grow**2 + 4 - size**2)) / (2 - size)))


def summary(
    name: str, values: Array, replicates: Array, units: Units, margin: float | str | None = None
) -> Columns:
    """Value, se and interval of baseline, treated, delta and percent delta, and p; None where undefined.

    Parameters
    ----------
    name : the measure
    values : (2,) of baseline and treated
    replicates : (2, B) of both
    margin : of the test of equivalence, in the measure's unit or as '5%' of the baseline
    """
    row: Columns = {}
    for part, value, drawn in zip(("baseline", "treated"), values, replicates, strict=True):
        row |= side(part, name, value, drawn, units)
    row |= spread("delta", values[1] - values[0], replicates[1] - replicates[0], units)
    se = row["delta_se"]
    if is_correlation(name):
        z = to_z(values)
        se = spread("z", z[1] - z[0], to_z(replicates[1]) - to_z(replicates[0]), units)["z_se"]
        if units.interval == "t":
            row |= z_interval(values, se, units)
    percent, drawn = (percent_change(name, *x) for x in (values, replicates))
    row |= spread("percent_delta", float(percent), drawn, units, RATIO)
    return row | tests(name, values, se, units, margin)


def tests(
    name: str, values: Array, se: float | None, units: Units, margin: float | str | None
) -> Columns:
    """p of no change, and of a change beyond the margin; ``se`` of the change, of a correlation on z."""
    row: Columns = {"p": None, "margin": None, "p_equivalence": None}
    z = to_z(values) if is_correlation(name) else np.asarray(values)
    change, middle = float(z[1] - z[0]), float(z.mean())
    tested = np.isfinite(change) and se is not None and units.freedom > 0
    if tested:
        row["p"] = min(1.0, 2 * units.tail(abs(change), se))  # type: ignore[arg-type]
    if margin is not None:
        row["margin"] = size = _margin(margin, float(values[0]))
        if tested and size is not None:
            most = z_of_change(size, middle) if is_correlation(name) else size
            row["p_equivalence"] = units.tail(most - abs(change), se)  # type: ignore[arg-type]
    return row


def percent_change(name: str, baseline: Array, treated: Array) -> Array:
    """Percent changes of a positive measure; NaN of the others, and where the baseline is not above 0.

    An estimate can be negative where what it estimates is not: CE* by control variate is one.
    """
    base = np.where(np.asarray(baseline) > 0, baseline, np.nan)
    if not MEASURES[name].positive:
        return np.full(base.shape, np.nan)
    return 100 * (treated - base) / base


def z_interval(values: Array, se: float | None, units: Units) -> Columns:
    """The interval of a correlation's change, from the se of its change on Fisher's z."""
    z = to_z(values)
    ends: Columns = {"delta_ci_low": None, "delta_ci_high": None}
    if se is not None and np.isfinite(half := units.width() * se):
        for end, at in zip(ends, (z[1] - z[0] - half, z[1] - z[0] + half), strict=True):
            ends[end] = float(change_of_z(at, float(z.mean())))
    return ends


def spread(part: str, value: float, drawn: Array, units: Units, scale: Scale = PLAIN) -> Columns:
    """A value, the se of its replicates (B,) and its interval, as columns of ``part``."""
    known = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or len(known) < _DEFINED * len(drawn):
        return columns(part, value)
    se = known.std(ddof=1)
    if units.interval == "percentile":
        tail = 50 * (1 - units.confidence)
        return columns(part, value, se, *np.percentile(known, [tail, 100 - tail]))
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = scale.to(known)
    moved = moved[np.isfinite(moved)]
    defined = len(moved) >= _DEFINED * len(drawn)
    return t_interval(part, value, se, moved.std(ddof=1) if defined else np.nan, units, scale)


def t_interval(
    part: str, value: float, se: float, scaled_se: float, units: Units, scale: Scale = PLAIN
) -> Columns:
    """A value, its se, and value ± width · ``scaled_se`` on ``scale``, mapped back from there."""
    with np.errstate(invalid="ignore", divide="ignore"):
        at, half = scale.to(np.asarray(value)), units.width() * scaled_se
        return columns(part, value, se, scale.back(at - half), scale.back(at + half))


def columns(part: str, value: Any, se: Any = np.nan, low: Any = np.nan, high: Any = np.nan) -> Columns:
    """The four columns of a part; None where a number is not finite."""
    named = (("", value), ("_se", se), ("_ci_low", low), ("_ci_high", high))
    return {part + suffix: float(x) if np.isfinite(x) else None for suffix, x in named}


def side(part: str, name: str, value: float, drawn: Array, units: Units) -> Columns:
    """The columns of one variant by itself."""
    return spread(part, value, drawn, units, scale_of(name))


def _margin(margin: float | str, baseline: float) -> float | None:
    text = str(margin)
    try:
        if text.endswith("%"):
            return abs(float(text[:-1]) / 100 * baseline) if np.isfinite(baseline) else None
        return float(text)
    except ValueError:
        raise UsageError(f"--margin {margin}: needs a number, or a percentage like 5%") from None


def adjusted(frame: pl.DataFrame) -> pl.DataFrame:
    """Adds p_holm and p_bh over every p there is, and ``equivalent`` at 0.05.

    A measure that is another one on another scale counts once: of SAME_TEST the second stands for all,
    and each first is adjusted as if it stood in its place. Rows of single seeds are not adjusted: the
    row over all of them is.
    """
    metric, tests = frame["metric"], set(frame["metric"])
    counted = frame["p"].is_not_null() & (frame["level"] != "seed")
    twins = {name: of for name, of in SAME_TEST.items() if {name, of} <= tests}
    out = {name: np.full(len(frame), np.nan) for name in ("p_holm", "p_bh")}
    p = frame["p"].cast(pl.Float64).to_numpy()
    others = [set(twins), *({*twins, of} - {name} for name, of in twins.items())]
    for left_out in others:
        at = (counted & ~metric.is_in(left_out)).to_numpy()
        for name, values in _adjustments(p[at]).items():
            place = out[name]
            fresh = at & np.isnan(place)
            place[fresh] = values[fresh[at]]
    frame = frame.with_columns(pl.Series(name, x).fill_nan(None) for name, x in out.items())
    return frame.with_columns(
        pl.col("margin").cast(pl.Float64), pl.col("p_equivalence").cast(pl.Float64)
    ).with_columns((pl.col("p_equivalence") < 0.05).alias("equivalent"))


def _adjustments(p: Array) -> Mapping[str, Array]:
    from statsmodels.stats.multitest import multipletests

    methods = {"p_holm": "holm", "p_bh": "fdr_bh"}
    return {name: multipletests(p, method=m)[1] for name, m in methods.items()} if len(p) else {}
