"""Neighborhood attention on one or two axes by our Triton kernels, which load on first use."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.neighborhood import Indices, Neighborhood, inverse_limits
from attnlab_kernels.operations.neighborhood.reference import Result
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.triton_platform import grid_refusal, load_kernels, padded, triton_support

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
    if block_d > 128:
        return Config(*tile, 16, 8, 2)
    return Config(*tile, 64 if block_d < 128 else 32, 4, 2)


def choose_gradient_config(axes: int, block_d: int, element_size: int) -> Config:
    """Tile of both kernels of the backward."""
    if element_size == 4:
        return Config(*((1, 16) if axes == 1 else (4, 4)), 16, 4, 1)
    tile = (1, 32) if axes == 1 else (4, 8)
    return Config(*tile, 32, 4 if block_d <= 128 else 8, 1)


@dataclass(frozen=True, eq=False)
class Grid:
    """One or two axes as the kernels see them: a line is a grid of height 1. What is made of it is made once."""

    height: int
    width: int
    dilation: tuple[int, int]
    limits: tuple[tuple[Indices, Indices], ...]

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, neighborhood: Neighborhood) -> Grid:
        """The grid with the windows of its queries."""
        if len(neighborhood.space) == 2:
            height, width = neighborhood.space
            along, across = neighborhood.dilation
            return cls(height, width, (along, across), neighborhood.limits)
        line = (np.zeros(1, np.int64), np.ones(1, np.int64))
        return cls(1, neighborhood.space[0], (1, neighborhood.dilation[0]), (line, *neighborhood.limits))

    @cached_property
    def inverse(self) -> Grid:
        """The grid with the queries of each key for windows."""
        pairs = zip(self.limits, self.dilation, strict=True)
        return replace(self, limits=tuple(inverse_limits(*limits, step) for limits, step in pairs))

    def tables(self, device: torch.device) -> list[Tensor]:
        """First and count of each axis, int32."""
        return _tables(self, device)

    def tiles(self, config: Config) -> tuple[int, int]:
        """Rectangles of a residue class: how many, and how many side by side."""
        down = math.ceil(math.ceil(self.height / self.dilation[0]) / config.tile_y)
        beside = math.ceil(math.ceil(self.width / self.dilation[1]) / config.tile_x)
        return down * beside, beside


@lru_cache(maxsize=32)
def _tables(grid: Grid, device: torch.device) -> list[Tensor]:
    """Kept: to copy them anew would be timed with the attention."""
    parts = (np.ascontiguousarray(table, np.int32) for axis in grid.limits for table in axis)
    return [torch.from_numpy(part).to(device) for part in parts]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighborhood: Neighborhood,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
) -> Result:
    """Attend from every pixel ``[B, H, *space, D]`` to its window, with a gradient where one is asked for."""
    grid = Grid.of(neighborhood)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    seen = None if visible is None else visible.flatten(1).to(torch.uint8).contiguous()
    flat = [tensor.flatten(2, -2).contiguous() for tensor in (q, k, v)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat):
        from attnlab_kernels.operations.neighborhood.triton_backward import run_with_gradient

        out, lse = run_with_gradient(flat[0], flat[1], flat[2], grid, factor, seen)
    else:
        out, lse = forward(flat[0], flat[1], flat[2], grid, factor, seen)
    return Result(out.unflatten(2, neighborhood.space), lse.unflatten(2, neighborhood.space), None)


def forward(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, scale: float, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, N, Dv]`` and log-sum-exp ``[B, H, N]`` of contiguous ``[B, H, N, D]``; ``seen`` uint8 [B, N]."""
    kernels = load_kernels(KERNELS)
    batch, heads, pixels, dim = q.shape
    value_dim = v.shape[-1]
    out = torch.empty(batch, heads, pixels, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, pixels, dtype=torch.float32, device=q.device)
    axes = 1 if grid.height == 1 else 2
    config = choose_config(axes, max(padded(dim), padded(value_dim)), q.element_size())
    tiles, beside = grid.tiles(config)
    kernels.neighborhood_forward_kernel[(tiles, math.prod(grid.dilation), batch * heads)](
        q, k, v, out, lse, *grid.tables(q.device), seen, heads, grid.height, grid.width, *grid.dilation, beside,
        scale * math.log2(math.e),
        D=dim, DV=value_dim, TILE_Y=config.tile_y, TILE_X=config.tile_x, BLOCK_N=config.block_n,
        BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim), HAS_VISIBLE=seen is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def supports(
    q: Tensor,
    v: Tensor,
    neighborhood: Neighborhood,
    *,
    bias: Tensor | None,
    dropout: float,
    need_windows: bool,
) -> Support:
    """One and two axes, every window, head dimensions to 256; no bias, no weights by slot."""
    support = triton_support(q)
    if not support:
        return support
    if len(neighborhood.space) > 2:
        return Support(False, f"the Triton kernel has 1 or 2 axes; got {len(neighborhood.space)}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return Support(False, f"the Triton kernel holds head dimensions to {MAX_HEAD_DIM}; got {q.shape[-1]}")
    if refusal := grid_refusal(q):
        return Support(False, refusal)
    if bias is not None:
        return Support(False, "the Triton kernel takes no table of relative positions")
    if dropout or need_windows:
        return Support(False, "the Triton kernel keeps no weights: no dropout, no weights by window slot")
    return support
