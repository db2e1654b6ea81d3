"""The look that every chart shares: colours that survive colour blindness, ground that follows the page."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable
from html import escape
from typing import Any

import plotly.graph_objects as go

from attnlab.views.colormaps import colormap

# Okabe and Ito 2008, the grey darker than their pink; the yellow last because it is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6E6E6E", "#F0E442")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
FONT = "#7d8590"  # readable on white and on near-black alike
_GRID = "rgba(128,128,128,0.22)"


def color(position: int) -> str:
    return PALETTE[position % len(PALETTE)]


def faint(position: int) -> str:
    """A colour to fill with, where things lie over each other."""
    red, green, blue = bytes.fromhex(color(position)[1:])
    return f"rgba({red},{green},{blue},0.2)"


def symbol(position: int) -> str:
    """Another one when the colours begin again: 64 positions differ in colour or symbol."""
    return SYMBOLS[(position + position // len(PALETTE)) % len(SYMBOLS)]


def dash(position: int) -> str:
    """How a line is drawn, for whom colours do not tell apart."""
    return DASHES[position % len(DASHES)]


def plain(text: str) -> str:
    """Text for a figure: Plotly reads a few HTML tags, and a run's name is not markup."""
    return escape(str(text), quote=False)


def wrapped(text: str, width: int) -> str:
    """The same on lines of so many characters; parameters in brackets begin a line where they do not fit."""
    lines = textwrap.wrap(re.sub(r"\s*\(", " (", text), width, break_long_words=False)
    return "<br>".join(plain(line) for line in lines)


WIDE = 20
"""values that are further apart than this are drawn on a logarithmic axis, and never as bars"""


def log_axis(values: Iterable[float], unit: str = "") -> dict[str, Any]:
    """A logarithmic axis whose ticks are whole numbers in words: at decades, at 1, 2 and 5, or closer.

    Plotly's own would be bare digits between two decades.
    """
    found = [value for value in values if value > 0]
    low, high = min(found, default=1.0), max(found, default=1.0)
    return {"type": "log", "dtick": _log_step(low, high), "tickformat": tick_format(unit)}


def _log_step(low: float, high: float) -> str | int:
    decades = math.log10(high / low)
    if decades > 3:
        return math.ceil(decades / 8)
    if decades > 1:
        return "D2"
    step = 10.0 ** math.floor(math.log10((high - low) / 4 or low))
    fitting = [step * times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 5]
    return f"L{fitting[0]:g}" if high > low else "D2"


def tick_format(unit: str) -> str:
    """No digit more than the tick needs; thousands, millions and so on of bytes and operations by their letter."""
    return "~s" if unit in ("bytes", "FLOP/s") else ",~g"


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
