"""Map statistics and pooled maps block by block: O(n) memory, and only keys that the mask allows are touched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.map_pooling.reference import cell_areas
from attnlab_kernels.operations.map_pooling.results import ROWS, MapStatistics, PooledMap
from attnlab_kernels.operations.softmax import lower

# scores held at once, all heads together
BLOCK_CELLS = 1 << 20


class _Block(NamedTuple):
    """Weights and their logarithms ``[b, Hq, rows, keys]`` of a part of the maps; both 0 where forbidden."""

    batch: slice
    rows: slice
    keys: slice
    first_key: int
    weights: Tensor
    logs: Tensor


def statistics(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask, scale: float, bias: Tensor | None = None, sinks: int = 1
) -> MapStatistics:
    """``map_statistics``, streamed."""
    wide = torch.promote_types(q.dtype, torch.float32)
    num_queries, num_keys = q.shape[2], k.shape[2]
    rows = {name: q.new_zeros(q.shape[:3], dtype=wide) for name in ROWS}
    column_sum, column_max = (q.new_zeros(*q.shape[:2], num_keys, dtype=wide) for _ in range(2))
    for batch, part, keys, first, weights, logs in _blocks(q, k, lse, mask, scale, bias, multiple=1):
        columns = torch.arange(keys.start, keys.stop, device=q.device)
        positions = torch.arange(part.start, part.stop, device=q.device)[:, None] + num_keys - num_queries
        found = {
            "row_sum": weights.sum(-1),
            "entropy": -torch.einsum("bhnm,bhnm->bhn", weights, logs),
            "row_max": weights.amax(-1),
            "square_sum": torch.einsum("bhnm,bhnm->bhn", weights, weights),
            "distance": torch.einsum("bhnm,nm->bhn", weights, (positions - columns).abs().to(wide)),
            "sink_mass": weights[..., max(0, first - keys.start) : max(0, first + sinks - keys.start)].sum(
                -1
            ),
            "previous": torch.einsum("bhnm,nm->bhn", weights, (columns == positions - 1).to(wide)),
        }
        for name, value in found.items():
            rows[name][batch, :, part] = value
        column_sum[batch, :, keys] += weights.sum(-2)
        target = column_max[batch, :, keys]
        torch.maximum(target, weights.amax(-2), out=target)
    return MapStatistics(**rows, column_sum=column_sum, column_max=column_max)


def pool(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    cell: tuple[int, int],
) -> PooledMap:
    """``pooled_map``, streamed."""
    wide = torch.promote_types(q.dtype, torch.float32)
    height, width = cell
    shape = (*q.shape[:2], -(-q.shape[2] // height), -(-k.shape[2] // width))
    maximum, total = q.new_zeros(shape, dtype=wide), q.new_zeros(shape, dtype=wide)
    for batch, part, keys, _, weights, _ in _blocks(q, k, lse, mask, scale, bias, multiple=height):
        (above, top, bottom, below), (left, first, last, right) = _cells(part, height), _cells(keys, width)
        whole = functional.pad(weights, (left, right, above, below)).unflatten(3, (-1, width))
        place = (batch, slice(None), slice(top, bottom), slice(first, last))
        total[place] += whole.sum(4).unflatten(2, (-1, height)).sum(3)
        target = maximum[place]
        torch.maximum(target, whole.amax(4).unflatten(2, (-1, height)).amax(3), out=target)
    return PooledMap(maximum, total / cell_areas(q.shape[2], k.shape[2], cell).to(total))


def _cells(part: slice, side: int) -> tuple[int, int, int, int]:
    """Pairs missing before the part, its first cell, one past its last, pairs missing behind it."""
    first, last = part.start // side, -(-part.stop // side)
    return part.start - first * side, first, last, last * side - part.stop


def _blocks(
    q: Tensor, k: Tensor, lse: Tensor, mask: Mask, scale: float, bias: Tensor | None, *, multiple: int
) -> Iterator[_Block]:
    """Row blocks with the keys that some row may see, as whole cells of ``multiple`` rows where they fit."""
    size = {"num_queries": q.shape[2], "num_keys": k.shape[2]}
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads = q.shape[1], k.shape[1]
    for batch, first, _ in lower.key_groups(mask, k.shape[2], q.shape[0]):
        lead = batch.start if mask.band().ranges is not None else 0
        step = _rows_of_a_block(mask, q, k, batch.stop - batch.start, lead, multiple)
        for start in range(0, q.shape[2], step):
            rows = slice(start, min(start + step, q.shape[2]))
            keys = slice(*mask.key_range(rows.start, rows.stop, batch=lead, **size))
            if keys.start == keys.stop:
                continue
            query = q[batch, :, rows].to(wide).unflatten(1, (kv_heads, -1)).flatten(2, 3)
            logs = (query @ k[batch, :, keys].to(wide).transpose(-1, -2)).mul_(scale)
            logs = logs.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
            if bias is not None:
                logs += lower.bias_tile(bias.to(wide), batch, rows, keys)
            norm = lse[batch, :, rows, None].to(wide)
            dead = torch.isneginf(norm)
            logs -= norm.masked_fill(dead, 0)
            allowed = lower.dense(mask, rows, keys, device=q.device, batch=lead, **size)
            hidden = ~allowed | dead if not allowed.all() or bool(dead.any()) else None
            if hidden is not None:
                logs.masked_fill_(hidden, 0)
            weights = logs.exp()
            if hidden is not None:
                weights.masked_fill_(hidden, 0)
            if bias is not None:
                logs.masked_fill_(weights == 0, 0)
            yield _Block(batch, rows, keys, first, weights, logs)


def _rows_of_a_block(mask: Mask, q: Tensor, k: Tensor, batch: int, lead: int, multiple: int) -> int:
    # a block of s rows touches about visited + s keys, never more than all
    visited = mask.count(q.shape[2], k.shape[2], lead) // max(1, q.shape[2])
    cells = max(1, BLOCK_CELLS // (batch * q.shape[1]))
    step = int((math.sqrt(visited**2 + 4 * cells) - visited) / 2)
    step = max(1, step, cells // max(1, k.shape[2]))
    return step - step % multiple if step > multiple else step
