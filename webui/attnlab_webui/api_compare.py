"""Two maps against each other over HTTP: their difference, single cells of it, and which token is which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from attnlab.views.aligned_map import alignment_document, needed_alignment, places
from attnlab.views.difference import allowed_difference, difference, difference_progress
from attnlab.views.viewport import cell, load_map
from attnlab_webui import heatmap
from attnlab_webui.answers import StoreDep, octets, span
from attnlab_webui.api_maps import PictureBytes, Pixels

router = APIRouter()


@router.get("/compare/viewport")
def compare_viewport(
    a: int,
    b: int,
    layer: int,
    head: int,
    store: StoreDep,
    rows: str | None = None,
    cols: str | None = None,
    height: Pixels = 512,
    width: Pixels = 512,
    reduce: str = "signed_max",
    layer_b: int | None = None,
    head_b: int | None = None,
    v: str | None = None,
    most_bytes: PictureBytes = None,
) -> Response:
    """A − B over a region as float32 [height, width]; NaN where neither map allows a pair.

    Where the inputs differ the region is of A's tokens, NaN where B lacks one; of two models by what
    tokens say. `layer_b` and `head_b`
    are B's where they are not A's; `most_bytes` as for one map. 202 with {"building": share} while what a wide region
    comes from is being built: ask again.
    """
    region = span("rows", rows), span("cols", cols)
    second = _second(layer, head, layer_b, head_b)
    other = {"layer_b": second[0], "head_b": second[1]}
    ready = difference_progress(store, a, b, layer, head, *region, reduce, **other)
    if ready < 1:
        return JSONResponse({"building": ready}, 202, {"Cache-Control": "no-store"})
    view = difference(store, a, b, layer, head, *region, height, width, reduce, **other)
    allowed = allowed_difference(store, view, (a, layer, head), (b, *second))
    view = replace(view, values=np.where(allowed, view.values, np.float32(np.nan)))
    return octets(*heatmap.encode(view, [], most_bytes=most_bytes), v)


@router.get("/compare/cell")
def compare_cell(
    a: int,
    b: int,
    layer: int,
    head: int,
    row: int,
    col: int,
    store: StoreDep,
    layer_b: int | None = None,
    head_b: int | None = None,
) -> dict[str, Any]:
    """The exact difference A − B of one weight, at the tokens of A; null where B has not both of them."""
    second = _second(layer, head, layer_b, head_b)
    maps = load_map(store, a, layer, head), load_map(store, b, *second)
    aligned = None if a == b else needed_alignment(store, a, b, maps[0].shape, maps[1].shape)
    value = cell(store, a, layer, head, row, col)
    masked = heatmap.masked_cell(maps[0], row, col)
    down, across = row, col
    if aligned is not None:
        down, across = int(places(aligned[0])[row]), int(places(aligned[1])[col])
    if min(down, across) < 0:
        return {"row": row, "col": col, "value": None, "masked": masked}
    gap = value - cell(store, b, *second, down, across)
    masked = masked and heatmap.masked_cell(maps[1], down, across)
    return {"row": row, "col": col, "value": gap, "masked": masked}


def _second(layer: int, head: int, layer_b: int | None, head_b: int | None) -> tuple[int, int]:
    """Layer and head of B."""
    return layer if layer_b is None else layer_b, head if head_b is None else head_b


@router.get("/compare/alignment")
def compare_alignment(a: int, b: int, layer: int, store: StoreDep, v: str | None = None) -> dict[str, Any]:
    """Where each query and key of run A stands in run B, -1 for nowhere; null where the tokens are the same."""
    shapes = [load_map(store, run_id, layer, 0).shape for run_id in (a, b)]
    return alignment_document(store, a, b, shapes)
