"""A map wider than the screen as a pyramid: exact maximum and sum of blocks of 16 x 16 cells, 32 x 32, and so on.

A level keeps, for each row of blocks, only the blocks between the first and the last key that the mask allows there;
all levels of a head lie one after another in one flat array, so that a pyramid is one small tensor in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from attnlab_kernels.effective_map import SoftmaxMap

EXACT_CELLS = 4 << 20
"""cells of a region that are computed when somebody looks: a twentieth of a second on one core"""
SMALLEST_BLOCK = 16
MOST_BLOCKS = 1 << 23
"""blocks of the finest level, at most; where there would be more, it is coarser"""
COARSEST_SIDE = 64
STRIP_ROWS = 1024
MOST_UNPACKED = 1 << 22
LAYOUTS_KEPT = 64
REDUCTIONS = ("max", "sum")

Span = tuple[int, int]


class KeyRanges(Protocol):
    """All that a pyramid has to know of a mask."""

    def key_ranges(
        self, edges: np.ndarray, *, num_queries: int, num_keys: int
    ) -> tuple[np.ndarray, np.ndarray]: ...


class PooledRegion(Protocol):
    """A map that can say the maximum and mean under pixels; all kinds of maps can."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def mask(self) -> KeyRanges: ...

    def pool(self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max") -> np.ndarray: ...


class Level(NamedTuple):
    """One level: blocks of ``block x block`` cells; row r has blocks ``first[r]`` to ``last[r]`` at ``offset[r]``."""

    block: int
    first: np.ndarray
    last: np.ndarray
    offset: np.ndarray


class Pixels(NamedTuple):
    """Blocks as pixels: values float32 [height, width] and the edges of the pixels in cells."""

    values: np.ndarray
    row_edges: np.ndarray
    col_edges: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Where the blocks of a map's pyramid lie; it follows from the map's shape and mask alone."""

    shape: tuple[int, int]
    mask: KeyRanges

    @property
    def levels(self) -> tuple[Level, ...]:
        return _levels(self.shape, self.mask, SMALLEST_BLOCK, MOST_BLOCKS, COARSEST_SIDE)

    @property
    def size(self) -> int:
        """Numbers in the flat array of a reduction."""
        level = self.levels[-1]
        return int(level.offset[-1] + level.last[-1] - level.first[-1])


@lru_cache(LAYOUTS_KEPT)
def _levels(
    shape: tuple[int, int], mask: KeyRanges, smallest: int, most: int, coarsest_side: int
) -> tuple[Level, ...]:
    """The levels from the finest to the coarsest; kept, because every look at a map asks for them."""
    block = smallest
    while int(np.diff(_limits(shape, mask, block), axis=0).sum()) > most:
        block *= 2
    made: list[Level] = []
    start = 0
    while True:
        first, last = _limits(shape, mask, block)
        ends = start + np.cumsum(last - first)
        made.append(Level(block, first, last, ends - (last - first)))
        start = int(ends[-1])
        if block * coarsest_side >= max(shape):
            return tuple(made)
        block *= 2


def _limits(shape: tuple[int, int], mask: KeyRanges, block: int) -> tuple[np.ndarray, np.ndarray]:
    """First block and one past the last of each row of blocks."""
    queries, keys = shape
    edges = np.append(np.arange(0, queries, block), queries)
    low, high = mask.key_ranges(edges, num_queries=queries, num_keys=keys)
    return low // block, -(-high // block)


def is_wide(shape: tuple[int, int], mask: KeyRanges, rows: Span, cols: Span) -> bool:
    """Whether a region has more cells that the mask allows than are computed when somebody looks."""
    if (rows[1] - rows[0]) * (cols[1] - cols[0]) <= EXACT_CELLS:
        return False
    edges = np.unique(np.linspace(rows[0], rows[1], 65).astype(int))
    low, high = mask.key_ranges(edges, num_queries=shape[0], num_keys=shape[1])
    seen = np.minimum(high, cols[1]) - np.maximum(low, cols[0])
    return int((np.diff(edges) * np.maximum(seen, 0)).sum()) > EXACT_CELLS


def build_pyramid(
    full_map: PooledRegion,
    progress: Callable[[float], None] = lambda done: None,
    reductions: Sequence[str] = REDUCTIONS,
) -> dict[str, np.ndarray]:
    """The pyramid of a map: float32 [size] for each of ``reductions`` ("max", "sum"), every level exact.

    Args:
        progress: told the share that is done, from 0 to 1, after each strip of rows.
    """
    layout = Layout(full_map.shape, full_map.mask)
    made = {name: np.zeros(layout.size, np.float32) for name in reductions}
    base = layout.levels[0]
    step = max(1, STRIP_ROWS // base.block)
    count = len(base.first)
    for top in range(0, count, step):
        bottom = min(top + step, count)
        _fill_strip(full_map, base, made, top, bottom)
        progress(bottom / count)
    for finer, coarser in zip(layout.levels[:-1], layout.levels[1:], strict=True):
        for name, flat in made.items():
            _coarsen(flat, finer, coarser, name)
    return made


def pyramid_pixels(
    layout: Layout,
    flat: dict[str, np.ndarray],
    rows: Span,
    cols: Span,
    height: int,
    width: int,
    reduce: str,
    finest: int = 0,
) -> Pixels:
    """A region, grown to whole blocks, as at most ``height x width`` pixels, each a rectangle of blocks.

    ``reduce`` is "max" (of a signed map the weight of the greatest size) or "mean"; forbidden cells count as 0.
    No pixel is smaller than a block of ``finest`` cells: two maps of one shape have the same pixels where ``finest`` is
    the larger of their smallest blocks.
    """
    least = max(finest, layout.levels[0].block)
    wanted = [_block_side(least, span, pixels) for span, pixels in ((rows, height), (cols, width))]
    level = _level(layout, min(wanted), rows, cols)
    top, bottom = _grown(rows, level.block, wanted[0])
    left, right = _grown(cols, level.block, wanted[1])
    bottom, right = min(bottom, len(level.first)), min(right, -(-layout.shape[1] // level.block))
    name = "max" if reduce == "max" else "sum"
    cells = _unpacked(flat[name], level, (top, bottom), (left, right))
    row_starts = np.arange(0, bottom - top, wanted[0] // level.block or 1)
    col_starts = np.arange(0, right - left, wanted[1] // level.block or 1)
    values = _folded(cells, row_starts, col_starts, name)
    row_edges = _edges(row_starts, top, bottom, level.block, layout.shape[0])
    col_edges = _edges(col_starts, left, right, level.block, layout.shape[1])
    if reduce == "mean":
        values = values / (np.diff(row_edges)[:, None] * np.diff(col_edges)[None]).astype(np.float32)
    return Pixels(values.astype(np.float32), row_edges, col_edges)


def _fill_strip(
    full_map: PooledRegion, base: Level, made: dict[str, np.ndarray], top: int, bottom: int
) -> None:
    """The finest level's rows of blocks ``top`` to ``bottom``, from the map itself."""
    queries, keys = full_map.shape
    alive = slice(top, bottom)
    if not (base.last[alive] > base.first[alive]).any():
        return
    left, right = int(base.first[alive].min()), int(base.last[alive].max())
    found = _blocks(full_map, base.block, (top, bottom), (left, right), list(made))
    for (name, flat), values in zip(made.items(), found, strict=True):
        if name == "sum":
            heights = np.diff(np.minimum(np.arange(top, bottom + 1) * base.block, queries))
            widths = np.diff(np.minimum(np.arange(left, right + 1) * base.block, keys))
            values = values * (heights[:, None] * widths[None]).astype(np.float32)
        for row in range(top, bottom):
            first, last, offset = int(base.first[row]), int(base.last[row]), int(base.offset[row])
            flat[offset : offset + last - first] = values[row - top, first - left : last - left]


def _blocks(
    full_map: PooledRegion, block: int, rows: Span, cols: Span, names: Sequence[str]
) -> list[np.ndarray]:
    """The maximum ("max") or mean of blocks ``rows x cols``; those that the map's end cuts off by themselves."""
    parts = [
        _whole_and_rest(span, block, size) for span, size in zip((rows, cols), full_map.shape, strict=True)
    ]
    reductions = ["max" if name == "max" else "mean" for name in names]
    bands = []
    for start, stop, height in parts[0]:
        row = [
            _pools(full_map, (slice(start, stop), slice(low, high)), height, width, reductions)
            for low, high, width in parts[1]
        ]
        bands.append([np.concatenate(pieces, axis=1) for pieces in zip(*row, strict=True)])
    return [np.concatenate(pieces, axis=0) for pieces in zip(*bands, strict=True)]


def _pools(
    full_map: PooledRegion, part: tuple[slice, slice], height: int, width: int, reductions: Sequence[str]
) -> list[np.ndarray]:
    if isinstance(full_map, SoftmaxMap):
        return full_map.pools(*part, height, width, reductions)
    return [full_map.pool(*part, height, width, reduce) for reduce in reductions]


def _whole_and_rest(span: Span, block: int, size: int) -> list[tuple[int, int, int]]:
    """(first cell, last cell + 1, blocks) of the whole blocks, and of one that the end cuts off."""
    start, stop = span[0] * block, min(span[1] * block, size)
    whole = (stop - start) // block
    parts = [(start, start + whole * block, whole)] if whole else []
    return [*parts, (start + whole * block, stop, 1)] if start + whole * block < stop else parts


def _folded(cells: np.ndarray, row_starts: np.ndarray, col_starts: np.ndarray, name: str) -> np.ndarray:
    """The sum, or the weight of the greatest size with its sign, of the cells from each start to the next."""

    def fold(with_: np.ufunc) -> np.ndarray:
        return with_.reduceat(with_.reduceat(cells, row_starts, axis=0), col_starts, axis=1)

    if name == "sum":
        return fold(np.add)
    highest = fold(np.maximum)
    if cells.size == 0 or cells.min() >= 0:
        return highest
    lowest = fold(np.minimum)
    return np.where(highest >= -lowest, highest, lowest)


def _coarsen(flat: np.ndarray, finer: Level, coarser: Level, name: str) -> None:
    for row in range(len(coarser.first)):
        first, last = int(coarser.first[row]), int(coarser.last[row])
        if first == last:
            continue
        pair = _unpacked(flat, finer, (2 * row, min(2 * row + 2, len(finer.first))), (2 * first, 2 * last))
        offset = int(coarser.offset[row])
        flat[offset : offset + last - first] = _folded(
            pair, np.array([0]), np.arange(0, 2 * (last - first), 2), name
        )[0]


def _unpacked(flat: np.ndarray, level: Level, rows: Span, cols: Span) -> np.ndarray:
    """Blocks of a region, 0 where none is kept: float32 [rows, cols]."""
    out = np.zeros((rows[1] - rows[0], cols[1] - cols[0]), np.float32)
    for row in range(*rows):
        first, last = max(int(level.first[row]), cols[0]), min(int(level.last[row]), cols[1])
        if first < last:
            start = int(level.offset[row]) + first - int(level.first[row])
            out[row - rows[0], first - cols[0] : last - cols[0]] = flat[start : start + last - first]
    return out


def _block_side(least: int, span: Span, pixels: int) -> int:
    """The smallest block from ``least`` up of which no more than ``pixels`` lie over the span."""
    side = least
    while -(-span[1] // side) - span[0] // side > pixels:
        side *= 2
    return side


def _level(layout: Layout, side: int, rows: Span, cols: Span) -> Level:
    """The level with this block, or the next one that does not unpack too much at once."""
    found = [level for level in layout.levels if level.block >= side] or [layout.levels[-1]]
    area = (rows[1] - rows[0]) * (cols[1] - cols[0])
    return next((level for level in found if area // level.block**2 <= MOST_UNPACKED), found[-1])


def _grown(span: Span, block: int, side: int) -> Span:
    """The span in blocks, grown to whole pixels of ``side`` cells."""
    side = max(side, block)
    return span[0] // side * (side // block), -(-span[1] // side) * (side // block)


def _edges(starts: np.ndarray, first: int, last: int, block: int, size: int) -> np.ndarray[Any, Any]:
    return np.minimum(np.append(starts + first, last) * block, size)
