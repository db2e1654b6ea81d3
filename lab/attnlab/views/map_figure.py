"""A viewport as a Plotly figure, for a notebook."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from attnlab.views.chart_style import colorscale, plain, styled
from attnlab.views.colormaps import DIVERGING
from attnlab.views.viewport import Viewport


def map_figure(
    view: Viewport,
    title: str,
    query_labels: Sequence[str] = (),
    key_labels: Sequence[str] = (),
    colormap: str = "viridis",
    *,
    signed: bool = False,
) -> go.Figure:
    """Queries down, keys across; a pixel's hover says which tokens it covers and its weight.

    Args:
        query_labels, key_labels: readable tokens of the whole map; empty where none are known.
        signed: weights of both signs, drawn around zero in diverging colours, whatever ``colormap`` says.
    """
    peak = max(view.maximum, -view.minimum)
    ends = {"zmin": -peak, "zmax": peak} if signed else {}
    rows, cols = (_starts(view, axis) for axis in (0, 1))
    hover = [
        [
            f"{_words(rows, row, query_labels)} → {_words(cols, col, key_labels)}"
            for col in range(len(cols) - 1)
        ]
        for row in range(len(rows) - 1)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=view.values,
            x=cols[:-1],
            y=rows[:-1],
            customdata=hover,
            colorscale=colorscale(DIVERGING if signed else colormap),
            **ends,
            hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
            colorbar={"thickness": 12},
        )
    )
    styled(figure, title=title, x="key (to)", y="query (from)", height=520)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False)
    return figure


def _starts(view: Viewport, axis: int) -> np.ndarray:
    """First cell of each pixel, and one past the last."""
    if view.edges is not None:
        return view.edges[axis]
    start, stop = (view.rows, view.cols)[axis]
    count = view.values.shape[axis]
    return start + np.arange(count + 1) * (stop - start) // count


def _words(edges: np.ndarray, pixel: int, labels: Sequence[str]) -> str:
    """``17 ·river``, or the range of a pixel over several tokens."""
    start, stop = int(edges[pixel]), int(edges[pixel + 1])
    if stop - start > 1:
        return f"{start}..{stop - 1}"
    return f"{start} {plain(labels[start])}" if start < len(labels) else str(start)
