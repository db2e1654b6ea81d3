"""Neighborhood attention tile by tile: a block of queries meets the block of keys that its windows span.

Hassani et al., https://arxiv.org/abs/2204.07143. Keys are slices of the image, so nothing is unfolded or gathered,
and the scores in memory are those of one tile. A dilated neighbourhood is a plain one in each residue class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.neighborhood import Neighborhood, NeighborhoodError

# queries on one side of a tile, by number of axes: the keys of a tile are (side + k - 1) on each axis
SIDES = {1: 32, 2: 8, 3: 4}


class Result(NamedTuple):
    """Output ``[B, H, *space, Dv]``, natural log-sum-exp ``[B, H, *space]`` and, if asked, weights by window slot."""

    output: Tensor
    lse: Tensor
    windows: Tensor | None
    """``[B, H, *space, k1 * k2 * ..]``, before dropout; 0 in a slot that a causal window lacks or that is hidden"""


@dataclass(frozen=True, eq=False)
class Tile:
    """Slices of the grid for queries and keys, and per axis which key ``[queries, keys]`` a query may see."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    first: tuple[np.ndarray, ...]
    """first key of each query, counted in the tile's keys"""
    count: tuple[np.ndarray, ...]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighborhood: Neighborhood,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
    dropout: float = 0.0,
    need_windows: bool = False,
) -> Result:
    """Attend from every pixel to its window; scores and softmax in float32 or wider, with autograd.

    Args:
        q: ``[B, H, *space, D]``; k the same; v ``[B, H, *space, Dv]``.
        scale: default ``D ** -0.5``.
        bias: relative position table ``[H, 2 k1 - 1, 2 k2 - 1, ..]``.
        visible: bool ``[B, *space]``, False for pixels that nobody may attend to.
        dropout: share of probabilities dropped after the softmax.

    Raises:
        NeighborhoodError: shapes that do not fit.
    """
    check(q, k, v, neighborhood, bias, visible)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    numbers = torch.arange(neighborhood.size, device=q.device).view(neighborhood.space)
    parts: list[tuple[Tensor, ...]] = []
    for tile in tiles(neighborhood):
        queries, keys = (slice(None), slice(None), *tile.queries), (slice(None), slice(None), *tile.keys)
        query, key, value = (
            tensor[cut].flatten(2, -2).to(wide) for tensor, cut in ((q, queries), (k, keys), (v, keys))
        )
        scores = query @ key.transpose(-1, -2) * factor
        if bias is not None:
            scores = scores + bias_tile(bias.to(wide), tile, neighborhood)
        keep = keep_tile(tile, q.device)
        if visible is not None:
            keep = keep & visible[(slice(None), *tile.keys)].flatten(1)[:, None, None]
        scores = scores.masked_fill(~keep, -torch.inf)
        lse = torch.logsumexp(scores.detach(), dim=-1)
        dead = torch.isneginf(lse)[..., None]
        weights = torch.softmax(scores.masked_fill(dead, 0), dim=-1).masked_fill(dead, 0)
        windows = (_by_slot(weights, tile, neighborhood),) if need_windows else ()
        weights = functional.dropout(weights, dropout) if dropout else weights
        if visible is not None:
            value = value.masked_fill(~visible[(slice(None), *tile.keys)].flatten(1)[:, None, :, None], 0)
        parts.append((numbers[tile.queries].flatten(), lse, (weights @ value).to(q.dtype), *windows))
    order, lse, output, *windows = (
        torch.cat(part, dim=min(2, part[0].dim() - 1)) for part in zip(*parts, strict=True)
    )
    back = torch.argsort(order)
    return Result(
        *(
            tensor.index_select(2, back).unflatten(2, neighborhood.space)
            for tensor in (output, lse, *windows[:1])
        ),
        *(() if need_windows else (None,)),
    )


def visited_pairs(neighborhood: Neighborhood) -> int:
    """(query, key) pairs that ``run`` computes a score for, masked ones included."""
    return sum(
        int(np.prod([len(first) for first in tile.first])) * _key_count(tile) for tile in tiles(neighborhood)
    )


def _key_count(tile: Tile) -> int:
    return int(np.prod([len(range(part.start, part.stop, part.step)) for part in tile.keys]))


