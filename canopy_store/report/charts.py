"""One Vega-Lite chart a function: the same specification draws the page and the PDF and SVG files.

Data come in as rows; names out of the store are only ever data, never part of an expression. Widths
are those of the files: the page fits them to the window. A colour is a variant, the same in every chart
and beside its name on the page: gray the baseline, a hue each of the others. Nothing else is coloured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

# Hues that people with colour-blindness tell apart, after Okabe and Ito; the baseline takes the gray.
_LIGHT = ["#757d86", "#0072B2", "#D55E00", "#009E73", "#A4508F", "#8C5A2B", "#3F51B5", "#00838F"]
_DARK = ["#a0a7af", "#56B4E9", "#FF8A3D", "#2CC594", "#DD95CF", "#C99A6A", "#97A3F0", "#4FC3CF"]
_LENGTH_PIECES = ("E[N] · E[r]", "covariance of N and r")
_STOP_PIECES = ("content", "when to stop")
FONT = "Avenir Next, Segoe UI, Helvetica Neue, Arial, Liberation Sans, sans-serif"

# Labels in lines of at most so many characters, broken after a space or a sign where there is one: a
# label that is cut off names nothing. The page gives narrow windows shorter lines.
_LINES = (
    "split(trim(replace(datum.label, regexp('(.{{1,' + {n} + '}}$|.{{1,' + {n} + '}}[ _·/.,-]"
    "|.{{1,' + {n} + '}})', 'g'), '$1\\n')), '\\n')"
)
_WRAPPED, _HEADED = _LINES.format(n="label_line"), _LINES.format(n="header_line")
_PARAMS = [{"name": "label_line", "value": 22}, {"name": "header_line", "value": 44}]
_SHORTEST = 16  # characters of a label's line on a phone

ROWS = alt.NamedData("rows")
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
            "labelLimit": 170,
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
        },
        "header": {
            "labelColor": ink,
            "labelFontSize": 13,
            "labelFontWeight": 600,
            "labelAnchor": "start",
            "labelPadding": 8,
            "title": None,
            "labelLimit": 320,
        },
        "range": {"category": _DARK if dark else _LIGHT},
        "rule": {"color": soft},
        "text": {"color": ink, "fontSize": 12},
        "style": {"ink": {"color": ink, "stroke": ink}, "note": {"fill": soft}},
    }


def specification(chart: Any, frame: pl.DataFrame) -> Spec:
    """The chart as Vega-Lite, over the rows of ``frame``."""
    # rows go in by hand: altair would check every one of them against its schema
    spec: Spec = chart.to_dict()
    del spec["$schema"]  # it names an address; nothing on the page should
    datasets = {**spec.get("datasets", {}), "rows": frame.to_dicts()}
    return {**spec, "params": _PARAMS, "config": config(), "datasets": datasets}


def by_variant(
    variants: Sequence[str], channel: Any = alt.Color, field: str = "variant", **legend: Any
) -> Any:
    """The variant as a colour, or as another channel; the legend is one and the same."""
    return channel(
        f"{field}:N",
        scale=alt.Scale(domain=list(variants)),
        title=None,
        legend=alt.Legend(symbolOpacity=1, **legend),
    )


def rows_axis(**more: Any) -> alt.Axis:
    """An axis of names, each in as many lines as it needs."""
    return alt.Axis(labelExpr=_WRAPPED, **more)


def row_step(names: Sequence[str], rows: int, least: float) -> float:
    """Pixels of each of ``rows`` rows of a name, so that the longest name's lines have room."""
    lines = max((math.ceil(len(name) / _SHORTEST) for name in names), default=1)
    return max(least, (15 * lines + 8) / rows)


def small_charts(chart: Any, panels: Sequence[str], columns: int, field: str = "panel") -> Any:
    """The chart once for each value of ``field``, in the order of ``panels``."""
    return chart.properties(data=alt.Undefined).facet(
        facet=alt.Facet(
            f"{field}:N", title=None, sort=list(panels), header=alt.Header(labelExpr=_HEADED)
        ),
        columns=min(columns, max(1, len(panels))),
        data=ROWS,
        spacing={"row": 28, "column": 26},
    )


