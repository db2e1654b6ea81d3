"""Maps over HTTP: what a run recorded, any region as float32, single weights, thumbnails, differences."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from attnlab.describe import run_brief
from attnlab.heads import statistics_document
from attnlab.views.colormaps import COLORMAPS, colormap
from attnlab.views.labels import mechanism_label, ran_as
from attnlab.views.overlays import part_names
from attnlab.views.read_inputs import attention_role, grows, patch_grid
from attnlab.views.statistics import kept_curves
from attnlab.views.thumbnails import KEPT_SIZE, thumbnail, thumbnail_progress
from attnlab.views.tokens import stream_axes, token_labels
from attnlab.views.trace_map import is_signed, map_facts
from attnlab.views.viewport import (
    cell,
    find_trace,
    head_overlays,
    load_map,
    overview_progress,
    recorded,
    viewport,
)
from attnlab_kernels.masks import mask_from_json
from attnlab_storage import results
from attnlab_storage.database import Store
from attnlab_webui import heatmap
from attnlab_webui.answers import StoreDep, find_run, octets, span

router = APIRouter()
Pixels = Annotated[int, Query(ge=1, le=2048)]
PictureBytes = Annotated[int | None, Query(ge=1024)]
ThumbPixels = Annotated[int, Query(ge=8, le=256)]


@router.get("/colormaps")
def colormaps() -> dict[str, Any]:
    """The colour tables of pages and exports: 256 x RGB, flat."""
    return {"colormaps": {name: colormap(name).ravel().tolist() for name in COLORMAPS}}


@router.get("/runs/{run_id}/map")
def recorded_maps(run_id: int, store: StoreDep) -> dict[str, Any]:
    """What maps a run holds: its layers with heads, sizes, masks and self-checks."""
    find_run(store, run_id)
    run, traces = recorded(store, run_id)
    brief = run_brief(run)
    given = results.run_input(store, run_id)
    return {
        "run": run_id,
        "label": f"#{run_id} {mechanism_label(brief)} · {ran_as(brief)} · {brief['dtype']}",
        "model": run.model,
        "stamp": stamp(run),
        "phase": run.phase,
        "generated": ((given and given.detail) or {}).get("generated_tokens", 0),
        "layers": [
            {
                "layer": trace.layer,
                "name": trace.name,
                "role": attention_role(run, trace),
                "query_stream": (trace.detail or {}).get("queries"),
                "key_stream": (trace.detail or {}).get("keys"),
                "heads": trace.heads,
                "kv_heads": trace.kv_heads,
                "queries": trace.num_queries,
                "keys": trace.num_keys,
                "mask": mask_from_json(trace.mask).describe(),
                "kind": trace.kind,
                "signed": is_signed(trace),
                "columns": map_facts(trace).get("columns"),
                "parts": part_names(trace),
                "grid": patch_grid(trace),
                "grows": grows(trace),
                "row_sum_defect": trace.row_sum_defect,
                "output_defect": trace.output_defect,
            }
            for trace in traces
        ],
    }


def stamp(run: Any) -> str:
    """Changes whenever what a run holds may have changed; browsers keep tiles under it."""
    return f"{run.created_at:.0f}.{run.attempt}.{run.finished_at or 0:.0f}"


@router.get("/runs/{run_id}/overlays")
def run_overlays(run_id: int, layer: int, head: int, store: StoreDep, v: str | None = None) -> dict[str, Any]:
    """What the mechanism adds to a head's map: lines, strips and notes to draw over it."""
    find_run(store, run_id)
    return {"run": run_id, "overlays": head_overlays(store, run_id, layer, head)}


