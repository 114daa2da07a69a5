"""Charts of studies: accuracy and loss by arm, types of token, the frontier, training and generations.

As in `charts`: rows in, one Vega-Lite specification out, and a colour is a variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from canopy_store.report.charts import (
    Spec,
    by_variant,
    row_step,
    rows_axis,
    small_charts,
    specification,
)


def _tip(*names: str) -> list[Any]:
    return [alt.Tooltip(f"{name}:Q", format=".3f") for name in names]


def by_arm(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str], title: str) -> Spec:
    """A row an arm: its value with its interval, and a dashed line at ``rule``, once a panel."""
    present = set(frame["variant"])
    own = [name for name in variants if name in present]
    base = alt.Chart().encode(
        y=alt.Y("variant:N", title=None, scale=alt.Scale(domain=own), axis=rows_axis(grid=True)),
        color=alt.Color("variant:N", scale=alt.Scale(domain=list(variants)), legend=None),
        tooltip=["panel:N", "variant:N", "n_clusters:Q", *_tip("value", "ci_low", "ci_high", "rule")],
    )
    x: dict[str, Any] = {
        "title": title,
        "axis": alt.Axis(tickCount=4),
        "scale": alt.Scale(padding=12, nice=False, zero=True),
    }
    rule = alt.Chart().mark_rule(strokeDash=[3, 3]).encode(x=alt.X("mean(rule):Q", **x))
    interval = base.mark_rule(strokeWidth=3, opacity=0.45).encode(
        x=alt.X("ci_low:Q", **x), x2="ci_high:Q"
    )
    point = base.mark_point(filled=True, size=80, opacity=1).encode(x=alt.X("value:Q", **x))
    layered = alt.layer(rule, interval, point).properties(
        width=230, height=alt.Step(row_step(own, 1, 20))
    )
    return specification(small_charts(layered, panels, 3), frame)


def token_types(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Steps from 0 to the total, one a type of token, with the interval of each at its end."""
    types = [*(name for name in frame["token_type"].unique().sort() if name != "total"), "total"]
    base = alt.Chart().encode(
        y=alt.Y("token_type:N", title=None, scale=alt.Scale(domain=types), axis=rows_axis(grid=False)),
        color=alt.Color("variant:N", scale=alt.Scale(domain=list(variants)), legend=None),
        tooltip=["panel:N", "token_type:N", *_tip("contribution", "low", "high")],
    )
    x: dict[str, Any] = {
        "title": "change of the loss (nats per token)",
        "axis": alt.Axis(tickCount=4),
        "scale": alt.Scale(padding=12, nice=False, zero=True),
    }
    zero = alt.Chart().mark_rule(strokeDash=[3, 3]).encode(x=alt.datum(0))
    step = base.mark_bar(height=13).encode(
        x=alt.X("start:Q", **x),
        x2="end:Q",
        opacity=alt.condition("datum.token_type === 'total'", alt.value(0.95), alt.value(0.5)),
    )
    interval = base.mark_rule(strokeWidth=2).encode(x=alt.X("from_low:Q", **x), x2="from_high:Q")
    layered = alt.layer(zero, step, interval).properties(width=330, height=alt.Step(20))
    return specification(small_charts(layered, panels, 2), frame)


def frontier(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str], unit: str) -> Spec:
    """Forgetting against gain, a point an arm, with the interval of each."""
    present = set(frame["variant"])
    own = [name for name in variants if name in present]
    x: dict[str, Any] = {
        "title": f"gain ({unit})",
        "scale": alt.Scale(padding=14, nice=False, zero=True),
        "axis": alt.Axis(tickCount=5),
    }
    y: dict[str, Any] = {
        "title": f"forgetting ({unit})",
        "scale": alt.Scale(padding=14, nice=False, zero=True),
        "axis": alt.Axis(tickCount=4),
    }
    base = alt.Chart().encode(
        x=alt.X("gain:Q", **x),
        y=alt.Y("forgetting:Q", **y),
        color=by_variant(variants, values=own),
        tooltip=[
            "variant:N",
            *_tip("gain", "gain_low", "gain_high"),
            *_tip("forgetting", "forgetting_low", "forgetting_high"),
        ],
    )
    across = base.mark_rule(strokeWidth=2, opacity=0.4).encode(
        x=alt.X("gain_low:Q", **x), x2="gain_high:Q"
    )
    along = base.mark_rule(strokeWidth=2, opacity=0.4).encode(
        y=alt.Y("forgetting_low:Q", **y), y2="forgetting_high:Q"
    )
    point = base.mark_point(filled=True, size=90, opacity=1).encode(
        shape=by_variant(variants, alt.Shape, values=own)
    )
    layered = alt.layer(across, along, point).properties(width=330, height=240)
    chart = small_charts(layered, panels, 2).resolve_scale(x="independent", y="independent")
    return specification(chart, frame)


def curves(
    frame: pl.DataFrame,
    variants: Sequence[str],
    panels: Sequence[str],
    along: str,
    *,
    points: bool,
) -> Spec:
    """Lines of ``value`` along ``at``, one a variant; its interval is a band, or a bar at each point."""
    present = set(frame["variant"])
    own = [name for name in variants if name in present]
    axis = alt.Axis(tickCount=5, grid=False, format="d", tickMinStep=1)
    x = alt.X("at:Q", title=along, axis=axis)
    y: dict[str, Any] = {
        "title": None,
        "scale": alt.Scale(zero=False, padding=10, nice=False),
        "axis": alt.Axis(tickCount=4),
    }
    legend = by_variant(variants, values=own, symbolType="stroke", symbolStrokeWidth=3)
    tips = ["variant:N", *(["model:N"] if points else []), "at:Q", *_tip("value", "low", "high")]
    base = alt.Chart().encode(x=x, color=legend, tooltip=tips)
    value = alt.Y("value:Q", **y)
    line = base.mark_line(strokeWidth=2.4).encode(y=value)
    spread: Any
    if points:
        spread = base.mark_rule(strokeWidth=2.4, opacity=0.5).encode(y=alt.Y("low:Q", **y), y2="high:Q")
        mark = base.mark_point(filled=True, size=60, opacity=1).encode(y=value)
    else:
        # a band's colour is its line's
        spread = base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", **y), y2="high:Q")
        mark = base.mark_point(opacity=0, size=60).encode(y=value)
    layered = alt.layer(spread, line, mark).properties(width=330, height=190)
    chart = small_charts(layered, panels, 2).resolve_scale(x="independent", y="independent")
    return specification(chart, frame)
