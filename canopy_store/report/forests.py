"""Forest plots: a dot and an interval a row, with zero in sight and room at both edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from canopy_store.report.charts import (
    ROWS,
    Spec,
    by_variant,
    row_step,
    rows_axis,
    small_charts,
    specification,
)


def _padded(ends: Sequence[float | None], least: float) -> list[float]:
    """A range around zero and every end, with room at both edges, at least ``least`` wide."""
    drawn = [end for end in ends if end is not None]
    low, high = min(0.0, *drawn), max(0.0, *drawn)
    room = max(0.09 * (high - low), (least - (high - low)) / 2)
    return [low - room, high + room]


def rho(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """ρ of each model with its interval."""
    base = alt.Chart(ROWS).encode(
        y=alt.Y(
            "panel:N",
            title=None,
            scale=alt.Scale(domain=list(panels)),
            axis=rows_axis(grid=True),
        ),
        yOffset=alt.YOffset("place:O", scale=alt.Scale(paddingOuter=0.6)),
        color=by_variant(variants),
        tooltip=[
            "panel:N",
            "variant:N",
            "n_prompts:Q",
            *[alt.Tooltip(f"{c}:Q", format=".3f") for c in ("rho_pearson", "ci_low", "ci_high")],
        ],
    )
    ends = [*frame["rho_pearson"], *frame["ci_low"], *frame["ci_high"]]
    low, high = _padded(ends, 0.4)
    x: dict[str, Any] = {
        "title": "ρ (Pearson) of length and entropy rate",
        "scale": alt.Scale(domain=[max(low, -1.05), min(high, 1.05)], nice=False),
        "axis": alt.Axis(tickCount=5),
    }
    zero = alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(strokeDash=[3, 3]).encode(x="zero:Q")
    interval = base.mark_rule(strokeWidth=3, opacity=0.45).encode(
        x=alt.X("ci_low:Q", **x), x2="ci_high:Q"
    )
    point = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=alt.X("rho_pearson:Q", **x),
        shape=by_variant(variants, alt.Shape),
    )
    layered = alt.layer(zero, interval, point)
    step = row_step(panels, 1 + int(frame["place"].max() or 0), 15)  # type: ignore[arg-type]
    return specification(
        layered.properties(width=640, height=alt.Step(step, **{"for": "offset"})), frame
    )


def changes(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Percent change from the baseline, the first of ``variants``, of each metric, with its interval."""
    metrics = frame["metric"].unique(maintain_order=True).to_list()
    treated = list(variants)[1:]
    change, low, high = "percent_delta", "percent_delta_ci_low", "percent_delta_ci_high"
    base = alt.Chart().encode(
        y=alt.Y("panel:N", title=None, scale=alt.Scale(domain=list(panels)), axis=rows_axis(grid=True)),
        yOffset=alt.YOffset("variant:N", scale=alt.Scale(domain=treated, paddingOuter=0.6)),
        tooltip=[
            "panel:N",
            "variant:N",
            "metric:N",
            "n_prompts:Q",
            *[alt.Tooltip(f"{c}:Q", format="+.1f") for c in (change, low, high)],
            "marks:N",
        ],
    )
    # each metric has a scale of its own, on which no interval reaches the edge
    x: dict[str, Any] = {
        "title": None,
        "axis": alt.Axis(
            tickCount=3,
            labelExpr="format(datum.value, datum.value ? '+' : '') + '%'",
            labelOverlap="greedy",
            labelSeparation=8,
        ),
        "scale": alt.Scale(padding=14, nice=False, zero=True),
    }
    zero = alt.Chart().mark_rule(strokeDash=[3, 3]).encode(x=alt.datum(0))
    interval = base.mark_rule(strokeWidth=3, opacity=0.45).encode(
        x=alt.X(f"{low}:Q", **x),
        x2=f"{high}:Q",
        stroke=by_variant(variants, alt.Stroke, values=treated),
    )
    # hollow where it must be read with something: rollouts cut, a subset
    point = base.mark_point(size=80, opacity=1, strokeWidth=2.4).encode(
        x=alt.X(f"{change}:Q", **x),
        shape=by_variant(variants, alt.Shape, values=treated),
        fill=by_variant(variants, alt.Fill, values=treated),
        stroke=by_variant(variants, alt.Stroke, values=treated),
        fillOpacity=alt.condition("datum.marks === ''", alt.value(1), alt.value(0)),
    )
    step = row_step(panels, max(1, len(treated)), 15)
    layered = alt.layer(zero, interval, point).properties(
        width=190, height=alt.Step(step, **{"for": "offset"})
    )
    return specification(
        small_charts(layered, metrics, 3, "metric").resolve_scale(x="independent"), frame
    )
