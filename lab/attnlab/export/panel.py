"""One map drawn into a scene: cells, axes with token labels where they fit, title and colour bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnlab.export.colourbar import BAR_ROOM, LOG_DECADES, Scale, draw_bar
from attnlab.export.scene import Line, Raster, Scene, Text, shorten, text_width
from attnlab.views.colormaps import COLORMAPS, DIVERGING, colorize
from attnlab.views.errors import ViewError

SCALES = ("linear", "log", "row")
SIGNED_KNEE = 1e-3  # share of the peak below which a signed logarithmic scale is linear
PLOT_SIDE = 512
PANELS_ACROSS = 3
TOKEN_CELL = 11  # pixels a cell needs before its token is written beside it
_LABEL_ROOM = 96
_NUMBER_ROOM = 40


@dataclass(frozen=True)
class Theme:
    """The colours of a picture's ground, text and ticks."""

    background: str
    text: str
    quiet: str
    masked: tuple[int, int, int]


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#6e7781", (225, 228, 232)),
    "dark": Theme("#0d1117", "#e6edf3", "#8b949e", (38, 44, 54)),
}


@dataclass(frozen=True)
class Panel:
    """What one map picture shows.

    ``values`` float [h, w] are the pixels of the region ``rows`` x ``cols`` (half-open token ranges);
    ``peak`` is the value at the end of the colour scale, the same for all panels that are compared. Signed
    panels run from -peak to peak. Labels hold one entry for every token of the region, or are empty.
    Pixels that are False in ``allowed`` bool [h, w] are grey: the mask forbids them. ``clipped``: some may lie beyond
    the peak.
    """

    values: np.ndarray
    rows: tuple[int, int]
    cols: tuple[int, int]
    peak: float
    title: str
    subtitle: str = ""
    col_word: str = "key"
    row_title: str = ""
    """what the rows are, where they are no tokens of a text"""
    col_title: str = ""
    row_labels: Sequence[str] = ()
    col_labels: Sequence[str] = ()
    colormap: str = "viridis"
    scale: Scale = "linear"
    signed: bool = False
    allowed: np.ndarray | None = None
    clipped: bool = False
    bar_title: str = "weight"


def unit_values(
    values: np.ndarray, peak: float, scale: Scale, *, signed: bool, decades: int = LOG_DECADES
) -> np.ndarray:
    """Values mapped to 0..1 of the colour scale: linear, log (some decades below the peak), or by row.

    Of signed values 0.5 is zero, and log is linear near it (below `SIGNED_KNEE` of the peak).

    Raises ViewError for an unknown scale, or one without a meaning for signed values.
    """
    if scale not in SCALES:
        raise ViewError(f"scale must be one of {', '.join(SCALES)}; got {scale!r}")
    if signed and scale == "row":
        raise ViewError(f"scale of signed values must be linear or log; got {scale!r}")
    peak = peak if peak > 0 else 1.0
    if signed and scale == "log":
        size = np.log1p(np.abs(values) / (SIGNED_KNEE * peak)) / np.log1p(1 / SIGNED_KNEE)
        return np.clip(0.5 + 0.5 * np.sign(values) * size, 0.0, 1.0)
    if signed:
        return np.clip(values / (2 * peak) + 0.5, 0.0, 1.0)
    if scale == "row":
        tops = values.max(axis=1, keepdims=True)
        return values / np.where(tops > 0, tops, 1.0)
    if scale == "log":
        below = np.log10(np.maximum(values / peak, 10.0**-decades))
        return np.clip(1.0 + below / decades, 0.0, 1.0)
    return np.clip(values / peak, 0.0, 1.0)


def check_look(theme: str, colormap: str) -> None:
    """ViewError for a theme or a colour map that pictures do not have."""
    if theme not in THEMES:
        raise ViewError(f"theme must be one of {', '.join(THEMES)}; got {theme!r}")
    if colormap not in COLORMAPS:
        raise ViewError(f"colormap must be one of {', '.join(COLORMAPS)}; got {colormap!r}")


def draw_panels(panels: Sequence[Panel], theme: str = "light") -> Scene:
    """The panels side by side in one scene, three in a row, each with its own axes, title and colour bar."""
    for panel in panels:
        check_look(theme, panel.colormap)
    boxes = [_Box.of(panel) for panel in panels]
    starts = range(0, len(panels), PANELS_ACROSS)
    lines = [list(zip(panels, boxes, strict=True))[start : start + PANELS_ACROSS] for start in starts]
    heights = [max(box.height for _, box in line) for line in lines]
    width = max(sum(box.width for _, box in line) for line in lines)
    scene = Scene(width, sum(heights), THEMES[theme].background)
    for line, top in zip(lines, np.cumsum([0, *heights]).tolist(), strict=False):
        left = 0
        for panel, box in line:
            _draw(scene, panel, box, left, top, THEMES[theme])
            left += box.width
    return scene


