"""All heads of one layer as one picture, for reports."""

from __future__ import annotations

import numpy as np
from PIL import Image

from attnlab.export.panel import THEMES, Scale, unit_values
from attnlab.export.scene import Raster, Scene, Text, to_png
from attnlab.views.colormaps import DIVERGING, colorize
from attnlab.views.thumbnails import thumbnails
from attnlab.views.trace_map import is_signed
from attnlab.views.viewport import find_trace
from attnlab_storage.database import Store

COLUMNS = 8
_GAP = 8
_LABEL = 18


def head_strip(
    store: Store, run_id: int, layer: int, size: int = 128, *, scale: Scale = "log", colormap: str = "viridis"
) -> bytes:
    """PNG of every head's whole map (maximum under each pixel), labelled L5H2, on one scale for the layer.

    Signed weights are drawn in the diverging colours, whatever ``colormap`` says.
    """
    signed = is_signed(find_trace(store, run_id, layer)[1])
    colormap = DIVERGING if signed else colormap
    strip = thumbnails(store, run_id, layer, size)
    peak = float(np.abs(strip.values).max())
    heads = len(strip.values)
    columns = min(COLUMNS, heads)
    height = -(-heads // columns) * (size + _LABEL + _GAP) + _GAP
    theme = THEMES["light"]
    scene = Scene(columns * (size + _GAP) + _GAP, height, theme.background)
    for head, values in enumerate(strip.values):
        x = _GAP + (head % columns) * (size + _GAP)
        y = _GAP + (head // columns) * (size + _LABEL + _GAP)
        cells = colorize(unit_values(values, peak, scale, signed=signed), colormap)
        scene.add(Text(x, y + 7, f"L{layer}H{head}", 11, theme.quiet))
        scene.add(Raster(x, y + _LABEL, size, size, _resized(cells, size)))
    return to_png(scene)


def _resized(cells: np.ndarray, size: int) -> np.ndarray:
    if cells.shape[:2] == (size, size):
        return cells
    return np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.NEAREST))
