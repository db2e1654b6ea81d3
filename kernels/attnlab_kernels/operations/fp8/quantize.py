"""Numbers as eight-bit floats, e4m3, with one float32 scale for a block of rows of a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


class Quantized(NamedTuple):
    """``values`` e4m3 ``[B, H, S, D]`` times ``scales`` float32 ``[B, H, ceil(S / block_size)]``."""

    values: Tensor
    scales: Tensor
    block_size: int

    def row_scales(self) -> Tensor:
        """The scale of every row, float32 ``[B, H, S, 1]``."""
        rows = self.scales.repeat_interleave(self.block_size, dim=2)
        return rows[:, :, : self.values.shape[2], None]

    def dequantize(self) -> Tensor:
        """The numbers that were kept, float32 ``[B, H, S, D]``."""
        return self.values.float() * self.row_scales()


def cast(numbers: Tensor) -> Tensor:
    """To e4m3, the nearest one; what lies beyond ±448 becomes ±448 and NaN stays NaN."""
    return numbers.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def quantize(numbers: Tensor, block_size: int | None) -> Quantized:
    """Scale each block so that its largest magnitude becomes 448, then round.

    Args:
        numbers: ``[B, H, S, D]`` float, S at least 1.
        block_size: rows of a head that share a scale, the last block may be shorter; None: one for the whole tensor.

    Raises:
        ValueError: ``block_size`` below 1, or a shape that is not four-dimensional.
    """
    if numbers.dim() != 4 or 0 in numbers.shape:
        raise ValueError(f"numbers must be [B, H, S, D] and not empty; got shape {tuple(numbers.shape)}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1 row, or None for one scale; got {block_size}")
    wide = numbers.float()
    tokens = wide.shape[2]
    size = tokens if block_size is None else block_size
    if block_size is None:
        largest = wide.abs().amax().expand(*wide.shape[:2], 1)
    else:
        blocks = functional.pad(wide, (0, 0, 0, -tokens % size)).unflatten(2, (-1, size))
        largest = blocks.abs().amax(dim=(-1, -2))
    # a block of zeros needs a scale that can divide it
    scales = torch.where(largest == 0, 1.0, largest / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    rows = scales.repeat_interleave(size, dim=2)[:, :, :tokens, None]
    return Quantized(cast(wide / rows), scales, size)
