"""The reference: softmax attention as the formula says it; any device, float32 or float64, autograd.

Scaled dot-product attention of Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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
) -> tuple[Tensor, Tensor]:
    """Attend with every score in memory; scores and softmax in float32 (float64 for float64 inputs).

    Args:
        q: ``[B, Hq, Sq, D]``; k ``[B, Hkv, Sk, D]``; v ``[B, Hkv, Sk, Dv]``; heads as in ``attend``.
        bias: added to the scaled scores, broadcasts to ``[B, Hq, Sq, Sk]``; minus infinity forbids a pair.
        modifiers: soft cap, ALiBi slopes and sinks.
        dropout: share of probabilities dropped after the softmax, the rest scaled up.

    Returns:
        output ``[B, Hq, Sq, Dv]`` in q's dtype and natural log-sum-exp ``[B, Hq, Sq]``, detached.
    """
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    if num_keys == 0:
        nothing = q.new_zeros(batch, heads, num_queries, v.shape[-1])
        return lower.add_sinks(nothing, _wide(q).new_full(q.shape[:3], -torch.inf), modifiers.sinks)
    scores = _per_head(q, _wide(lower.hide_padding(k, mask)).transpose(-1, -2)).mul_(scale)
    scores = lower.modify(scores, modifiers, slice(0, num_queries), slice(0, num_keys), num_queries, num_keys)
    if bias is not None:
        scores = scores + bias
    allowed = lower.dense_batch(
        mask, num_queries=num_queries, num_keys=num_keys, batch_size=batch, device=q.device
    )
    if allowed is not None:
        scores = scores.masked_fill_(~allowed, -torch.inf)
    if modifiers.sinks is not None:
        # one more column, which has no value
        sinks = modifiers.sinks.to(scores.dtype)[:, None, None]
        scores = torch.cat((scores, sinks.expand(batch, heads, num_queries, 1)), dim=-1)
    top = scores.detach().amax(dim=-1, keepdim=True)
    # the softmax of a dead row is 0 / 0: give it any scores, and then no weight and no gradient
    dead = torch.isneginf(top)
    has_dead = bias is not None or any(
        mask.dead_rows(num_queries, num_keys, index).any() for index in range(batch)
    )
    scores = scores.masked_fill(dead, 0) if has_dead else scores
    probabilities = torch.softmax(scores, dim=-1)
    # the largest probability is 1 over the sum of exp(score - top)
    largest = probabilities.detach().amax(dim=-1, keepdim=True)
    lse = torch.where(dead, top, top - largest.log()).squeeze(-1)
    probabilities = probabilities.masked_fill(dead, 0) if has_dead else probabilities
    probabilities = probabilities[..., :num_keys]
    if dropout:
        probabilities = functional.dropout(probabilities, dropout)
    return _per_head(probabilities, _wide(lower.hide_padding(v, mask))).to(q.dtype), lse


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _per_head(left: Tensor, right: Tensor) -> Tensor:
    """``left [B, Hq, S, X] @ right [B, Hkv, X, Y]``: a group's rows are stacked, so no key head is copied."""
    batch, heads, rows, inner = left.shape
    stacked = _wide(left).reshape(batch, right.shape[1], -1, inner)
    return (stacked @ right).reshape(batch, heads, rows, right.shape[-1])
