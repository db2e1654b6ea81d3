"""Positions as numbers added to the scores: ALiBi, T5's buckets, a table over a window.

Each is called with the absolute positions of the queries ``[n]`` and of the keys ``[m]`` and gives ``[H, n, m]``, so it
may be passed as ``position_bias`` of any module that has scores: with a cache or in chunks the numbers stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

PositionBias = Tensor | Callable[[Tensor, Tensor], Tensor]
"""A tensor that broadcasts to ``[B, H, n, m]``, or what makes one from positions of queries and keys."""


def alibi_slopes(num_heads: int) -> Tensor:
    """``2 ** (-8 k / H)`` for k = 1..H, float32 ``[H]``; for other counts than powers of two, every other slope of 2H.

    Press et al., "Train Short, Test Long", https://arxiv.org/abs/2108.12409.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1; got {num_heads}")
    whole = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / whole) for head in range(whole)]
    finer = [2 ** (-4 * (head + 1) / whole) for head in range(0, 2 * whole, 2)]
    return torch.tensor((slopes + finer)[:num_heads])


class Alibi:
    """``-slope_h |i - j|``, nothing to learn."""

    def __init__(self, num_heads: int) -> None:
        self.slopes = alibi_slopes(num_heads)

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        distance = (queries[:, None] - keys).abs()
        return -self.slopes.to(distance.device)[:, None, None] * distance


class BucketBias(nn.Module):
    """T5's bias: one learned number a head for each bucket of ``key - query``; wider buckets farther away.

    Raffel et al., https://arxiv.org/abs/1910.10683. T5 adds it to unscaled scores (``attention_scale=1``) and shares
    the table of its first layer. The parameter's name is transformers'.

    Args:
        bidirectional: half of the buckets for keys after the query; False: those are all in bucket 0.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        least = 4 if bidirectional else 2
        if num_buckets < least or num_buckets % least:
            raise ValueError(f"num_buckets must be a positive multiple of {least}; got {num_buckets}")
        if max_distance <= num_buckets // least:
            raise ValueError(f"max_distance must be above {num_buckets // least}; got {max_distance}")
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def buckets(self, relative: Tensor) -> Tensor:
        """Bucket of each ``key - query``."""
        count, before = self.num_buckets, torch.zeros_like(relative)
        if self.bidirectional:
            count //= 2
            before = (relative > 0).long() * count
            distance = relative.abs()
        else:
            distance = (-relative).clamp(min=0)
        exact = count // 2
        # float32, as the trained models have it: an exact power may fall on either side
        steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (steps * (count - exact)).long()).clamp(max=count - 1)
        return before + torch.where(distance < exact, distance, far)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.relative_attention_bias(self.buckets(keys - queries[:, None])).permute(2, 0, 1)


class WindowBias(nn.Module):
    """A learned number a head for each place in a window, as in Swin and NAT: table ``[H, 2 k - 1]``.

    Liu et al., https://arxiv.org/abs/2103.14030; index ``(key - query) / dilation + k - 1``. Pairs outside the window
    get the number at its edge, for a mask to forbid. In 2-D and 3-D the table is ``NeighborhoodAttention``'s own.
    """

    def __init__(self, num_heads: int, window_size: int, dilation: int = 1) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("window_size", window_size), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.window_size, self.dilation = window_size, dilation
        self.position_table = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(num_heads, 2 * window_size - 1), std=0.02)
        )

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        place = (keys - queries[:, None]).div(self.dilation, rounding_mode="floor") + self.window_size - 1
        return self.position_table[:, place.clamp(0, 2 * self.window_size - 2)]
