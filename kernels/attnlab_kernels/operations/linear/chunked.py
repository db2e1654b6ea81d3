"""Linear attention in chunks: weights inside a chunk, one state between chunks. O(n c + n f) for each head and width.

Hua et al., "Transformer Quality in Linear Time", https://arxiv.org/abs/2202.10447.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.operations.linear.reference import LinearSums, Raw, read, total

# tokens whose intermediate states exist at a time; more of them leave the processor's cache
SEGMENT = 1024


def chunked(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, past: LinearSums, chunk: int) -> Raw:
    """The same as ``reference.parallel``; ``chunk`` tokens at a time, the last chunk may be shorter."""
    if not causal:
        sums = total(key, value, past)
        return Raw(*read(query, sums), sums)
    numerators, denominators = [], []
    size = chunk * max(1, SEGMENT // chunk)
    pieces = (part.split(size, dim=2) for part in (query, key, value))
    for q, k, v in zip(*pieces, strict=True):
        numerator, denominator, past = segment(q, k, v, past, chunk)
        numerators.append(numerator)
        denominators.append(denominator)
    return Raw(torch.cat(numerators, dim=2), torch.cat(denominators, dim=2), past)


def segment(query: Tensor, key: Tensor, value: Tensor, past: LinearSums, chunk: int) -> Raw:
    """Causal, with the states of all its chunks in memory at once."""
    length = query.shape[2]
    sums = total(key, value, past)
    rest = -length % chunk
    query, key, value = (
        functional.pad(part, (0, 0, 0, rest)).unflatten(2, (-1, chunk)) for part in (query, key, value)
    )
    states = _before(key.transpose(-1, -2) @ value, past.state)
    normalisers = _before(key.sum(dim=3), past.normaliser)
    weights = (query @ key.transpose(-1, -2)).tril()
    numerator = weights @ value + query @ states
    denominator = weights.sum(dim=-1) + (query @ normalisers[..., None]).squeeze(-1)
    return Raw(numerator.flatten(2, 3)[:, :, :length], denominator.flatten(2, 3)[:, :, :length], sums)


def _before(parts: Tensor, past: Tensor) -> Tensor:
    """For each chunk along dimension 2, the sum over the past and over the chunks before it."""
    return torch.cat((past[:, :, None], parts[:, :, :-1]), dim=2).cumsum(dim=2)
