"""The small map of a mechanism as a picture: a PNG for a page, shaded blocks for a terminal."""

from __future__ import annotations

import base64
import io
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from attnlab.views.colormaps import DIVERGING, colorize
from attnlab.views.sample_maps import sample_map

SHADES = " ░▒▓█"
BELOW_ZERO = "-"


@cache
def sample_png(mechanism: str, cell: int = 4) -> str:
    """A ``data:`` address of the map, ``cell`` pixels a weight; what is masked is transparent.

    Colour is the square root of the weight over the largest, so that small weights show.
    """
    made = sample_map(mechanism)
    unit = np.sqrt(np.abs(made.weights) / np.abs(made.weights).max())
    if made.signed:
        colors = colorize(0.5 - 0.5 * np.sign(made.weights) * unit, DIVERGING)[..., :3]
    else:
        colors = colorize(unit, "viridis")
    alpha = np.where(made.weights == 0, 0, 255).astype(np.uint8)
    pixels = np.concatenate((colors, alpha[..., None]), axis=2).repeat(cell, axis=0).repeat(cell, axis=1)
    for line in made.lines:
        pixels[line * cell, ::2] = (128, 128, 128, 255)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels), "RGBA").save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def sample_text(mechanism: str, rows: int = 24) -> str:
    """The map as lines of shaded blocks, two characters a cell, the largest weight of each; ``-`` is below zero."""
    weights = sample_map(mechanism).weights
    rows = min(rows, weights.shape[0])
    columns = min(rows, weights.shape[1])
    pooled = _pool(weights, rows, columns)
    unit = np.sqrt(np.abs(pooled) / np.abs(pooled).max())
    levels = np.ceil(unit * (len(SHADES) - 1)).astype(int)
    lines = [
        "".join(2 * (BELOW_ZERO if value < 0 else SHADES[level]) for value, level in zip(*row, strict=True))
        for row in zip(pooled, levels, strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _pool(weights: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """The weight of largest size under each cell."""
    tops = np.arange(rows + 1) * weights.shape[0] // rows
    lefts = np.arange(columns + 1) * weights.shape[1] // columns
    pooled = np.zeros((rows, columns), np.float32)
    for y in range(rows):
        for x in range(columns):
            part = weights[tops[y] : tops[y + 1], lefts[x] : lefts[x + 1]].ravel()
            pooled[y, x] = part[np.abs(part).argmax()]
    return pooled
