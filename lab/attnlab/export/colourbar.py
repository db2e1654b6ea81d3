"""The bar beside a picture that says which colour is which number."""

from __future__ import annotations

from typing import Literal

import numpy as np

from attnlab.export.scene import Line, Raster, Scene, Text, shorten
from attnlab.views.colormaps import colorize

Scale = Literal["linear", "log", "row"]
LOG_DECADES = 5
BAR_ROOM = 88  # pixels that the bar, its numbers and its title take


def draw_bar(
    scene: Scene,
    x: int,
    y: int,
    height: int,
    *,
    peak: float,
    scale: Scale,
    signed: bool,
    colormap: str,
    color: str,
    low: float = 0.0,
    decades: int = LOG_DECADES,
    clipped: bool = False,
    title: str = "",
) -> None:
    """A bar of ``height`` pixels, its numbers to the right in ``color``, from ``low`` (linear only) to ``peak``.

    ``clipped``: the last colour also stands for what is larger, of signed values the first for what is lower.
    ``title``: what the numbers are, upright beside them.
    """
    ramp = colorize(np.linspace(1.0, 0.0, height)[:, None], colormap)
    scene.add(Raster(x, y, 12, height, ramp))
    labels = bar_labels(peak, scale, signed=signed, low=low, decades=decades)
    if clipped and scale != "row" and peak:
        labels[-1] = (labels[-1][0], f"≥ {labels[-1][1]}")
        if signed:
            labels[0] = (labels[0][0], f"≤ {labels[0][1]}")
    if title and (peak or not signed):
        scene.add(Text(x + 72, y + height / 2, shorten(title, height, 10), 10, color, "middle", 90))
    for fraction, label in labels:
        at = y + (1.0 - fraction) * (height - 1)
        scene.add(Line(x + 12, at, x + 15, at, color), Text(x + 18, at, label, 10, color))


def bar_labels(
    peak: float, scale: Scale, *, signed: bool, low: float = 0.0, decades: int = LOG_DECADES
) -> list[tuple[float, str]]:
    """(place 0..1 on the colour bar, label) pairs, from low to high."""
    if signed and not peak:
        return [(0.5, "0 everywhere")]
    if signed:
        return [(0.0, f"{-peak:.3g}"), (0.5, "0"), (1.0, f"{peak:+.3g}")]
    if scale == "row":
        return [(0.0, "0"), (1.0, "row max")]
    if scale == "log":
        ends = range(decades + 1)
        return [(i / decades, f"{'' if i else '≤ '}{peak * 10.0 ** (i - decades):.2g}") for i in ends]
    return [(i / 4, f"{low + (peak - low) * i / 4:.3g}") for i in range(5)]
