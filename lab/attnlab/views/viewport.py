"""Any region of a stored map at any size, exact: rebuilt from the chunk rows of Q, K and log-sum-exp.

What a pixel shows is a probability (or the maximum or mean of those under it). Scaling by row, logarithms and
colours belong to whoever draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from attnlab.views.aligned_map import span_of_tokens
from attnlab.views.errors import NotFound, NothingRecorded, ViewError
from attnlab.views.labels import OUTCOME_WORDS
from attnlab.views.memory import ArrayMemory
from attnlab.views.overlays import make_part, overlays
from attnlab.views.overview import Layout, Pixels, is_wide, pyramid_pixels
from attnlab.views.pyramids import Pyramids
from attnlab.views.trace_map import BY_KEY_HEAD, AttentionMap, make_map
from attnlab_kernels.difference_map import DifferenceMap
from attnlab_kernels.linear_map import LinearMap
from attnlab_kernels.neighborhood import NeighborhoodMap
from attnlab_kernels.sparse_map import SparseMap
from attnlab_storage import results, tensors
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow, TraceRow

REDUCTIONS = ("max", "mean")
MAX_PIXELS = 4096
Region: TypeAlias = "tuple[int, int] | slice | None"

MEMORY = ArrayMemory(128 * 2**20)
PYRAMIDS = Pyramids(64 * 2**20)


@dataclass(frozen=True)
class Viewport:
    """A region of a map as pixels.

    Attributes:
        values: float32 [height, width]; never more pixels than cells.
        rows, cols: the region, half-open token ranges (queries, keys).
        shape: (queries, keys) of the whole map.
        maximum, minimum: over the pixels; panels that are compared share a scale made of these.
        reduce: how a pixel sums up its cells: "max", "mean", or "signed_max" (of a difference).
        exact: True when every pixel is one cell.
        edges: first row and column of each pixel and one past the last, where the pixels are not of even size.
    """

    values: np.ndarray
    rows: tuple[int, int]
    cols: tuple[int, int]
    shape: tuple[int, int]
    maximum: float
    minimum: float
    reduce: str
    exact: bool
    edges: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(
        cls,
        values: np.ndarray,
        rows: tuple[int, int],
        cols: tuple[int, int],
        shape: tuple[int, int],
        reduce: str,
    ) -> Viewport:
        """A viewport over values that were reduced from the region; NaN, where nothing is known, is no extreme."""
        cells = (rows[1] - rows[0], cols[1] - cols[0])
        known = values[~np.isnan(values)] if np.isnan(values).any() else values
        extremes = (float(known.max()), float(known.min())) if known.size else (0.0, 0.0)
        return cls(values, rows, cols, shape, *extremes, reduce, values.shape == cells)


class Linked(NamedTuple):
    """Panels of the same region, and the maximum for the one scale that they share."""

    panels: list[Viewport]
    maximum: float


def viewport(
    store: Store,
    run_id: int,
    layer: int,
    head: int,
    rows: Region = None,
    cols: Region = None,
    height: int = 512,
    width: int = 512,
    reduce: str = "max",
    part: str | None = None,
) -> Viewport:
    """The region ``rows`` x ``cols`` (None: all) reduced to at most ``height`` x ``width`` pixels.

    A region of more cells than can be computed at once comes from the map's pyramid: the region grows to whole
    blocks, and each pixel is exact for the cells under it. On first look the pyramid is built, which takes seconds;
    `overview_progress` says how far that is.

    Raises ViewError for a layer, head, region, size or reduction that the map does not have, NothingRecorded
    where the run holds no maps. ``part`` shows one of ``overlays.part_names`` in place of the weights.
    """
    check_size(height, width)
    if reduce not in REDUCTIONS:
        raise ViewError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")
    run, _ = find_trace(store, run_id, layer)
    full_map = _shown(store, run_id, layer, head, part)
    region = region_of(full_map.shape, rows, cols)
    if part is None and has_pyramid(full_map) and is_wide(full_map.shape, full_map.mask, *region):
        pyramid = PYRAMIDS.get(store, run, layer, head, full_map)
        layout = Layout(full_map.shape, full_map.mask)
        return viewport_of_blocks(
            pyramid_pixels(layout, pyramid, *region, height, width, reduce), full_map.shape, reduce
        )
    values = full_map.pool(slice(*region[0]), slice(*region[1]), height, width, reduce)
    return Viewport.of(values, *region, full_map.shape, reduce)


def overview_progress(
    store: Store,
    run_id: int,
    layer: int,
    head: int,
    rows: Region = None,
    cols: Region = None,
    *,
    patient: bool = False,
) -> float:
    """1.0 where `viewport` can answer for this region at once; else how far its pyramid is, which this call starts.

    ``patient``: starts it only while no other is being built.
    """
    run, trace = find_trace(store, run_id, layer)
    full_map = head_map(store, run, trace, head)
    region = region_of(full_map.shape, rows, cols)
    if not has_pyramid(full_map) or not is_wide(full_map.shape, full_map.mask, *region):
        return 1.0
    return PYRAMIDS.progress(store, run, layer, head, full_map, patient=patient)


def has_pyramid(full_map: AttentionMap) -> bool:
    """Whether one may be built: its blocks keep the largest weight, which of signed weights is not the one to show."""
    return not isinstance(full_map, DifferenceMap | LinearMap)


def viewport_of_blocks(pixels: Pixels, shape: tuple[int, int], reduce: str) -> Viewport:
    """Pixels of a pyramid as a viewport of a map of this shape."""
    (top, bottom), (left, right) = ((int(edges[0]), int(edges[-1])) for edges in pixels[1:])
    view = Viewport.of(pixels.values, (top, bottom), (left, right), shape, reduce)
    return replace(view, edges=(pixels.row_edges, pixels.col_edges))


def linked_viewports(
    store: Store,
    panels: Sequence[tuple[int, int, int]],
    rows: Region = None,
    cols: Region = None,
    height: int = 512,
    width: int = 512,
    reduce: str = "max",
) -> Linked:
    """The same region of several maps, given as (run id, layer, head), with one maximum for them all.

    The region is of the first one's tokens; a run over another text shows where it has them.
    Raises ViewError as `viewport` and `span_of_tokens`.
    """
    if not panels:
        raise ViewError("panels must name at least one (run, layer, head); got none")
    spans = linked_regions(store, panels, rows, cols)
    views = [
        viewport(store, *panel, *span, height, width, reduce)
        for panel, span in zip(panels, spans, strict=True)
    ]
    return Linked(views, max(view.maximum for view in views))


def linked_regions(
    store: Store, panels: Sequence[tuple[int, int, int]], rows: Region, cols: Region
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows and columns of each (run id, layer, head) that hold the tokens of a region of the first.

    Raises ViewError as `span_of_tokens`.
    """
    shapes = [load_map(store, *panel).shape for panel in panels]
    region = region_of(shapes[0], rows, cols)
    first = panels[0][0]
    return [
        span_of_tokens(store, first, run_id, (shapes[0], shape), *region)
        for (run_id, _, _), shape in zip(panels, shapes, strict=True)
    ]


