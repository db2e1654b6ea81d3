"""A view as a picture for a paper: PNG, or SVG and PDF with vector text and axes around embedded cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from attnlab.describe import run_brief
from attnlab.export.colourbar import Scale
from attnlab.export.panel import PLOT_SIDE, Panel, draw_panels
from attnlab.export.patches import draw_query
from attnlab.export.pdf import to_pdf
from attnlab.export.scene import Scene, to_png, to_svg
from attnlab.export.strips import draw_heads
from attnlab.views.difference import allowed_difference, difference
from attnlab.views.errors import ViewError
from attnlab.views.labels import map_label, ran_as
from attnlab.views.tokens import TokenLabels, token_labels
from attnlab.views.trace_map import column_word, is_signed
from attnlab.views.viewport import (
    Region,
    Viewport,
    allowed_in,
    find_run,
    find_trace,
    linked_viewports,
    load_map,
)
from attnlab_storage.database import Store
from attnlab_storage.results import TraceRow

ENCODERS = {"png": to_png, "svg": to_svg, "pdf": to_pdf}
FORMATS = tuple(ENCODERS)


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
    clip: float = 100.0,
) -> bytes:
    """One region of one map with axes, token labels where they fit, title and colour bar.

    Args:
        scale: "linear" from 0, "log" over five decades, or "row". Signed weights go from minus the end of the scale to
            its end in diverging colours; they are linear where "row" is asked for.
        clip: the scale ends at this percentile of the pixels' sizes above 0, and what is larger has its last colour.

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
        clip=clip,
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
    pair: tuple[int, int] | None = None,
    against: tuple[int, int] | None = None,
    colormap: str = "viridis",
    scale: Scale = "linear",
    theme: str = "light",
    reduce: str = "max",
    clip: float = 100.0,
) -> bytes:
    """The same region of the same head in several runs on one shared scale; two maps also get A - B.

    Runs with signed weights share a scale of their own. The region is of the first run's tokens, and a run over
    another text shows where it has them.

    Args:
        pair: of more than two runs the two whose difference is drawn too.
        against: layer and head of the last run that the given head of it is compared with.

    Raises ViewError for anything that cannot be shown, also where the tokens of two runs cannot be matched.
    """
    check_format(format)
    if not 0 < clip <= 100:
        raise ViewError(f"clip must be a percentile above 0 and at most 100; got {clip}")
    heads = compared_heads(run_ids, layer, head, against)
    linked = linked_viewports(store, heads, rows, cols, PLOT_SIDE, PLOT_SIDE, reduce)
    signed = [is_signed(find_trace(store, run_id, at)[1]) for run_id, at, _ in heads]
    peaks = {
        kind: _peak([view for view, is_it in zip(linked.panels, signed, strict=True) if is_it == kind], clip)
        for kind in set(signed)
    }
    panels = [
        replace(_panel(store, *at, view, peaks, colormap, scale), clipped=clip < 100)
        for at, view in zip(heads, linked.panels, strict=True)
    ]
    if (places := _differing(run_ids, heads, pair)) is not None:
        a, b = places
        views = linked.panels[a], linked.panels[b]
        panels.append(_difference_panel(store, heads[a], heads[b], views, reduce, scale, clip))
    return encode(draw_panels(panels, theme), format)


def compared_heads(
    run_ids: Sequence[int], layer: int, head: int, against: tuple[int, int] | None
) -> list[tuple[int, int, int]]:
    """(run, layer, head) of every map that is compared."""
    own = [] if against is None else [(run_ids[-1], *against)]
    return [*((run_id, layer, head) for run_id in run_ids), *own]


