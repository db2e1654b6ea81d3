"""Sparse attention along block lists by our Triton kernels, forward and backward; they are loaded on first use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.block_lists import BlockLists, key_lists, query_lists
from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.operations.softmax.lower import merge
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.softmax.triton_config import Config
from attnlab_kernels.operations.softmax.triton_forward import ranges_of
from attnlab_kernels.operations.sparse.reference import Result, check
from attnlab_kernels.operations.triton_platform import grid_refusal, load_kernels, padded, triton_support
from attnlab_kernels.patterns import Pattern

KERNELS = "attnlab_kernels.operations.sparse.triton_kernel"
SOFTMAX_BACKWARD = "attnlab_kernels.operations.softmax.triton_backward_kernel"
MAX_HEAD_DIM = 256
DELTA_ROWS = 16


def choose_config(block_d: int, element_size: int) -> Config:
    """Tile of the forward for a padded head dimension and the bytes of a number; a test compiles every one."""
    if element_size == 4:
        return Config(32, 16, 4, 1) if block_d <= 64 else Config(16, 16, 8, 1)
    return Config(64, 64 if block_d <= 64 else 32, 4 if block_d <= 128 else 8, 2)


def choose_query_config(block_d: int, element_size: int) -> Config:
    """Tile of the kernel of dQ."""
    if element_size == 4:
        return Config(16, 16, 4, 1)
    return Config(64, 32, 4, 2) if block_d <= 64 else Config(32, 32, 8 if block_d > 128 else 4, 1)


def choose_key_config(block_d: int, element_size: int) -> Config:
    """Tile of the kernel of dK and dV: ``block_n`` keys, ``block_m`` queries at a time."""
    if element_size == 4:
        return Config(16, 16, 4, 1)
    return Config(32, 64, 4, 2) if block_d <= 64 else Config(32, 32, 8 if block_d > 128 else 4, 1)


@dataclass(frozen=True)
class _Call:
    """What every launch of one call shares."""

    pattern: Pattern
    start: int
    scale: float
    mask: Mask


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    start: int | None = None,
    scale: float | None = None,
    mask: Mask | None = None,
) -> Result:
    """Attend along the pattern, with a gradient where one is asked for; arguments as in ``reference.run``."""
    start = k.shape[2] - q.shape[2] if start is None else start
    check(q, k, v, start)
    call = _Call(pattern, start, q.shape[-1] ** -0.5 if scale is None else float(scale), mask or Full())
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        return Result(*_Attention.apply(q, k, v, call))
    return Result(*_forward(q, k, v, call))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        output, lse = _forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.call = call
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        return *_backward(q, k, v, output, lse, gradients[0], ctx.call), None


def _forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    kernels = load_kernels(KERNELS)
    batch, heads, num_queries, _ = q.shape
    config, launch = _launched(choose_config, q, v, kernels.INTERPRETED)
    parts = []
    passes = _passes(query_lists, *_listed(call, q, k), (config.block_m, config.block_n), q.device)
    for lists, on_card in passes:
        out = torch.empty(
            batch,
            heads,
            num_queries,
            v.shape[-1],
            dtype=q.dtype if len(passes) == 1 else torch.float32,
            device=q.device,
        )
        lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
        kernels.sparse_forward_kernel[(lists.rows.shape[1], batch * heads)](
            *(q, k, v, out, lse, *on_card, _ranges(call, q, k)),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            *(heads, heads // k.shape[1], len(lists.rows), num_queries, *_band(call)),
            call.scale * math.log2(math.e),
            **_constants(call, q, v),
            **launch,
        )
        parts.append((out, lse))
    out, lse = merge(parts)
    return out.to(q.dtype), lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, gradient: Tensor, call: _Call
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = load_kernels(KERNELS)
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys, value_dim = k.shape[1], k.shape[2], v.shape[-1]
    delta = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    load_kernels(SOFTMAX_BACKWARD).softmax_delta_kernel[(-(-num_queries // DELTA_ROWS), batch * heads)](
        *(output, gradient, delta, *output.stride()[:3], *gradient.stride()[:3], heads, num_queries),
        DV=value_dim,
        BLOCK_M=DELTA_ROWS,
        BLOCK_DV=padded(value_dim),
        num_warps=4,
    )
    given = (q, k, v, gradient, lse, delta)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *gradient.stride()[:3])
    last = (*_band(call), call.scale, call.scale * math.log2(math.e))
    constants, group = _constants(call, q, v), heads // kv_heads
    config, launch = _launched(choose_query_config, q, v, kernels.INTERPRETED)
    dqs = []
    tile = (config.block_m, config.block_n)
    for lists, on_card in _passes(query_lists, *_listed(call, q, k), tile, q.device):
        dqs.append(torch.empty(q.shape, dtype=torch.float32, device=q.device))
        kernels.sparse_query_gradient_kernel[(lists.rows.shape[1], batch * heads)](
            *(*given, dqs[-1], *on_card, _ranges(call, q, k), *strides),
            *(heads, group, len(lists.rows), num_queries, *last),
            **constants,
            **launch,
        )
    config, launch = _launched(choose_key_config, q, v, kernels.INTERPRETED)
    dks, dvs = [], []
    tile = (config.block_n, config.block_m)
    for lists, on_card in _passes(key_lists, *_listed(call, q, k), tile, q.device):
        members = group if len(lists.rows) == 1 else 1
        programs = heads // members
        dk, dv = (
            torch.empty(batch, programs, num_keys, size, dtype=torch.float32, device=q.device)
            for size in (dim, value_dim)
        )
        kernels.sparse_key_gradient_kernel[(lists.rows.shape[1], batch * programs)](
            *(*given, dk, dv, *on_card, _ranges(call, q, k), *strides),
            *(programs, members, group, len(lists.rows), num_queries, num_keys, *last),
            **constants,
            **launch,
        )
        dks.append(dk.unflatten(1, (kv_heads, -1)).sum(2))
        dvs.append(dv.unflatten(1, (kv_heads, -1)).sum(2))
    return (
        sum(dqs[1:], dqs[0]).to(q.dtype),
        sum(dks[1:], dks[0]).to(k.dtype),
        sum(dvs[1:], dvs[0]).to(v.dtype),
    )


def _listed(call: _Call, q: Tensor, k: Tensor) -> tuple[Pattern, int, int, int, int]:
    return call.pattern, call.start, call.start + q.shape[2], k.shape[2], q.shape[1]


def _launched(choose: Any, q: Tensor, v: Tensor, interpreted: bool) -> tuple[Config, dict[str, int]]:
    config = choose(max(padded(q.shape[-1]), padded(v.shape[-1])), q.element_size())
    if interpreted:
        config = Config(min(config.block_m, 32), min(config.block_n, 32), 1, 1)
    return config, {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _constants(call: _Call, q: Tensor, v: Tensor) -> dict[str, Any]:
    band = call.mask.band()
    return {
        "D": q.shape[-1],
        "DV": v.shape[-1],
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_DV": padded(v.shape[-1]),
        "HAS_LEFT": band.left is not None,
        "HAS_RIGHT": band.right is not None,
        "HAS_RANGES": band.ranges is not None,
    }


def _band(call: _Call) -> tuple[int, int, int]:
    band = call.mask.band()
    return call.start, band.left or 0, band.right or 0


def _ranges(call: _Call, q: Tensor, k: Tensor) -> Tensor | None:
    return ranges_of(call.mask, q.shape[0], k.shape[2], q.device)


@lru_cache(maxsize=16)
def _passes(
    find: Callable[..., tuple[BlockLists, ...]],
    pattern: Pattern,
    start: int,
    stop: int,
    num_keys: int,
    heads: int,
    tile: tuple[int, int],
    device: torch.device,
) -> list[tuple[BlockLists, list[Tensor]]]:
    """The lists of each pass, and the same on the device: to copy them anew would be timed with the attention."""
    passes = find(pattern, start, stop, num_keys, heads, tile)
    return [(lists, [torch.from_numpy(part).to(device) for part in lists]) for lists in passes]


def supports(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, dropout: float) -> Support:
    """Every pattern, with ranges of keys and a band, forward and backward, head dimensions to 256."""
    able = triton_support(q)
    if not able:
        return able
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return Support(False, f"the Triton kernel holds head dimensions to {MAX_HEAD_DIM}; got {q.shape[-1]}")
    if refusal := grid_refusal(q):
        return Support(False, refusal)
    if bias is not None:
        return Support(False, "the Triton kernel takes no bias; use tiled")
    if dropout:
        return Support(False, f"the Triton kernel drops no probabilities; got dropout {dropout}; use tiled")
    if 0 in q.shape[:2]:
        return Support(False, "there is nothing to attend to")
    return Support(True, able.reason or "visits the blocks of the pattern and no others")
