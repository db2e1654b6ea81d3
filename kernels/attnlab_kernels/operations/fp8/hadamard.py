"""The random rotation that spreads an outlier over all dimensions: ``x diag(±1) H / sqrt(d)``.

"Incoherent processing" of FlashAttention-3, https://arxiv.org/abs/2407.08608, section 3.3. The matrix is orthogonal, so
rotating queries and keys alike leaves every ``q . k`` as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def random_signs(width: int, *, seed: int = 0) -> Tensor:
    """Float64 ±1 for each of ``width`` dimensions padded to a power of two, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (padded_width(width),), generator=generator).double() * 2 - 1


def padded_width(width: int) -> int:
    """The smallest power of two that is at least ``width``."""
    return 1 << (width - 1).bit_length()


def rotate(numbers: Tensor, signs: Tensor) -> Tensor:
    """Rotate the last dimension in float32 (float64 for float64), padded with zeros to ``len(signs)``.

    Args:
        numbers: ``[..., D]``, D at most ``len(signs)``.
        signs: ``[P]`` of ±1, P a power of two.

    Returns:
        ``[..., P]``.
    """
    size = signs.shape[0]
    if size & (size - 1) or not 0 < numbers.shape[-1] <= size:
        raise ValueError(
            f"signs must be as many as a power of two that is at least {numbers.shape[-1]}; got {size}"
        )
    wide = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    wide = functional.pad(wide, (0, size - wide.shape[-1])) * signs.to(wide)
    span = 1
    while span < size:
        pairs = wide.unflatten(-1, (-1, 2, span))
        low, high = pairs.unbind(-2)
        wide = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        span *= 2
    return wide * size**-0.5
