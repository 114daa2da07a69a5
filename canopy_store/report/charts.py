"""One Vega-Lite chart a function: the same specification draws the page and the PDF and SVG files.

Data come in as rows; names out of the store are only ever data, never part of an expression. Widths
are those of the files: the page fits them to the window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

# Okabe and Ito's palette, which people with colour-blindness tell apart; the baseline takes the first.
_LIGHT = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777"]
_DARK = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#AAAAAA"]
_LENGTH_PIECES = {"E[N] · E[r]": "#56B4E9", "covariance of N and r": "#E69F00"}
_STOP_PIECES = {"content": "#009E73", "when to stop": "#CC79A7"}
_FAMILIES = ["#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00", "#0072B2"]
FONT = "Avenir Next, Segoe UI, Helvetica Neue, Arial, Liberation Sans, sans-serif"

_ROWS = alt.NamedData("rows")
Spec = dict[str, Any]


def config(dark: bool = False) -> dict[str, Any]:
    """The look of every chart: quiet axes, one typeface, variants in the palette's order."""
    ink, soft, grid = ("#e8e6e1", "#a9adb3", "#33383f") if dark else ("#22262b", "#5d646c", "#e7e4dd")
    labels = {"labelColor": soft, "titleColor": soft, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "font": FONT,
        "background": "transparent" if dark else None,
        "view": {"stroke": None},
        "title": {"anchor": "start", "offset": 18, "fontSize": 15, "color": ink},
        "axis": {
            **labels,
            "titleFontWeight": "normal",
            "gridColor": grid,
            "domain": False,
            "ticks": False,
            "labelPadding": 6,
            "titlePadding": 10,
            "labelLimit": 150,
        },
        "legend": {
            **labels,
            "orient": "top",
            "direction": "horizontal",
            "title": None,
            "symbolSize": 110,
            "labelLimit": 180,
            "offset": 14,
            "columnPadding": 18,
            "symbolOpacity": 1,
        },
        "header": {
            "labelColor": ink,
            "labelFontSize": 13,
            "labelFontWeight": 600,
            "labelAnchor": "start",
            "labelPadding": 8,
            "title": None,
            "labelLimit": 300,
        },
        "range": {"category": _DARK if dark else _LIGHT},
        "rule": {"color": soft},
        "text": {"color": ink, "fontSize": 12},
        "style": {"soft": {"color": soft, "stroke": soft}},
    }


def _spec(chart: Any, frame: pl.DataFrame) -> Spec:
    # rows go in by hand: altair would check every one of them against its schema
    spec: Spec = chart.to_dict()
    del spec["$schema"]  # it names an address; nothing on the page should
    datasets = {**spec.get("datasets", {}), "rows": frame.to_dicts()}
    return {**spec, "config": config(), "datasets": datasets}


def _variant(variants: Sequence[str], **legend: Any) -> alt.Color:
    return alt.Color(
        "variant:N", scale=alt.Scale(domain=list(variants)), title=None, legend=alt.Legend(**legend)
    )


def _facets(chart: Any, panels: Sequence[str], columns: int, field: str = "panel") -> Any:
    return chart.properties(data=alt.Undefined).facet(
        facet=alt.Facet(f"{field}:N", title=None, sort=list(panels)),
        columns=min(columns, max(1, len(panels))),
        data=_ROWS,
        spacing={"row": 28, "column": 26},
    )


