"""The difference of two maps of more cells than are computed when somebody looks: from blocks, each exact.

The mean of A - B under a pixel is the difference of the means, so it comes from the pyramids of both maps. Its largest
size does not follow from theirs: one pass over all cells makes a pyramid of the pair, which stays in memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from attnlab.views.jobs import Jobs, Work
from attnlab.views.overview import Layout, Span, build_pyramid, is_wide, pyramid_pixels
from attnlab.views.pyramids import Pyramid
from attnlab.views.trace_map import AttentionMap
from attnlab.views.viewport import PYRAMIDS, Viewport, has_pyramid, viewport_of_blocks
from attnlab_kernels.masks import Mask
from attnlab_kernels.tile_pooling import pool_tiles
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow

LARGEST: Jobs[Pyramid] = Jobs(keep=4)
"""pyramids of pairs: at most 45 MB each"""


class Side(NamedTuple):
    """One of the two maps, and where it is stored."""

    run: RunRow
    layer: int
    head: int
    full_map: AttentionMap


@dataclass(frozen=True)
class EitherMask:
    """Key ranges that hold what one of two masks allows; what lies between them is held too."""

    first: Mask
    second: Mask

    def key_ranges(
        self, edges: np.ndarray, *, num_queries: int, num_keys: int
    ) -> tuple[np.ndarray, np.ndarray]:
        size = {"num_queries": num_queries, "num_keys": num_keys}
        (low, high), (other_low, other_high) = (
            mask.key_ranges(edges, **size) for mask in (self.first, self.second)
        )
        starts = [np.where(lo < hi, lo, num_keys) for lo, hi in ((low, high), (other_low, other_high))]
        last = np.maximum(high, other_high)  # 0 where neither has any
        return np.minimum(np.minimum(*starts), last), last


@dataclass(frozen=True, eq=False)
class PairMap:
    """A - B of two maps of one shape, a cell that only one of them allows counting as 0 in the other."""

    a: AttentionMap
    b: AttentionMap

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape

    @property
    def mask(self) -> Mask | EitherMask:
        return self.a.mask if self.a.mask == self.b.mask else EitherMask(self.a.mask, self.b.mask)

    def tile(self, rows: slice, cols: slice) -> np.ndarray:
        """float32 [rows, cols]."""
        return self.a.tile(rows, cols) - self.b.tile(rows, cols)

    def pool(self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max") -> np.ndarray:
        """As `AttentionMap.pool`: "max" is the difference of largest size with its sign. Computes every cell."""
        return pool_tiles(self, rows, cols, height, width, reduce)


def is_wide_pair(a: AttentionMap, b: AttentionMap, rows: Span, cols: Span, reduce: str) -> bool:
    """Whether a region of their difference comes from blocks.

    A mean of maps without a pyramid, such as signed ones, does not.
    """
    if reduce == "mean" and not (has_pyramid(a) and has_pyramid(b)):
        return False
    return is_wide(a.shape, PairMap(a, b).mask, rows, cols)


def pair_progress(store: Store, a: Side, b: Side, reduce: str) -> float:
    """1.0 where `pair_viewport` can answer at once; else how far its pyramids are, which this call starts."""
    if reduce == "mean":
        return sum(PYRAMIDS.progress(store, *side) for side in (a, b)) / 2
    return LARGEST.ask(pair_key(store, a, b), _largest(a, b)).done


def pair_viewport(
    store: Store, a: Side, b: Side, rows: Span, cols: Span, height: int, width: int, reduce: str
) -> Viewport:
    """A - B over a region grown to whole blocks, waited for where its pyramids have to be built."""
    layouts = [Layout(side.full_map.shape, side.full_map.mask) for side in (a, b)]
    if reduce == "mean":
        # the same blocks of both, whatever the finest is that each of them keeps
        finest = max(layout.levels[0].block for layout in layouts)
        means = [
            pyramid_pixels(layout, PYRAMIDS.get(store, *side), rows, cols, height, width, "mean", finest)
            for layout, side in zip(layouts, (a, b), strict=True)
        ]
        pixels = means[0]._replace(values=means[0].values - means[1].values)
    else:
        pair = PairMap(a.full_map, b.full_map)
        flat = LARGEST.wait(pair_key(store, a, b), _largest(a, b))
        pixels = pyramid_pixels(Layout(pair.shape, pair.mask), flat, rows, cols, height, width, "max")
    return viewport_of_blocks(pixels, a.full_map.shape, reduce)


def _largest(a: Side, b: Side) -> Work[Pyramid]:
    pair = PairMap(a.full_map, b.full_map)
    return lambda progress: build_pyramid(pair, progress, reductions=("max",))


def pair_key(store: Store, a: Side, b: Side) -> Hashable:
    """What a result of two maps is kept under."""
    # as for tensors: a retry moves the attempt, and a purged id may come back with another creation time
    sides = [(one.run.id, one.run.created_at, one.run.attempt, one.layer, one.head) for one in (a, b)]
    return (store.url, *sides)
