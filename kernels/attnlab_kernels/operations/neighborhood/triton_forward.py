"""Neighborhood attention on one or two axes by our Triton kernel, forward. ``triton_kernel`` loads on first use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.neighborhood.reference import Result
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.triton_platform import load_kernels, padded, triton_support

KERNELS = "attnlab_kernels.operations.neighborhood.triton_kernel"
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Config:
    """Queries of a tile by axis, keys of a step, and launch numbers."""

    tile_y: int
    tile_x: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_config(axes: int, block_d: int, element_size: int) -> Config:
    """Tile for the number of axes, a padded head dimension and the bytes of a number."""
    if element_size == 4:
        tile = (1, 16) if axes == 1 else (4, 4)
        return Config(*tile, 16, 4, 1)
    tile = (1, 64) if axes == 1 else (8, 8)
    return Config(*tile, 64 if block_d <= 128 else 32, 4, 2)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighborhood: Neighborhood,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
) -> Result:
    """Attend from every pixel ``[B, H, *space, D]`` to its window."""
    kernels = load_kernels(KERNELS)
    space, axes = neighborhood.space, len(neighborhood.space)
    height, width = (1, *space) if axes == 1 else space
    dilation = (1, *neighborhood.dilation) if axes == 1 else neighborhood.dilation
    line = (np.zeros(1, np.int64), np.ones(1, np.int64))
    limits = (line, *neighborhood.limits) if axes == 1 else neighborhood.limits
    tables = [
        torch.from_numpy(np.ascontiguousarray(table, np.int32)).to(q.device)
        for axis in limits
        for table in axis
    ]
    batch, heads, dim, value_dim = *q.shape[:2], q.shape[-1], v.shape[-1]
    q, k, v = (tensor.flatten(2, -2).contiguous() for tensor in (q, k, v))
    out = torch.empty(batch, heads, height * width, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, height * width, dtype=torch.float32, device=q.device)
    seen = None if visible is None else visible.flatten(1).to(torch.uint8).contiguous()
    config = choose_config(axes, max(padded(dim), padded(value_dim)), q.element_size())
    tiles_y = math.ceil(math.ceil(height / dilation[0]) / config.tile_y)
    tiles_x = math.ceil(math.ceil(width / dilation[1]) / config.tile_x)
    factor = dim**-0.5 if scale is None else scale
    kernels.neighborhood_forward_kernel[(tiles_y * tiles_x, dilation[0] * dilation[1], batch * heads)](
        q, k, v, out, lse, *tables, seen, heads, height, width, *dilation, tiles_x, factor * math.log2(math.e),
        D=dim, DV=value_dim, TILE_Y=config.tile_y, TILE_X=config.tile_x, BLOCK_N=config.block_n,
        BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim), HAS_VISIBLE=seen is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return Result(out.unflatten(2, space), lse.unflatten(2, space), None)


def supports(
    q: Tensor,
    v: Tensor,
    neighborhood: Neighborhood,
    *,
    bias: Tensor | None,
    dropout: float,
    need_windows: bool,
    need_grad: bool,
) -> Support:
    """One and two axes, every window, head dimensions to 256; forward only, no bias, no weights by slot."""
    support = triton_support(q)
    if not support:
        return support
    if len(neighborhood.space) > 2:
        return Support(False, f"the Triton kernel has 1 or 2 axes; got {len(neighborhood.space)}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return Support(False, f"the Triton kernel holds head dimensions to {MAX_HEAD_DIM}; got {q.shape[-1]}")
    if bias is not None:
        return Support(False, "the Triton kernel takes no table of relative positions")
    if dropout or need_windows:
        return Support(False, "the Triton kernel keeps no weights: no dropout, no weights by window slot")
    if need_grad:
        return Support(False, "the Triton kernel has no backward")
    return support
