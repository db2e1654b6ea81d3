"""Which tiles of a sparse pattern the CPU computes together: equal shapes in one call, cut so that the sum is cheapest.

A pattern's own tiles are compared with larger ones, up to a single tile of everything with a dense mask: where a
pattern is nearly full, or short, skipping pairs costs more than it saves. ``pair_cost`` is the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.patterns import Flags, Indices, Pattern, Tile

# a call of the fused kernel and a copied key with its value, in pairs of one head; measured at D 64
CALL, COPY = 30_000.0, 6.0
# tiles larger than the pattern's own: rows of one, and how many pairs a dense mask may have at most
SIDES, MOST_PAIRS = (256, 2**30), 2**24
# keys of tiles that are alike in nothing else are filled up to a multiple of this, so that they share a call
FILL = 64


class Run(NamedTuple):
    """Numbers ``first + tile * across + place * along``: a view of the tensor, nothing has to be copied."""

    first: int
    across: int
    along: int


class Group(NamedTuple):
    """T tiles of M rows and K keys that one call computes.

    ``rows`` int64 ``[T, M]``, numbered from the first query, and ``keys`` int64 ``[1 | H, T, K]``; ``keep`` bool
    ``[1 | T, 1 | H, M, K]``, None where every pair counts. ``causal``: what is kept is a lower triangle. ``added``
    float32: the same as a term of the scores, where all tiles share it.
    """

    rows: Tensor
    keys: Tensor
    keep: Tensor | None
    added: Tensor | None
    causal: bool
    row_run: Run | None
    key_run: Run | None

    @property
    def cost(self) -> float:
        """Of one head, in pairs of a large tile."""
        tiles, height = self.rows.shape
        width = self.keys.shape[-1]
        pairs = tiles * height * width * pair_cost(height, width)
        # of a triangle the kernel leaves out whole blocks of 512 keys
        computed = min(1.0, 0.5 + 256 / width) if self.causal else 1.0
        return pairs * computed + (0.0 if self.key_run else COPY * tiles * width)


# of each pass: its groups
Tiling = tuple[tuple[Group, ...], ...]


def pair_cost(rows: int, keys: int) -> float:
    """Time of a pair in a tile of the fused CPU kernel over that in a large one; a fit to D 64, float32, AVX2.

    Few rows use a key's column too seldom, few keys do not fill the vectors: 8 x 8 would cost 12 times as much.
    """
    return 1 + 20 / rows + (70 if keys <= FILL else 16) / keys


def tiling_cost(tiling: Tiling, heads: int) -> float:
    """Cost of all passes for one head of ``heads``, in pairs of a large tile."""
    groups = [group for groups in tiling for group in groups]
    joined = 0 if len(tiling) == 1 else 8.0 * sum(group.rows.numel() for group in groups)
    return sum(group.cost + CALL / heads for group in groups) + joined


def describe(tiling: Tiling) -> str:
    """A few words for the record of a run."""
    shapes = [group.rows.shape for groups in tiling for group in groups]
    if len(shapes) == 1 and shapes[0][0] == 1:
        return "one tile with a dense mask, which costs less here than skipping pairs"
    return f"{sum(count for count, _ in shapes)} tiles of up to {max((rows for _, rows in shapes), default=0)} queries"


@lru_cache(maxsize=16)
def choose_tiling(
    pattern: Pattern,
    start: int,
    stop: int,
    num_keys: int,
    heads: int,
    left: int | None = None,
    right: int | None = None,
) -> Tiling:
    """The cheapest of the pattern's own tiles and larger ones, which are tried where the own hold much of all pairs.

    Args:
        start: position of the first query, ``stop`` one past the last.
        left: farthest key before a query that counts, None for all; ``right`` after it.
    """
    passes = pattern.passes(start, stop, num_keys, heads)
    band = (left, right)
    with torch.inference_mode(False):
        best = tuple(_grouped([_cut(tile, start, band) for tile in tiles]) for tiles in passes)
        lists = max((len(tile.keys) for tiles in passes for tile in tiles), default=1)
        every = (stop - start) * num_keys
        if tiling_cost(best, heads) < every / 3 or every * lists > MOST_PAIRS:
            return best
        for side in SIDES:
            tiles = _larger(pattern, start, stop, num_keys, lists, side)
            other = (_grouped([_cut(tile, start, band) for tile in tiles]),)
            best = min(best, other, key=lambda tiling: tiling_cost(tiling, heads))
    return best


def _larger(pattern: Pattern, start: int, stop: int, num_keys: int, lists: int, side: int) -> Iterator[Tile]:
    """Tiles of ``side`` queries over all keys; ``_cut`` takes out those that nobody sees."""
    columns = np.arange(num_keys)
    for low in range(start, stop, side):
        rows = np.arange(low, min(low + side, stop))
        keep = [pattern.allowed(rows, columns, num_keys=num_keys, head=head) for head in range(lists)]
        yield Tile(rows, columns[None], np.stack(keep))


def _cut(tile: Tile, start: int, band: tuple[int | None, int | None]) -> Tile:
    """The tile inside the band without rows and keys that have no pair, rows numbered from ``start``."""
    rows, keys, keep = tile
    distance = keys[:, None] - rows[:, None]
    if band[0] is not None:
        keep = keep & (distance >= -band[0])
    if band[1] is not None:
        keep = keep & (distance <= band[1])
    if keep.all():
        return Tile(rows - start, keys, keep)
    live, seen = keep.any(axis=(0, 2)), keep.any(axis=(0, 1))
    return Tile(rows[live] - start, keys[:, seen], keep[:, live][:, :, seen])


def _grouped(tiles: list[Tile]) -> tuple[Group, ...]:
    """Tiles of one shape together; widths that only one or two have are filled up to a common one."""
    alike: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        if tile.keep.size:
            alike.setdefault(tile.keep.shape[1:], []).append(tile)
    common: dict[tuple[int, int], list[Tile]] = {}
    for (height, width), members in alike.items():
        wide = width if len(members) > 2 else -(-width // FILL) * FILL
        common.setdefault((height, wide), []).extend(members)
    return tuple(_group(members) for members in common.values())


def _group(tiles: list[Tile]) -> Group:
    width = max(tile.keys.shape[1] for tile in tiles)
    tiles = [_filled(tile, width) for tile in tiles]
    lists = max(len(tile.keys) for tile in tiles)
    rows = np.stack([tile.queries for tile in tiles])
    keys = np.stack([np.broadcast_to(tile.keys, (lists, width)) for tile in tiles], axis=1)
    keep = _shared([tile.keep for tile in tiles])
    causal = bool(keep.shape[2] == keep.shape[3] and (keep == np.tri(width, dtype=bool)).all())
    kept = None if keep.all() else torch.from_numpy(np.ascontiguousarray(keep))
    shared = kept is not None and len(kept) == 1 and bool(kept.any(-1).all())
    return Group(
        torch.from_numpy(rows),
        torch.from_numpy(keys),
        kept,
        torch.zeros(kept.shape).masked_fill_(~kept, -torch.inf) if kept is not None and shared else None,
        causal,
        _run(rows),
        _run(keys[0]) if lists == 1 else None,
    )


def _filled(tile: Tile, width: int) -> Tile:
    more = ((0, 0), (0, width - tile.keys.shape[1]))
    return Tile(tile.queries, np.pad(tile.keys, more), np.pad(tile.keep, ((0, 0), *more)))


def _shared(keeps: list[Flags]) -> Flags:
    """What tiles keep ``[1 | T, 1 | H, M, K]``, once where they agree."""
    lists = max(len(keep) for keep in keeps)
    keeps = [keep[:1] if (keep == keep[:1]).all() else keep for keep in keeps]
    if all(np.array_equal(keep, keeps[0]) for keep in keeps):
        return keeps[0][None]
    lists = max(len(keep) for keep in keeps)
    return np.stack([np.broadcast_to(keep, (lists, *keep.shape[1:])) for keep in keeps])


def _run(numbers: Indices) -> Run | None:
    """The rule that makes ``[T, P]`` numbers, if there is one."""
    first = int(numbers[0, 0])
    across = int(numbers[1, 0]) - first if len(numbers) > 1 else 0
    along = int(numbers[0, 1]) - first if numbers.shape[1] > 1 else 1
    tile, place = np.ogrid[: numbers.shape[0], : numbers.shape[1]]
    made = first + tile * across + place * along
    return Run(first, across, along) if along >= 0 and across >= 0 and (made == numbers).all() else None
