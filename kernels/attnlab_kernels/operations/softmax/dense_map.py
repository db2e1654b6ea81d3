"""The whole attention map from scores and log-sum-exp, for those who ask for it; refused where it is too large."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import lower

# 2 GiB of float32; more than that is looked at through SoftmaxMap, region by region
MAP_LIMIT_BYTES = 2**31


def check_map_size(batch: int, heads: int, num_queries: int, num_keys: int) -> None:
    """ValueError with the bytes, if a float32 map of this shape is larger than the limit."""
    size = 4 * batch * heads * num_queries * num_keys
    if size > MAP_LIMIT_BYTES:
        raise ValueError(
            f"output_attentions would take {size:,} bytes, more than {MAP_LIMIT_BYTES:,}; "
            "look at regions with SoftmaxMap instead"
        )


def dense_map(scores: Tensor, lse: Tensor, mask: Mask, bias: Tensor | None = None) -> Tensor:
    """Probabilities ``[B, H, n, m]`` in the dtype of ``lse``: ``exp(scores + bias - lse)``, 0 where masked.

    Args:
        scores: scaled ``[B, H, n, m]``; what stands in a masked place does not matter.
        lse: natural log-sum-exp ``[B, H, n]`` of the same scores, mask and bias.
    """
    batch, heads, num_queries, num_keys = scores.shape
    check_map_size(batch, heads, num_queries, num_keys)
    with torch.no_grad():
        scores = scores.to(lse.dtype)
        scores = scores if bias is None else scores + bias
        maps = torch.exp(scores - torch.where(torch.isneginf(lse), 0, lse)[..., None])
        allowed = lower.dense_batch(
            mask, num_queries=num_queries, num_keys=num_keys, batch_size=batch, device=scores.device
        )
        return maps if allowed is None else maps.masked_fill(~allowed, 0)
