"""The difference of two softmax maps, times the values. Ye et al., https://arxiv.org/abs/2410.05258.

``run`` forms the signed map and reads as the formula; ``compose`` needs two calls of any softmax implementation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.api import attend


class Pair(NamedTuple):
    """What the first and the second softmax map are made of: ``[B, h, n, d]`` queries, ``[B, hkv, m, d]`` keys."""

    first: Tensor
    second: Tensor


class Difference(NamedTuple):
    """Output ``[B, h, n, dv]`` before any norm, the two log-sum-exps ``[B, h, n]``, and how it was computed."""

    output: Tensor
    lse: Pair
    implementation: str
    reason: str


def run(
    query: Pair,
    key: Pair,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(softmax(q1 k1) - weight * softmax(q2 k2)) v`` with the signed map in memory.

    Args:
        value: ``[B, hkv, m, dv]``; query head i reads key head ``i // (h // hkv)``.
        weight: λ, a number or ``[B, h, n]``.
        bias: added to the scores of both maps.

    Returns:
        output ``[B, h, n, dv]`` and the signed map ``[B, h, n, m]``, rows of sum 1 - λ; zeros in dead rows.
    """
    mask = Full() if mask is None else mask
    maps = [_softmax(*pair, mask, scale, bias) for pair in zip(query, key, strict=True)]
    signed = maps[0] - (weight[..., None] if weight.dim() else weight) * maps[1]
    groups = query.first.shape[1] // value.shape[1]
    values = lower.hide_padding(value, mask).to(signed.dtype).repeat_interleave(groups, dim=1)
    return (signed @ values).to(value.dtype), signed


def compose(
    query: Pair,
    key: Pair,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Difference:
    """As ``run`` from two softmax calls, so no map is formed where the implementation forms none.

    Raises:
        Unsupported: the implementation cannot run one of the calls.
    """
    mask = Full() if mask is None else mask
    first, second = (
        attend(q, k, value, mask=mask, scale=scale, bias=bias, implementation=implementation)
        for q, k in zip(query, key, strict=True)
    )
    assert first.lse is not None
    assert second.lse is not None
    weight = weight[..., None] if weight.dim() else weight
    output = first.output.to(weight.dtype) - weight * second.output.to(weight.dtype)
    return Difference(output.to(value.dtype), Pair(first.lse, second.lse), **first.aux)


def _softmax(query: Tensor, key: Tensor, mask: Mask, scale: float | None, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    keys = lower.hide_padding(key, mask).to(wide).repeat_interleave(groups, dim=1)
    scores = query.to(wide) @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    allowed = lower.dense_batch(
        mask,
        num_queries=query.shape[2],
        num_keys=key.shape[2],
        batch_size=query.shape[0],
        device=query.device,
    )
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    dead = torch.isneginf(scores).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0), dim=-1).masked_fill(dead, 0)
