"""The same small region of every head of a layer, exact: what the line view draws."""

from __future__ import annotations

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.viewport import Region, allowed_pixels, find_trace, head_map, region_of
from attnlab_storage.database import Store

MOST_WEIGHTS = 1 << 20


def head_tiles(store: Store, run_id: int, layer: int, rows: Region = None, cols: Region = None) -> np.ndarray:
    """The weights of a region in all heads: float32 [heads, rows, cols], NaN where no pair is allowed.

    Raises ViewError for an unknown layer or region, and for more than a million weights.
    """
    run, trace = find_trace(store, run_id, layer)
    region = region_of((trace.num_queries, trace.num_keys), rows, cols)
    sides = [stop - start for start, stop in region]
    if trace.heads * sides[0] * sides[1] > MOST_WEIGHTS:
        asked = f"{trace.heads} heads of {sides[0]} x {sides[1]}"
        raise ViewError(f"rows and cols must hold at most {MOST_WEIGHTS} weights of all heads; got {asked}")
    found = []
    for head in range(trace.heads):
        full_map = head_map(store, run, trace, head)
        weights = full_map.tile(slice(*region[0]), slice(*region[1]))
        allowed = allowed_pixels(full_map, *region, *sides)
        found.append(np.where(allowed, weights, np.float32(np.nan)))
    return np.stack(found)