@dataclass(frozen=True)
class _Box:
    """Where the plot of one panel sits: margins and plot size in pixels."""

    left: int
    top: int
    plot_width: int
    plot_height: int
    room_down: int  # pixels beside the plot for row labels, zero where numbers are written instead
    room_across: int

    @classmethod
    def of(cls, panel: Panel) -> _Box:
        height, width = panel.values.shape
        cell = max(1, PLOT_SIDE // max(height, width, 1))
        # a strip of one row or column still has room for its axis title
        plot_height, plot_width = max(cell * height, 96), max(cell * width, 96)
        if width > 4 * height and len(panel.row_labels) == height <= PLOT_SIDE // TOKEN_CELL:
            plot_height = max(plot_height, TOKEN_CELL * height)  # few tokens over a long sound: all are named
        down = _label_room(panel.row_labels, panel.rows, plot_height)
        across = _label_room(panel.col_labels, panel.cols, plot_width)
        return cls(28 + (down or _NUMBER_ROOM), 56, plot_width, plot_height, down, across)

    @property
    def width(self) -> int:
        return max(self.left + self.plot_width + BAR_ROOM + 16, 420)

    @property
    def height(self) -> int:
        return self.top + max(self.plot_height, 120) + (self.room_across or 24) + 28


def _label_room(labels: Sequence[str], span: tuple[int, int], pixels: int) -> int:
    """Pixels that the longest label needs; zero when there are none or the cells are too small for them."""
    count = span[1] - span[0]
    if len(labels) != count or pixels < TOKEN_CELL * count:
        return 0
    return round(min(_LABEL_ROOM, max(text_width(label, 10) for label in labels) + 10))


def _draw(scene: Scene, panel: Panel, box: _Box, left: int, top: int, theme: Theme) -> None:
    x, y = left + box.left, top + box.top
    room = box.width - 24
    scene.add(Text(left + 12, top + 18, shorten(panel.title, room, 14), 14, theme.text))
    scene.add(Text(left + 12, top + 38, shorten(panel.subtitle, room, 11), 11, theme.quiet))
    unit = unit_values(panel.values, panel.peak, panel.scale, signed=panel.signed)
    name = DIVERGING if panel.signed else panel.colormap
    pixels = colorize(unit, name)
    if panel.allowed is not None:
        pixels = np.where(panel.allowed[..., None], pixels, np.array(theme.masked, np.uint8))
    scene.add(Raster(x, y, box.plot_width, box.plot_height, pixels))
    _draw_rows(scene, panel, box, x, y, theme)
    _draw_cols(scene, panel, box, x, y, theme)
    down, across = _axis("query (from)", panel.row_title), _axis(f"{panel.col_word} (to)", panel.col_title)
    scene.add(Text(left + 14, y + box.plot_height / 2, down, 12, theme.text, "middle", 90))
    below = y + box.plot_height + (box.room_across or 24) + 12
    scene.add(Text(x + box.plot_width / 2, below, across, 12, theme.text, "middle"))
    side = x + box.plot_width + 16
    look = {"peak": panel.peak, "scale": panel.scale, "signed": panel.signed, "colormap": name}
    look |= {"clipped": panel.clipped, "title": panel.bar_title}
    draw_bar(scene, side, y, max(box.plot_height, 120), **look, color=theme.quiet)


def _mark(title: str, labels: Sequence[str], tick: int, start: int) -> str:
    """The position, or its name where positions have a meaning of their own (seconds, patches)."""
    return shorten(labels[tick - start], _NUMBER_ROOM, 10) if title and labels else str(tick)


def _axis(word: str, title: str) -> str:
    return f"{word}: {title}" if title else word


def _draw_rows(scene: Scene, panel: Panel, box: _Box, x: int, y: int, theme: Theme) -> None:
    start, stop = panel.rows
    step = box.plot_height / (stop - start)
    if box.room_down:
        for i, label in enumerate(panel.row_labels):
            middle = y + (i + 0.5) * step
            text = shorten(label, _LABEL_ROOM - 8, 10)
            scene.add(Text(x - 5, middle, text, 10, theme.quiet, "end"))
        return
    for tick in nice_ticks(start, stop):
        middle = y + (tick - start + 0.5) * step
        scene.add(Line(x - 4, middle, x - 1, middle, theme.quiet))
        text = _mark(panel.row_title, panel.row_labels, tick, start)
        scene.add(Text(x - 6, middle, text, 10, theme.quiet, "end"))


def _draw_cols(scene: Scene, panel: Panel, box: _Box, x: int, y: int, theme: Theme) -> None:
    start, stop = panel.cols
    step, y = box.plot_width / (stop - start), y + box.plot_height
    if box.room_across:
        for i, label in enumerate(panel.col_labels):
            text = shorten(label, _LABEL_ROOM - 8, 10)
            scene.add(Text(x + (i + 0.5) * step, y + 5, text, 10, theme.quiet, "end", 90))
        return
    for tick in nice_ticks(start, stop):
        middle = x + (tick - start + 0.5) * step
        scene.add(Line(middle, y + 1, middle, y + 4, theme.quiet))
        text = _mark(panel.col_title, panel.col_labels, tick, start)
        scene.add(Text(middle, y + 13, text, 10, theme.quiet, "middle"))


def nice_ticks(start: int, stop: int, most: int = 8) -> list[int]:
    """At most ``most`` round token indices inside [start, stop): steps of 1, 2 or 5 times a power of ten."""
    span = max(stop - start, 1)
    step = 1
    while span / step > most:
        step = step * 2 if str(step)[0] in "15" else step * 5 // 2
    first = -(-start // step) * step
    return list(range(first, stop, step))
