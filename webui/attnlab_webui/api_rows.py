"""What single views ask for: one query in all heads, the picture that was read, the sound that was heard."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Response

from attnlab.views.query_rows import query_row, run_picture, run_sound
from attnlab_webui import heatmap
from attnlab_webui.answers import StoreDep, find_run, octets

router = APIRouter()


@router.get("/runs/{run_id}/rows")
def run_rows(run_id: int, layer: int, row: int, store: StoreDep, v: str | None = None) -> Response:
    """What query `row` gives to every key in every head of a layer, as float32 [heads, keys]; NaN where masked."""
    find_run(store, run_id)
    found = query_row(store, run_id, layer, row)
    values = np.where(found.allowed, found.weights, np.float32(np.nan))
    keys = (0, values.shape[1])
    headers = heatmap.headers_of(values, (row, row + 1), keys, float(found.weights.max()), exact=True)
    return octets(values.astype("<f4").tobytes(), headers, v)


@router.get("/runs/{run_id}/picture")
def picture(run_id: int, store: StoreDep) -> dict[str, Any]:
    """The picture as the model saw it (a data URI) and the model's answer, null for each that the run has not."""
    find_run(store, run_id)
    return run_picture(store, run_id)


@router.get("/runs/{run_id}/sound")
def sound(run_id: int, store: StoreDep) -> dict[str, Any]:
    """The length of the sound that a run heard and its envelope, null where it heard none."""
    find_run(store, run_id)
    return run_sound(store, run_id)
