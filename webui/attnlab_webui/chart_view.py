"""The chart panel of a page: what its pickers offer, the figure they ask for, and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from attnlab.views.chart import (
    BARS,
    PRESETS,
    ROOFLINE,
    SAMPLES,
    Axes,
    best_axes,
    chart_info,
    check_axes,
    outcome_words,
)
from attnlab.views.chart_figure import chart_figure
from attnlab.views.chart_table import FIELDS, MEASURES, chart_rows, varying
from attnlab.views.errors import ViewError
from attnlab.views.labels import TIMINGS, plain_number
from attnlab.views.roofline import roofline_figure, roofline_info
from attnlab.views.samples import samples_figure, samples_info
from attnlab_webui import pieces
from attnlab_webui.pieces import Raw, escape

OWN = "own"
CHART_CHOICES = [
    *((words, name) for name, (words, _) in PRESETS.items()),
    ("Samples: histogram and ECDF", SAMPLES),
    ("Roofline", ROOFLINE),
    ("Axes of your own", OWN),
]
FIELD_CHOICES = [(field.words, name) for name, field in FIELDS.items()]
MEASURE_CHOICES = [(measure.words, name) for name, measure in MEASURES.items()]
NONE = [("none", "")]
FORMATS = {"csv": "CSV", "parquet": "Parquet", "json": "JSON"}
PARTS = ("chart", "x", "y", "colour", "facet", "bars")
BAR_CHOICES = [(words, name) for name, words in BARS.items()]


class Chosen(NamedTuple):
    """What a person asks for: a preset, the roofline, or axes of their own; "" is what suits the runs best."""

    chart: str = ""
    axes: Axes = PRESETS["latency"][1]


class Panel(NamedTuple):
    """What the panel shows."""

    chosen: Chosen
    figure: go.Figure | None
    note: str
    table: str


def read_choice(query: Mapping[str, str]) -> Chosen:
    """The chart of an address; what it gets wrong falls to the chart that suits, and the page says which it shows."""
    chart = query.get("chart", "")
    if chart in PRESETS:
        return Chosen(chart, PRESETS[chart][1])
    if chart in (ROOFLINE, SAMPLES):
        return Chosen(chart)
    if chart != OWN:
        return Chosen()
    start = PRESETS["latency"][1]
    axes = Axes(
        query.get("x") or start.x,
        query.get("y") or start.y,
        query.get("colour", ""),
        query.get("facet", ""),
        query.get("bars") or start.bars,
    )
    try:
        check_axes(axes)
    except ViewError:
        return Chosen()
    return Chosen(OWN, axes)


def picked(chart: str) -> Chosen:
    """A preset or the roofline, as its picker says."""
    return Chosen(chart, PRESETS[chart][1]) if chart in PRESETS else Chosen(chart)


def panel(documents: Sequence[Mapping[str, Any]], chosen: Chosen) -> Panel:
    """Figure, note and table of the chosen chart."""
    if not documents:
        return Panel(chosen, None, "", "")
    if not chosen.chart:
        chosen = picked(best_axes(documents))
    rows = chart_rows(documents)
    if chosen.chart == ROOFLINE:
        roofs = roofline_info(documents)
        wanted = ["attention_flops_per_s", "ceiling_percent", "intensity", "attention_latency_ms"]
        table = _table(rows, wanted, documents)
        if not roofs.points:
            text = "No run has a place under a roofline: it takes timing in record, and an attention with a mask."
            return Panel(chosen, None, pieces.notice(text), table)
        return Panel(chosen, roofline_figure(roofs), _left_out(roofs.missing), table)
    if chosen.chart == SAMPLES:
        return _samples_panel(documents, rows, chosen)
    info = chart_info(documents, chosen.axes)
    wanted = [name for name in (chosen.axes.x, chosen.axes.y) if name in MEASURES]
    table = _table(rows, wanted, documents)
    if not any(line.points or line.ends for line in info.lines):
        text = f"No run has measured the {MEASURES[chosen.axes.y].words} yet."
        return Panel(chosen, None, pieces.notice(text), table)
    lost = [outcome_words(end) for line in info.lines for end in line.ends if end.x is None]
    return Panel(chosen, chart_figure(info), _left_out(lost), table)


def _samples_panel(
    documents: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], chosen: Chosen
) -> Panel:
    table = _table(rows, list(TIMINGS), documents)
    info = samples_info(documents)
    if not info.rows:
        return Panel(
            chosen, None, pieces.notice("No run has samples yet: they take timing in record."), table
        )
    return Panel(chosen, samples_figure(info), _left_out(info.missing), table)


def _left_out(words: Sequence[str]) -> str:
    """Runs without a place, those with the same words together."""
    if not words:
        return ""
    alike: dict[str, list[str]] = {}
    for word in words:
        run, _, why = word.partition(" ")
        alike.setdefault(why, []).append(run)
    lines = "".join(f"<li>{escape(' '.join(runs))} {escape(why)}</li>" for why, runs in alike.items())
    return (
        f'<details class="at-muted"><summary>{len(words)} runs have no place in this chart</summary>'
        f"<ul>{lines}</ul></details>"
    )


def _table(
    rows: Sequence[Mapping[str, Any]], wanted: Sequence[str], documents: Sequence[Mapping[str, Any]]
) -> str:
    fields = ["mechanism", *(name for name in varying(rows) if name != "mechanism")]
    columns = ["run", *(FIELDS[name].words for name in fields), *(_head(name) for name in wanted), "outcome"]
    body = [
        (
            f"#{row['id']}",
            *(row[name] for name in fields),
            *(_cell(name, row[name]) for name in wanted),
            Raw(pieces.chip(row["outcome"], row["reason"] or row["conditions"]) + _conditions(row)),
        )
        for row in rows
    ]
    ids = ",".join(str(document["id"]) for document in documents)
    links = "".join(
        f'<a href="/api/v1/chart/{form}?runs={ids}" download>{word}</a>' for form, word in FORMATS.items()
    )
    exports = (
        '<div class="at-exports"><span class="at-label">these runs with all their measures</span>'
        f"{links}</div>"
    )
    return pieces.table(columns, body, label="The same numbers") + exports


def _conditions(row: Mapping[str, Any]) -> str:
    """What disturbed the times of a run, where that is not its outcome already."""
    if row["outcome"] != "succeeded" or not row["conditions"]:
        return ""
    return f' <span class="at-muted" title="{escape(row["conditions"])}">disturbed</span>'


def _head(name: str) -> str:
    measure = MEASURES[name]
    return f"{measure.words}, {measure.unit}" if measure.unit not in ("", "bytes") else measure.words


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "—"
    if MEASURES[name].unit == "bytes":
        return pieces.size_in_bytes(value)
    return f"{value:,.0f}" if MEASURES[name].unit == "tokens" else plain_number(value)
