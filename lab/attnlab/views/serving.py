"""What a server did: rates by run, waits of all requests, the cache over time, and every request on a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from attnlab.serving.metrics import gaps_of, read_series
from attnlab.serving.timeline import Timeline
from attnlab.views.chart_style import FONT, PALETTE, color, log_axis, plain, styled
from attnlab.views.errors import NothingRecorded
from attnlab.views.labels import OUTCOME_WORDS, mechanism_label
from attnlab.views.viewport import find_run
from attnlab_storage import tensors
from attnlab_storage.database import Store

MOST_POINTS = 600
"""steps that a chart draws; more are thinned, the table keeps all"""
MOST_REQUESTS = 200
"""lines of the chart of requests"""
WAITS = ("time_to_first_token", "inter_token_latency")


def load_timeline(store: Store, run_id: int) -> Timeline:
    """The pass of median duration of a served run. Raises NotFound, NothingRecorded."""
    find_run(store, run_id)
    names = [info.name for info in tensors.tensor_info(store, run_id)]
    if "serving_steps" not in names:
        raise NothingRecorded(
            f"run {run_id} served nothing: its phase must be serving, and it must have ended well"
        )
    steps, requests, tokens = (
        tensors.read_tensor(store, run_id, name, 0, 0)
        for name in ("serving_steps", "serving_requests", "serving_tokens")
    )
    total = tensors.read_tensor(store, run_id, "serving_total", 0, 0)
    return read_series(int(total[0, 0]), steps, requests, tokens[:, 0])


def timeline_document(timeline: Timeline) -> dict[str, Any]:
    """A timeline as plain values: the cache's size, every step, every request with the time of each token."""
    requests = [
        {**served.request._asdict(), **{k: v for k, v in vars(served).items() if k != "request"}}
        for served in timeline.requests
    ]
    steps = [step._asdict() for step in timeline.steps]
    return {"total_tokens": timeline.total_tokens, "requests": requests, "steps": steps}


