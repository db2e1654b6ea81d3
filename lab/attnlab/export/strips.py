"""All heads of one layer as one picture."""

from __future__ import annotations

import numpy as np

from attnlab.describe import run_brief
from attnlab.export.colourbar import BAR_ROOM, Scale, draw_bar
from attnlab.export.panel import THEMES, check_look, unit_values
from attnlab.export.scene import Raster, Scene, Text, shorten, to_png
from attnlab.views.colormaps import DIVERGING, colorize
from attnlab.views.labels import mechanism_label, ran_as
from attnlab.views.thumbnails import thumbnails
from attnlab.views.tokens import token_labels
from attnlab.views.trace_map import column_word, is_signed
from attnlab.views.viewport import allowed_pixels, find_trace, load_map
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow, TraceRow

COLUMNS = 8
_GAP = 8
_LABEL = 18
_TOP = 52
_LEAST_WIDTH = 360


def head_strip(store: Store, run_id: int, layer: int, size: int = 128) -> bytes:
    """`draw_heads` as PNG, for a report."""
    return to_png(draw_heads(store, run_id, layer, size))


def draw_heads(
    store: Store,
    run_id: int,
    layer: int,
    size: int = 128,
    *,
    scale: Scale = "log",
    colormap: str = "viridis",
    theme: str = "light",
    reduce: str = "max",
) -> Scene:
    """Every head's whole map, labelled L5H2, on one scale for the layer, with title, axis words and colour bar.

    Signed weights are drawn in the diverging colours, whatever ``colormap`` says, and linear where "row" is asked for.

    Raises ViewError for anything that cannot be shown.
    """
    check_look(theme, colormap)
    run, trace = find_trace(store, run_id, layer)
    signed = is_signed(trace)
    look = THEMES[theme]
    name, kind = (DIVERGING if signed else colormap), ("linear" if signed and scale == "row" else scale)
    strip = thumbnails(store, run_id, layer, size, reduce)
    peak = float(np.abs(strip.values).max())
    heads = len(strip.values)
    columns = min(COLUMNS, heads)
    rows = -(-heads // columns)
    width = columns * (size + _GAP) + _GAP
    scene = Scene(
        max(width + BAR_ROOM, _LEAST_WIDTH), _TOP + rows * (size + _LABEL + _GAP) + 24, look.background
    )
    room = scene.width - 2 * _GAP
    title, subtitle = _words(store, run, trace, strip.reduce, strip.values.shape[1:])
    scene.add(Text(_GAP, 18, shorten(title, room, 14), 14, look.text))
    scene.add(Text(_GAP, 38, shorten(subtitle, room, 11), 11, look.quiet))
    masked = ~allowed_pixels(
        load_map(store, run_id, layer, 0),
        (0, trace.num_queries),
        (0, trace.num_keys),
        *strip.values.shape[1:],
    )
    for head, values in enumerate(strip.values):
        x = _GAP + (head % columns) * (size + _GAP)
        y = _TOP + (head // columns) * (size + _LABEL + _GAP)
        cells = colorize(unit_values(values, peak, kind, signed=signed), name)
        cells[masked] = look.masked
        scene.add(
            Text(x, y + 7, f"L{layer}H{head}", 11, look.quiet), Raster(x, y + _LABEL, size, size, cells)
        )
    scene.add(Text(_GAP, scene.height - 14, shorten(_axes(store, trace, run_id), room, 11), 11, look.text))
    bar = {"peak": peak, "scale": kind, "signed": signed, "colormap": name, "title": "weight"}
    draw_bar(scene, width + _GAP, _TOP + _LABEL, size, **bar, color=look.quiet)
    return scene


def _words(
    store: Store, run: RunRow, trace: TraceRow, reduce: str, shape: tuple[int, ...]
) -> tuple[str, str]:
    brief = run_brief(run)
    parts = [f"#{run.id} {mechanism_label(brief)}", f"layer {trace.layer}, all heads"]
    title = " · ".join([*parts, str(brief["model"])] if brief.get("model") else parts)
    whole = shape == (trace.num_queries, trace.num_keys)
    pixel = "exact weights" if whole else f"{'mean' if reduce == 'mean' else 'maximum'} under each pixel"
    return title, " · ".join([ran_as(brief), str(brief["dtype"]), pixel])


def _axes(store: Store, trace: TraceRow, run_id: int) -> str:
    labels, word = token_labels(store, run_id, trace.layer), column_word(trace)
    down = f"query (from): {labels.query_title}" if labels.query_title else "query (from)"
    across = f"{word} (to)"
    if labels.key_title and word == "key":
        across = f"{across}: {labels.key_title}"
    return f"down: {down}, {trace.num_queries} · across: {across}, {trace.num_keys}"
