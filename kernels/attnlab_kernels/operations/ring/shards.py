"""Cut a tensor's tokens into the shards of a ring, and put them together again."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab_kernels.operations.ring.layout import RingError, places, shard_positions


def split(tensor: Tensor, *, size: int, layout: str, dim: int) -> tuple[Tensor, Tensor]:
    """All shards ``[size, ..]``, zeros in slots without a token, and their positions ``[size, slots]`` (there -1)."""
    dim %= tensor.dim()
    table = torch.from_numpy(shard_positions(layout, tensor.shape[dim], size)).to(tensor.device)
    # a slot without a token reads one more token, of zeros
    shape = list(tensor.shape)
    shape[dim] = 1
    padded = torch.cat((tensor, tensor.new_zeros(shape)), dim=dim)
    index = torch.where(table < 0, tensor.shape[dim], table)
    parts = padded.index_select(dim, index.flatten()).unflatten(dim, tuple(table.shape))
    return parts.movedim(dim, 0), table


def join(parts: Tensor, *, length: int, layout: str, dim: int) -> Tensor:
    """The tokens in order, from all shards ``[size, ..]``; ``dim`` counts without the axis of ranks."""
    dim %= parts.dim() - 1
    slots = parts.shape[dim + 1]
    wanted = shard_positions(layout, length, parts.shape[0]).shape[1]
    if slots != wanted:
        raise RingError(f"parts must have {wanted} slots a rank for {length} tokens, {layout}; got {slots}")
    order = torch.from_numpy(places(layout, length, parts.shape[0])).to(parts.device)
    return parts.movedim(0, dim).flatten(dim, dim + 1).index_select(dim, order)


def shard(tensor: Tensor, rank: int, *, size: int, layout: str, dim: int = 1) -> tuple[Tensor, Tensor]:
    """What one rank owns of ``[B, n, ..]``: its tokens (zeros where none is left) and their positions ``[slots]``."""
    if not 0 <= rank < size:
        raise RingError(f"rank must be one of 0..{size - 1}; got {rank}")
    parts, positions = split(tensor, size=size, layout=layout, dim=dim)
    return parts[rank], positions[rank]
