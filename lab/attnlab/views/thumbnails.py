"""All heads of a layer as small pictures, for the strip that people pick a head from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.viewport import REDUCTIONS, check_size, find_trace, head_map
from attnlab_storage.database import Store


class Thumbnails(NamedTuple):
    """Every head of one layer, pooled over the whole map."""

    values: np.ndarray  # float32 [heads, height, width]
    maximum: float
    reduce: str


def thumbnails(store: Store, run_id: int, layer: int, size: int = 64, reduce: str = "max") -> Thumbnails:
    """Pooled maps of all heads of a layer, at most ``size`` pixels a side.

    Raises ViewError for an unknown layer, size or reduction.
    """
    check_size(size, size)
    if reduce not in REDUCTIONS:
        raise ViewError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")
    run, trace = find_trace(store, run_id, layer)
    maps = (head_map(store, run, trace, head) for head in range(trace.heads))
    values = np.stack([one.pool(slice(None), slice(None), size, size, reduce) for one in maps])
    return Thumbnails(values, float(values.max()), reduce)
