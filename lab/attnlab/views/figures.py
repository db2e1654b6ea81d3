"""Charts of run documents. Each is two pure functions: what is shown (a NamedTuple), then the Plotly figure.

Runs that did not succeed stay in every chart as a mark with their outcome: they are results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from attnlab.intervals import median_interval
from attnlab.views.chart_style import FONT, color, colorscale, plain, styled, symbol, tick_format
from attnlab.views.errors import ViewError
from attnlab.views.labels import OUTCOME_WORDS, format_bytes, run_labels, shown_outcome

LATENCIES = {"latency_ms": "forward pass", "attention_latency_ms": "attention kernel alone"}
WORDED_COLUMNS, LEVEL_MARKS = 5, 2
"""so many columns have room for the words of their label, and for how they ended"""
MEMORIES = {
    "peak_memory_bytes": "forward pass",
    "attention_peak_memory_bytes": "attention kernel alone",
}


class LatencySeries(NamedTuple):
    label: str
    samples: list[float]  # milliseconds, in the order they were taken
    median: float | None
    outcome: str
    interval: tuple[float, float] | None = None  # of the median, 95 %; None with too few samples


class LatencyInfo(NamedTuple):
    title: str
    series: list[LatencySeries]


def latency_info(documents: Sequence[Mapping[str, Any]], value: str = "latency_ms") -> LatencyInfo:
    """All samples, the median and its 95 % interval of every run; ``value`` is latency_ms or attention_latency_ms."""
    if value not in LATENCIES:
        raise ViewError(f"value must be one of {', '.join(LATENCIES)}; got {value!r}")
    series = []
    for document, label in zip(documents, run_labels(documents), strict=True):
        timing = document.get(value) or {}
        samples = [float(sample) for sample in timing.get("samples") or []]
        median, interval = timing.get("median"), median_interval(samples)
        series.append(LatencySeries(label, samples, median, shown_outcome(document), interval))
    return LatencyInfo(f"Time of the {LATENCIES[value]}", series)


def latency_figure(info: LatencyInfo) -> go.Figure:
    """One column a run: a point for every sample, a bar at the median with its interval, a word for no number."""
    figure = go.Figure()
    for i, series in enumerate(info.series):
        spread = [i + 0.5 * ((7 * k) % 11 - 5) / 11 for k in range(len(series.samples))]
        name, hover = plain(series.label), "%{y:.4g} ms<extra>" + plain(series.label) + "</extra>"
        marker = {"color": color(i), "symbol": symbol(i), "size": 6, "opacity": 0.6}
        figure.add_scatter(
            x=spread, y=series.samples, mode="markers", marker=marker, name=name, hovertemplate=hover
        )
        if series.median is not None:
            line = {"color": color(i), "width": 3}
            figure.add_scatter(
                x=[i - 0.35, i + 0.35],
                y=[series.median] * 2,
                mode="lines",
                line=line,
                showlegend=False,
                hovertemplate="median " + hover,
            )
        if series.interval is not None and series.median is not None:
            low, high = series.interval
            sure = f"95 % interval {low:.4g} to {high:.4g} ms<extra>{name}</extra>"
            figure.add_scatter(
                x=[i],
                y=[series.median],
                mode="lines",
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [high - series.median],
                    "arrayminus": [series.median - low],
                    "color": FONT,
                    "thickness": 2,
                    "width": 8,
                },
                showlegend=False,
                hovertemplate=sure,
            )
    styled(figure, title=info.title, x="", y="milliseconds")
    _label_columns(figure, [series.label for series in info.series])
    _mark_outcomes(
        figure,
        [(i, s.outcome) for i, s in enumerate(info.series) if s.median is None or s.outcome == "throttled"],
        upright=len(info.series) > LEVEL_MARKS,
    )
    figure.update_yaxes(rangemode="tozero")
    return figure


class MemoryBar(NamedTuple):
    label: str
    peak: float | None  # bytes above inputs and weights
    floor: float | None  # bytes that any implementation needs (its output), where the probe stated it
    outcome: str


class MemoryInfo(NamedTuple):
    title: str
    bars: list[MemoryBar]


def memory_info(documents: Sequence[Mapping[str, Any]], value: str = "peak_memory_bytes") -> MemoryInfo:
    """Peak memory of every run beyond what was held before, with the floor that the probe stated.

    ``value`` is peak_memory_bytes (a whole forward pass) or attention_peak_memory_bytes (one kernel call).
    """
    if value not in MEMORIES:
        raise ViewError(f"value must be one of {', '.join(MEMORIES)}; got {value!r}")
    bars = [
        MemoryBar(
            label,
            document.get(value),
            (document.get(value.removesuffix("_bytes")) or {}).get("floor_bytes"),
            document["state"],
        )
        for document, label in zip(documents, run_labels(documents), strict=True)
    ]
    return MemoryInfo(f"Peak memory of the {MEMORIES[value]}", bars)


def memory_figure(info: MemoryInfo) -> go.Figure:
    """One bar a run, with the floor as a line across it."""
    figure = go.Figure()
    for i, bar in enumerate(info.bars):
        if bar.peak is not None:
            text = format_bytes(bar.peak)
            hover = text + "<extra>" + plain(bar.label) + "</extra>"
            figure.add_bar(
                x=[i],
                y=[bar.peak],
                marker_color=color(i),
                name=plain(bar.label),
                text=text,
                hovertemplate=hover,
            )
        if bar.floor is not None:
            figure.add_scatter(
                x=[i - 0.4, i + 0.4],
                y=[bar.floor] * 2,
                mode="lines",
                line={"color": FONT, "dash": "dot"},
                showlegend=False,
                hovertemplate=f"floor {format_bytes(bar.floor)}<extra></extra>",
            )
    styled(figure, title=info.title, x="", y="")
    figure.update_yaxes(title_text="bytes above<br>weights and inputs")
    _label_columns(figure, [bar.label for bar in info.bars])
    ended = [(i, bar.outcome) for i, bar in enumerate(info.bars) if bar.peak is None]
    _mark_outcomes(figure, ended, upright=len(info.bars) > LEVEL_MARKS)
    figure.update_yaxes(rangemode="tozero", tickformat=tick_format("bytes"))
    return figure


class StatisticInfo(NamedTuple):
    title: str
    unit: str
    layers: list[int]
    heads: list[int]
    values: list[list[float | None]]  # [layer][head]


def statistic_info(rows: Iterable[Any], name: str, *, title: str | None = None) -> StatisticInfo:
    """One number for each layer and head, from measurement rows (with .name .layer .head .value .unit)."""
    found = [row for row in rows if row.name == name and row.layer is not None and row.head is not None]
    layers = sorted({row.layer for row in found})
    heads = sorted({row.head for row in found})
    at = {(row.layer, row.head): float(row.value) for row in found if row.value is not None}
    values = [[at.get((layer, head)) for head in heads] for layer in layers]
    unit = str(found[0].unit or "") if found else ""
    return StatisticInfo(title or name.replace("_", " "), unit, layers, heads, values)


def statistic_figure(info: StatisticInfo, colormap: str = "viridis") -> go.Figure:
    """Layers down, heads across; hover names the head as L5H2."""
    names = [[f"L{layer}H{head}" for head in info.heads] for layer in info.layers]
    figure = go.Figure(
        go.Heatmap(
            z=info.values,
            x=info.heads,
            y=info.layers,
            customdata=names,
            colorscale=colorscale(colormap),
            hovertemplate="%{customdata}: %{z:.4g} " + plain(info.unit) + "<extra></extra>",
            colorbar={"title": {"text": plain(info.unit)}, "thickness": 12},
        )
    )
    styled(figure, title=info.title, x="head", y="layer", height=max(240, 60 + 14 * len(info.layers)))
    figure.update_yaxes(autorange="reversed", dtick=max(1, len(info.layers) // 12), showgrid=False)
    figure.update_xaxes(dtick=max(1, len(info.heads) // 16), showgrid=False)
    return figure


def _label_columns(figure: go.Figure, labels: list[str]) -> None:
    """Every column keeps its label on a narrow page: a line a word, or only the run's number if there are many."""
    words = [label.replace("(", " (").split(" ") for label in labels]
    shown = [one if len(labels) <= WORDED_COLUMNS else one[:1] for one in words]
    texts = [
        "<br>".join(plain(word if len(word) <= 18 else word[:17] + "…") for word in one) for one in shown
    ]
    figure.update_layout(showlegend=False)
    figure.update_xaxes(
        tickmode="array",
        tickvals=list(range(len(labels))),
        ticktext=texts,
        tickangle=0,
        ticklabeloverflow="allow",
        range=[-0.6, len(labels) - 0.4],
    )


def _mark_outcomes(figure: go.Figure, marks: list[tuple[int, str]], *, upright: bool) -> None:
    for position, outcome in marks:
        word = OUTCOME_WORDS.get(outcome, outcome) if outcome != "succeeded" else "not recorded"
        figure.add_annotation(
            x=position,
            y=0.03,
            yref="paper",
            yanchor="bottom",
            textangle=-90 if upright else 0,
            showarrow=False,
            text="✕ " + plain(word),
            font={"color": color(position)},
        )
