"""From a mask to what kernels take: full and causal blocks, dense tiles, key slots that do not exist.

Kernels disagree about what causal means when Sq != Sk (top-left or bottom-right). So a causal mask is cut
into rectangles without a mask and *square* triangles, where both readings are the same, and the parts are
merged by their log-sum-exp. Padding becomes slices, so what lies in a padded slot is never read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax.support import Modifiers

Kind = Literal["full", "causal", "masked"]


@dataclass(frozen=True)
class Block:
    """Attend rows of some batch elements to a slice of keys; blocks with equal batch and rows are merged."""

    batch: slice
    rows: slice
    keys: slice
    kind: Kind


def key_groups(mask: Mask, num_keys: int, batch_size: int) -> Iterator[tuple[slice, int, int]]:
    """Runs of batch elements with the same keys and documents: ``(batch, start, stop)``."""
    band = mask.form()
    if band.batch_size == 1:
        yield slice(0, batch_size), *band.key_interval(num_keys)
        return
    elements = [
        (band.key_interval(num_keys, index), band.document_spans(num_keys, index))
        for index in range(batch_size)
    ]
    first = 0
    for index in range(1, batch_size + 1):
        if index == batch_size or elements[index] != elements[first]:
            yield slice(first, index), *elements[first][0]
            first = index


@functools.lru_cache(maxsize=256)
def plan(
    mask: Mask, *, num_queries: int, num_keys: int, batch_size: int, has_bias: bool, merge: bool
) -> tuple[Block, ...]:
    """Blocks that cover the mask exactly; rows that no block covers are dead.

    A window or a bias gives ``masked`` blocks, which need a dense tile. ``merge=False`` keeps each row in one
    block (merging through log-sum-exp would lose gradients), at the price of a dense tile where Sq != Sk.
    Each document has blocks of its own.
    """
    band = mask.form()
    offset = num_keys - num_queries
    blocks: list[Block] = []
    for batch, first, last, start, stop in _parts(mask, num_queries, num_keys, batch_size):
        # positions that reach a key: start - right up to stop + left
        lo = first if band.right is None else max(first, start - band.right - offset)
        hi = last if band.left is None else min(last, stop + band.left - offset)
        if start >= stop or lo >= hi:
            continue
        if band.left is not None or has_bias:
            blocks.append(Block(batch, slice(lo, hi), slice(start, stop), "masked"))
        elif band.right is None:
            blocks.append(Block(batch, slice(lo, hi), slice(start, stop), "full"))
        else:
            blocks += _causal_blocks(batch, lo, hi, start, stop, offset, merge)
    return tuple(blocks)


def _causal_blocks(
    batch: slice, lo: int, hi: int, start: int, stop: int, offset: int, merge: bool
) -> list[Block]:
    # rows lo..turn meet a new key each, rows turn..hi lie past the last key and see all of them
    turn = min(hi, max(lo, stop - offset))
    blocks: list[Block] = []
    if turn - lo == 1:
        blocks.append(Block(batch, slice(lo, turn), slice(start, offset + turn), "full"))
    elif turn > lo:
        diagonal = offset + lo
        rows = slice(lo, turn)
        if diagonal > start and not merge:
            blocks.append(Block(batch, rows, slice(start, offset + turn), "masked"))
        else:
            if diagonal > start:
                blocks.append(Block(batch, rows, slice(start, diagonal), "full"))
            blocks.append(Block(batch, rows, slice(diagonal, offset + turn), "causal"))
    if turn < hi:
        blocks.append(Block(batch, slice(turn, hi), slice(start, stop), "full"))
    return blocks


def _parts(
    mask: Mask, num_queries: int, num_keys: int, batch_size: int
) -> Iterator[tuple[slice, int, int, int, int]]:
    """Rows and the keys they may see at most: ``(batch, first row, one past, first key, one past)``."""
    band = mask.form()
    offset = num_keys - num_queries
    for batch, start, stop in key_groups(mask, num_keys, batch_size):
        if band.documents is None:
            yield batch, 0, num_queries, start, stop
            continue
        for head, tail in band.document_spans(num_keys, batch.start):
            rows = max(0, head - offset), max(0, tail - offset)
            yield batch, *rows, max(start, head), min(stop, tail)


def band_tile(
    mask: Mask, rows: slice, keys: slice, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What a block of ``plan`` adds to its scores ``[rows, keys]``: 0, and -inf outside the mask's left and right.

    Its rows and keys are of one document and none of the keys is padding. Row i sits at position ``offset + i``.
    """
    band, shape = mask.form(), (rows.stop - rows.start, keys.stop - keys.start)
    diagonal = offset + rows.start - keys.start

    def forbidden() -> Tensor:
        return torch.full(shape, -torch.inf, dtype=dtype, device=device)

    if band.right is None:
        tile = torch.zeros(shape, dtype=dtype, device=device)
    else:
        tile = forbidden().triu_(diagonal + band.right + 1)
    return tile if band.left is None else tile.add_(forbidden().tril_(diagonal - band.left - 1))