def decomposition(
    frame: pl.DataFrame, pieces: Mapping[str, str], variants: Sequence[str], panels: Sequence[str]
) -> Spec:
    """Stacked bars of CE*, one a variant: ``pieces`` gives each piece's name and colour."""
    order = pl.DataFrame({"piece": list(pieces), "order": range(len(pieces))})
    long = (
        frame.unpivot(
            on=list(pieces),
            index=["panel", "variant", "ce_star"],
            variable_name="piece",
            value_name="nats",
        )
        .with_columns(pl.col("nats", "ce_star").round(4))
        .join(order, on="piece")
    )
    y = alt.Y("variant:N", scale=alt.Scale(domain=list(variants)), title=None)
    bars = (
        alt.Chart()
        .mark_bar(height=18)
        .encode(
            x=alt.X("nats:Q", title="CE* (nats)", axis=alt.Axis(tickCount=5)),
            y=y,
            color=alt.Color(
                "piece:N",
                title=None,
                scale=alt.Scale(domain=list(pieces), range=list(pieces.values())),
            ),
            order=alt.Order("order:Q"),
            tooltip=[
                "variant:N",
                "piece:N",
                alt.Tooltip("nats:Q", format=".3f"),
                alt.Tooltip("ce_star:Q", title="CE*", format=".3f"),
            ],
        )
    )
    total = (
        alt.Chart()
        .mark_tick(thickness=3, height=26, style="soft", tooltip=False)
        .encode(x="ce_star:Q", y=y)
    )
    layered = alt.layer(bars, total).properties(width=330, height=alt.Step(32))
    return _spec(_facets(layered, panels, 2), long)


