"""A statistic of every layer and head as one picture: a cell a head, layers across and heads down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnlab.describe import run_brief
from attnlab.export.colourbar import BAR_ROOM, draw_bar
from attnlab.export.panel import THEMES, Theme, check_look, nice_ticks
from attnlab.export.scene import Line, Raster, Scene, Text, outline, shorten, text_width
from attnlab.heads import statistics_document
from attnlab.views.colormaps import colorize
from attnlab.views.errors import NothingRecorded, ViewError
from attnlab.views.labels import ran_as, view_label
from attnlab.views.viewport import find_run
from attnlab_storage.database import Store

SIDE = 480
_LEAST_CELL, _MOST_CELL = 6, 32
_LEAST_WIDTH, _MOST_FOR_WORDS, _LEAST_BAR = 420, 720, 96
_LEFT, _TOP, _BELOW = 60, 78, 48
_TICK_ROOM = 18


def draw_statistic(
    store: Store, run_id: int, name: str | None = None, *, colormap: str = "viridis", theme: str = "light"
) -> Scene:
    """One statistic of all heads; heads without a value are grey. Colours run linearly from 0, or the least below it.

    Args:
        name: one of those that the run keeps (`attnlab.heads.statistics_document`); None for the first.

    Raises ViewError for another name, NothingRecorded for a run that keeps none.
    """
    check_look(theme, colormap)
    run, kept = find_run(store, run_id), statistics_document(store, run_id)
    if not kept:
        raise NothingRecorded(f"run {run_id} holds no statistics: its record does not include them")
    name = next(iter(kept)) if name is None else name
    if name not in kept:
        raise ViewError(f"statistic must be one of {', '.join(kept)}; got {name[:60]!r}")
    one, brief = kept[name], run_brief(run)
    facts = [one["formula"], ran_as(brief), str(brief["dtype"])]
    values = np.array(one["values"], float).T
    places = {"layers": one["layers"], "heads": one["heads"], "unit": one["unit"]}
    return draw_cells(
        view_label(brief, one["title"]), facts, values, **places, colormap=colormap, theme=theme
    )


def draw_cells(
    title: str,
    facts: Sequence[str],
    values: np.ndarray,
    *,
    layers: Sequence[int],
    heads: Sequence[int],
    unit: str,
    colormap: str,
    theme: str,
) -> Scene:
    """A number of every head, [heads, layers] (NaN: grey), below its title and a line of facts, with its scale."""
    look = THEMES[theme]
    cell = int(np.clip(SIDE // max(values.shape), _LEAST_CELL, _MOST_CELL))
    width, height = cell * len(layers), cell * len(heads)
    bar_height = max(height, _LEAST_BAR)
    words = int(max(text_width(title, 14), text_width(" · ".join(facts), 11))) + 25
    wide = max(_LEFT + width + 16 + BAR_ROOM, min(words, _MOST_FOR_WORDS))
    scene = Scene(max(wide, _LEAST_WIDTH), _TOP + bar_height + _BELOW, look.background)
    room = scene.width - 24
    scene.add(Text(12, 18, shorten(title, room, 14), 14, look.text))
    scene.add(Text(12, 38, shorten(" · ".join(facts), room, 11), 11, look.quiet))
    low = float(np.nanmin(values, initial=0.0))
    peak = float(np.nanmax(values, initial=low))
    cells = colorize((values - low) / ((peak - low) or 1.0), colormap)
    cells[np.isnan(values)] = look.masked
    scene.add(Raster(_LEFT, _TOP, width, height, cells), *outline(_LEFT, _TOP, width, height, look.quiet))
    _draw_axes(scene, layers, heads, cell, look)
    side = _LEFT + width + 16
    scene.add(Text(side, _TOP - 14, unit, 11, look.quiet))
    bar = {"peak": peak, "low": low, "scale": "linear", "signed": False, "colormap": colormap}
    draw_bar(scene, side, _TOP, bar_height, **bar, color=look.quiet)
    return scene


def _draw_axes(scene: Scene, layers: Sequence[int], heads: Sequence[int], cell: int, look: Theme) -> None:
    width, height = cell * len(layers), cell * len(heads)
    for tick in nice_ticks(0, len(layers), max(1, width // _TICK_ROOM)):
        x, y = _LEFT + (tick + 0.5) * cell, _TOP + height
        scene.add(Line(x, y + 1, x, y + 4, look.quiet))
        scene.add(Text(x, y + 13, str(layers[tick]), 10, look.quiet, "middle"))
    for tick in nice_ticks(0, len(heads), max(1, height // _TICK_ROOM)):
        y = _TOP + (tick + 0.5) * cell
        scene.add(Line(_LEFT - 4, y, _LEFT - 1, y, look.quiet))
        scene.add(Text(_LEFT - 6, y, str(heads[tick]), 10, look.quiet, "end"))
    scene.add(Text(_LEFT + width / 2, _TOP + height + 32, "layer", 12, look.text, "middle"))
    scene.add(Text(20, _TOP + height / 2, "head", 12, look.text, "middle", 90))