def dense(
    mask: Mask,
    rows: slice,
    keys: slice,
    *,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    batch: int = 0,
) -> Tensor:
    """Bool tile ``[rows, keys]`` on the device, True where attention is allowed."""
    first, last = mask.form().row_limits(
        np.arange(rows.start, rows.stop), num_queries=num_queries, num_keys=num_keys, batch=batch
    )
    limits = torch.from_numpy(np.stack([first, last])).to(device)
    columns = torch.arange(keys.start, keys.stop, device=device)
    return (columns >= limits[0, :, None]) & (columns < limits[1, :, None])


def dense_batch(
    mask: Mask, *, num_queries: int, num_keys: int, batch_size: int, device: torch.device
) -> Tensor | None:
    """Bool ``[1 or B, 1, Sq, Sk]``, or None where everything is allowed."""
    band = mask.form()
    if band.unbounded:
        return None
    count = batch_size if band.batch_size > 1 else 1
    size = {"num_queries": num_queries, "num_keys": num_keys, "device": device}
    tiles = [
        dense(mask, slice(0, num_queries), slice(0, num_keys), batch=index, **size) for index in range(count)
    ]
    return torch.stack(tiles)[:, None]


def hide_padding(keys: Tensor, mask: Mask) -> Tensor:
    """Keys or values ``[B, H, Sk, D]`` with zeros in padded slots (0 * NaN would be NaN)."""
    ranges = mask.form().ranges
    if ranges is None:
        return keys
    batch_size, num_keys = keys.shape[0], keys.shape[2]
    limits = torch.tensor(ranges, device=keys.device).expand(batch_size, 2)
    slots = torch.arange(num_keys, device=keys.device)
    exists = (slots >= limits[:, :1]) & (slots < limits[:, 1:])
    return torch.where(exists[:, None, :, None], keys, keys.new_zeros(()))


def bias_tile(bias: Tensor, batch: slice, rows: slice, keys: slice) -> Tensor:
    """Slice of a bias that broadcasts to ``[B, Hq, Sq, Sk]``, as 4-D."""
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    parts = [
        slice(None) if size == 1 else part
        for size, part in zip(bias.shape, (batch, slice(None), rows, keys), strict=True)
    ]
    return bias[tuple(parts)]


def alibi_tile(slopes: Tensor, rows: slice, keys: slice, num_queries: int, num_keys: int) -> Tensor:
    """``-slope * |p - j|`` as ``[1, Hq, rows, keys]``, float32 or wider."""
    device = slopes.device
    position = torch.arange(rows.start, rows.stop, device=device) + (num_keys - num_queries)
    distance = (position[:, None] - torch.arange(keys.start, keys.stop, device=device)).abs()
    wide = torch.promote_types(slopes.dtype, torch.float32)
    return -slopes.to(wide)[None, :, None, None] * distance.to(wide)


def tile_dtype(q: Tensor) -> torch.dtype:
    """What the CPU flash kernel adds to its scores: float32 for half types, or distances would be rounded."""
    return torch.promote_types(q.dtype, torch.float32)


def modify(
    scores: Tensor, modifiers: Modifiers, rows: slice, keys: slice, num_queries: int, num_keys: int
) -> Tensor:
    """Scaled scores ``[B, Hq, rows, keys]`` with soft cap and ALiBi; the scores themselves where there are none."""
    if modifiers.softcap is not None:
        scores = torch.tanh(scores / modifiers.softcap) * modifiers.softcap
    if modifiers.alibi is not None:
        scores = scores + alibi_tile(modifiers.alibi, rows, keys, num_queries, num_keys).to(scores.dtype)
    return scores


def add_sinks(output: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give sinks ``[Hq]`` their share of finished rows ``[B, Hq, S, Dv]`` and lse ``[B, Hq, S]``; no gradient."""
    if sinks is None:
        return output, lse
    total = torch.logaddexp(lse, sinks.detach().to(lse)[:, None])
    safe = torch.where(torch.isneginf(total), 0, total)
    return (output * torch.exp(lse - safe)[..., None]).to(output.dtype), total


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint keys: outputs ``[..., S, Dv]`` weighted by log-sum-exp ``[..., S]``."""
    output, lse = parts[0]
    for other, more in parts[1:]:
        wide = torch.promote_types(output.dtype, lse.dtype)
        # neither has a key: NaN, and any share of nothing will do
        share = torch.sigmoid(more - lse).nan_to_num_(0)[..., None].to(wide)
        output = torch.lerp(output.to(wide), other.to(wide), share)
        lse = torch.logaddexp(lse, more)
    return output.to(parts[0][0].dtype), lse
