"""A view as a picture for a paper: PNG, or SVG with vector text and axes around embedded cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnlab.describe import run_brief
from attnlab.export.panel import PLOT_SIDE, Panel, Scale, draw_panels
from attnlab.export.scene import Scene, to_png, to_svg
from attnlab.views.difference import difference
from attnlab.views.errors import ViewError
from attnlab.views.labels import map_label, ran_as
from attnlab.views.tokens import TokenLabels, token_labels
from attnlab.views.viewport import Region, Viewport, allowed_pixels, find_run, linked_viewports, load_map
from attnlab_storage.database import Store

FORMATS = ("png", "svg")


def render_view(
    store: Store,
    run_id: int,
    layer: int,
    head: int,
    rows: Region = None,
    cols: Region = None,
    format: str = "png",
    *,
    colormap: str = "viridis",
    scale: Scale = "linear",
    theme: str = "light",
    reduce: str = "max",
    maximum: float | None = None,
) -> bytes:
    """One region of one map with axes, token labels where they fit, title and colour bar.

    Args:
        scale: "linear" from 0 to ``maximum`` (None: the largest pixel), "log" over five decades, or "row".

    Raises ViewError for anything that cannot be shown.
    """
    return render_comparison(
        store,
        [run_id],
        layer,
        head,
        rows,
        cols,
        format,
        colormap=colormap,
        scale=scale,
        theme=theme,
        reduce=reduce,
        maximum=maximum,
    )


def render_comparison(
    store: Store,
    run_ids: Sequence[int],
    layer: int,
    head: int,
    rows: Region = None,
    cols: Region = None,
    format: str = "png",
    *,
    colormap: str = "viridis",
    scale: Scale = "linear",
    theme: str = "light",
    reduce: str = "max",
    maximum: float | None = None,
) -> bytes:
    """The same region of the same head in several runs on one shared scale; two runs also get A - B.

    Raises ViewError for anything that cannot be shown, also where two runs' maps differ in size.
    """
    if format not in FORMATS:
        raise ViewError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    linked = linked_viewports(
        store, [(run_id, layer, head) for run_id in run_ids], rows, cols, PLOT_SIDE, PLOT_SIDE, reduce
    )
    peak = linked.maximum if maximum is None else maximum
    panels = [
        _panel(store, run_id, layer, head, view, peak, colormap, scale)
        for run_id, view in zip(run_ids, linked.panels, strict=True)
    ]
    if len(run_ids) == 2:
        panels.append(_difference_panel(store, run_ids, layer, head, linked.panels[0], reduce))
    return encode(draw_panels(panels, theme), format)


def encode(scene: Scene, format: str) -> bytes:
    """The scene as PNG or SVG bytes."""
    return to_png(scene) if format == "png" else to_svg(scene)


def _panel(
    store: Store,
    run_id: int,
    layer: int,
    head: int,
    view: Viewport,
    peak: float,
    colormap: str,
    scale: Scale,
) -> Panel:
    brief = run_brief(find_run(store, run_id))
    facts = [ran_as(brief), str(brief["dtype"]), _pixels(view)]
    labels = token_labels(store, run_id, layer)
    return Panel(
        view.values,
        view.rows,
        view.cols,
        peak,
        title=map_label(brief, layer, head),
        subtitle=" · ".join(facts),
        row_title=labels.query_title,
        col_title=labels.key_title,
        row_labels=_part(labels, view.rows, "query"),
        col_labels=_part(labels, view.cols, "key"),
        colormap=colormap,
        scale=scale,
        allowed=_allowed(store, run_id, layer, head, view),
    )


def _allowed(store: Store, run_id: int, layer: int, head: int, view: Viewport) -> np.ndarray:
    height, width = view.values.shape
    return allowed_pixels(load_map(store, run_id, layer, head), view.rows, view.cols, height, width)


def _difference_panel(
    store: Store, run_ids: Sequence[int], layer: int, head: int, like: Viewport, reduce: str
) -> Panel:
    signed = "mean" if reduce == "mean" else "signed_max"
    a, b = run_ids
    gap = difference(store, a, b, layer, head, like.rows, like.cols, PLOT_SIDE, PLOT_SIDE, signed)
    labels = token_labels(store, a, layer)
    return Panel(
        gap.values,
        gap.rows,
        gap.cols,
        max(-gap.minimum, gap.maximum),
        title=f"#{a} − #{b} · L{layer}H{head}",
        subtitle=f"signed difference · {_pixels(gap)}",
        row_title=labels.query_title,
        col_title=labels.key_title,
        row_labels=_part(labels, gap.rows, "query"),
        col_labels=_part(labels, gap.cols, "key"),
        signed=True,
        allowed=_allowed(store, a, layer, head, gap) | _allowed(store, b, layer, head, gap),
    )


def _part(labels: TokenLabels, span: tuple[int, int], side: str) -> list[str]:
    tokens = labels.query if side == "query" else labels.key
    return tokens[slice(*span)]


def _pixels(view: Viewport) -> str:
    """What one pixel stands for, so that a pooled picture is never read as single weights."""
    if view.exact:
        return "exact weights"
    down = (view.rows[1] - view.rows[0]) / view.values.shape[0]
    across = (view.cols[1] - view.cols[0]) / view.values.shape[1]
    word = {"max": "maximum", "mean": "mean", "signed_max": "furthest from zero"}[view.reduce]
    return f"{word} of {down:.3g} x {across:.3g} weights a pixel"