def timeline_table(timeline: Timeline, what: str) -> str:
    """``steps`` or ``requests`` as CSV; of a request's tokens the first and the last."""
    document = timeline_document(timeline)
    rows = document[what]
    if what == "requests":
        rows = [
            {k: v for k, v in row.items() if k != "tokens_at"}
            | {"first_token": row["tokens_at"][0], "last_token": row["tokens_at"][-1]}
            for row in rows
        ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class RateBar(NamedTuple):
    label: str
    rate: float | None
    interval: tuple[float, float] | None
    outcome: str


class RateInfo(NamedTuple):
    title: str
    bars: list[RateBar]


def rate_info(documents: Sequence[Mapping[str, Any]]) -> RateInfo:
    """Tokens a second of every run: the median of its passes, with the least and the most."""
    bars = []
    for document in documents:
        rate = (document.get("serving") or {}).get("output_tokens_per_second")
        samples = rate["samples"] if rate else []
        interval = (min(samples), max(samples)) if samples else None
        bars.append(RateBar(_label(document), rate and rate["value"], interval, document["state"]))
    return RateInfo("Tokens written a second", bars)


def rate_figure(info: RateInfo) -> go.Figure:
    """One bar a run with the range of its passes, or the word for how it ended."""
    figure = go.Figure()
    for i, bar in enumerate(info.bars):
        if bar.rate is None:
            word = "✕ " + plain(OUTCOME_WORDS.get(bar.outcome, bar.outcome))
            figure.add_annotation(
                y=i, x=0, xanchor="left", showarrow=False, text=word, font={"color": color(i)}
            )
            continue
        low, high = bar.interval or (bar.rate, bar.rate)
        spread = {"array": [high - bar.rate], "arrayminus": [bar.rate - low], "color": FONT}
        figure.add_bar(
            y=[i],
            x=[bar.rate],
            orientation="h",
            marker_color=color(i),
            name=plain(bar.label),
            text=f"{bar.rate:,.4g}",
            textposition="inside",
            insidetextanchor="start",
            error_x={"type": "data", "symmetric": False, **spread},
            hovertemplate="%{x:.4g} tokens/s<extra>" + plain(bar.label) + "</extra>",
        )
    styled(figure, title=info.title, x="tokens a second", y="")
    texts = [plain(bar.label).replace("(", "<br>(") for bar in info.bars]
    places = list(range(len(texts)))
    figure.update_yaxes(tickvals=places, ticktext=texts, autorange="reversed", showgrid=False, zeroline=False)
    figure.update_xaxes(rangemode="tozero")
    figure.update_layout(showlegend=False)
    return figure


class WaitLine(NamedTuple):
    label: str
    seconds: list[float]  # sorted
    shares: list[float]  # of all that are at most so long


class WaitInfo(NamedTuple):
    title: str
    lines: list[WaitLine]


def wait_info(timelines: Mapping[str, Timeline], what: str) -> WaitInfo:
    """How many of all waits are at most how long, by label; ``what`` is one of ``WAITS``."""
    first = what == "time_to_first_token"
    lines = []
    for label, timeline in timelines.items():
        if first:
            waits = [served.tokens_at[0] - served.request.arrival for served in timeline.requests]
        else:
            waits = [gap for served in timeline.requests for gap in gaps_of(served)]
        if waits:
            levels = np.linspace(0, 1, min(len(waits), 201))
            lines.append(WaitLine(label, np.quantile(waits, levels).tolist(), levels.tolist()))
    return WaitInfo("Time to first token" if first else "Time between tokens", lines)


def wait_figure(info: WaitInfo) -> go.Figure:
    """A cumulative distribution a run; the dotted lines are the median, p90 and p99."""
    figure = go.Figure()
    for i, line in enumerate(info.lines):
        hover = "%{y:.0%} within %{x:.4g} s<extra>" + plain(line.label) + "</extra>"
        figure.add_scatter(
            x=line.seconds,
            y=line.shares,
            mode="lines",
            name=plain(line.label),
            line_color=color(i),
            hovertemplate=hover,
        )
    for level in (0.5, 0.9, 0.99):
        figure.add_hline(y=level, line={"color": FONT, "dash": "dot", "width": 1})
    styled(figure, title=info.title, x="seconds", y="share of all")
    figure.update_xaxes(**log_axis(second for line in info.lines for second in line.seconds))
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    figure.update_layout(showlegend=len(info.lines) > 1)
    return figure


class CacheInfo(NamedTuple):
    title: str
    seconds: list[float]
    used: list[int]
    reserved: list[int]
    total: int
    running: list[int]
    waiting: list[int]
    preempted: list[float]  # when sequences gave their room back


def cache_info(timeline: Timeline, title: str = "The cache over time") -> CacheInfo:
    """Tokens held, room set aside, and how many requests ran and waited, at the end of each step."""
    steps = timeline.steps
    kept = steps[:: max(1, -(-len(steps) // MOST_POINTS))]
    return CacheInfo(
        title,
        [step.end for step in kept],
        [step.used for step in kept],
        [step.reserved for step in kept],
        timeline.total_tokens,
        [step.running for step in kept],
        [step.waiting for step in kept],
        [step.end for step in steps if step.preempted],
    )


def cache_figure(info: CacheInfo) -> go.Figure:
    """Used and reserved tokens under the line of all there are; requests on the axis at the right."""
    figure = go.Figure()
    parts = (("set aside", info.reserved, PALETTE[4]), ("used", info.used, PALETTE[0]))
    for name, values, shade in parts:
        figure.add_scatter(
            x=info.seconds,
            y=values,
            mode="lines",
            line={"color": shade, "shape": "vh"},
            fill="tozeroy",
            name=name,
        )
    figure.add_hline(y=info.total, line={"color": FONT, "dash": "dot", "width": 1})
    counts = (("running", info.running, PALETTE[1]), ("waiting", info.waiting, PALETTE[6]))
    for name, values, shade in counts:
        figure.add_scatter(
            x=info.seconds,
            y=values,
            mode="lines",
            line={"color": shade, "shape": "vh"},
            yaxis="y2",
            name=name,
        )
    if info.preempted:
        figure.add_scatter(
            x=info.preempted,
            y=[info.total] * len(info.preempted),
            mode="markers",
            marker={"color": PALETTE[1], "symbol": "x", "size": 8},
            name="preempted",
        )
    styled(figure, title=info.title, x="seconds", y="tokens")
    figure.update_layout(
        yaxis2={"overlaying": "y", "side": "right", "title": {"text": "requests"}, "showgrid": False}
    )
    figure.update_layout(yaxis2_rangemode="tozero", margin_r=56)
    figure.update_yaxes(rangemode="tozero")
    return figure


class RequestLine(NamedTuple):
    request: int
    arrival: float
    started: float
    first: float
    finished: float
    preemptions: int


class RequestInfo(NamedTuple):
    title: str
    lines: list[RequestLine]
    left_out: int


def request_info(timeline: Timeline) -> RequestInfo:
    """When each request came, began, had its first token and its last; the first so many."""
    lines = [
        RequestLine(
            served.request.id,
            served.request.arrival,
            served.started,
            served.tokens_at[0],
            served.finished,
            served.preemptions,
        )
        for served in timeline.requests[:MOST_REQUESTS]
    ]
    left_out = len(timeline.requests) - len(lines)
    title = "Requests" if not left_out else f"Requests, the first {len(lines)} of {len(timeline.requests)}"
    return RequestInfo(title, lines, left_out)


def request_figure(info: RequestInfo) -> go.Figure:
    """A line a request from the top: it waits, its prompt is read, its answer is written."""
    figure = go.Figure()
    parts = (
        ("waits", "arrival", "started", PALETTE[6]),
        ("prompt", "started", "first", PALETTE[5]),
        ("answer", "first", "finished", PALETTE[0]),
    )
    rows = [line.request for line in info.lines]
    for name, begin, end, shade in parts:
        starts = [getattr(line, begin) for line in info.lines]
        figure.add_bar(
            y=rows,
            base=starts,
            x=[getattr(line, end) - start for line, start in zip(info.lines, starts, strict=True)],
            orientation="h",
            marker={"color": shade, "line": {"width": 0}},
            width=0.8,
            name=name,
            hovertemplate="request %{y}: " + name + " %{x:.4g} s<extra></extra>",
        )
    again = [line for line in info.lines if line.preemptions]
    if again:
        figure.add_scatter(
            y=[line.request for line in again],
            x=[line.finished for line in again],
            mode="markers",
            marker={"color": PALETTE[1], "symbol": "x", "size": 7},
            name="was preempted",
        )
    styled(figure, title=info.title, x="seconds", y="request", height=max(240, 110 + 6 * len(rows)))
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _label(document: Mapping[str, Any]) -> str:
    return f"#{document['id']} {mechanism_label(document)}"
