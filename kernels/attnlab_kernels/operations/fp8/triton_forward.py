"""Attention in e4m3 with block scales by our Triton kernel; rotation and quantization happen outside of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.fp8.quantize import quantize
from attnlab_kernels.operations.fp8.reference import Fp8Attention, quantize_scores
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.softmax.triton_config import Config
from attnlab_kernels.operations.softmax.triton_forward import ranges_of
from attnlab_kernels.operations.triton_platform import grid_refusal, load_kernels, padded, triton_support

KERNELS = "attnlab_kernels.operations.fp8.triton_kernel"
BLOCK_SIZES = (32, 64, 128)
MAX_HEAD_DIM = 256


def choose_config(block_d: int, block_size: int) -> Config:
    """Tile for a padded head dimension; a tile of keys is one block of one scale."""
    rows = min(128 if block_d <= 64 else 64, block_size)
    few = block_d <= 64 or (block_size == 32 and block_d <= 128)
    return Config(rows, block_size, 4 if few and block_size < 128 else 8, 2)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    block_size: int = 128,
    rotated: bool = True,
    seed: int = 0,
) -> Fp8Attention:
    """As ``reference.run`` without a bias, on the tensor cores."""
    kernels = load_kernels(KERNELS)
    query, key = quantize_scores(q, k, mask=mask, block_size=block_size, rotated=rotated, seed=seed)
    value = quantize(lower.hide_padding(v, mask), block_size)
    batch, heads, num_queries, dim = query.values.shape
    kv_heads, num_keys, value_dim = k.shape[1], k.shape[2], v.shape[-1]
    wide = -(-num_keys // 16) * 16
    # e4m3 cannot be padded itself, its bytes can
    bytes_ = functional.pad(value.values.view(torch.uint8).transpose(-1, -2), (0, wide - num_keys))
    turned = bytes_.contiguous().view(value.values.dtype)
    out = torch.empty(batch, heads, num_queries, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    band, ranges = mask.band(), ranges_of(mask, batch, num_keys, q.device)
    config = choose_config(max(padded(dim, 32), padded(value_dim)), block_size)
    kernels.fp8_forward_kernel[(-(-num_queries // config.block_m), batch * heads)](
        query.values.contiguous(), key.values.contiguous(), turned, query.scales.contiguous(), key.scales.contiguous(),
        value.scales.contiguous(), out, lse, ranges, heads, heads // kv_heads, num_queries, num_keys, wide,
        query.scales.shape[-1], key.scales.shape[-1], band.left or 0, band.right or 0, scale * math.log2(math.e),
        D=dim, DV=value_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SCALE_ROWS=block_size,
        BLOCK_D=padded(dim, 32), BLOCK_DV=padded(value_dim), HAS_LEFT=band.left is not None,
        HAS_RIGHT=band.right is not None, HAS_RANGES=ranges is not None, EMULATED=kernels.INTERPRETED,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return Fp8Attention(out, lse, query, key, value)


def supports(q: Tensor, v: Tensor, *, bias: Tensor | None, block_size: int | None) -> Support:
    """Hopper or newer (Ampere has no eight-bit products), block scales of 32, 64 or 128 rows, no bias, no gradient."""
    able = triton_support(q, oldest=(9, 0), dtypes=(torch.float32, torch.float16, torch.bfloat16))
    if not able:
        return able
    if block_size not in BLOCK_SIZES:
        choices = ", ".join(map(str, BLOCK_SIZES))
        return Support(False, f"the FP8 kernel needs a scale for every {choices} rows; got {block_size}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return Support(False, f"the FP8 kernel holds head dimensions to {MAX_HEAD_DIM}; got {q.shape[-1]}")
    if max(q.shape[-1], v.shape[-1]) > 128 and block_size == 128:
        return Support(
            False, "256 dimensions leave the FP8 kernel no registers for scales of 128 rows; use 64"
        )
    if refusal := grid_refusal(q):
        return Support(False, refusal)
    if bias is not None:
        return Support(False, "the FP8 kernel takes no bias")
    return Support(True, able.reason or "e4m3 on the tensor cores")
