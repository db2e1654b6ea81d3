"""Pooling of maps that have no shortcut: every cell of a region, block by block. No torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.effective_map import BLOCK_CELLS, pixel_edges


class Tiled(Protocol):
    """What can be pooled."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def tile(self, rows: slice, cols: slice) -> NDArray[np.float32]: ...


def pool_tiles(
    weights: Tiled, rows: slice, cols: slice, height: int, width: int, reduce: str
) -> NDArray[np.float32]:
    """As ``SoftmaxMap.pool``, with the signed weight of largest size as the maximum."""
    row_edges, col_edges = pixel_edges(rows, cols, weights.shape, height, width, reduce)
    out = np.zeros((len(row_edges) - 1, len(col_edges) - 1), np.float32)
    span = slice(int(col_edges[0]), int(col_edges[-1]))
    if span.start == span.stop:
        return out
    bins = col_edges[:-1] - span.start
    for pixel, (top, bottom) in enumerate(pairwise(row_edges.tolist())):
        step = max(1, BLOCK_CELLS // (span.stop - span.start))
        for start in range(top, bottom, step):
            tile = weights.tile(slice(start, min(start + step, bottom)), span)
            if reduce == "mean":
                out[pixel] += np.add.reduceat(tile.sum(axis=0), bins) / (bottom - top)
                continue
            extreme = largest(np.maximum(tile.max(axis=0), 0), np.minimum(tile.min(axis=0), 0), bins)
            out[pixel] = np.where(np.abs(extreme) > np.abs(out[pixel]), extreme, out[pixel])
    return out / np.diff(col_edges).astype(np.float32) if reduce == "mean" else out


def largest(highest: NDArray[Any], lowest: NDArray[Any], bins: NDArray[np.int64]) -> NDArray[Any]:
    """Of each bin the number of largest size, with its sign."""
    top, bottom = np.maximum.reduceat(highest, bins), np.minimum.reduceat(lowest, bins)
    return np.where(top >= -bottom, top, bottom)
