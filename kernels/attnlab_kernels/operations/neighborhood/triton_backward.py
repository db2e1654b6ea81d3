"""Training through our Triton kernel of neighborhood attention: the launchers of its backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.operations.neighborhood.triton_forward import Grid, choose_gradient_config, forward
from attnlab_kernels.operations.triton_platform import load_kernels, padded

KERNELS = "attnlab_kernels.operations.neighborhood.triton_backward_kernel"


def run_with_gradient(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, scale: float, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ``triton_forward.forward``, with gradients of q, k and v; the log-sum-exp is detached."""
    return _Windows.apply(q, k, v, seen, (grid, scale))


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, terms: tuple[Grid, float]
    ) -> tuple[Tensor, Tensor]:
        output, lse = forward(q, k, v, *terms, seen)
        ctx.save_for_backward(q, k, v, seen, output, lse)
        ctx.terms = terms
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, seen, output, lse = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        delta = (gradient.float() * output.float()).sum(-1)
        return *_gradients((q, k, v, gradient, lse, delta), seen, *ctx.terms), None, None


def _gradients(
    given: tuple[Tensor, ...], seen: Tensor | None, grid: Grid, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = load_kernels(KERNELS)
    q, k, v = given[:3]
    dq, dk, dv = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (q, k, v))
    batch, heads, _, dim = q.shape
    block_d, block_dv = padded(dim), padded(v.shape[-1])
    config = choose_gradient_config(1 if grid.height == 1 else 2, max(block_d, block_dv), q.element_size())
    tiles, beside = grid.tiles(config)
    size = (tiles, math.prod(grid.dilation), batch * heads)
    numbers = (heads, grid.height, grid.width, *grid.dilation, beside, scale, scale * math.log2(math.e))
    constants = {
        "D": dim,
        "DV": v.shape[-1],
        "TILE_Y": config.tile_y,
        "TILE_X": config.tile_x,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "HAS_VISIBLE": seen is not None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    kernels.neighborhood_query_gradient_kernel[size](
        *(*given, dq, *grid.tables(q.device), seen, *numbers), **constants
    )
    kernels.neighborhood_key_gradient_kernel[size](
        *(*given, dk, dv, *grid.inverse.tables(q.device), seen, *numbers), **constants
    )
    return dq, dk, dv
