"""Masks for mechanisms that sum over keys: which keys exist, the same for every query."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.mechanisms.attention_mask import read_attention_mask


def read_key_mask(
    given: Mask | Tensor | None,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    past: int,
    device: torch.device,
) -> tuple[Tensor | None, bool]:
    """Which keys exist, bool ``[B, m]`` or None for all, and whether the mask is causal.

    Args:
        given: forms as in ``read_attention_mask``, without pairs of their own: ``[B, m]``, ``[B, 1, 1, m]``, or a
            ``Mask`` of padding and causal parts.
        past: keys before these, which a ``Mask`` counts too and a longer tensor covers.

    Raises:
        ValueError: a mask that treats queries differently, or weighs keys.
    """
    mask, bias = read_attention_mask(given, batch=batch, heads=1, num_queries=num_queries, num_keys=num_keys)
    band = mask.band()
    if band.left is not None or band.right not in (None, 0):
        raise ValueError(f"attention_mask must be causal or padding here; got {mask.describe()}")
    keep = None
    if band.ranges is not None:
        offset = past if isinstance(given, Mask) else 0
        limits = torch.tensor(band.ranges, device=device).expand(batch, 2) - offset
        slots = torch.arange(num_keys, device=device)
        keep = (slots >= limits[:, :1]) & (slots < limits[:, 1:])
    if bias is not None:
        if bias.dim() != 4 or bias.shape[1] != 1 or bias.shape[2] != 1:
            raise ValueError(
                "attention_mask must be the same for every query here, [batch, keys]: "
                f"there are no pairs to mask; got shape {list(bias.shape)}"
            )
        flat = bias[:, 0, 0].expand(batch, num_keys)
        if not bool(((flat == 0) | torch.isneginf(flat)).all()):
            raise ValueError("attention_mask must keep or forbid a key (0 or -inf); it holds other weights")
        keep = flat == 0
    return keep, band.right == 0


def hide(tensor: Tensor, keep: Tensor | None, fill: float = 0.0) -> Tensor:
    """``tensor`` ``[B, H, m, D]`` with ``fill`` where the key does not exist, whatever lay there."""
    return tensor if keep is None else torch.where(keep[:, None, :, None], tensor, tensor.new_full((), fill))