def cell(
    store: Store, run_id: int, layer: int, head: int, row: int, col: int, part: str | None = None
) -> float:
    """The exact weight (float64 arithmetic) that query ``row`` gives to key ``col``."""
    full_map = _shown(store, run_id, layer, head, part)
    for name, value, size in (("row", row, full_map.shape[0]), ("col", col, full_map.shape[1])):
        if not 0 <= value < size:
            raise ViewError(f"{name} must be in 0..{size - 1}; got {value}")
    return float(full_map.tile(slice(row, row + 1), slice(col, col + 1))[0, 0])


def load_map(store: Store, run_id: int, layer: int, head: int) -> AttentionMap:
    """The map of one head (zero-based), from memory when it was looked at lately.

    Raises ViewError naming the layers or heads that there are.
    """
    return head_map(store, *find_trace(store, run_id, layer), head)


def head_map(store: Store, run: RunRow, trace: TraceRow, head: int) -> AttentionMap:
    """`load_map` for one of many heads of a layer that was found before."""
    _check_head(run, trace, head)
    return make_map(trace, head, lambda name, at: _tensor(store, run, name, trace.layer, at))


def head_overlays(store: Store, run_id: int, layer: int, head: int) -> list[dict[str, Any]]:
    """What the mechanism adds to the map of one head, as JSON, see `overlays`."""
    run, trace = find_trace(store, run_id, layer)
    _check_head(run, trace, head)
    return overlays(trace, head, lambda name, at: _tensor(store, run, name, layer, at))


def load_part(store: Store, run_id: int, layer: int, head: int, part: str) -> AttentionMap:
    """Another map of the same head, one of ``part_names``; ViewError names them."""
    run, trace = find_trace(store, run_id, layer)
    _check_head(run, trace, head)
    return make_part(trace, head, lambda name, at: _tensor(store, run, name, layer, at), part)


def head_tensor(store: Store, run_id: int, name: str, layer: int, head: int) -> np.ndarray:
    """A stored tensor of a layer as query head ``head`` reads it; TensorError names the ones that there are."""
    run, trace = find_trace(store, run_id, layer)
    _check_head(run, trace, head)
    at = head * trace.kv_heads // trace.heads if name in BY_KEY_HEAD else head
    return _tensor(store, run, name, layer, at)