def length_pieces(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """CE* = E[N]·E[r] + covariance, within and between prompts in one piece, as the paper plots it."""
    product, covariance = _LENGTH_PIECES
    ready = frame.select(
        "panel",
        "variant",
        "ce_star",
        pl.col("length_rate_product").alias(product),
        (pl.col("cov_within") + pl.col("cov_between")).alias(covariance),
    )
    return decomposition(ready, _LENGTH_PIECES, variants, panels)


def stop_pieces(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """CE* = content, the next token when the rollout goes on, + when to stop."""
    content, stop = _STOP_PIECES
    ready = frame.select(
        "panel",
        "variant",
        "ce_star",
        pl.col("content_entropy").alias(content),
        pl.col("stop_entropy").alias(stop),
    )
    return decomposition(ready, _STOP_PIECES, variants, panels)


def trajectory(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Entropy rate so far along position, over the step's own entropy in a fainter line."""
    base = alt.Chart().encode(
        x=alt.X("position:Q", title="position (tokens)", axis=alt.Axis(tickCount=5, grid=False)),
        color=_variant(variants, symbolType="stroke", symbolStrokeWidth=3),
    )
    y: dict[str, Any] = {
        "title": "nats per token",
        "scale": alt.Scale(zero=True),
        "axis": alt.Axis(tickCount=4),
    }
    steps = base.mark_line(strokeWidth=1, opacity=0.3, clip=True).encode(y=alt.Y("mean_entropy:Q", **y))
    rate = base.mark_line(strokeWidth=2.6).encode(y=alt.Y("mean_entropy_rate:Q", **y))
    points = base.mark_point(opacity=0, size=60, tooltip=True).encode(
        y=alt.Y("mean_entropy_rate:Q", **y),
        tooltip=[
            "variant:N",
            "position:Q",
            "active:Q",
            alt.Tooltip("mean_entropy_rate:Q", title="rate so far", format=".3f"),
            alt.Tooltip("mean_entropy:Q", title="this step", format=".3f"),
        ],
    )
    layered = alt.layer(steps, rate, points).properties(width=330, height=170)
    chart = _facets(layered, panels, 2).resolve_scale(x="independent", y="independent")
    return _spec(chart, frame)


def lengths(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Densities of rollout length."""
    chart = (
        alt.Chart()
        .mark_area(opacity=0.22, line={"strokeWidth": 2}, clip=True)
        .encode(
            x=alt.X(
                "length:Q",
                title="length (tokens)",
                scale=alt.Scale(nice=False),
                axis=alt.Axis(tickCount=5, grid=False),
            ),
            y=alt.Y("density:Q", title="share per token", stack=None, axis=alt.Axis(tickCount=3)),
            color=_variant(variants),
            tooltip=[
                "variant:N",
                alt.Tooltip("length:Q", format=".0f"),
                alt.Tooltip("density:Q", format=".4f"),
            ],
        )
        .properties(width=330, height=130)
    )
    faceted = _facets(chart, panels, 2).resolve_scale(x="independent", y="independent")
    return _spec(faceted, frame)


def rho(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """ρ of each model with its interval."""
    base = alt.Chart(_ROWS).encode(
        y=alt.Y("panel:N", title=None, scale=alt.Scale(domain=list(panels)), axis=alt.Axis(grid=True)),
        yOffset=alt.YOffset("place:O", scale=alt.Scale(paddingOuter=0.6)),
        color=_variant(variants),
        tooltip=[
            "panel:N",
            "variant:N",
            "n_prompts:Q",
            *[alt.Tooltip(f"{c}:Q", format=".3f") for c in ("rho_pearson", "ci_low", "ci_high")],
        ],
    )
    ends = [*frame["rho_pearson"], *frame["ci_low"], *frame["ci_high"]]
    farthest = max(abs(end) for end in ends if end is not None)
    edge = min(1.0, max(0.2, math.ceil(farthest * 10.5) / 10))  # zero stays in the middle
    x: dict[str, Any] = {
        "title": "ρ (Pearson) of length and entropy rate",
        "scale": alt.Scale(domain=[-edge, edge]),
        "axis": alt.Axis(tickCount=5),
    }
    zero = alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(strokeDash=[3, 3]).encode(x="zero:Q")
    interval = base.mark_rule(strokeWidth=3, opacity=0.45).encode(
        x=alt.X("ci_low:Q", **x), x2="ci_high:Q"
    )
    point = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=alt.X("rho_pearson:Q", **x),
        shape=alt.Shape("variant:N", scale=alt.Scale(domain=list(variants))),
    )
    layered = alt.layer(interval, point, zero)
    return _spec(layered.properties(width=640, height=alt.Step(15, **{"for": "offset"})), frame)


def diversity(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Semantic diversity against entropy rate: a point a prompt, a fitted line a variant."""
    scale = alt.Scale(zero=False)
    base = alt.Chart().encode(
        x=alt.X(
            "entropy_rate:Q",
            title="entropy rate (nats per token)",
            scale=scale,
            axis=alt.Axis(tickCount=5),
        ),
        y=alt.Y(
            "semantic_diversity:Q", title="semantic diversity", scale=scale, axis=alt.Axis(tickCount=4)
        ),
        color=_variant(variants),
    )
    points = (
        base.transform_filter("datum.kind === 'prompt'")
        .mark_point(filled=True, size=38, opacity=0.55)
        .encode(
            shape=alt.Shape("variant:N", scale=alt.Scale(domain=list(variants))),
            tooltip=[
                "variant:N",
                "prompt_id:N",
                alt.Tooltip("entropy_rate:Q", format=".3f"),
                alt.Tooltip("semantic_diversity:Q", format=".3f"),
            ],
        )
    )
    lines = base.transform_filter("datum.kind === 'line'").mark_line(strokeWidth=2.6)
    layered = alt.layer(points, lines).properties(width=330, height=210)
    return _spec(_facets(layered, panels, 2), frame)


def arrows(frame: pl.DataFrame, families: Sequence[str]) -> Spec:
    """One arrow per family, task and treated variant, from the baseline's place to its own."""
    spans = {}
    for axis in ("rate", "diversity"):
        both = pl.concat([frame[f"{axis}_from"], frame[f"{axis}_to"]])
        low, high = float(both.min()), float(both.max())  # type: ignore[arg-type]
        room = max((high - low) * 0.16, 0.002)
        spans[axis] = [low - room, high + room]
    wide, high = (spans[a][1] - spans[a][0] for a in ("rate", "diversity"))
    # the head points along the arrow as it is drawn: in pixels, not in units of the axes
    angle = (
        f"atan2((datum.rate_to - datum.rate_from) * width / {wide!r},"
        f" (datum.diversity_to - datum.diversity_from) * height / {high!r}) * 180 / PI"
    )
    colours = (_FAMILIES * (len(families) // len(_FAMILIES) + 1))[: len(families)]
    data = alt.Chart(_ROWS).transform_calculate(angle=angle)
    base = data.encode(
        color=alt.Color(
            "family:N",
            title=None,
            scale=alt.Scale(domain=list(families), range=colours),
            legend=alt.Legend() if len(families) > 1 else None,
        ),
        tooltip=[
            "family:N",
            "task:N",
            "variant:N",
            *[
                alt.Tooltip(f"{c}:Q", format=".3f")
                for c in ("rate_from", "rate_to", "diversity_from", "diversity_to")
            ],
        ],
    )
    x: dict[str, Any] = {
        "title": "entropy rate (nats per token)",
        "axis": alt.Axis(tickCount=6),
        "scale": alt.Scale(domain=spans["rate"], nice=False),
    }
    y: dict[str, Any] = {
        "title": "semantic diversity",
        "axis": alt.Axis(tickCount=6),
        "scale": alt.Scale(domain=spans["diversity"], nice=False),
    }
    start: dict[str, Any] = {"x": alt.X("rate_from:Q", **x), "y": alt.Y("diversity_from:Q", **y)}
    end: dict[str, Any] = {"x": alt.X("rate_to:Q", **x), "y": alt.Y("diversity_to:Q", **y)}
    layers = [
        base.mark_rule(strokeWidth=2.4).encode(**start, x2="rate_to:Q", y2="diversity_to:Q"),
        base.mark_point(size=64, strokeWidth=2, filled=False).encode(**start),
        base.mark_point(shape="triangle", size=190, filled=True, opacity=1).encode(
            **end, angle=alt.Angle("angle:Q", scale=None)
        ),
    ]
    # the label stands beyond the head, on the side it points to
    for test, beyond in (
        ("datum.rate_to >= datum.rate_from", {"align": "left", "dx": 12}),
        ("datum.rate_to < datum.rate_from", {"align": "right", "dx": -12}),
    ):
        labels = data.transform_filter(test).mark_text(style="text", **beyond)  # type: ignore[arg-type]
        layers.append(labels.encode(**end, text="label:N"))
    return _spec(alt.layer(*layers).properties(width=640, height=400), frame)


def changes(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Percent change from the baseline, the first of ``variants``, of each metric, with its interval."""
    metrics = frame["metric"].unique(maintain_order=True).to_list()
    treated = list(variants)[1:]
    change, low, high = "percent_delta", "percent_delta_ci_low", "percent_delta_ci_high"
    base = alt.Chart().encode(
        y=alt.Y("panel:N", title=None, scale=alt.Scale(domain=list(panels)), axis=alt.Axis(grid=True)),
        yOffset=alt.YOffset("variant:N", scale=alt.Scale(domain=treated, paddingOuter=0.6)),
        color=_variant(variants, values=treated),
        tooltip=[
            "panel:N",
            "variant:N",
            "metric:N",
            "n_prompts:Q",
            *[alt.Tooltip(f"{c}:Q", format="+.1f") for c in (change, low, high)],
        ],
    )
    x: dict[str, Any] = {"title": "change (%)", "axis": alt.Axis(tickCount=4)}
    zero = alt.Chart().mark_rule(strokeDash=[3, 3]).encode(x=alt.datum(0))
    interval = base.mark_rule(strokeWidth=3, opacity=0.45).encode(
        x=alt.X(f"{low}:Q", **x), x2=f"{high}:Q"
    )
    point = base.mark_point(filled=True, size=80, opacity=1).encode(x=alt.X(f"{change}:Q", **x))
    layered = alt.layer(interval, point, zero).properties(
        width=190, height=alt.Step(15, **{"for": "offset"})
    )
    return _spec(_facets(layered, metrics, 3, "metric"), frame)
