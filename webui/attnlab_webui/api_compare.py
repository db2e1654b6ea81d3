"""Two maps against each other over HTTP: their difference, single cells of it, and how far every head is apart."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from attnlab.views.aligned_map import alignment_document, needed_alignment, places
from attnlab.views.difference import difference
from attnlab.views.distances import MEASURES, head_distances, run_distances
from attnlab.views.viewport import cell, load_map
from attnlab_webui import heatmap
from attnlab_webui.answers import Refused, StoreDep, find_run, octets, span
from attnlab_webui.api_maps import Pixels

router = APIRouter()
WORDS = {
    "total_variation": (
        "total variation",
        "half the sum of |p - q|, mean over rows: 0 equal, 1 disjoint",
        "",
    ),
    "jensen_shannon": ("Jensen-Shannon", "divergence in bits, mean over rows: 0 equal, 1 disjoint", "bits"),
    "spearman": (
        "rank correlation",
        "Spearman's, of the weights of a row, mean over rows: 1 the same order",
        "",
    ),
}


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
    v: str | None = None,
) -> Response:
    """A − B over a region as float32 [height, width]; NaN where neither map allows a pair."""
    region = span("rows", rows), span("cols", cols)
    view = difference(store, a, b, layer, head, *region, height, width, reduce)
    first, second = (load_map(store, run_id, layer, head) for run_id in (a, b))
    aligned = needed_alignment(store, a, b, first.shape, second.shape)
    maps = [first, second] if aligned is None else [first]
    return octets(*heatmap.encode(view, maps), v)


@router.get("/compare/cell")
def compare_cell(
    a: int, b: int, layer: int, head: int, row: int, col: int, store: StoreDep
) -> dict[str, Any]:
    """The exact difference A − B of one weight, at the tokens of A; null where B has not both of them."""
    first, second = (load_map(store, run_id, layer, head) for run_id in (a, b))
    aligned = needed_alignment(store, a, b, first.shape, second.shape)
    value = cell(store, a, layer, head, row, col)
    masked = heatmap.masked_cell(first, row, col)
    if aligned is None:
        other, masked = (row, col), masked and heatmap.masked_cell(second, row, col)
    else:
        other = tuple(int(places(one)[at]) for one, at in zip(aligned, (row, col), strict=True))
    value = None if min(other) < 0 else value - cell(store, b, layer, head, *other)
    return {"row": row, "col": col, "value": value, "masked": masked}


@router.get("/compare/alignment")
def compare_alignment(a: int, b: int, layer: int, store: StoreDep, v: str | None = None) -> dict[str, Any]:
    """Where each query and key of run A stands in run B, -1 for nowhere; null where the tokens are the same."""
    shapes = [load_map(store, run_id, layer, 0).shape for run_id in (a, b)]
    return alignment_document(store, a, b, shapes)


@router.get("/compare/distances")
def compare_distances(
    a: int, b: int, layer: int, store: StoreDep, layer_b: int | None = None, v: str | None = None
) -> dict[str, Any]:
    """How far apart every head of one layer is from the same head of another run, each measure as a list by head.

    With `a` equal to `b` and `layer_b` another layer: every head of the one against every head of the other, as rows.
    """
    for run_id in (a, b):
        find_run(store, run_id)
    if layer_b is None:
        grid = run_distances(store, a, b, [layer])
    elif a == b:
        grid = head_distances(store, a, layer, layer_b)
    else:
        raise Refused(f"layer_b is of two layers of one run, a and b must be equal; got {a} and {b}")
    words = {name: dict(zip(("title", "formula", "unit"), WORDS[name], strict=True)) for name in MEASURES}
    return grid.to_json() | {"words": words}
