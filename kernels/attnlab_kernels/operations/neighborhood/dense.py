"""Neighborhood attention by the book: every score in memory, minus infinity outside the windows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.neighborhood import Neighborhood


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighborhood: Neighborhood,
    *,
    scale: float,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Output ``[B, H, N, Dv]`` in q's dtype, pixels row by row; arguments as in ``reference.run``, flattened."""
    wide = torch.promote_types(q.dtype, torch.float32)
    pixels = np.arange(neighborhood.size)
    keep = torch.from_numpy(neighborhood.allowed(pixels, pixels)).to(q.device)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if bias is not None:
        places = neighborhood.offsets(pixels[:, None], pixels[None])
        index = tuple(
            torch.from_numpy(np.clip(place, 0, size - 1)).to(q.device)
            for place, size in zip(places, bias.shape[1:], strict=True)
        )
        scores = scores + bias.to(wide)[(slice(None), *index)]
    keep = keep[None, None]
    if visible is not None:
        keep = keep & visible.flatten(1)[:, None, None]
    dead = ~keep.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~keep, -torch.inf).masked_fill(dead, 0), dim=-1)
    return (weights.masked_fill(dead, 0) @ v.to(wide)).to(q.dtype)
