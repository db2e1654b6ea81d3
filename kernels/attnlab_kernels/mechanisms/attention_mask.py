"""Attention masks as tensors, in the forms that callers pass around, read into a Mask and a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab_kernels.masks import Full, Mask, Padding
from attnlab_kernels.position_bias import PositionBias


def read_attention_mask(
    given: Mask | Tensor | None, *, batch: int, heads: int, num_queries: int, num_keys: int
) -> tuple[Mask, Tensor | None]:
    """Split a mask into what the mask algebra can say and a bias for the rest.

    Args:
        given: a ``Mask``; bool, True = attend; 0/1 integers, 1 = attend; or floats that are added to the scores.
            Shapes: ``[B, m]`` over keys, ``[n, m]``, ``[B, 1 | H, n, m]``. Where B equals n, two dimensions are
            read as ``[B, m]``. A longer last dimension (tokens that a window has dropped) is cut at the front.

    Returns:
        the mask and a bias that broadcasts to ``[B, H, n, m]``, or None.

    Raises:
        ValueError: another shape, or a float mask of zeros and ones (add it or read it as bool?).
    """
    if given is None or isinstance(given, Mask):
        return given or Full(), None
    tensor = given[..., -num_keys:] if given.shape[-1] > num_keys else given
    if tensor.shape[-1] != num_keys:
        raise ValueError(f"attention_mask must end in {num_keys} keys; got shape {tuple(given.shape)}")
    keys_only = tensor.dim() == 2 and tensor.shape[0] in (1, batch)
    if not keys_only and tuple(tensor.shape) != (num_queries, num_keys):
        sizes = (batch, heads, num_queries, num_keys)
        fits = tensor.dim() == 4 and all(
            size in (1, full) for size, full in zip(tensor.shape, sizes, strict=True)
        )
        if not fits:
            raise ValueError(
                f"attention_mask must be [{batch}, {num_keys}], [{num_queries}, {num_keys}] or broadcast to "
                f"{list(sizes)}; got {list(given.shape)}"
            )
    if tensor.dtype.is_floating_point:
        return Full(), _additive(tensor[:, None, None] if keys_only else tensor)
    allowed = tensor != 0
    if keys_only:
        ranges = _ranges(allowed)
        if ranges is not None:
            return Padding(ranges), None
        allowed = allowed[:, None, None]
    return Full(), torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def read_position_bias(
    given: PositionBias | None, bias: Tensor | None, *, queries: Tensor, keys: Tensor
) -> Tensor | None:
    """``bias`` and what positions add to it, broadcasting to ``[B, H, n, m]``, or None.

    Args:
        given: a tensor, whose keys beyond the last m are cut at the front, or a function of positions.
        queries: absolute positions ``[n]``; keys ``[m]``.
    """
    if given is None:
        return bias
    if not isinstance(given, Tensor):
        given = given(queries, keys)
    elif given.shape[-1] > len(keys):
        given = given[..., -len(keys) :]
    return given if bias is None else bias + given


def _additive(tensor: Tensor) -> Tensor:
    if bool(((tensor == 0) | (tensor == 1)).all()) and bool((tensor == 1).any()):
        raise ValueError(
            "attention_mask of floats holds only 0 and 1, which may mean keep or add: pass bool or integers "
            "(1 = attend), or 0 and -inf to be added"
        )
    # the lowest finite number stands for forbidden; added to scores it would leave a dead row the mean of all values
    return tensor.masked_fill(tensor <= torch.finfo(tensor.dtype).min, -torch.inf)


def _ranges(allowed: Tensor) -> tuple[tuple[int, int], ...] | None:
    """The key range of each sequence, or None where one has holes."""
    counts = allowed.sum(dim=1)
    first = allowed.int().argmax(dim=1)
    last = allowed.shape[1] - allowed.flip(1).int().argmax(dim=1)
    if not bool(((last - first == counts) | (counts == 0)).all()):
        return None
    empty = counts == 0
    pairs = torch.stack((first.masked_fill(empty, 0), last.masked_fill(empty, 0)), dim=1)
    return tuple((start, stop) for start, stop in pairs.tolist())
