"""Training through the one-pass kernel of differential attention: the launchers of its backward.

The forward keeps the second map's output, from which both row terms and the gradient of the weight follow.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.differential.reference import Pair
from attnlab_kernels.operations.differential.triton_forward import Config, forward
from attnlab_kernels.operations.softmax.triton_forward import all_ranges_of
from attnlab_kernels.operations.triton_platform import load_kernels, padded

KERNELS = "attnlab_kernels.operations.differential.triton_backward_kernel"


def choose_query_config(block_d: int, block_dv: int, element_size: int) -> Config:
    """Tile of the kernel of dQ1 and dQ2; a test compiles every one for every target."""
    widest = max(block_d, block_dv)
    if element_size == 4:
        return Config(16, 16, 4 if widest <= 64 else 8, 1)
    return Config(32, 32, 4 if widest <= 128 else 8, 1)


def choose_key_config(block_d: int, block_dv: int, element_size: int) -> Config:
    """Tile of the kernel of dK1, dK2 and dV: ``block_n`` keys, ``block_m`` queries at a time."""
    widest = max(block_d, block_dv)
    if element_size == 4:
        return Config(16, 16, 4 if widest <= 32 else 8, 1)
    if min(block_d, block_dv) > 128:
        return Config(16, 32, 8, 1)
    return Config(32, 32, 4 if widest <= 64 else 8, 1)


def run_with_gradient(
    query: Pair, key: Pair, value: Tensor, weight: Tensor, *, mask: Mask, scale: float
) -> tuple[Tensor, Pair]:
    """As ``triton_forward.run``, with gradients of queries, keys, values and the weight."""
    wide = weight.float().expand(query.first.shape[:3])
    output, first, second = _Difference.apply(*query, *key, value, wide, (mask, scale))
    return output, Pair(first, second)


class _Difference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q1: Tensor,
        q2: Tensor,
        k1: Tensor,
        k2: Tensor,
        v: Tensor,
        weight: Tensor,
        terms: tuple[Mask, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask, scale = terms
        second = torch.empty(*q1.shape[:3], v.shape[-1], dtype=torch.float32, device=q1.device)
        output, lse = forward(
            Pair(q1, q2), Pair(k1, k2), v, weight, mask=mask, scale=scale, second_output=second
        )
        ctx.save_for_backward(q1, q2, k1, k2, v, weight, output, second, *lse)
        ctx.terms = terms
        ctx.mark_non_differentiable(*lse)
        return output, lse.first, lse.second

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q1, q2, k1, k2, v, weight, output, second, lse1, lse2 = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        delta2 = (gradient.float() * second).sum(-1)
        delta1 = (gradient.float() * output.float()).sum(-1) + weight * delta2
        weight = weight.contiguous()
        parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (q1, q2, k1, k2, v)]
        rows = (gradient, weight, lse1, lse2, delta1, delta2)
        return *_gradients(parts, rows, *ctx.terms), -delta2, None


def _gradients(
    parts: list[Tensor], rows: tuple[Tensor, ...], mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = load_kernels(KERNELS)
    q1, k1, v = parts[0], parts[2], parts[4]
    batch, heads, num_queries, dim = q1.shape
    kv_heads, num_keys, value_dim = k1.shape[1], k1.shape[2], v.shape[-1]
    band = mask.band()
    strides = [step for part in (*parts, rows[0]) for step in part.stride()[:3]]
    numbers = [heads // kv_heads, num_queries, num_keys, band.left or 0, band.right or 0]
    numbers += [scale, scale * math.log2(math.e)]
    ranges = all_ranges_of(mask, batch, num_keys, q1.device)
    sizes = (padded(dim), padded(value_dim), q1.element_size())
    dq1, dq2, dk1, dk2, dv = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in parts)
    constants = {
        "D": dim,
        "DV": value_dim,
        "BLOCK_D": padded(dim),
        "BLOCK_DV": padded(value_dim),
        "HAS_LEFT": band.left is not None,
        "HAS_RIGHT": band.right is not None,
    }
    config = choose_query_config(*sizes)
    kernels.difference_query_gradient_kernel[(-(-num_queries // config.block_m), batch * heads)](
        *(*parts, *rows, dq1, dq2, ranges, *strides, heads, *numbers), **constants, **config.launch
    )
    config = choose_key_config(*sizes)
    kernels.difference_key_gradient_kernel[(-(-num_keys // config.block_n), batch * kv_heads)](
        *(*parts, *rows, dk1, dk2, dv, ranges, *strides, kv_heads, *numbers), **constants, **config.launch
    )
    return dq1, dq2, dk1, dk2, dv