@router.get("/runs/{run_id}/tokens")
def tokens(run_id: int, store: StoreDep) -> dict[str, Any]:
    """The text and the token of every query and key, as a person can read them and as the tokenizer wrote them.

    Where a model's attentions lie between several sequences, `streams` has the names of each: `/map` says which one
    a layer's queries and keys are.
    """
    find_run(store, run_id)
    given = results.run_input(store, run_id)
    streams = {} if given is None else stream_axes(given)
    return token_labels(store, run_id)._asdict() | {
        "streams": {name: {"title": axis.title, "labels": axis.labels} for name, axis in streams.items()}
    }


@router.get("/runs/{run_id}/viewport")
def run_viewport(
    run_id: int,
    layer: int,
    head: int,
    store: StoreDep,
    rows: str | None = None,
    cols: str | None = None,
    height: Pixels = 512,
    width: Pixels = 512,
    reduce: str = "max",
    part: str | None = None,
    v: str | None = None,
    most_bytes: PictureBytes = None,
) -> Response:
    """Any region of a map as float32 [height, width], row by row; NaN where no pair is allowed.

    ``most_bytes``: where it would be longer, as gzip of rounded numbers (``heatmap.deflated``).
    202 with {"building": share} while the overview that a wide region comes from is being built: ask again.
    """
    region = span("rows", rows), span("cols", cols)
    ready = 1.0 if part else overview_progress(store, run_id, layer, head, *region)
    if ready < 1:
        return JSONResponse({"building": ready}, 202, {"Cache-Control": "no-store"})
    view = viewport(store, run_id, layer, head, *region, height, width, reduce, part)
    return octets(*heatmap.encode(view, [load_map(store, run_id, layer, head)], most_bytes=most_bytes), v)


@router.get("/runs/{run_id}/cell")
def run_cell(
    run_id: int, layer: int, head: int, row: int, col: int, store: StoreDep, part: str | None = None
) -> dict[str, Any]:
    """The exact weight that query `row` gives to key `col`."""
    value = cell(store, run_id, layer, head, row, col, part)
    return {"row": row, "col": col, "value": value, "masked": _masked(store, run_id, layer, head, row, col)}


@router.get("/runs/{run_id}/thumbnails")
def run_thumbnails(
    run_id: int,
    layer: int,
    store: StoreDep,
    head: int | None = None,
    size: ThumbPixels = KEPT_SIZE,
    reduce: str = "max",
    v: str | None = None,
) -> Response:
    """All heads of a layer, or one, pooled, as float32 [heads * height, width]; NaN where no pair is allowed.

    202 with {"building": share} while the overviews that pictures of long maps come from are being built.
    """
    full_map = load_map(store, run_id, layer, head or 0)
    heads = range(find_trace(store, run_id, layer)[1].heads) if head is None else [head]
    ready = [thumbnail_progress(store, run_id, layer, one, size, reduce) for one in heads]
    if min(ready) < 1:
        return JSONResponse({"building": sum(ready) / len(ready)}, 202, {"Cache-Control": "no-store"})
    values = np.concatenate([thumbnail(store, run_id, layer, one, size, reduce) for one in heads])
    whole = (0, full_map.shape[0]), (0, full_map.shape[1])
    exact = values.shape == (len(heads) * full_map.shape[0], full_map.shape[1])
    headers = heatmap.headers_of(values, *whole, heatmap.largest(values), exact=exact)
    return octets(values.astype("<f4").tobytes(), headers, v)


@router.get("/runs/{run_id}/statistics")
def statistics(run_id: int, store: StoreDep) -> dict[str, Any]:
    """Per-layer, per-head numbers: {name: {title, formula, source, unit, layers, heads, values[layer][head]}}.

    `curves` names those that the run keeps along the positions: ask for them at `/curve`.
    """
    find_run(store, run_id)
    document = {"run": run_id, "statistics": statistics_document(store, run_id)}
    return document | {"curves": kept_curves(store, run_id)}


def _masked(store: Store, run_id: int, layer: int, head: int, row: int, col: int) -> bool:
    return heatmap.masked_cell(load_map(store, run_id, layer, head), row, col)
