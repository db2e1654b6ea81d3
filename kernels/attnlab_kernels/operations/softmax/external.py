"""What the kernels of other packages share: finding them, what refuses them, and how their answers become ours.

None of them can run where this was written: their calls were checked against the signatures of their released sources,
with stand-ins of those signatures, and not on a GPU. All take ``[batch, tokens, heads, dim]`` by strides, so
``[batch, heads, tokens, dim]`` is handed over as a view and nothing is copied, unless a file says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.support import Modifiers, Support

HALF = (torch.float16, torch.bfloat16)


@cache
def find(module: str, symbol: str) -> tuple[Callable[..., Any] | None, str]:
    """The function itself, or None and why it cannot be imported; a package that is there but broken says so."""
    try:
        return getattr(import_module(module), symbol), ""
    except Exception as error:  # of a package that was built for another torch it may be anything
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"{module}.{symbol} cannot be imported: {words}"


def found(module: str, symbol: str) -> Callable[..., Any]:
    """The function; ``supports`` has said yes before."""
    function, reason = find(module, symbol)
    if function is None:
        raise RuntimeError(reason)
    return function


def version(package: str) -> str:
    """Installed version, or "unknown version" of a package without metadata."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package}, unknown version"


def card(q: Tensor) -> tuple[int, int] | None:
    """Compute capability of the tensor's CUDA device; None if it is not on one."""
    return torch.cuda.get_device_capability(q.device) if q.is_cuda else None


def shape_refusal(
    q: Tensor, v: Tensor, *, name: str, oldest: tuple[int, int], dims: range | tuple[int, ...]
) -> str:
    """Why a half-precision kernel with one head dimension cannot take these tensors; empty if it can."""
    capability = card(q)
    if capability is None:
        return f"{name} needs an NVIDIA GPU; the tensors are on {q.device.type}"
    if capability < oldest:
        needed, has = (".".join(map(str, pair)) for pair in (oldest, capability))
        return f"{name} needs compute capability {needed}; the device has {has}"
    if q.dtype not in HALF:
        return f"{name} takes float16 and bfloat16; got {str(q.dtype).removeprefix('torch.')}"
    if v.shape[-1] != q.shape[-1] or q.shape[-1] not in dims:
        allowed = f"a multiple of {dims.step} to {dims[-1]}" if isinstance(dims, range) else f"one of {dims}"
        return f"{name} takes one head dimension, {allowed}; got {q.shape[-1]} and {v.shape[-1]}"
    return ""


def call_refusal(
    *,
    name: str,
    mask: Mask,
    bias: Tensor | None,
    modifiers: Modifiers,
    need_grad: bool,
    softcap: bool = False,
    alibi: bool = False,
    trains: bool = True,
) -> str:
    """Why a kernel without these features cannot take the call; empty if it can. Sinks join afterwards."""
    if mask.band().ranges is not None:
        return f"{name} takes no padding mask here; pack the sequences, or use triton or flex"
    if bias is not None:
        return f"{name} takes no additive bias"
    if modifiers.softcap is not None and not softcap:
        return f"{name} takes no soft cap; got softcap {modifiers.softcap}"
    if modifiers.alibi is not None and not alibi:
        return f"{name} takes no ALiBi slopes of the caller"
    if need_grad and not trains:
        return f"{name} is forward only here"
    if need_grad and any(part.requires_grad for part in modifiers.tensors):
        return f"{name} gives no gradient of slopes or sinks"
    if need_grad and modifiers.sinks is not None:
        return f"sinks join after {name}, without a gradient; use eager or triton"
    return ""


def verdict(reasons: list[str], note: str) -> Support:
    """The first reason there is, or yes with the note."""
    first = next((reason for reason in reasons if reason), "")
    return Support(not first, first or note)


def window(mask: Mask, unbounded: int | None) -> tuple[bool, tuple[int | None, int | None]]:
    """Whether the mask is causal alone, and its (left, right), with ``unbounded`` for a side without an end."""
    band = mask.band()
    sides = tuple(unbounded if side is None else side for side in (band.left, band.right))
    return band.left is None and band.right == 0, (sides[0], sides[1])


def tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``[B, tokens, heads, dim]`` as views of ``[B, heads, tokens, dim]``: what most kernels take, by its strides."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def settle(
    output: Tensor, lse: Tensor, mask: Mask, num_keys: int, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ours from theirs, ``[B, H, n, Dv]`` and ``[B, H, n]``: dead rows (infinity in some) and sinks."""
    return settle_rows(output, lse, mask.dead_rows(output.shape[2], num_keys), sinks)


def settle_rows(
    output: Tensor, lse: Tensor, dead_rows: NDArray[np.bool_], sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same, told which of the n rows see no key."""
    if dead_rows.any():
        dead = torch.from_numpy(dead_rows).to(output.device)
        output, lse = output.masked_fill(dead[:, None], 0), lse.masked_fill(dead, -torch.inf)
    return lower.add_sinks(output, lse, sinks)