def decomposition(
    frame: pl.DataFrame,
    pieces: Sequence[str],
    variants: Sequence[str],
    panels: Sequence[str],
    unit: str,
) -> Spec:
    """Stacked bars of CE*, one a variant in its colour; the pieces are two strengths of it."""
    order = pl.DataFrame({"piece": list(pieces), "order": range(len(pieces))})
    end = pl.sum_horizontal(pl.max_horizontal(piece, 0) for piece in pieces)
    long = (
        frame.with_columns(end=end)
        .unpivot(
            on=list(pieces),
            index=["panel", "variant", "ce_star", "end", "number"],
            variable_name="piece",
            value_name="nats",
        )
        .with_columns(pl.col("nats", "ce_star", "end").round(4))
        .join(order, on="piece", maintain_order="left")
    )
    least = min(0.0, *long["nats"])
    # room for the number that stands behind the longest bar
    room = 1.1 + 0.035 * max(len(number) for number in long["number"])
    domain = [1.1 * least, room * max(*long["end"], *long["ce_star"], 1e-6)]
    y = alt.Y("variant:N", scale=alt.Scale(domain=list(variants)), title=None, axis=rows_axis())
    bars = (
        alt.Chart()
        .mark_bar(height=18)
        .encode(
            x=alt.X(
                "nats:Q",
                title=unit,
                axis=alt.Axis(tickCount=5),
                scale=alt.Scale(domain=domain, nice=False),
            ),
            y=y,
            color=alt.Color("variant:N", scale=alt.Scale(domain=list(variants)), legend=None),
            opacity=alt.Opacity(
                "piece:O",
                title=None,
                sort=list(pieces),
                scale=alt.Scale(domain=list(pieces), range=[0.95, 0.4]),
                legend=alt.Legend(symbolType="square", symbolFillColor=_LIGHT[0], symbolStrokeWidth=0),
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
    whole = alt.Chart().transform_filter("datum.order === 0")
    total = whole.mark_tick(thickness=3, height=26, style="ink", tooltip=False).encode(
        x="ce_star:Q", y=y
    )
    number = whole.mark_text(align="left", dx=7, style="text").encode(x="end:Q", y=y, text="number:N")
    layered = alt.layer(bars, total, number).properties(
        width=330, height=alt.Step(row_step(variants, 1, 32))
    )
    return specification(small_charts(layered, panels, 2), long)


def length_pieces(
    frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str], unit: str
) -> Spec:
    """CE* = E[N]·E[r] + covariance, within and between prompts in one piece, as the paper plots it."""
    product, covariance = _LENGTH_PIECES
    ready = frame.select(
        "panel",
        "variant",
        "ce_star",
        "number",
        pl.col("length_rate_product").alias(product),
        (pl.col("cov_within") + pl.col("cov_between")).alias(covariance),
    )
    return decomposition(ready, _LENGTH_PIECES, variants, panels, unit)


def stop_pieces(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str], unit: str) -> Spec:
    """CE* = content, the next token when the rollout goes on, + when to stop."""
    content, stop = _STOP_PIECES
    ready = frame.select(
        "panel",
        "variant",
        "ce_star",
        "number",
        pl.col("content_entropy").alias(content),
        pl.col("stop_entropy").alias(stop),
    )
    return decomposition(ready, _STOP_PIECES, variants, panels, unit)


def trajectory(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Entropy rate so far along position, over the step's own entropy in a fainter line."""
    base = alt.Chart().encode(
        x=alt.X("position:Q", title="position (tokens)", axis=alt.Axis(tickCount=5, grid=False)),
        color=by_variant(variants, symbolType="stroke", symbolStrokeWidth=3),
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
    chart = small_charts(layered, panels, 2).resolve_scale(x="independent", y="independent")
    return specification(chart, frame)


def pass_at_k(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Lines of ``value`` over k, which doubles from mark to mark, with their intervals as bands."""
    present = set(frame["variant"])
    own = [name for name in variants if name in present]
    ks = frame["k"].unique().sort().to_list()
    x = alt.X(
        "k:Q",
        title="k (rollouts)",
        scale=alt.Scale(type="log", base=2, nice=False),
        axis=alt.Axis(values=ks, grid=False, format="d", labelOverlap=True),
    )
    y: dict[str, Any] = {
        "title": "prompts answered right",
        "scale": alt.Scale(domain=[0, 1], clamp=True),
        "axis": alt.Axis(tickCount=4, format="%"),
    }
    base = alt.Chart().encode(
        x=x,
        color=by_variant(variants, values=own, symbolType="stroke", symbolStrokeWidth=3),
        tooltip=[
            "variant:N",
            "k:Q",
            "n_prompts:Q",
            *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("value", "low", "high")),
        ],
    )
    band = base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", **y), y2="high:Q")
    line = base.mark_line(strokeWidth=2.4).encode(y=alt.Y("value:Q", **y))
    mark = base.mark_point(filled=True, size=40, opacity=1).encode(y=alt.Y("value:Q", **y))
    layered = alt.layer(band, line, mark).properties(width=330, height=170)
    return specification(small_charts(layered, panels, 2), frame)


def lengths(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Share of rollouts that go on after each length; what stands at the right end was cut.

    ``cut`` names a panel's shares cut, and stands above it; ``last`` marks a run's last length.
    """
    base = alt.Chart().encode(
        x=alt.X(
            "length:Q",
            title="length (tokens)",
            scale=alt.Scale(nice=False, zero=True),
            axis=alt.Axis(tickCount=5, grid=False),
        ),
        y=alt.Y(
            "going_on:Q",
            title="share that goes on",
            scale=alt.Scale(domain=[0, 1]),
            axis=alt.Axis(tickCount=3, format="%"),
        ),
        color=by_variant(variants, symbolType="stroke", symbolStrokeWidth=3),
        tooltip=[
            "variant:N",
            alt.Tooltip("length:Q", title="after (tokens)"),
            alt.Tooltip("going_on:Q", title="goes on", format=".1%"),
        ],
    )
    line = base.mark_line(interpolate="step-after", strokeWidth=2.2)
    # nothing is left at the last length of a run of which nothing was cut
    end = (
        base.transform_filter("datum.last")
        .mark_point(filled=True, size=70)
        .encode(opacity=alt.condition("datum.going_on > 0", alt.value(1), alt.value(0)))
    )
    lines = max(words.count("\n") for words in frame["cut"].drop_nulls())
    words = (
        alt.Chart()
        .transform_filter("datum.cut !== null")
        .mark_text(align="left", baseline="bottom", lineBreak="\n", fontSize=11, style="note")
        .encode(x=alt.value(0), y=alt.value(-5 - 14 * lines), text="cut:N")
    )
    layered = alt.layer(line, end, words).properties(width=330, height=130)
    faceted = small_charts(layered, panels, 2).resolve_scale(x="independent", y="independent")
    return specification(faceted, frame)


def diversity(frame: pl.DataFrame, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """Semantic diversity against entropy rate: a point a prompt, a fitted line a variant."""
    x, y = _rate_and_diversity("entropy_rate", "semantic_diversity")
    base = alt.Chart().encode(x=x, y=y, color=by_variant(variants))
    points = (
        base.transform_filter("datum.kind === 'prompt'")
        .mark_point(filled=True, size=38, opacity=0.55)
        .encode(
            shape=by_variant(variants, alt.Shape),
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
    return specification(small_charts(layered, panels, 2), frame)


def _rate_and_diversity(
    rate: str, diversity: str, spans: Mapping[str, list[float]] | None = None
) -> tuple[alt.X, alt.Y]:
    """The two axes, over ``spans`` if they are given."""
    # padding: a mark of some size stands at each end
    scales = {
        axis: alt.Scale(domain=spans[axis], nice=False)
        if spans
        else alt.Scale(zero=False, padding=14, nice=False)
        for axis in ("rate", "diversity")
    }
    x = alt.X(
        f"{rate}:Q",
        title="entropy rate (nats per token)",
        scale=scales["rate"],
        axis=alt.Axis(tickCount=5),
    )
    y = alt.Y(
        f"{diversity}:Q",
        title="semantic diversity",
        scale=scales["diversity"],
        axis=alt.Axis(tickCount=4),
    )
    return x, y


def arrows(frame: pl.DataFrame, baseline: str, variants: Sequence[str], panels: Sequence[str]) -> Spec:
    """One small chart a panel: an arrow per treated variant, from the baseline's place to its own."""
    spans = {}
    for axis in ("rate", "diversity"):
        both = pl.concat([frame[f"{axis}_from"], frame[f"{axis}_to"]])
        low, high = float(both.min()), float(both.max())  # type: ignore[arg-type]
        room = max((high - low) * 0.12, 0.002)
        spans[axis] = [low - room, high + room]
    wide, high = (spans[a][1] - spans[a][0] for a in ("rate", "diversity"))
    # the head points along the arrow as it is drawn: in pixels, not in units of the axes
    angle = (
        f"atan2((datum.rate_to - datum.rate_from) * width / {wide!r},"
        f" (datum.diversity_to - datum.diversity_from) * height / {high!r}) * 180 / PI"
    )
    frame = frame.with_columns(start=pl.lit(baseline))
    base = (
        alt.Chart()
        .transform_calculate(angle=angle)
        .encode(
            color=by_variant(variants),
            tooltip=[
                "panel:N",
                "variant:N",
                *[
                    alt.Tooltip(f"{c}:Q", format=".3f")
                    for c in ("rate_from", "rate_to", "diversity_from", "diversity_to")
                ],
            ],
        )
    )
    x, y = _rate_and_diversity("rate_from", "diversity_from", spans)
    layers = [
        base.mark_rule(strokeWidth=2.4).encode(x=x, y=y, x2="rate_to:Q", y2="diversity_to:Q"),
        base.mark_point(size=64, strokeWidth=2.4, filled=False, opacity=1).encode(
            x=x, y=y, color=by_variant(variants, field="start")
        ),
        base.mark_point(shape="triangle", size=170, filled=True, opacity=1).encode(
            x="rate_to:Q", y="diversity_to:Q", angle=alt.Angle("angle:Q", scale=None)
        ),
    ]
    return specification(
        small_charts(alt.layer(*layers).properties(width=330, height=190), panels, 2), frame
    )
