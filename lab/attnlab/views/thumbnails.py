"""Heads as small pictures, for the strip and the grid that people pick a head from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.memory import ArrayMemory
from attnlab.views.viewport import (
    REDUCTIONS,
    allowed_in,
    check_size,
    find_trace,
    head_map,
    overview_progress,
    viewport,
)
from attnlab_storage import tensors
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow

KEPT_SIZE = 48
"""pixels a side of the pictures that the store keeps once they were made"""
MEMORY = ArrayMemory(32 * 2**20)


class Thumbnails(NamedTuple):
    """Every head of one layer, pooled over the whole map."""

    values: np.ndarray  # float32 [heads, height, width]
    maximum: float
    reduce: str


def thumbnail(
    store: Store, run_id: int, layer: int, head: int, size: int = KEPT_SIZE, reduce: str = "max"
) -> np.ndarray:
    """One head pooled to at most ``size`` pixels a side: float32 [height, width], NaN where no pair is allowed.

    A picture of `KEPT_SIZE` pixels is made once and kept in the store.

    Raises ViewError for a layer, head, size or reduction that the map does not have.
    """
    run, key = _check(store, run_id, layer, head, size, reduce)

    def made() -> np.ndarray:
        kept = _kept(store, run, layer, head, size, reduce)
        if kept is not None:
            return kept
        view = viewport(store, run_id, layer, head, None, None, size, size, reduce)
        full_map = head_map(store, *find_trace(store, run_id, layer), head)
        values = np.where(allowed_in(view, full_map), view.values, np.float32(np.nan))
        if size == KEPT_SIZE:
            tensors.keep_derived(store, run_id, run.attempt, _name(reduce, head), layer, values[None])
        return values

    return MEMORY.get(key, made)


def thumbnail_progress(
    store: Store, run_id: int, layer: int, head: int, size: int = KEPT_SIZE, reduce: str = "max"
) -> float:
    """1.0 where `thumbnail` can answer soon; else how far the overview of a long map is.

    This call starts to build it unless another one is being built: pictures of many heads are in nobody's way.
    """
    run, _ = _check(store, run_id, layer, head, size, reduce)
    if _kept(store, run, layer, head, size, reduce) is not None:
        return 1.0
    return overview_progress(store, run_id, layer, head, patient=True)


def thumbnails(store: Store, run_id: int, layer: int, size: int = 64, reduce: str = "max") -> Thumbnails:
    """Pooled maps of all heads of a layer, at most ``size`` pixels a side; 0 where no pair is allowed.

    Raises ViewError for an unknown layer, size or reduction.
    """
    _, trace = find_trace(store, run_id, layer)
    found = [thumbnail(store, run_id, layer, head, size, reduce) for head in range(trace.heads)]
    values = np.nan_to_num(np.stack(found))
    return Thumbnails(values, float(values.max()), reduce)


def _check(
    store: Store, run_id: int, layer: int, head: int, size: int, reduce: str
) -> tuple[RunRow, tuple[object, ...]]:
    check_size(size, size)
    if reduce not in REDUCTIONS:
        raise ViewError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")
    run, trace = find_trace(store, run_id, layer)
    if not 0 <= head < trace.heads:
        raise ViewError(f"head must be in 0..{trace.heads - 1} for layer {layer} of run {run_id}; got {head}")
    # a retry keeps the id and moves the attempt; a purged id may come back with another creation time
    return run, (store.url, run_id, run.created_at, run.attempt, layer, head, size, reduce)


def _kept(store: Store, run: RunRow, layer: int, head: int, size: int, reduce: str) -> np.ndarray | None:
    if size != KEPT_SIZE:
        return None
    try:
        return tensors.read_tensor(store, run.id, _name(reduce, head), layer, 0)
    except tensors.TensorError:
        return None


def _name(reduce: str, head: int) -> str:
    return f"thumbnail_{reduce}.{head}"
