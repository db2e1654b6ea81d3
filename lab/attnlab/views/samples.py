"""The samples of runs as distributions: a histogram, and beside it the share of samples up to each time (ECDF)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attnlab.views.chart_style import WIDE, color, faint, log_axis, plain, styled
from attnlab.views.figures import LATENCIES, LatencySeries, latency_info
from attnlab.views.labels import OUTCOME_WORDS

DASHES = ("solid", "dash", "dot", "dashdot")
MOST_RUNS = 12
"""whose samples are drawn; more would hide each other"""
ROW_HEIGHT = 300
NAME_HEIGHT = 12
"""of a run in the legend, a few of which share a line"""


class SampleRow(NamedTuple):
    """The runs that have samples of one time."""

    title: str
    series: list[LatencySeries]


class SamplesInfo(NamedTuple):
    rows: list[SampleRow]  # of the forward pass, of the attention alone; only those with samples
    missing: list[str]  # runs without samples, with their outcome


def samples_info(documents: Sequence[Mapping[str, Any]]) -> SamplesInfo:
    """All samples of the first dozen runs that have any, for each of the two times."""
    rows = []
    for value, words in LATENCIES.items():
        series = [one for one in latency_info(documents, value).series if one.samples][:MOST_RUNS]
        if series:
            rows.append(SampleRow(f"time of the {words}", series))
    drawn = {one.label for row in rows for one in row.series}
    missing = [
        f"{one.label}: {OUTCOME_WORDS.get(one.outcome, one.outcome)}"
        for one in latency_info(documents).series
        if one.label not in drawn
    ]
    return SamplesInfo(rows, missing)


def ecdf(samples: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted samples, float64 [n], and the share of samples that are at most each, (0, 1]."""
    values = np.sort(np.asarray(samples, dtype=np.float64))
    return values, np.arange(1, len(values) + 1) / len(values)


def samples_figure(info: SamplesInfo) -> go.Figure:
    """A row a time: a histogram on the left in bins that all runs share, the ECDF on the right."""
    named: set[str] = set()
    labels = list(dict.fromkeys(one.label for row in info.rows for one in row.series))
    titles = [title for row in info.rows for title in (row.title, "share of samples up to a time")]
    figure = make_subplots(
        rows=len(info.rows), cols=2, subplot_titles=titles, vertical_spacing=0.2, horizontal_spacing=0.09
    )
    for place, row in enumerate(info.rows, 1):
        edges = np.histogram_bin_edges([value for one in row.series for value in one.samples], bins="auto")
        bins = {"start": edges[0], "end": edges[-1] + 1e-9, "size": max(edges[1] - edges[0], 1e-9)}
        for one in row.series:
            index = labels.index(one.label)
            look: dict[str, Any] = {"name": plain(one.label), "legendgroup": one.label}
            figure.add_trace(
                go.Histogram(
                    x=one.samples,
                    xbins=bins,
                    marker={"color": faint(index), "line": {"color": color(index), "width": 1.5}},
                    showlegend=False,
                    hovertemplate="%{x} ms: %{y} samples<extra>" + plain(one.label) + "</extra>",
                    **look,
                ),
                row=place,
                col=1,
            )
            times, shares = ecdf(one.samples)
            line = {"shape": "hv", "color": color(index), "dash": DASHES[index // 8 % len(DASHES)]}
            figure.add_trace(
                go.Scatter(
                    x=[times[0], *times],
                    y=[0, *shares],
                    mode="lines",
                    line=line,
                    showlegend=one.label not in named,
                    hovertemplate="%{y:.0%} within %{x:.4g} ms<extra>" + plain(one.label) + "</extra>",
                    **look,
                ),
                row=place,
                col=2,
            )
            named.add(one.label)
    styled(
        figure,
        title="Every sample",
        x="",
        y="",
        height=80 + ROW_HEIGHT * len(info.rows) + NAME_HEIGHT * len(labels),
    )
    figure.update_layout(barmode="overlay", margin={"t": 72}, showlegend=True)
    figure.update_xaxes(title_text="milliseconds")
    for place, row in enumerate(info.rows, 1):
        times = [value for one in row.series for value in one.samples]
        if min(times) > 0 and max(times) > WIDE * min(times):
            figure.update_xaxes(**log_axis(times), row=place, col=2)
    figure.update_yaxes(title_text="samples", col=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], col=2)
    return figure
