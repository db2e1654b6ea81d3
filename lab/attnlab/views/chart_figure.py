"""A chart of runs as a Plotly figure: bars for names, lines for numbers, every outcome that gave no number marked."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attnlab.views.chart import ChartInfo, Line, Point, outcome_words
from attnlab.views.chart_style import FONT, color, dash, log_axis, plain, styled, symbol, tick_format, wrapped
from attnlab.views.chart_table import FIELDS, MEASURES
from attnlab.views.labels import OUTCOME_WORDS, format_bytes, plain_number

MOST_FACETS = 4
LABEL_CHARS, LINE_CHARS = 26, 110
LEVEL_LABELS = 6
"""beyond so many columns labels are slanted, and the words of a mark stand upright"""
PANEL_CHARS, AXIS_CHARS = 26, 34


def chart_figure(info: ChartInfo) -> go.Figure:
    """One panel a facet, at most four of them, on one scale; hover has the interval, the runs and the reasons."""
    facets = info.facets[:MOST_FACETS] or [""]
    titles = (
        [wrapped(f"{FIELDS[info.axes.facet].words} {facet}", PANEL_CHARS) for facet in facets]
        if info.axes.facet
        else None
    )
    figure = make_subplots(rows=1, cols=len(facets), shared_yaxes=True, subplot_titles=titles)
    figure.update_annotations(font_size=12)
    labels = list(dict.fromkeys(line.label for line in info.lines))
    ended = [line.label for line in info.lines if any(end.x is not None for end in line.ends)]
    shown: set[str] = set()
    marked: set[str] = set()
    for line in info.lines:
        if line.facet in facets:
            place = {"row": 1, "col": facets.index(line.facet) + 1}
            row = ended.index(line.label) if line.label in ended else 0
            height = end_height(info, row)
            _draw(
                figure, info, line, labels.index(line.label), height, line.label not in shown, marked, place
            )
            shown.add(line.label)
    styled(figure, title=info.title, x=info.x_words, y="", height=440)
    figure.update_yaxes(title_text=wrapped(info.y_words, AXIS_CHARS), row=1, col=1)
    figure.update_layout(barmode="group", margin={"t": 72 if titles else 40}, showlegend=True)
    _scales(figure, info)
    return figure


def end_height(info: ChartInfo, row: int) -> float:
    """Where the ends of a line are marked: above all points, each line in a row of its own; of columns at the foot."""
    values = [end for line in info.lines for point in line.points for end in point.ends(info.axes.bars)]
    low, high = min(values, default=1.0), max(values, default=1.0)
    if info.labels:
        return low * (low / high) ** 0.09 if info.log_y else 0.0
    if info.log_y and low > 0:
        return high * max(high / low, 10.0) ** (0.09 * (row + 1))
    return high + (high - low or high or 1.0) * 0.09 * (row + 1)


def _draw(
    figure: go.Figure,
    info: ChartInfo,
    line: Line,
    index: int,
    top: float,
    legend: bool,
    marked: set[str],
    place: dict[str, Any],
) -> None:
    look = {"color": color(index), "symbol": symbol(index), "size": 8}
    name = plain(line.label) + (f" · {line.fit.words()}" if line.fit else "")
    common: dict[str, Any] = {
        "name": name,
        "legendgroup": line.label,
        "showlegend": legend,
        "x": [point.x for point in line.points],
        "y": [point.y for point in line.points],
        "customdata": [_hover(info, point) for point in line.points],
        "hovertemplate": "%{customdata}<extra>" + plain(line.label) + "</extra>",
        "error_y": {
            "type": "data",
            "array": [point.ends(info.axes.bars)[1] - point.y for point in line.points],
            "arrayminus": [point.y - point.ends(info.axes.bars)[0] for point in line.points],
            "visible": any(point.samples > 1 for point in line.points),
            "thickness": 1.2,
        },
    }
    if info.labels and not info.log_y:
        common["error_y"]["color"] = FONT
        figure.add_trace(go.Bar(marker_color=color(index), offsetgroup="all", **common), **place)
    else:
        mode = "lines+markers" if info.axes.x in FIELDS and not info.labels else "markers"
        figure.add_trace(
            go.Scatter(mode=mode, marker=look, line={"color": color(index), "dash": dash(index)}, **common),
            **place,
        )
    _mark_conditions(figure, info, line, marked, place)
    ends = [end for end in line.ends if end.x is not None]
    if ends:
        words = [
            "not recorded" if end.outcome == "succeeded" else OUTCOME_WORDS.get(end.outcome, end.outcome)
            for end in ends
        ]
        heights = [top if end.y is None else end.y for end in ends]
        if is_narrow(info):
            for end, height, word in zip(ends, heights, words, strict=True):
                _stand(figure, end.x, math.log10(height) if info.log_y else height, word, place)
        figure.add_trace(
            go.Scatter(
                x=[end.x for end in ends],
                y=heights,
                mode="markers" if is_narrow(info) else "markers+text",
                marker={"color": color(index), "symbol": "x", "size": 11},
                text=words,
                textposition=[_beside(info, end.x) for end in ends],
                customdata=[plain(outcome_words(end)) for end in ends],
                hovertemplate="%{customdata}<extra>" + plain(line.label) + "</extra>",
                name=name,
                legendgroup=line.label,
                showlegend=legend and not line.points,
                cliponaxis=False,
            ),
            **place,
        )


def is_narrow(info: ChartInfo) -> bool:
    """Whether a column has no room for a word."""
    return len(info.labels) * max(1, min(MOST_FACETS, len(info.facets))) > LEVEL_LABELS


def _stand(figure: go.Figure, x: Any, y: float, word: str, place: dict[str, Any]) -> None:
    """A word that stands upright on a mark, in its own column."""
    figure.add_annotation(
        x=x,
        y=y,
        text=plain(word),
        textangle=-90,
        showarrow=False,
        yanchor="bottom",
        yshift=8,
        font_size=11,
        **place,
    )


CONDITIONS = {True: ("throttled", "diamond-tall-open"), False: ("disturbed", "circle-open")}


def _beside(info: ChartInfo, x: Any) -> str:
    """Where the words of a mark stand: at the right edge of the panel they would be cut off."""
    if info.labels:
        return "top center"
    places = [point.x for line in info.lines for point in line.points]
    places += [end.x for line in info.lines for end in line.ends if end.x is not None]
    return "middle left" if x == max(places) else "middle right"


def _mark_conditions(
    figure: go.Figure, info: ChartInfo, line: Line, marked: set[str], place: dict[str, Any]
) -> None:
    """A ring around every time that is not the kernel's alone; what was throttled is named where it stands."""
    for throttled, (word, mark) in CONDITIONS.items():
        points = [point for point in line.points if point.conditions and point.throttled == throttled]
        if not points:
            continue
        figure.add_trace(
            go.Scatter(
                x=[point.x for point in points],
                y=[point.y for point in points],
                mode="markers+text" if throttled and not is_narrow(info) else "markers",
                text=[word] * len(points) if throttled else None,
                textposition=[_beside(info, point.x) for point in points],
                marker={"color": FONT, "symbol": mark, "size": 16, "line": {"width": 2}},
                customdata=[plain("; ".join(point.conditions)) for point in points],
                hovertemplate="%{customdata}<extra>" + plain(line.label) + "</extra>",
                name=word,
                legendgroup=word,
                showlegend=word not in marked,
                legendrank=2000,  # below the lines
                cliponaxis=False,
            ),
            **place,
        )
        marked.add(word)


