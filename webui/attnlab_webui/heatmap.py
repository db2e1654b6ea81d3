"""The map component: a place that `static/js/heatmap.js` fills, and the bytes that it asks for.

A viewport travels as float32 in row order, NaN where the mask allows no pair, so that "masked" is never mistaken
for a weight of zero; headers carry shape, region and maximum.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np

from attnlab.views.viewport import Viewport
from attnlab_kernels.masks import Mask
from attnlab_webui import theme

OCTETS = "application/octet-stream"

_TEMPLATE = '<div class="at-view-place"></div>'
_ON_LOAD = """
import("{url}/js/heatmap.js").then((module) => module.mount(element, () => props.value, watch));
"""


def component(elem_id: str = "map") -> gr.HTML:
    """An empty map view; give it `config(...)`, `message(...)` or "" as its value."""
    return gr.HTML(
        "",
        html_template=_TEMPLATE,
        js_on_load=_ON_LOAD.format(url=theme.STATIC_URL).strip(),
        elem_id=elem_id,
        elem_classes="at-map-block",
        apply_default_css=False,
    )


def config(
    runs: Sequence[int], *, mode: str = "single", pair: Sequence[int] | None = None, stamp: str = ""
) -> str:
    """The value that shows runs: "single" (one map) or "compare" (linked maps, and the difference of a pair).

    `stamp` makes the view start anew when it changes, for example when a run ends.
    """
    document = {"mode": mode, "runs": list(runs), "pair": list(pair) if pair else None, "stamp": stamp}
    return json.dumps(document)


def message(text: str) -> str:
    """The value that shows one sentence in place of a map."""
    return json.dumps({"message": text})


def masked_pixels(
    mask: Mask, rows: tuple[int, int], cols: tuple[int, int], shape: tuple[int, int], pixels: tuple[int, int]
) -> np.ndarray:
    """Which pixels hold no allowed pair: bool [height, width].

    Args:
        rows, cols: the region, half-open.
        shape: (queries, keys) of the whole map.
        pixels: (height, width); pixel y covers the rows from floor(y * R / height) on, as in `SoftmaxMap.pool`.
    """
    queries, keys = shape
    first, last = mask.band().row_limits(np.arange(*rows), num_queries=queries, num_keys=keys)
    empty = first >= last
    first, last = np.where(empty, keys, first), np.where(empty, 0, last)
    row_edges, col_edges = _edges(rows, pixels[0]), _edges(cols, pixels[1])
    starts = row_edges[:-1] - rows[0]
    low = np.minimum.reduceat(first, starts)[:, None]
    high = np.maximum.reduceat(last, starts)[:, None]
    return (col_edges[None, 1:] <= low) | (col_edges[None, :-1] >= high)


def _edges(span: tuple[int, int], count: int) -> np.ndarray:
    start, stop = span
    return start + np.arange(count + 1) * (stop - start) // count


def encode(view: Viewport, masks: Sequence[Mask]) -> tuple[bytes, dict[str, str]]:
    """A viewport as bytes and headers; a pixel is NaN where none of `masks` allows a pair."""
    values = np.ascontiguousarray(view.values, "<f4")
    if masks:
        hidden = np.ones(values.shape, bool)
        for mask in masks:
            hidden &= masked_pixels(
                mask, view.rows, view.cols, view.shape, (values.shape[0], values.shape[1])
            )
        values = np.where(hidden, np.float32(np.nan), values)
    return values.tobytes(), headers_of(values, view.rows, view.cols, view.maximum, exact=view.exact)


def headers_of(
    values: np.ndarray, rows: tuple[int, int], cols: tuple[int, int], maximum: float, *, exact: bool
) -> dict[str, str]:
    """What a client needs beside the bytes: shape "height,width", the region, the maximum, pooled or exact."""
    return {
        "X-Attnlab-Shape": ",".join(str(side) for side in values.shape),
        "X-Attnlab-Rows": f"{rows[0]}:{rows[1]}",
        "X-Attnlab-Cols": f"{cols[0]}:{cols[1]}",
        "X-Attnlab-Max": repr(float(maximum)),
        "X-Attnlab-Exact": "1" if exact else "0",
    }


def masked_cell(mask: Mask, shape: tuple[int, int], row: int, col: int) -> bool:
    """Whether query `row` may not attend to key `col`."""
    allowed: Any = mask.allowed(np.array([row]), np.array([col]), num_queries=shape[0], num_keys=shape[1])
    return not bool(allowed[0, 0])
