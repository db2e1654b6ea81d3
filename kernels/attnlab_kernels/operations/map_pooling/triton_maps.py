"""Map statistics and pooled maps by our Triton kernels. ``triton_kernel`` is loaded on first use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.map_pooling.results import ROWS, MapStatistics, PooledMap
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.softmax.triton_forward import all_ranges_of
from attnlab_kernels.operations.triton_platform import grid_refusal, load_kernels, padded, triton_support

KERNELS = "attnlab_kernels.operations.map_pooling.triton_kernel"
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Config:
    """Tile and launch numbers."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_config(block_d: int, element_size: int, interpreted: bool = False) -> Config:
    """Tile for a padded head dimension and the bytes of a number; a test compiles some for every target."""
    if interpreted:
        return Config(16, 16, 1, 1)
    if element_size == 4:
        return Config(32, 32, 4, 1) if block_d <= 64 else Config(16, 16, 4, 1)
    return Config(64, 64, 4, 2) if block_d <= 128 else Config(64, 32, 4, 2)


def statistics(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask, scale: float, bias: Tensor | None = None, sinks: int = 1
) -> MapStatistics:
    """``map_statistics``: rows in one pass over the tiles, columns in a second."""
    assert bias is None
    q, k = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k))
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    kernels, config = load_kernels(KERNELS), _config(q)
    rows = torch.empty(len(ROWS), batch, heads, num_queries, dtype=torch.float32, device=q.device)
    columns = torch.empty(2, batch, heads, num_keys, dtype=torch.float32, device=q.device)
    ranges, numbers, flags = _mask_arguments(q, k, mask)
    lse = lse.float().contiguous()
    strides = (*q.stride()[:3], *k.stride()[:3])
    factor = scale * math.log2(math.e)
    launch = _tile(q, config) | flags
    kernels.map_row_kernel[(-(-num_queries // config.block_m), batch * heads)](
        q, k, lse, rows, ranges, *strides, rows.stride(0), heads, heads // k.shape[1], num_queries, num_keys,
        *numbers, sinks, factor, **launch,
    )  # fmt: skip
    kernels.map_column_kernel[(-(-num_keys // config.block_n), batch * heads)](
        q, k, lse, columns[0], columns[1], ranges, *strides, heads, heads // k.shape[1], num_queries, num_keys,
        *numbers, factor, **launch,
    )  # fmt: skip
    return MapStatistics(*rows, column_sum=columns[0], column_max=columns[1])


def pool(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    cell: tuple[int, int],
) -> PooledMap:
    """``pooled_map`` in one pass."""
    assert bias is None
    q, k = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k))
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    kernels, config = load_kernels(KERNELS), _config(q)
    down, across = -(-num_queries // cell[0]), -(-num_keys // cell[1])
    maximum, mean = (
        torch.empty(batch, heads, down, across, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    ranges, numbers, flags = _mask_arguments(q, k, mask)
    patch_m, patch_n = max(cell[0], config.block_m), max(cell[1], config.block_n)
    kernels.map_pool_kernel[(-(-num_queries // patch_m), batch * heads)](
        q, k, lse.float().contiguous(), maximum, mean, ranges, *q.stride()[:3], *k.stride()[:3],
        heads, heads // k.shape[1], num_queries, num_keys, down, across, *numbers, scale * math.log2(math.e),
        CELL_M=cell[0], CELL_N=cell[1], PATCH_M=patch_m, PATCH_N=patch_n, **_tile(q, config), **flags,
    )  # fmt: skip
    return PooledMap(maximum, mean)


def supports(q: Tensor, k: Tensor, *, bias: Tensor | None, cell: tuple[int, int] | None) -> Support:
    """Every mask; no bias; cells with sides that are powers of two."""
    support = triton_support(q)
    if not support:
        return support
    if bias is not None:
        return Support(False, "the Triton map kernels take no bias")
    if q.shape[-1] > MAX_HEAD_DIM:
        return Support(
            False, f"the Triton map kernels hold head dimensions to {MAX_HEAD_DIM}; got {q.shape[-1]}"
        )
    if refusal := grid_refusal(q):
        return Support(False, refusal)
    if k.dtype != q.dtype:
        return Support(False, f"the Triton map kernels need one dtype; got {q.dtype} and {k.dtype}")
    if cell is not None and any(side & (side - 1) for side in cell):
        return Support(False, f"the Triton map kernels pool cells with sides of powers of two; got {cell}")
    return support


def _config(q: Tensor) -> Config:
    interpreted = q.device.type == "cpu"
    return choose_config(padded(q.shape[-1]), q.element_size(), interpreted)


def _tile(q: Tensor, config: Config) -> dict[str, int]:
    return {
        "D": q.shape[-1],
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _mask_arguments(q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
    """Key ranges int32 ``[B, 2]``, how far a query sees to the left and right, and which of these bounds it."""
    band = mask.band()
    ranges = all_ranges_of(mask, q.shape[0], k.shape[2], q.device)
    flags = {"HAS_LEFT": band.left is not None, "HAS_RIGHT": band.right is not None}
    return ranges, (band.left or 0, band.right or 0), flags
