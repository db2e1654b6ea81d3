"""Exact attention in chunks of queries and keys, in plain PyTorch: for any device, mask, bias, dropout and gradient.

Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", https://arxiv.org/abs/2112.05682.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    modifiers: Modifiers = PLAIN,
    dropout: float = 0.0,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """Attend ``chunk`` queries to ``chunk`` keys at a time and merge by a running maximum.

    At most ``[B, Hq, chunk, chunk]`` scores exist at once. Where a gradient is wanted, a query chunk is computed
    again in the backward pass instead of keeping its scores. Key chunks that the mask forbids are never visited.

    Args:
        q: ``[B, Hq, Sq, D]``; k ``[B, Hkv, Sk, D]``; v ``[B, Hkv, Sk, Dv]``; heads as in ``attend``.
        bias: added to the scaled scores, broadcasts to ``[B, Hq, Sq, Sk]``; minus infinity forbids a pair.
        modifiers: soft cap, ALiBi slopes and sinks.
        dropout: share of probabilities dropped after the softmax, the rest scaled up.

    Returns:
        output ``[B, Hq, Sq, Dv]`` in q's dtype and natural log-sum-exp ``[B, Hq, Sq]``, detached.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token; got {chunk}")
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (
        lower.hide_padding(part, mask).to(wide).repeat_interleave(group, dim=1) for part in (k, v)
    )
    parts = [part for part in (q, k, v, bias, *modifiers.tensors) if part is not None]
    keep_nothing = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    outputs, sums = [], []
    for start in range(0, q.shape[2], chunk):
        rows = slice(start, min(start + chunk, q.shape[2]))
        attend_rows = functools.partial(
            _attend_rows,
            rows=rows,
            mask=mask,
            scale=scale,
            softcap=modifiers.softcap,
            dropout=dropout,
            chunk=chunk,
            num_queries=q.shape[2],
        )
        arguments = (q[:, :, rows].to(wide), keys, values, bias, modifiers.alibi, modifiers.sinks)
        output, lse = (
            checkpoint(attend_rows, *arguments, use_reentrant=False)
            if keep_nothing
            else attend_rows(*arguments)
        )
        outputs.append(output)
        sums.append(lse)
    if not outputs:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_zeros(q.shape[:3], dtype=wide)
    return torch.cat(outputs, dim=2).to(q.dtype), torch.cat(sums, dim=2)


def _attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    alibi: Tensor | None,
    sinks: Tensor | None,
    *,
    rows: slice,
    mask: Mask,
    scale: float,
    softcap: float | None,
    dropout: float,
    chunk: int,
    num_queries: int,
) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3]
    top = query.new_full(shape, -torch.inf)
    total = query.new_zeros(shape)
    output = query.new_zeros(*shape, values.shape[-1])
    if sinks is not None:
        # a sink is a key that every row has seen, of value zero
        top = sinks.detach().to(query.dtype)[:, None].expand(shape)
        total = torch.exp(sinks.to(query.dtype)[:, None] - top)
    terms = Modifiers(softcap=softcap, alibi=alibi)
    first, last = _visited(mask, rows, num_queries, keys.shape[2], query.shape[0])
    for start in range(first, last, chunk):
        columns = slice(start, min(start + chunk, last))
        scores = query @ keys[:, :, columns].transpose(-1, -2) * scale
        scores = lower.modify(scores, terms, rows, columns, num_queries, keys.shape[2])
        if bias is not None:
            scores = scores + lower.bias_tile(bias, slice(None), rows, columns)
        scores = scores.masked_fill(
            ~_allowed(mask, rows, columns, num_queries, keys.shape[2], query), -torch.inf
        )
        higher = torch.maximum(top, scores.detach().amax(dim=-1))
        # a row that has seen nothing yet has no maximum to subtract
        safe = torch.where(torch.isneginf(higher), 0, higher)
        weights = torch.exp(scores - safe[..., None])
        fade = torch.exp(top - safe)
        total = total * fade + weights.sum(dim=-1)
        kept = functional.dropout(weights, dropout) if dropout else weights
        output = output * fade[..., None] + kept @ values[:, :, columns]
        top = higher
    dead = total == 0
    alive = total.masked_fill(dead, 1)
    lse = torch.where(dead, -torch.inf, torch.where(dead, 0, top) + alive.log()).detach()
    return output / alive[..., None], lse


def _visited(mask: Mask, rows: slice, num_queries: int, num_keys: int, batch: int) -> tuple[int, int]:
    """Keys that some batch element's rows may attend to: ``[first, last)``."""
    count = 1 if mask.form().batch_size == 1 else batch
    limits = [
        mask.key_range(rows.start, rows.stop, num_queries=num_queries, num_keys=num_keys, batch=index)
        for index in range(count)
    ]
    some = [pair for pair in limits if pair[0] < pair[1]]
    return (min(lo for lo, _ in some), max(hi for _, hi in some)) if some else (0, 0)


def _allowed(
    mask: Mask, rows: slice, columns: slice, num_queries: int, num_keys: int, query: Tensor
) -> Tensor:
    """Bool tile ``[1 or B, 1, rows, columns]``."""
    count = 1 if mask.form().batch_size == 1 else query.shape[0]
    tiles = [
        lower.dense(
            mask,
            rows,
            columns,
            num_queries=num_queries,
            num_keys=num_keys,
            device=query.device,
            batch=index,
        )
        for index in range(count)
    ]
    return torch.stack(tiles)[:, None]
