"""The difference of two maps over different texts: cells of which one map has no token are NaN and count nowhere.

What a wide region shows comes from blocks of all cells of A, worked out once, which stay in memory: the value
furthest from 0, and sum and number of the cells that both maps have. All three fold exactly into larger pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from attnlab.views.aligned_map import AlignedMap
from attnlab.views.jobs import Jobs, Work
from attnlab.views.overview import Pixels, Span
from attnlab.views.trace_map import AttentionMap
from attnlab.views.viewport import Viewport, viewport_of_blocks
from attnlab.views.wide_difference import Side, pair_key
from attnlab_kernels.effective_map import fold_pixels
from attnlab_storage.database import Store

MOST_BLOCKS = 2048
"""along a side"""
STRIP_CELLS = 1 << 20


class Blocks(NamedTuple):
    """Every cell of A - B by blocks; edges in cells of A, the rest [block rows, block columns]."""

    row_edges: np.ndarray
    col_edges: np.ndarray
    furthest: np.ndarray
    """float32, NaN where no cell is known"""
    sums: np.ndarray
    """float32, of the known cells"""
    counts: np.ndarray
    """int32, known cells"""


BLOCKS: Jobs[Blocks] = Jobs(keep=2)
"""at most 50 MB each"""


def aligned_progress(store: Store, a: Side, b: Side, moved: AlignedMap) -> float:
    """1.0 where `aligned_viewport` can answer at once; else how far its blocks are, which this call starts."""
    return BLOCKS.ask(pair_key(store, a, b), _work(a.full_map, moved)).done


def aligned_viewport(
    store: Store,
    a: Side,
    b: Side,
    moved: AlignedMap,
    rows: Span,
    cols: Span,
    height: int,
    width: int,
    reduce: str,
) -> Viewport:
    """A - B over a region grown to whole blocks, waited for; ``moved`` is B's map at the tokens of A."""
    blocks = BLOCKS.wait(pair_key(store, a, b), _work(a.full_map, moved))
    pixels = block_pixels(blocks, rows, cols, height, width, reduce)
    return viewport_of_blocks(pixels, a.full_map.shape, reduce)


def build_blocks(a: AttentionMap, moved: AlignedMap, progress: Callable[[float], None]) -> Blocks:
    """The blocks of a whole map, strip by strip."""
    row_edges, col_edges = (pixel_edges(0, size, MOST_BLOCKS) for size in a.shape)
    shape = len(row_edges) - 1, len(col_edges) - 1
    made = Blocks(
        row_edges,
        col_edges,
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.int32),
    )
    strip = max(1, STRIP_CELLS // (a.shape[1] * int(np.diff(row_edges).max())))
    for top in range(0, shape[0], strip):
        edges = row_edges[top : top + strip + 1]
        part = slice(int(edges[0]), int(edges[-1])), slice(0, a.shape[1])
        gap, place = a.tile(*part) - moved.tile(*part), slice(top, top + len(edges) - 1)
        made.furthest[place] = furthest(gap, edges - edges[0], col_edges)
        made.sums[place], made.counts[place] = known_sums(gap, edges - edges[0], col_edges)
        progress(edges[-1] / a.shape[0])
    return made


def block_pixels(blocks: Blocks, rows: Span, cols: Span, height: int, width: int, reduce: str) -> Pixels:
    """At most height x width pixels of whole blocks over a region, NaN where no cell is known."""
    row_blocks = _block_edges(blocks.row_edges, rows, height)
    col_blocks = _block_edges(blocks.col_edges, cols, width)
    part = slice(row_blocks[0], row_blocks[-1]), slice(col_blocks[0], col_blocks[-1])
    edges = row_blocks - row_blocks[0], col_blocks - col_blocks[0]
    if reduce == "mean":
        sums, counts = (
            fold_pixels(np.add, one[part].astype(np.float64), *edges) for one in (blocks.sums, blocks.counts)
        )
        values = quotient(sums, counts)
    else:
        values = furthest(blocks.furthest[part], *edges)
    return Pixels(values.astype(np.float32), blocks.row_edges[row_blocks], blocks.col_edges[col_blocks])


def furthest(gap: np.ndarray, row_edges: np.ndarray, col_edges: np.ndarray) -> np.ndarray:
    """The value furthest from 0 under each pixel; NaN counts nowhere, and stands where there is nothing else."""
    highest, lowest = (fold_pixels(one, gap, row_edges, col_edges) for one in (np.fmax, np.fmin))
    return np.where(highest >= -lowest, highest, lowest)


def known_mean(gap: np.ndarray, row_edges: np.ndarray, col_edges: np.ndarray) -> np.ndarray:
    """The mean of what is no NaN under each pixel."""
    return quotient(*known_sums(gap, row_edges, col_edges))


def known_sums(
    gap: np.ndarray, row_edges: np.ndarray, col_edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of what is no NaN under each pixel, float64."""
    known = ~np.isnan(gap)
    sums = fold_pixels(np.add, np.where(known, gap, 0.0).astype(np.float64), row_edges, col_edges)
    return sums, fold_pixels(np.add, known.astype(np.float64), row_edges, col_edges)


def quotient(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``sums / counts``, NaN where nothing was counted."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def pixel_edges(start: int, stop: int, pixels: int) -> np.ndarray:
    """First cell of each pixel of a side, and one past the last."""
    count = min(pixels, stop - start)
    return start + np.arange(count + 1) * (stop - start) // count


def _block_edges(edges: np.ndarray, span: Span, pixels: int) -> np.ndarray:
    """As `pixel_edges`, in blocks: all those that the span touches."""
    first = int(np.searchsorted(edges, span[0], "right")) - 1
    return pixel_edges(first, int(np.searchsorted(edges, span[1], "left")), pixels)


def _work(a: AttentionMap, moved: AlignedMap) -> Work[Blocks]:
    return lambda progress: build_blocks(a, moved, progress)
