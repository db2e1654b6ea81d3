"""The look that every chart shares: colours that survive colour blindness, ground that follows the page."""

from __future__ import annotations

from html import escape
from typing import Any

import plotly.graph_objects as go

from attnlab.views.colormaps import colormap

# Okabe and Ito 2008, the grey darker than their pink; the yellow last because it is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6E6E6E", "#F0E442")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")
FONT = "#7d8590"  # readable on white and on near-black alike
_GRID = "rgba(128,128,128,0.22)"


def color(position: int) -> str:
    return PALETTE[position % len(PALETTE)]


def symbol(position: int) -> str:
    return SYMBOLS[position % len(SYMBOLS)]


def plain(text: str) -> str:
    """Text for a figure: Plotly reads a few HTML tags, and a run's name is not markup."""
    return escape(str(text), quote=False)


def colorscale(name: str) -> list[list[Any]]:
    """A colour map as Plotly wants it."""
    table = colormap(name)
    picks = range(0, 256, 15)
    return [[i / 255, f"rgb({table[i][0]},{table[i][1]},{table[i][2]})"] for i in picks]


def styled(figure: go.Figure, *, title: str, x: str, y: str, height: int = 320) -> go.Figure:
    """The figure with titles, transparent ground and quiet grid."""
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GRID, "automargin": True}
    figure.update_layout(
        title={"text": plain(title), "x": 0.0, "xanchor": "left", "font": {"size": 14}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": FONT, "size": 12},
        margin={"l": 56, "r": 16, "t": 40, "b": 40},
        height=height,
        legend={"orientation": "h", "y": -0.25, "x": 0},
    )
    figure.update_xaxes(title_text=plain(x), **axis)
    figure.update_yaxes(title_text=plain(y), **axis)
    return figure
