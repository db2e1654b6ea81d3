"""Our own flash attention in Triton: the launcher. The kernels are loaded on first use.

A few query rows (decoding) are packed over the heads of a group and their keys are split over programs. On a CPU it
runs only under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnlab_kernels.masks import Band, Mask
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support
from attnlab_kernels.operations.softmax.triton_config import (
    MEDIUM_ROWS,
    Config,
    choose_config,
    choose_splits,
)
from attnlab_kernels.operations.triton_platform import grid_refusal, load_kernels, padded, triton_support

MAX_HEAD_DIM = 256
LOG2E = math.log2(math.e)
# the interpreter has no multiprocessors; as many as make it split a short sequence
SIMULATED_MULTIPROCESSORS = 4
KERNELS = "attnlab_kernels.operations.softmax.triton_kernel"


class Size(NamedTuple):
    """Of a call, or of the longest of packed sequences."""

    batch: int
    num_queries: int
    num_keys: int
    kv_heads: int


@dataclass(frozen=True)
class Plan:
    """How one call is cut: heads that share a row block, shares of the keys, and the tile."""

    pack: int
    splits: int
    config: Config


def plan(
    q: Tensor, size: Size, value_dim: int, modified: bool, limited: bool = False, paged: bool = False
) -> Plan:
    """The cut for queries of any layout with heads second and D last."""
    heads = q.shape[1]
    group = heads // size.kv_heads
    pack = group if group > 1 and size.num_queries <= MEDIUM_ROWS else 1
    rows = size.num_queries * pack
    cores = SIMULATED_MULTIPROCESSORS
    if q.device.type == "cuda":
        cores = torch.cuda.get_device_properties(q.device).multi_processor_count
    block_d = max(padded(q.shape[-1]), padded(value_dim))
    config = choose_config(block_d, q.element_size(), rows, capability_of(q), modified, limited, paged)
    if q.device.type != "cuda":
        config = Config(min(config.block_m, 32), min(config.block_n, 32), 1, 1)
    programs = -(-rows // config.block_m) * size.batch * heads // pack
    splits = 1
    if rows <= MEDIUM_ROWS:
        splits = choose_splits(programs, size.num_keys // config.block_n, cores)
    return Plan(pack, splits, config)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    modifiers: Modifiers = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Attend with our kernels, with a gradient where one is asked for."""
    parts = (q, k, v, *modifiers.tensors)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        from attnlab_kernels.operations.softmax.triton_backward import run_with_gradient

        return run_with_gradient(q, k, v, mask=mask, scale=scale, bias=bias, modifiers=modifiers)
    return forward(q, k, v, mask=mask, scale=scale, bias=bias, modifiers=modifiers)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    modifiers: Modifiers = PLAIN,
) -> tuple[Tensor, Tensor]:
    """The forward alone; the last dimension of q, k and v is made contiguous if it is not."""
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    batch, heads, num_queries, _ = q.shape
    kv_heads, num_keys, value_dim = k.shape[1], k.shape[2], v.shape[-1]
    modified = bias is not None or modifiers.softcap is not None or modifiers.alibi is not None
    size = Size(batch, num_queries, num_keys, kv_heads)
    limits, _ = limits_of(mask, batch, num_queries, num_keys, q.device)
    cut = plan(q, size, value_dim, modified, limits is not None)
    out = torch.empty(batch, heads, num_queries, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    launch(
        q,
        k,
        v,
        out,
        lse,
        cut,
        size,
        mask=mask,
        scale=scale,
        modifiers=modifiers,
        ranges=ranges_of(mask, batch, num_keys, q.device) if limits is None else None,
        limits=limits,
        bias=None if bias is None else bias.expand(batch, heads, num_queries, num_keys),
    )
    return out, lse


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cut: Plan,
    size: Size,
    *,
    mask: Mask,
    scale: float,
    modifiers: Modifiers,
    ranges: Tensor | None = None,
    limits: Tensor | None = None,
    bias: Tensor | None = None,
    key_strides: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    starts: tuple[Tensor, Tensor] | None = None,
    table: Tensor | None = None,
    page: int = 0,
) -> None:
    """Write contiguous ``out [B, H, n, Dv]`` and ``lse [B, H, n]``, or packed ``[T, H, Dv]`` and ``[T, H]``.

    Packed sequences have ``starts``, and ``size`` is then the longest sequence's.

    Args:
        limits: keys of each query, see ``limits_of``; the mask is then not read.
        bias: expanded to ``[B, H, n, m]``.
        key_strides: (batch, head, token, page) of k and of v, if they are not ``[B, Hkv, Sk, D]``.
        starts: int32 cuts of the queries, and cuts (or, with a table, lengths) of the keys.
        table: int32 ``[B, blocks]``; ``page`` tokens a block.
    """
    kernels = load_kernels(KERNELS)
    heads, dim, value_dim = q.shape[1], q.shape[-1], v.shape[-1]
    config = cut.config
    band = mask.form() if limits is None else Band()
    strides_k, strides_v = key_strides or ((*k.stride()[:3], 0), (*v.stride()[:3], 0))
    target, target_lse = (out[None], lse[None]) if cut.splits == 1 else _parts(out, lse, cut.splits)
    bias_strides = (0, 0, 0, 0) if bias is None else bias.stride()
    programs = heads // cut.pack
    grid = (-(-size.num_queries * cut.pack // config.block_m), size.batch * programs, cut.splits)
    softcap = modifiers.softcap
    kernels.softmax_forward_kernel[grid](
        *(q, k, v, target, target_lse, ranges, limits),
        *(as_float(modifiers.alibi), as_float(modifiers.sinks), bias),
        *(starts or (None, None)),
        table,
        *_row_strides(q),
        *strides_k[:3],
        *strides_v[:3],
        *_row_strides(target[0]),
        target.stride(0),
        *_row_strides(target_lse[0, ..., None]),
        target_lse.stride(0),
        *bias_strides,
        2 * size.num_queries if limits is not None and len(limits) > 1 else 0,
        0 if table is None else table.stride(0),
        strides_k[3],
        strides_v[3],
        programs,
        heads // size.kv_heads,
        size.num_queries,
        size.num_keys,
        band.left or 0,
        band.right or 0,
        cut.splits,
        scale * LOG2E,
        (softcap or 0.0) * LOG2E,
        D=dim,
        DV=value_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=padded(dim),
        BLOCK_DV=padded(value_dim),
        PACK=cut.pack,
        PAGE=page,
        VARLEN=starts is not None,
        HAS_LEFT=band.left is not None,
        HAS_RIGHT=band.right is not None,
        HAS_RANGES=ranges is not None,
        HAS_LIMITS=limits is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_ALIBI=modifiers.alibi is not None,
        HAS_BIAS=bias is not None,
        HAS_SINKS=modifiers.sinks is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if cut.splits > 1:
        _merge(target, target_lse, out, lse, kernels)


def _row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Batch, head and token of ``[B, H, n, D]``, or of packed ``[tokens, H, D]``."""
    if tensor.dim() == 3:
        return 0, tensor.stride(1), tensor.stride(0)
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _parts(out: Tensor, lse: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device),
        torch.empty(splits, *lse.shape, dtype=torch.float32, device=out.device),
    )


def _merge(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, kernels: Any) -> None:
    """Join the shares into ``out`` and ``lse``, which are contiguous and in the same order."""
    rows, value_dim = lse.numel(), out.shape[-1]
    block = 16
    kernels.softmax_merge_kernel[(-(-rows // block),)](
        parts,
        part_lse,
        out,
        lse,
        rows,
        parts.shape[0],
        DV=value_dim,
        BLOCK_M=block,
        BLOCK_DV=padded(value_dim),
        num_warps=4,
    )


def as_float(tensor: Tensor | None) -> Tensor | None:
    """One float32 a head, contiguous, as the kernels read it."""
    return None if tensor is None else tensor.detach().float().contiguous()


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Tensor | None,
    modifiers: Modifiers,
    need_grad: bool,
) -> Support:
    """Any mask, soft cap, ALiBi, bias and sinks, any head dimension to 256; no gradient of a bias or of slopes."""
    able = triton_support(q)
    if not able:
        return able
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return Support(False, f"the Triton kernel holds head dimensions to {MAX_HEAD_DIM}; got {q.shape[-1]}")
    if refusal := grid_refusal(q):
        return Support(False, refusal)
    if need_grad and any(part is not None and part.requires_grad for part in (bias, modifiers.alibi)):
        return Support(False, "the Triton backward gives no gradient of a bias or of slopes; use eager")
    if q.device.type != "cuda":
        return able
    return Support(True, "skips tiles outside the mask")


def capability_of(q: Tensor) -> int:
    """Compute capability whose tiles the tensor's card takes, as 10 * major + minor; 80 on a CPU.

    Cards of 12.x (RTX 50, GB10) have the matrix instructions and the 99 KiB of shared memory of 8.6, not 10.0's.
    """
    if q.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(q.device)
    return 80 if major >= 12 else 10 * major + minor


def ranges_of(mask: Mask, batch: int, num_keys: int, device: torch.device) -> Tensor | None:
    """Keys ``[start, stop)`` that exist for each batch element, int32 ``[B, 2]``; None where all do."""
    return None if mask.form().ranges is None else all_ranges_of(mask, batch, num_keys, device)


@lru_cache(maxsize=16)
def all_ranges_of(mask: Mask, batch: int, num_keys: int, device: torch.device) -> Tensor:
    """The same also where every key exists. Kept: to copy it anew would wait for the card, and end a graph capture."""
    band = mask.form()
    rows = [band.key_interval(num_keys, index if band.ranges else 0) for index in range(batch)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def limits_of(
    mask: Mask, batch: int, num_queries: int, num_keys: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Keys of each query and queries of each key, for a mask with documents; None where one band says it all.

    Both are int32 ``[1 or B, 2, .]``: the first, and one past the last. Nothing is visited outside of them, and they
    grow with the tokens, not with the pairs.
    """
    band = mask.form()
    if band.documents is None:
        return None, None
    every = [
        np.stack(
            band.row_limits(np.arange(num_queries), num_queries=num_queries, num_keys=num_keys, batch=index)
        )
        for index in range(batch if band.batch_size > 1 else 1)
    ]
    reach = [_reach(first, last, num_keys) for first, last in every]
    limits, reached = (
        torch.from_numpy(np.stack(part).astype(np.int32)).to(device) for part in (every, reach)
    )
    return limits, reached


def _reach(first: NDArray[np.int64], last: NDArray[np.int64], num_keys: int) -> NDArray[np.int64]:
    """First query and one past the last whose ``first <= key < last``, of every key ``[2, Sk]``; the limits rise."""
    live = np.flatnonzero(first < last)
    keys = np.arange(num_keys)
    start = np.searchsorted(last[live], keys, side="right")
    stop = np.searchsorted(first[live], keys, side="right")
    rows = np.append(live, 0)
    seen = start < stop
    return np.stack((np.where(seen, rows[start], len(first)), np.where(seen, rows[stop - 1] + 1, 0)))
