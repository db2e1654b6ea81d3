"""The Triton kernels of absorbed latent attention: a split of the keys a program, and the merge. Needs triton.

All heads share one latent a token, so heads are the rows of a tile. A tile of latents is loaded once and serves as keys
and as values. DeepSeek-AI, "DeepSeek-V2", https://arxiv.org/abs/2405.04434.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false
import triton
import triton.language as tl
from triton import knobs

from attnlab_kernels.operations.triton_tiles import (
    fold_softmax,
    load_columns,
    load_rows,
    store_rows,
    within_band,
)

INTERPRETED = knobs.runtime.interpret


@triton.jit
def latent_decode_kernel(
    nope_ptr, rope_ptr, latent_ptr, key_rope_ptr, out_ptr, lse_ptr, ranges_ptr,
    stride_cb, stride_cn, stride_rb, stride_rn, stride_os, stride_ls,
    num_rows, num_queries, num_keys, split_keys, left, right, qk_scale,
    R: tl.constexpr, DR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_DR: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Rows are (head, query): ``nope`` [B, H * n, R] and ``rope`` [B, H * n, DR] contiguous.

    ``latent`` [B, m, R] and ``key_rope`` [B, m, DR]; ``out`` float32 [splits, B, H * n, R] with planes stride_os apart,
    ``lse`` float32 [splits, B, H * n], in powers of two.
    """
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < num_rows
    place = batch * num_rows + rows.to(tl.int64)
    nope = load_rows(nope_ptr, place, R, live, R, BLOCK_R)
    rope = load_rows(rope_ptr, place, DR, live, DR, BLOCK_DR)
    position = num_keys - num_queries + rows % num_queries
    lo = tl.maximum(tl.load(ranges_ptr + 2 * batch), split * split_keys)
    hi = tl.minimum(tl.load(ranges_ptr + 2 * batch + 1), (split + 1) * split_keys)
    if HAS_LEFT:
        lo = tl.maximum(lo, num_keys - num_queries - left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, num_keys + right)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for first in range(lo, hi, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        keys64 = keys.to(tl.int64)
        exists = keys < hi
        latent = load_rows(latent_ptr + batch * stride_cb, keys64, stride_cn, exists, R, BLOCK_R)
        key_rope = load_columns(key_rope_ptr + batch * stride_rb, keys64, stride_rn, exists, DR, BLOCK_DR)
        scores = tl.dot(rope, key_rope, input_precision="ieee")
        scores = tl.dot(nope, tl.trans(latent), scores, input_precision="ieee") * qk_scale
        keep = within_band(
            exists[None, :], position[:, None], keys[None, :], left, right, HAS_LEFT, HAS_RIGHT
        )
        scores = tl.where(keep, scores, float("-inf"))
        acc, row_max, row_sum = fold_softmax(acc, row_max, row_sum, scores, latent)
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    plane = split.to(tl.int64)
    tl.store(lse_ptr + plane * stride_ls + place, row_max + tl.math.log2(row_sum), mask=live)
    store_rows(out_ptr + plane * stride_os, place, acc / row_sum[:, None], live, R, BLOCK_R)


@triton.jit
def latent_merge_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, stride_os, stride_ls, splits,
    R: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Join the splits of one row: ``out`` [rows, R] and natural ``lse`` float32 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    highest = tl.full([], float("-inf"), tl.float32)
    for split in range(splits):
        highest = tl.maximum(highest, tl.load(part_lse_ptr + row + split * stride_ls))
    # a dead row: every part is minus infinity, and every share 0
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_R], tl.float32)
    for split in range(splits):
        share = tl.math.exp2(tl.load(part_lse_ptr + row + split * stride_ls) - shift)
        part = tl.load(parts_ptr + split * stride_os + row * R + offs_r, mask=offs_r < R, other=0.0)
        acc += share * part
        total += share
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse_ptr + row, (highest + tl.math.log2(total)) * 0.6931471805599453)
    tl.store(out_ptr + row * R + offs_r, (acc / total).to(out_ptr.dtype.element_ty), mask=offs_r < R)
