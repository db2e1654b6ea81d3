"""Sparse attention by the book: every score in memory, minus infinity outside the pattern. Slow, and plain."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.patterns import Pattern


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    start: int | None = None,
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Output ``[B, H, n, Dv]`` in q's dtype; arguments as in ``reference.run``."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    first = num_keys - num_queries if start is None else start
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    key, value = (tensor.to(wide).repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = q.to(wide) @ key.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    rows, cols = np.arange(first, first + num_queries), np.arange(num_keys)
    heads = [pattern.allowed(rows, cols, num_keys=num_keys, head=head) for head in range(q.shape[1])]
    size: dict[str, Any] = {"num_queries": num_keys, "num_keys": num_keys}
    open_pairs = [
        (mask or Full()).allowed(rows, cols, batch=element, **size)
        if mask is not None and mask.band().ranges is not None
        else (mask or Full()).allowed(rows, cols, **size)
        for element in range(q.shape[0])
    ]
    keep = torch.from_numpy(np.stack(heads)[None] & np.stack(open_pairs)[:, None]).to(q.device)
    scores = scores.masked_fill(~keep, -torch.inf)
    dead = ~keep.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0), dim=-1).masked_fill(dead, 0)
    return (weights @ value).to(q.dtype)
