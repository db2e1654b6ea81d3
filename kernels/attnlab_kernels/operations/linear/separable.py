"""Efficient attention: a softmax on each side of the product, so that no n x m matrix is needed.

Shen et al., "Efficient Attention: Attention with Linear Complexities", https://arxiv.org/abs/1812.01243.
"""

from __future__ import annotations

import torch
from torch import Tensor


def separate(query: Tensor, key: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """``softmax_d(Q)`` and ``softmax_m(K)``: rows of their product sum to 1.

    Args:
        query: ``[B, H, n, d]``; key ``[B, H, m, d]``.
        keep: which keys exist, ``[B, m]``, or None for all; without any key the result is zero.

    Returns:
        float32 or float64 ``[B, H, n, d]`` and ``[B, H, m, d]``.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide).softmax(dim=-1), key.to(wide)
    if key.shape[2] == 0:
        return query, key
    if keep is None:
        return query, key.softmax(dim=2)
    gone = ~keep[:, None, :, None]
    key = key.masked_fill(gone, -torch.inf)
    return query, key.softmax(dim=2).masked_fill(gone, 0)


def separable_attend(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
    """``softmax_d(Q) (softmax_m(K)^T V)`` ``[B, H, n, Dv]`` in the values' dtype; never causal.

    Args:
        query: ``[B, H, n, d]``; key ``[B, H, m, d]``; value ``[B, H, m, Dv]``, finite where a key does not exist.
        keep: which keys exist, ``[B, m]``, or None for all.
    """
    query, key = separate(query, key, keep)
    return (query @ (key.transpose(-1, -2) @ value.to(key.dtype))).to(value.dtype)
