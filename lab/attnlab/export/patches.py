"""One query of a picture as a figure: every head of a layer over the picture, on one scale, with the query outlined."""

from __future__ import annotations

import numpy as np

from attnlab.describe import run_brief
from attnlab.export.colourbar import BAR_ROOM, Scale, draw_bar
from attnlab.export.panel import THEMES, check_look, unit_values
from attnlab.export.scene import Raster, Scene, Text, outline, shorten
from attnlab.pictures import open_picture
from attnlab.views.colormaps import DIVERGING, colorize
from attnlab.views.errors import ViewError
from attnlab.views.head_tiles import head_tiles
from attnlab.views.labels import mechanism_label, ran_as
from attnlab.views.read_inputs import patch_grid, run_picture
from attnlab.views.trace_map import is_signed
from attnlab.views.viewport import find_trace
from attnlab_storage.database import Store

COLUMNS = 6
SIDE = 160
PICTURE_SHARE = 0.3
_GAP, _LABEL, _TOP = 10, 18, 52


def draw_query(
    store: Store,
    run_id: int,
    layer: int,
    row: int,
    *,
    scale: Scale = "linear",
    colormap: str = "viridis",
    theme: str = "light",
) -> Scene:
    """What query ``row`` gives to every patch, head by head; the picture lies under the colours in grey.

    Raises ViewError for a layer whose keys are no patches, or anything else that cannot be shown.
    """
    check_look(theme, colormap)
    run, trace = find_trace(store, run_id, layer)
    grid = patch_grid(trace)
    if grid is None:
        raise ViewError(f"layer must be one that reads the patches of a picture; layer {layer} does not")
    rows, columns, prefix = grid["rows"], grid["columns"], grid["prefix"]
    weights = head_tiles(store, run_id, layer, (row, row + 1))[:, 0, prefix:].reshape(-1, rows, columns)
    signed, look = is_signed(trace), THEMES[theme]
    name = DIVERGING if signed else colormap
    peak = float(np.nanmax(np.abs(weights), initial=0.0))
    cell = max(1, SIDE // max(rows, columns))
    width, height = cell * columns, cell * rows
    across = min(COLUMNS, len(weights))
    down = -(-len(weights) // across)
    left = across * (width + _GAP) + _GAP
    scene = Scene(max(left + BAR_ROOM, 360), _TOP + down * (height + _LABEL + _GAP), look.background)
    brief = run_brief(run)
    query = f"patch {divmod(row - prefix, columns)}" if row >= prefix else f"token {row}"
    title = f"#{run_id} {mechanism_label(brief)} · layer {layer} · what {query} attends to"
    facts = " · ".join([str(brief["model"] or ""), ran_as(brief), str(brief["dtype"])]).removeprefix(" · ")
    scene.add(Text(_GAP, 18, shorten(title, scene.width - 20, 14), 14, look.text))
    scene.add(Text(_GAP, 38, shorten(facts, scene.width - 20, 11), 11, look.quiet))
    grey = _grey(run_picture(store, run_id)["picture"], width, height)
    for head, values in enumerate(weights):
        x = _GAP + (head % across) * (width + _GAP)
        y = _TOP + (head // across) * (height + _LABEL + _GAP)
        known = ~np.isnan(values)
        cells = colorize(unit_values(np.where(known, values, 0.0), peak, scale, signed=signed), name)
        cells[~known] = look.masked
        scene.add(Text(x, y + 7, f"L{layer}H{head}", 11, look.quiet))
        scene.add(Raster(x, y + _LABEL, width, height, _over(cells.repeat(cell, 0).repeat(cell, 1), grey)))
        if row >= prefix and trace.num_queries == trace.num_keys:
            down, right = divmod(row - prefix, columns)
            scene.add(*outline(x + right * cell, y + _LABEL + down * cell, cell, cell, look.text))
    bar = {"peak": peak, "scale": scale, "signed": signed, "colormap": name, "title": "weight"}
    draw_bar(scene, left + _GAP, _TOP + _LABEL, height, **bar, color=look.quiet)
    return scene


def _grey(picture: str | None, width: int, height: int) -> np.ndarray | None:
    """float32 [height, width, 1] of the picture without its colours."""
    if picture is None:
        return None
    return np.asarray(open_picture(picture).convert("L").resize((width, height)), np.float32)[..., None]


def _over(cells: np.ndarray, grey: np.ndarray | None) -> np.ndarray:
    if grey is None:
        return cells
    return np.round(cells * (1 - PICTURE_SHARE) + grey * PICTURE_SHARE).astype(np.uint8)
