"""What the views beside the map show, over HTTP: one token's weights, all heads of a region."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from attnlab.views.head_tiles import head_tiles
from attnlab.views.token import token_document
from attnlab_webui import heatmap
from attnlab_webui.answers import StoreDep, find_run, octets, span

router = APIRouter()
Text = Annotated[str | None, Query(max_length=40)]


@router.get("/runs/{run_id}/token")
def run_token(
    run_id: int,
    layer: int,
    row: int,
    store: StoreDep,
    head: int | None = None,
    shown: Text = None,
    count: int = 12,
) -> dict[str, Any]:
    """What query `row` gives to each key, and what its own key receives, in one head or the mean of all heads.

    `sent` and `received` each have `weights` of the `shown` positions START:STOP (null where no pair is allowed), a
    `strip` of all positions pooled to at most 512, and the `top` positions with their weights.
    """
    find_run(store, run_id)
    return token_document(store, run_id, layer, row, head, span("shown", shown), count)


@router.get("/runs/{run_id}/heads")
def run_heads(
    run_id: int, layer: int, store: StoreDep, rows: Text = None, cols: Text = None, v: str | None = None
) -> Response:
    """A region in every head of a layer, exact, as float32 [heads * rows, cols]; NaN where no pair is allowed."""
    find_run(store, run_id)
    region = span("rows", rows), span("cols", cols)
    tiles = head_tiles(store, run_id, layer, *region)
    heads, height, width = tiles.shape
    values = tiles.reshape(heads * height, width)
    top, left = (0 if part is None else part[0] for part in region)
    headers = heatmap.headers_of(
        values, (top, top + height), (left, left + width), heatmap.largest(values), exact=True
    )
    return octets(values.astype("<f4").tobytes(), headers, v)
