"""The map component: a place that `static/js/heatmap.js` fills, and the bytes that it asks for.

A viewport travels as float32 in row order, NaN where the mask allows no pair, so that "masked" is never mistaken
for a weight of zero; headers carry shape, region and maximum. Who wants few bytes says how many: what is longer in
float32 is rounded to the eight significant bits of bfloat16, which no colour shows, or to fewer where that is still too
long (a dense signed map of 512 x 512: five), and deflated.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np

from attnlab.views.trace_map import AttentionMap
from attnlab.views.viewport import Viewport, allowed_in, allowed_pixels
from attnlab_webui import theme

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
    runs: Sequence[int],
    *,
    mode: str = "single",
    pair: Sequence[int] | None = None,
    stamp: str = "",
    against: tuple[int, int] | None = None,
) -> str:
    """The value that shows runs: "single" (one map) or "compare" (linked maps, and the difference of a pair).

    `against` is a layer and head of one run that its others are compared with. `stamp` makes the view start anew when
    it changes, for example when a run ends.
    """
    document: dict[str, Any] = {
        "mode": mode,
        "runs": list(runs),
        "pair": list(pair) if pair else None,
        "stamp": stamp,
    }
    if against is not None:
        document["against"] = {"layer": against[0], "head": against[1]}
    return json.dumps(document)


def message(text: str) -> str:
    """The value that shows one sentence in place of a map."""
    return json.dumps({"message": text})


def encode(
    view: Viewport, maps: Sequence[AttentionMap], *, most_bytes: int | None = None
) -> tuple[bytes, dict[str, str]]:
    """A viewport as bytes and headers; a pixel is NaN where none of `maps` allows a pair.

    Args:
        most_bytes: what is longer is rounded and deflated to be at most that long; float32 whatever its length without.
    """
    values = np.ascontiguousarray(view.values, "<f4")
    if maps:
        allowed = np.zeros(values.shape, bool)
        for one in maps:
            allowed |= allowed_in(view, one)
        values = np.where(allowed, values, np.float32(np.nan))
    headers = headers_of(values, view.rows, view.cols, view.maximum, exact=view.exact)
    if most_bytes is not None and values.nbytes > most_bytes:
        return deflated(values, most_bytes), headers | {
            "X-Attnlab-Dtype": "bfloat16",
            "Content-Encoding": "gzip",
        }
    return values.tobytes(), headers


def deflated(values: np.ndarray, most_bytes: int) -> bytes:
    """Values as gzip of bfloat16, first all high bytes and then all low ones, rounded until `most_bytes` hold them.

    ValueError where not even their powers of two fit.
    """
    packed = b""
    for dropped in range(16, 23):
        raw = values.view("<u4") + np.uint32(1 << (dropped - 1)) >> dropped << (dropped - 16)
        raw[np.isnan(values)] = 0x7FC0
        packer = zlib.compressobj(1, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
        packed = packer.compress(np.stack([raw >> 8, raw & 255]).astype(np.uint8).tobytes()) + packer.flush()
        if len(packed) <= most_bytes:
            return packed
    pixels = " x ".join(map(str, values.shape))
    raise ValueError(
        f"most_bytes must be at least {len(packed):,} for these {pixels} pixels; got {most_bytes:,}"
    )


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
        "X-Attnlab-Dtype": "float32",
    }


def largest(values: np.ndarray) -> float:
    """The largest weight, 0 where no pair is allowed at all."""
    return 0.0 if np.isnan(values).all() else float(np.nanmax(values))


def masked_cell(full_map: AttentionMap, row: int, col: int) -> bool:
    """Whether query `row` may not attend to key `col`."""
    return not bool(allowed_pixels(full_map, (row, row + 1), (col, col + 1), 1, 1)[0, 0])
