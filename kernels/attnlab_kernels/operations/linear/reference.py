"""The reference: linear attention as a quadratic formula and as a recurrence, in float32 or float64.

Katharopoulos et al., "Transformers are RNNs", https://arxiv.org/abs/2006.16236.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LinearSums(NamedTuple):
    """What the keys so far add up to: the state ``[B, H, f, Dv]`` and the normaliser ``[B, H, f]``."""

    state: Tensor
    normaliser: Tensor


class Raw(NamedTuple):
    """Numerators ``[B, H, n, Dv]``, denominators ``[B, H, n]`` without epsilon, and the sums over all keys."""

    numerator: Tensor
    denominator: Tensor
    sums: LinearSums


def parallel(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, past: LinearSums, chunk: int) -> Raw:
    """``tril(query key^T) value``: every weight in memory, no order of summation over tokens to trust.

    Args:
        query: features ``[B, H, n, f]``; key ``[B, H, m, f]``; value ``[B, H, m, Dv]``; n equals m if causal.
        past: sums over earlier keys, which every query sees.
        chunk: not used.
    """
    weights = query @ key.transpose(-1, -2)
    weights = weights.tril() if causal else weights
    numerator = weights @ value + query @ past.state
    denominator = weights.sum(dim=-1) + (query @ past.normaliser[..., None]).squeeze(-1)
    return Raw(numerator, denominator, total(key, value, past))


def recurrent(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, past: LinearSums, chunk: int
) -> Raw:
    """One token after the other, as a decoder does it; arguments as in ``parallel``."""
    if not causal:
        sums = past
        for step in range(key.shape[2]):
            sums = _add(sums, key[:, :, step], value[:, :, step])
        return Raw(*read(query, sums), sums)
    sums, numerators, denominators = past, [], []
    for step in range(key.shape[2]):
        sums = _add(sums, key[:, :, step], value[:, :, step])
        numerator, denominator = read(query[:, :, step : step + 1], sums)
        numerators.append(numerator)
        denominators.append(denominator)
    return Raw(torch.cat(numerators, dim=2), torch.cat(denominators, dim=2), sums)


def total(key: Tensor, value: Tensor, past: LinearSums) -> LinearSums:
    """The sums over the past and over these keys."""
    return LinearSums(past.state + key.transpose(-1, -2) @ value, past.normaliser + key.sum(dim=2))


def read(query: Tensor, sums: LinearSums) -> tuple[Tensor, Tensor]:
    """Numerators and denominators of queries that see exactly these sums."""
    return query @ sums.state, (query @ sums.normaliser[..., None]).squeeze(-1)


def _add(sums: LinearSums, key: Tensor, value: Tensor) -> LinearSums:
    return LinearSums(sums.state + key[..., :, None] * value[..., None, :], sums.normaliser + key)
