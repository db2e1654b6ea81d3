"""Attention of one sequence over the blocks of a pool: block after block, or gathered to one piece first.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180. Slots that hold no token of the sequence are never read, so what lies there
(another sequence's past, NaN) never shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Mask


def gather(pool: Tensor, table: Sequence[int], length: int) -> Tensor:
    """The first ``length`` tokens of a sequence in order, ``[Hkv, m, D]``, copied out of the pool.

    Args:
        pool: ``[num_blocks, block_size, Hkv, D]``.
        table: physical blocks in logical order.
    """
    blocks = torch.tensor(list(table), dtype=torch.long, device=pool.device)
    return pool[blocks].flatten(0, 1)[:length].transpose(0, 1)


def walk(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    table: Sequence[int],
    length: int,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention that visits the logical blocks one by one and keeps a running maximum and sum.

    Args:
        query: ``[Hq, n, D]``, the last n tokens of the sequence; head h reads key head ``h // (Hq // Hkv)``.
        key_pool: ``[num_blocks, block_size, Hkv, D]``; value_pool the same with Dv.
        table: physical blocks of the sequence in logical order.
        length: tokens of the sequence, the queries' own included.
        mask: default causal; blocks outside of it are not visited.

    Returns:
        output ``[Hq, n, Dv]`` in the dtype of the query, natural log-sum-exp ``[Hq, n]`` (float32, or float64).
    """
    mask = Causal() if mask is None else mask
    heads, count, width = query.shape
    size, kv_heads = key_pool.shape[1:3]
    if length > len(table) * size or count > length:
        raise ValueError(
            f"length must be from {count} queries to {len(table) * size}, what the table holds; got {length}"
        )
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    # rows of one key head together: [Hkv, g n, D]
    grouped = query.to(wide).reshape(kv_heads, -1, width) * (width**-0.5 if scale is None else scale)
    rows = grouped.shape[1]
    top = grouped.new_full((kv_heads, rows, 1), -torch.inf)
    total = grouped.new_zeros(kv_heads, rows, 1)
    mixed = grouped.new_zeros(kv_heads, rows, value_pool.shape[-1])
    lo, hi = mask.key_range(0, count, num_queries=count, num_keys=length)
    for index in range(lo // size, -(-hi // size)):
        start, stop = max(lo, index * size), min(hi, (index + 1) * size)
        slots = slice(start - index * size, stop - index * size)
        key = key_pool[table[index], slots].to(wide).transpose(0, 1)
        value = value_pool[table[index], slots].to(wide).transpose(0, 1)
        allowed = mask.allowed(np.arange(count), np.arange(start, stop), num_queries=count, num_keys=length)
        forbidden = ~torch.from_numpy(allowed).to(query.device).repeat(rows // count, 1)
        scores = (grouped @ key.transpose(-1, -2)).masked_fill(forbidden, -torch.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        # a row that has seen nothing yet has no maximum to subtract
        safe = torch.where(torch.isneginf(higher), 0, higher)
        weights = torch.exp(scores - safe)
        shrink = torch.exp(top - safe)
        total = total * shrink + weights.sum(-1, keepdim=True)
        mixed = mixed * shrink + weights @ value
        top = higher
    dead = total == 0
    output = (mixed / torch.where(dead, 1, total)).reshape(heads, count, mixed.shape[-1]).to(query.dtype)
    return output, torch.where(dead, -torch.inf, top + total.log()).reshape(heads, count)
