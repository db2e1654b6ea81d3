"""What the views beside the map show, over HTTP: one token, all heads, ways through layers, distances."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from attnlab.views.distances import head_distances, run_distances
from attnlab.views.head_tiles import head_tiles
from attnlab.views.jobs import Answer
from attnlab.views.statistics import CURVES, curve
from attnlab.views.through_layers import flow_document, flow_way, rollout_document, rollout_way
from attnlab.views.token import token_document
from attnlab_webui import heatmap
from attnlab_webui.answers import StoreDep, find_run, octets, span

router = APIRouter()
Text = Annotated[str | None, Query(max_length=40)]
Share = Annotated[float, Query(ge=0, le=1)]
Rows = Annotated[int, Query(ge=1, le=256)]


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


@router.get("/runs/{run_id}/rollout")
def run_rollout(
    run_id: int,
    store: StoreDep,
    row: int | None = None,
    residual: Share = 0.5,
    height: Rows = 64,
    v: str | None = None,
) -> Response:
    """How much of each token reaches position `row` through all layers, or all positions pooled to `height` rows.

    202 with {"building": share} while it is being worked out: ask again.
    """
    find_run(store, run_id)
    return _later(rollout_document(store, run_id, row, residual, height))


@router.get("/runs/{run_id}/flow")
def run_flow(
    run_id: int,
    row: int,
    store: StoreDep,
    tokens: Text = None,
    residual: Share = 0.5,
    v: str | None = None,
) -> Response:
    """The maximum flow from position `row` to each of `tokens` START:STOP, at most 96; 202 as for a rollout."""
    find_run(store, run_id)
    return _later(flow_document(store, run_id, row, span("tokens", tokens), residual))


@router.post("/runs/{run_id}/rollout/cancel")
def cancel_rollout(
    run_id: int, store: StoreDep, row: int | None = None, residual: Share = 0.5, height: Rows = 64
) -> dict[str, bool]:
    """Give up a rollout that is being worked out; `cancelled` is false where none was."""
    find_run(store, run_id)
    return {"cancelled": rollout_way(store, run_id, row, residual, height).cancel()}


@router.post("/runs/{run_id}/flow/cancel")
def cancel_flow(
    run_id: int, row: int, store: StoreDep, tokens: Text = None, residual: Share = 0.5
) -> dict[str, bool]:
    """Give up a flow that is being worked out; `cancelled` is false where none was."""
    find_run(store, run_id)
    return {"cancelled": flow_way(store, run_id, row, span("tokens", tokens), residual).cancel()}


@router.get("/runs/{run_id}/curve")
def run_curve(run_id: int, name: str, layer: int, head: int, store: StoreDep) -> dict[str, Any]:
    """A stored curve of a head, `row_entropy` or `column_mass`: at most 1,024 points from first to last position."""
    points = curve(store, run_id, name, layer, head)
    return {"run": run_id, "name": name, "layer": layer, "head": head, "words": CURVES[name]} | {
        "points": points.tolist()
    }


@router.get("/runs/{run_id}/distances")
def distances_of_heads(
    run_id: int,
    layer: int,
    store: StoreDep,
    layer_b: int | None = None,
    head_b: int | None = None,
    max_rows: Rows = 64,
) -> dict[str, Any]:
    """How far every head of a layer is from every head, or from `head_b`, of the same layer or of `layer_b`."""
    return head_distances(store, run_id, layer, layer_b, max_rows, head_b=head_b).to_json()


@router.get("/compare/distances")
def distances_of_runs(
    a: int, b: int, store: StoreDep, layer: Annotated[list[int] | None, Query()] = None, max_rows: Rows = 64
) -> dict[str, Any]:
    """How far every head of run `a` is from the same head of run `b`; `layer` may be given several times."""
    for run_id in (a, b):
        find_run(store, run_id)
    return run_distances(store, a, b, layer, max_rows).to_json()


def _later(answer: Answer[dict[str, Any]]) -> Response:
    headers = {"Cache-Control": "no-store"}
    if answer.result is None:
        return JSONResponse({"building": answer.done}, 202, headers)
    return JSONResponse(answer.result, headers=headers)
