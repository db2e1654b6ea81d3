"""Memory over the time of one step, by whose it is, with the allocations that make its peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import plotly.graph_objects as go

from attnlab.views.chart_style import FONT, PALETTE, styled, tick_format
from attnlab.views.labels import format_bytes

OWNER_WORDS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations",
    "gradients": "gradients",
    "mask": "mask",
    "attention_scratch": "attention scratch",
}
_COLORS = dict(zip(OWNER_WORDS, (PALETTE[i] for i in (6, 2, 0, 3, 5, 1)), strict=True))


class Holder(NamedTuple):
    """Allocations alive at the peak that one line of code made."""

    owner: str
    operator: str
    place: str
    bytes: int
    allocations: int


class TimelineInfo(NamedTuple):
    title: str
    times: list[float]  # milliseconds from the first allocation
    layers: list[tuple[str, list[int]]]  # (owner, bytes at each time), drawn bottom up
    held: list[tuple[str, int]]  # (owner, bytes) there before the step, not drawn
    peak: tuple[float, int] | None  # (milliseconds, bytes above what was held)
    holders: list[Holder]
    events: int


def timeline_info(timeline: Mapping[str, Any], title: str) -> TimelineInfo:
    """What is shown of a stored timeline (``describe.memory_timeline``)."""
    times = [float(time) / 1000 for time in timeline["times_us"]]
    owners = timeline["owners"]
    peak = timeline["peak"]
    return TimelineInfo(
        title,
        times,
        [(owner, list(owners[owner])) for owner in OWNER_WORDS if owner in owners],
        [(owner, count) for owner, count in timeline["held"].items() if count],
        None if peak["index"] is None else (times[peak["index"]], peak["bytes"]),
        [Holder(**holder) for holder in peak["holders"]],
        timeline["events"],
    )


def timeline_figure(info: TimelineInfo) -> go.Figure:
    """A stacked area by owner, the peak marked; what was held before is named and not drawn."""
    figure = go.Figure()
    for owner, counts in info.layers:
        figure.add_scatter(
            x=info.times,
            y=counts,
            mode="lines",
            stackgroup="held",
            line={"shape": "hv", "width": 0.5, "color": _COLORS[owner]},
            name=OWNER_WORDS[owner],
            customdata=[format_bytes(count) for count in counts],
            hovertemplate="%{customdata}<extra>" + OWNER_WORDS[owner] + "</extra>",
        )
    if info.peak is not None:
        at, count = info.peak
        figure.add_scatter(
            x=[at],
            y=[count],
            mode="markers+text",
            marker={"symbol": "triangle-down", "size": 11, "color": FONT},
            text=[f"peak {format_bytes(count)}"],
            textposition="top right" if at < 0.5 * info.times[-1] else "top left",
            hovertemplate=f"peak {format_bytes(count)} at {at:.3g} ms<extra></extra>",
            showlegend=False,
        )
    before = ", ".join(f"{OWNER_WORDS.get(owner, owner)} {format_bytes(count)}" for owner, count in info.held)
    x = "milliseconds, under the profiler" + (f" · held before: {before}" if before else "")
    styled(figure, title=info.title, x=x, y="bytes")
    highest = info.peak[1] if info.peak else 1
    figure.update_yaxes(tickformat=tick_format("bytes"), range=[0, 1.15 * highest])
    figure.update_layout(hovermode="x unified")
    return figure