@lru_cache(maxsize=8)
def tiles(neighborhood: Neighborhood) -> tuple[Tile, ...]:
    side = SIDES[len(neighborhood.space)]
    axes = [list(_axis_tiles(neighborhood, axis, side)) for axis in range(len(neighborhood.space))]
    return tuple(Tile(*zip(*parts, strict=True)) for parts in product(*axes))


def _axis_tiles(
    neighborhood: Neighborhood, axis: int, side: int
) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    length, dilation = neighborhood.space[axis], neighborhood.dilation[axis]
    first, count = neighborhood.limits[axis]
    for residue in range(dilation):
        for start in range(residue, length, side * dilation):
            queries = slice(start, min(start + side * dilation, length), dilation)
            low, many = first[queries], count[queries]
            lowest, highest = int(low.min()), int((low + (many - 1) * dilation).max())
            yield queries, slice(lowest, highest + 1, dilation), (low - lowest) // dilation, many


def keep_tile(tile: Tile, device: torch.device) -> Tensor:
    """Bool ``[queries, keys]`` of a tile."""
    sides = []
    for part, first, count in zip(tile.keys, tile.first, tile.count, strict=True):
        keys = np.arange(len(range(part.start, part.stop, part.step)))
        sides.append((keys >= first[:, None]) & (keys < (first + count)[:, None]))
    joined = reduce(lambda a, b: _outer(a, b), sides)
    return torch.from_numpy(joined).to(device)


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    both = left[:, None, :, None] & right[None, :, None, :]
    return both.reshape(left.shape[0] * right.shape[0], -1)


def _grid(sides: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """For each axis the entry ``[queries, keys]`` of the joined axes, from ``[queries, keys]`` of each axis."""
    rows = np.meshgrid(*(np.arange(side.shape[0]) for side in sides), indexing="ij")
    cols = np.meshgrid(*(np.arange(side.shape[1]) for side in sides), indexing="ij")
    return tuple(
        side[row.reshape(-1, 1), col.reshape(1, -1)] for side, row, col in zip(sides, rows, cols, strict=True)
    )


def bias_tile(table: Tensor, tile: Tile, neighborhood: Neighborhood) -> Tensor:
    """Relative position bias ``[H, queries, keys]``; pairs outside a window get a number that is masked."""
    sides = []
    axes = zip(tile.queries, tile.keys, neighborhood.dilation, neighborhood.kernel_size, strict=True)
    for queries, keys, dilation, kernel in axes:
        query, key = (np.arange(part.start, part.stop, part.step) for part in (queries, keys))
        sides.append(np.clip((key[None] - query[:, None]) // dilation + kernel - 1, 0, 2 * kernel - 2))
    indices = tuple(torch.from_numpy(index).to(table.device) for index in _grid(sides))
    return table[(slice(None), *indices)]


def _by_slot(weights: Tensor, tile: Tile, neighborhood: Neighborhood) -> Tensor:
    """Weights ``[B, H, queries, keys]`` of a tile in window order ``[B, H, queries, slots]``."""
    sides, exists, widths = [], [], []
    axes = zip(tile.keys, tile.first, tile.count, neighborhood.kernel_size, strict=True)
    for part, first, count, kernel in axes:
        width = len(range(part.start, part.stop, part.step))
        slot = np.arange(kernel)
        sides.append(np.minimum(first[:, None] + slot, width - 1))
        exists.append(slot < count[:, None])
        widths.append(width)
    index = torch.from_numpy(np.ravel_multi_index(_grid(sides), widths)).to(weights.device)
    present = torch.from_numpy(reduce(_outer, exists)).to(weights.device)
    return weights.gather(-1, index.expand(*weights.shape[:2], *index.shape)).masked_fill(~present, 0)


def check(
    q: Tensor, k: Tensor, v: Tensor, neighborhood: Neighborhood, bias: Tensor | None, visible: Tensor | None
) -> None:
    space = neighborhood.space
    if tuple(q.shape[2:-1]) != space or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise NeighborhoodError(
            f"q, k and v must be [B, H, {', '.join(map(str, space))}, D]; got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    table = (q.shape[1], *(2 * kernel - 1 for kernel in neighborhood.kernel_size))
    if bias is not None and tuple(bias.shape) != table:
        raise NeighborhoodError(f"bias must be a table {list(table)}; got {list(bias.shape)}")
    if visible is not None and (visible.dtype != torch.bool or tuple(visible.shape) != (q.shape[0], *space)):
        raise NeighborhoodError(f"visible must be bool {[q.shape[0], *space]}; got {list(visible.shape)}")