def _hover(info: ChartInfo, point: Point) -> str:
    y = _value(info.axes.y, point.y)
    parts = [y if info.labels else f"{_value(info.axes.x, point.x)} {_short(info.axes.x)}: {y}"]
    if point.samples > 1:
        if point.interval:
            parts.append(f"95 % interval {_between(info.axes.y, point.interval)}")
        parts.append(f"p10 to p90: {_between(info.axes.y, point.percentiles)}, {point.samples} samples")
    parts += map(plain, point.conditions)
    runs = " ".join(f"#{run}" for run in point.runs)
    return "<br>".join([*parts, f"run {runs}" if len(point.runs) == 1 else f"runs {runs}"])


def _between(name: str, ends: tuple[float, float]) -> str:
    return f"{_value(name, ends[0])} to {_value(name, ends[1])}"


def _short(name: str) -> str:
    return FIELDS[name].words if name in FIELDS else ""


def _value(name: str, value: float) -> str:
    if name not in MEASURES:
        return f"{value:,}"
    unit = MEASURES[name].unit
    return format_bytes(value) if unit == "bytes" else f"{plain_number(value)} {unit}".strip()


def _scales(figure: go.Figure, info: ChartInfo) -> None:
    if info.labels:
        columns = len(info.labels) * max(1, min(MOST_FACETS, len(info.facets)))
        level = not is_narrow(info)
        texts = [_tick(label, LINE_CHARS // columns if level else 0) for label in info.labels]
        figure.update_xaxes(
            type="category", tickmode="array", tickvals=info.labels, ticktext=texts, categoryarray=info.labels
        )
        figure.update_yaxes(rangemode="normal" if info.log_y else "tozero")
        if level:
            lines = max(text.count("<br>") for text in texts)
            figure.update_xaxes(tickangle=0)
            figure.update_layout(height=440 + 14 * lines, legend={"y": -0.25 - 0.06 * lines})
        else:  # they are slanted, and need the room below them
            figure.update_layout(height=520, legend={"y": -0.55})
    elif info.log_x:
        figure.update_xaxes(**log_axis(numbers_of(figure, "x"), unit_of(info.axes.x)))
        if info.axes.x in FIELDS:
            places = {point.x for line in info.lines for point in line.points}
            places |= {end.x for line in info.lines for end in line.ends if end.x}
            ticks = sorted(places)
            figure.update_xaxes(tickmode="array", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    unit = unit_of(info.axes.y)
    if info.log_y:
        figure.update_yaxes(**log_axis(numbers_of(figure, "y"), unit))
    else:
        figure.update_yaxes(tickformat=tick_format(unit))


def _tick(label: str, width: int) -> str:
    """A run's name, and below it what tells it from the others; in lines of a width, or cut where it slants (0)."""
    run, _, apart = label.partition(" · ")
    cut = plain(run if len(run) <= LABEL_CHARS else f"{run[: LABEL_CHARS - 1]}…")
    lines = wrapped(run, width) if width else cut
    more = wrapped(apart, width) if width else plain(apart)
    return f"{lines}<br>{more}" if apart else lines


def unit_of(name: str) -> str:
    return MEASURES[name].unit if name in MEASURES else ""


def numbers_of(figure: go.Figure, axis: str) -> list[float]:
    """All that is drawn along an axis."""
    return [value for trace in figure.to_plotly_json()["data"] for value in trace[axis] if value is not None]
