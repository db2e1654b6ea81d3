"""Attention rollout: how much of each input token reaches a position through all layers.

Each layer is ``A~ = (1 - r) mean_h A_h + r I`` with r = 0.5 for the residual stream, and the rollout of layers 1 to L
is ``R = A~_L ... A~_1`` (Abnar and Zuidema 2020, arXiv 2005.00928). A row of R is a row vector times one matrix after
the other, so it needs O(n) memory: no product of two matrices is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.read_inputs import attention_role
from attnlab.views.viewport import head_map, recorded
from attnlab_kernels.masks import Mask
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow, TraceRow

TILE_CELLS = 1 << 19
MOST_GROUPS = 256


class TiledMap(Protocol):
    """One head's map, of whatever kind."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def mask(self) -> Mask: ...

    def tile(self, rows: slice, cols: slice) -> np.ndarray: ...


@dataclass(frozen=True)
class Rollout:
    """Where positions take their input from.

    Attributes:
        values: float64 [targets, tokens]; each row sums to 1 as far as
            float32 weights do. What each token contributes through all layers.
        flow: float64 [layers + 1, targets, tokens]: the share that stands at each token after going down so many
            layers, from the target itself (``flow[0]``) to the input (``flow[-1]``, which is ``values``).
        layers: the layers, from the last down, that the steps of ``flow`` went through.
        rows: the targets as half-open ranges of rows; a range of several is their mean.
    """

    values: np.ndarray
    flow: np.ndarray
    layers: list[int]
    rows: list[tuple[int, int]]


def rollout(
    store: Store,
    run_id: int,
    row: int,
    *,
    residual: float = 0.5,
    progress: Callable[[float], None] = lambda done: None,
) -> Rollout:
    """The rollout of one position: O(layers x heads x n^2) time, O(layers x n) memory.

    Args:
        residual: the share of each layer that passes by its attention, from 0 to 1.

    Raises ViewError for a row that is not there, and for runs whose layers are not all kept or no self-attention.
    """
    size = _size(store, run_id)
    if not 0 <= row < size:
        raise ViewError(f"row must be in 0..{size - 1}; got {row}")
    return _rollout(store, run_id, [(row, row + 1)], residual, progress)


def pooled_rollout(
    store: Store,
    run_id: int,
    height: int = 64,
    *,
    residual: float = 0.5,
    progress: Callable[[float], None] = lambda done: None,
) -> Rollout:
    """The rollout of all positions, each row the mean of its neighbours, in O(height x n) memory."""
    if not 1 <= height <= MOST_GROUPS:
        raise ViewError(f"height must be in 1..{MOST_GROUPS} rows; got {height}")
    return _rollout(store, run_id, row_groups(_size(store, run_id), height), residual, progress)


def row_groups(size: int, height: int) -> list[tuple[int, int]]:
    """The half-open ranges that ``size`` rows are pooled to."""
    edges = np.arange(min(height, size) + 1) * size // min(height, size)
    return list(pairwise(edges.tolist()))


def self_attention(store: Store, run_id: int) -> tuple[RunRow, list[TraceRow]]:
    """The run and its layers, all of them between the positions of one sequence; ViewError where they are not."""
    run, traces = recorded(store, run_id)
    layers = [trace.layer for trace in traces]
    if layers != list(range(len(layers))):
        raise ViewError(f"a rollout needs every layer from 0; run {run_id} keeps {layers}")
    shapes = {(trace.num_queries, trace.num_keys) for trace in traces}
    crossing = any(attention_role(run, trace) == "cross" for trace in traces)
    if crossing or len(shapes) > 1 or any(queries != keys for queries, keys in shapes):
        found = "attention between two sequences" if crossing else sorted(shapes)
        raise ViewError(f"a rollout needs self-attention over one sequence; run {run_id} has {found}")
    return run, traces


def _size(store: Store, run_id: int) -> int:
    """How many tokens the run's maps have; ViewError where a rollout has no meaning."""
    return self_attention(store, run_id)[1][0].num_queries


def _rollout(
    store: Store,
    run_id: int,
    rows: list[tuple[int, int]],
    residual: float,
    progress: Callable[[float], None],
) -> Rollout:
    if not 0 <= residual <= 1:
        raise ViewError(f"residual must be from 0 to 1; got {residual}")
    run, traces = recorded(store, run_id)
    shares = np.zeros((len(rows), traces[0].num_queries))
    for target, (start, stop) in enumerate(rows):
        shares[target, start:stop] = 1 / (stop - start)
    flow = [shares]
    for done, trace in enumerate(reversed(traces)):
        mixed = np.zeros_like(shares)
        for head in range(trace.heads):
            mixed += _through(head_map(store, run, trace, head), flow[-1])
            progress((done + (head + 1) / trace.heads) / len(traces))
        flow.append(residual * flow[-1] + (1 - residual) * mixed / trace.heads)
    return Rollout(flow[-1], np.stack(flow), [trace.layer for trace in reversed(traces)], rows)


def _through(full_map: TiledMap, shares: np.ndarray) -> np.ndarray:
    """``shares @ A`` for one head, [targets, tokens], over the rows that have a share at all."""
    out = np.zeros_like(shares)
    for rows, cols, weights in _tiles(full_map, np.flatnonzero(shares.any(0))):
        total = np.abs(weights).sum(1, dtype=np.float64)
        # a row that attends to nothing passes on nothing but its residual
        scaled = shares[:, rows] / np.where(total > 0, total, 1)
        # the weights are float32 as they come, and so is their product; what is summed up over tiles is not
        out[:, cols] += scaled.astype(weights.dtype) @ weights
    return out


def _tiles(full_map: TiledMap, rows: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(rows, keys, float32 weights) of the blocks that hold any of the rows, over the keys that these may see."""
    queries, keys = full_map.shape
    step = max(1, TILE_CELLS // keys)
    for block in np.unique(rows // step).tolist():
        start, stop = block * step, min(block * step + step, queries)
        inside = rows[(rows >= start) & (rows < stop)]
        start, stop = int(inside[0]), int(inside[-1]) + 1
        low, high = full_map.mask.key_range(start, stop, num_queries=queries, num_keys=keys)
        if low < high:
            yield slice(start, stop), slice(low, high), full_map.tile(slice(start, stop), slice(low, high))
