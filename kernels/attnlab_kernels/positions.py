"""Rotary position embedding: angles in float64, rotation in float32 or wider, both layouts.

Su et al., "RoFormer", https://arxiv.org/abs/2104.09864. In bfloat16 an angle of position 131,071 has lost its meaning
(the cosine is off by 1.6), so tables never follow the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnlab_kernels.rope_scaling import rope_frequencies

Layout = Literal["half_split", "interleaved"]


@dataclass(frozen=True)
class Rotary:
    """How a module rotates its queries and keys; may be passed as ``use_rotary``.

    Args:
        base: angle of pair i is ``position * base ** (-2 i / dim)``.
        layout: see ``rope_tables``; it also reads ``position_embeddings``.
        fraction: share of each head that turns; rounded down to whole pairs, at least one.
        scaling: see ``rope_frequencies``. "dynamic" and "longrope" look at the last position of a call, as in
            transformers: beyond the trained length, chunks then differ from one pass.
    """

    base: float = 10000.0
    layout: Layout = "half_split"
    fraction: float = 1.0
    scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _checked(self.layout)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1; got {self.fraction}")

    def width(self, head_dim: int) -> int:
        """Dimensions of a head that turn."""
        return 2 * max(1, int(self.fraction * head_dim / 2))

    def tables(self, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[.., n, width]`` of positions ``[n]`` or ``[B, n]``."""
        return rope_tables(
            positions, self.width(head_dim), base=self.base, layout=self.layout, scaling=self.scaling
        )


def rope_tables(
    positions: Tensor,
    dim: int,
    *,
    base: float = 10000.0,
    layout: Layout = "half_split",
    scaling: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and dimension, float32 ``[..., n, dim]``.

    Args:
        positions: whole numbers ``[n]`` or ``[B, n]``.
        dim: rotated dimensions, even.
        base: angle of pair i is ``position * base ** (-2 i / dim)``.
        layout: "half_split" pairs i with i + dim / 2 (Llama, NeoX); "interleaved" pairs 2i with 2i + 1 (GPT-J).
        scaling: see ``rope_frequencies``; the length is that of the last position.
    """
    length = int(positions.max()) + 1 if scaling and positions.numel() else None
    frequencies, factor = rope_frequencies(dim, base=base, scaling=scaling, length=length)
    angles = positions.to(torch.float64)[..., None] * frequencies.to(positions.device)
    if _checked(layout) == "half_split":
        angles = torch.cat((angles, angles), dim=-1)
    else:
        angles = angles.repeat_interleave(2, dim=-1)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout = "half_split") -> Tensor:
    """Rotate queries or keys ``[B, H, n, D]``; the first ``cos.shape[-1]`` dimensions turn, the rest stay.

    Args:
        cos: ``[n, R]`` or ``[B, n, R]`` with R <= D, in the same layout; sin the same.
    """
    size = cos.shape[-1]
    if size > x.shape[-1] or cos.shape[-2] != x.shape[-2]:
        raise ValueError(f"cos and sin must be [.., {x.shape[-2]}, <= {x.shape[-1]}]; got {tuple(cos.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    turning = x[..., :size].to(wide)
    cos, sin = (table.to(wide).unsqueeze(-3) for table in (cos, sin))
    if _checked(layout) == "half_split":
        first, second = turning.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    else:
        pairs = turning.unflatten(-1, (-1, 2))
        partner = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    turned = (turning * cos + partner * sin).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


def _checked(layout: str) -> str:
    if layout not in ("half_split", "interleaved"):
        raise ValueError(f"layout must be 'half_split' or 'interleaved'; got {layout!r}")
    return layout