def allowed_pixels(
    full_map: AttentionMap, rows: tuple[int, int], cols: tuple[int, int], height: int, width: int
) -> np.ndarray:
    """bool [height, width]: whether any cell under the pixel may have a weight; pixels of even size."""
    row_edges = rows[0] + np.arange(height + 1) * (rows[1] - rows[0]) // height
    col_edges = cols[0] + np.arange(width + 1) * (cols[1] - cols[0]) // width
    return _allowed(full_map, row_edges, col_edges)


def allowed_in(view: Viewport, full_map: AttentionMap) -> np.ndarray:
    """bool [height, width]: whether any cell under a pixel of the view may have a weight in this map."""
    if view.edges is not None:
        return _allowed(full_map, *view.edges)
    return allowed_pixels(full_map, view.rows, view.cols, *view.values.shape)


def _allowed(full_map: AttentionMap, row_edges: np.ndarray, col_edges: np.ndarray) -> np.ndarray:
    size = {"num_queries": full_map.shape[0], "num_keys": full_map.shape[1]}
    if isinstance(full_map, SparseMap | NeighborhoodMap):
        return full_map.seen(row_edges, col_edges)
    first, last = full_map.mask.key_ranges(row_edges, **size)
    return (col_edges[:-1] < last[:, None]) & (col_edges[1:] > first[:, None])


def find_trace(store: Store, run_id: int, layer: int) -> tuple[RunRow, TraceRow]:
    """The run and what it recorded of one layer; ViewError names the recorded layers."""
    run, traces = recorded(store, run_id)
    for trace in traces:
        if trace.layer == layer:
            return run, trace
    raise ViewError(f"layer must be one of {_ranges([t.layer for t in traces])} of run {run_id}; got {layer}")


def recorded(store: Store, run_id: int) -> tuple[RunRow, list[TraceRow]]:
    """The run and its recorded layers in order; NothingRecorded says why there are none."""
    run = find_run(store, run_id)
    traces = results.traces(store, run_id)
    if not traces:
        ended = OUTCOME_WORDS[run.state]
        why = f"it is {ended}" if run.state != "succeeded" else "its record does not include maps"
        raise NothingRecorded(f"run {run_id} holds no attention maps: {why}")
    return run, traces


def find_run(store: Store, run_id: int) -> RunRow:
    """The run; NotFound when there is none with this id."""
    run = results.get_run(store, run_id)
    if run is None:
        raise NotFound(f"run must be the id of a run in this store; got {run_id}")
    return run


def region_of(shape: tuple[int, int], rows: Region, cols: Region) -> tuple[tuple[int, int], tuple[int, int]]:
    """The region as two half-open ranges inside the map; ViewError when it is empty or reaches outside."""
    return _span("rows", rows, shape[0]), _span("cols", cols, shape[1])


def check_size(height: int, width: int) -> None:
    """ViewError unless a picture of this many pixels may be asked for."""
    for name, value in (("height", height), ("width", width)):
        if not 1 <= value <= MAX_PIXELS:
            raise ViewError(f"{name} must be in 1..{MAX_PIXELS} pixels; got {value}")


def _shown(store: Store, run_id: int, layer: int, head: int, part: str | None) -> AttentionMap:
    if part is None:
        return load_map(store, run_id, layer, head)
    return load_part(store, run_id, layer, head, part)


def _check_head(run: RunRow, trace: TraceRow, head: int) -> None:
    if not 0 <= head < trace.heads:
        rule = f"head must be in 0..{trace.heads - 1} for layer {trace.layer} of run {run.id}"
        raise ViewError(f"{rule}; got {head}")


def _span(name: str, part: Region, size: int) -> tuple[int, int]:
    if part is None:
        return 0, size
    if isinstance(part, slice):
        if part.step not in (None, 1):
            raise ViewError(f"{name} must be a slice with step 1; got {part}")
        part = (0 if part.start is None else part.start, size if part.stop is None else part.stop)
    start, stop = part
    if not 0 <= start < stop <= size:
        rule = f"must be a range start:stop with 0 <= start < stop <= {size}"
        raise ViewError(f"{name} {rule}; got {start}:{stop}")
    return int(start), int(stop)


def _tensor(store: Store, run: RunRow, name: str, layer: int, head: int) -> np.ndarray:
    # a retry keeps the id and moves the attempt; a purged id may come back with another creation time
    key = (store.url, run.id, run.created_at, run.attempt, name, layer, head)
    return MEMORY.get(key, lambda: tensors.read_tensor(store, run.id, name, layer, head))


def _ranges(layers: Sequence[int]) -> str:
    """``0..29``, or the list when it has gaps."""
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}..{layers[-1]}"
    return ", ".join(str(layer) for layer in layers)