def _differing(
    run_ids: Sequence[int], heads: Sequence[tuple[int, int, int]], pair: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Which two of the maps get a difference: the only two, or those of a pair of runs."""
    if pair is None:
        return (0, 1) if len(heads) == 2 else None
    if not set(pair) <= set(run_ids):
        raise ViewError(f"pair must be two of the runs {list(run_ids)}; got {list(pair)}")
    return run_ids.index(pair[0]), run_ids.index(pair[1])


def render_heads(
    store: Store,
    run_id: int,
    layer: int,
    format: str = "png",
    *,
    colormap: str = "viridis",
    scale: Scale = "log",
    theme: str = "light",
    reduce: str = "max",
) -> bytes:
    """All heads of a layer side by side, see `draw_heads`. Raises ViewError for anything that cannot be shown."""
    check_format(format)
    scene = draw_heads(store, run_id, layer, scale=scale, colormap=colormap, theme=theme, reduce=reduce)
    return encode(scene, format)


def render_query(
    store: Store,
    run_id: int,
    layer: int,
    row: int,
    format: str = "png",
    *,
    colormap: str = "viridis",
    scale: Scale = "linear",
    theme: str = "light",
) -> bytes:
    """What one query gives to the patches of a picture, every head, see `draw_query`. Raises ViewError."""
    check_format(format)
    return encode(draw_query(store, run_id, layer, row, colormap=colormap, scale=scale, theme=theme), format)


def check_format(format: str) -> None:
    """ViewError for a format that pictures do not have."""
    if format not in ENCODERS:
        raise ViewError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")


def encode(scene: Scene, format: str) -> bytes:
    """The scene as the bytes of a PNG, SVG or PDF file. Raises ViewError for another format."""
    check_format(format)
    return ENCODERS[format](scene)


def _panel(
    store: Store,
    run_id: int,
    layer: int,
    head: int,
    view: Viewport,
    peaks: Mapping[bool, float],
    colormap: str,
    scale: Scale,
) -> Panel:
    brief = run_brief(find_run(store, run_id))
    trace = find_trace(store, run_id, layer)[1]
    labels, signed = token_labels(store, run_id, layer), is_signed(trace)
    if signed and view.reduce == "max":
        view = replace(view, reduce="signed_max")
    facts = [ran_as(brief), str(brief["dtype"]), _pixels(view)]
    return Panel(
        view.values,
        view.rows,
        view.cols,
        peaks[signed],
        title=map_label(brief, layer, head),
        subtitle=" · ".join(facts),
        **_axes(labels, trace, view),
        colormap=colormap,
        scale="linear" if signed and scale == "row" else scale,
        signed=signed,
        allowed=_allowed(store, run_id, layer, head, view),
    )


def _allowed(store: Store, run_id: int, layer: int, head: int, view: Viewport) -> np.ndarray:
    return allowed_in(view, load_map(store, run_id, layer, head))


def _difference_panel(
    store: Store,
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    views: tuple[Viewport, Viewport],
    reduce: str,
    scale: Scale,
    clip: float,
) -> Panel:
    signed = "mean" if reduce == "mean" else "signed_max"
    (a, layer, head), (b, layer_b, head_b) = first, second
    like = views[0]
    where = like.rows, like.cols, PLOT_SIDE, PLOT_SIDE
    gap = difference(store, a, b, layer, head, *where, signed, layer_b=layer_b, head_b=head_b)
    one_run = a == b and (layer, head) != (layer_b, head_b)
    title = (
        f"#{a} · L{layer}H{head} − L{layer_b}H{head_b}"
        if one_run
        else f"{_apart(store, a, b)} · L{layer}H{head}"
    )
    return Panel(
        gap.values,
        gap.rows,
        gap.cols,
        _peak([gap], clip),
        title=title,
        subtitle=f"signed difference · {_pixels(gap)}",
        **_axes(token_labels(store, a, layer), find_trace(store, a, layer)[1], gap),
        signed=True,
        scale="log" if scale == "log" else "linear",
        allowed=allowed_difference(store, gap, first, second),
        clipped=clip < 100,
        bar_title=title.partition(" · ")[2] if one_run else f"#{a} − #{b}",
    )


def _apart(store: Store, a: int, b: int) -> str:
    """``#3 − #7``, with the models where they differ."""
    models = [find_run(store, run_id).model for run_id in (a, b)]
    names = [f"#{run_id} {model}" for run_id, model in zip((a, b), models, strict=True)]
    return " − ".join(names) if models[0] != models[1] else f"#{a} − #{b}"


def _peak(views: Sequence[Viewport], clip: float) -> float:
    """The size at the end of the scale: the largest pixel, or the percentile of those above 0."""
    if clip < 100:
        sizes = np.abs(np.concatenate([view.values.ravel() for view in views]))
        if (sizes := sizes[sizes > 0]).size:
            return float(np.percentile(sizes, clip, method="higher"))
    return max(max(view.maximum, -view.minimum) for view in views)


def _axes(labels: TokenLabels, trace: TraceRow, view: Viewport) -> dict[str, Any]:
    """Words and tokens of both axes; a slot or a cell is no token."""
    word = column_word(trace)
    keys = labels.key[slice(*view.cols)] if word == "key" else []
    return {
        "col_word": word,
        "row_title": labels.query_title,
        "col_title": labels.key_title if word == "key" else "",
        "row_labels": labels.query[slice(*view.rows)],
        "col_labels": keys,
    }


def _pixels(view: Viewport) -> str:
    """What one pixel stands for, so that a pooled picture is never read as single weights."""
    if view.exact:
        return "exact weights"
    down = (view.rows[1] - view.rows[0]) / view.values.shape[0]
    across = (view.cols[1] - view.cols[0]) / view.values.shape[1]
    word = {"max": "maximum", "mean": "mean", "signed_max": "furthest from zero"}[view.reduce]
    return f"{word} of {down:.3g} x {across:.3g} weights a pixel"
