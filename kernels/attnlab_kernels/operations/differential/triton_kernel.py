"""The Triton kernel of differential attention, forward: two softmaxes over one pass. Importing this needs triton.

Two calls of an attention kernel read the values twice. Here one program keeps two running maxima, sums and outputs for
a block of queries, reads each tile of values once, and subtracts at the end.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false
import triton
import triton.language as tl
from triton import knobs

from attnlab_kernels.operations.triton_tiles import (
    close_softmax,
    fold_softmax,
    load_columns,
    load_rows,
    store_rows,
    within_band,
)

INTERPRETED = knobs.runtime.interpret


@triton.jit
def difference_forward_kernel(
    q1_ptr, q2_ptr, k1_ptr, k2_ptr, v_ptr, weight_ptr, out_ptr, lse1_ptr, lse2_ptr, second_ptr, ranges_ptr,
    stride_q1b, stride_q1h, stride_q1m, stride_q2b, stride_q2h, stride_q2m,
    stride_k1b, stride_k1h, stride_k1n, stride_k2b, stride_k2h, stride_k2n, stride_vb, stride_vh, stride_vn,
    stride_wb, stride_wh, stride_wm,
    heads, group, num_queries, num_keys, left, right, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SHARED_KEY: tl.constexpr, KEEP_SECOND: tl.constexpr,
):  # fmt: skip
    """``qk_scale`` is scale * log2(e); ``out`` [B, H, Sq, DV] and both ``lse`` float32 [B, H, Sq] are contiguous.

    KEEP_SECOND stores the second map's output too, float32, which the backward needs.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    key_head = head // group
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    rows64 = rows.to(tl.int64)
    offset = num_keys - num_queries
    position = rows + offset
    live = rows < num_queries
    q1_base = q1_ptr + batch * stride_q1b + head * stride_q1h
    q2_base = q2_ptr + batch * stride_q2b + head * stride_q2h
    q1 = load_rows(q1_base, rows64, stride_q1m, live, D, BLOCK_D)
    q2 = load_rows(q2_base, rows64, stride_q2m, live, D, BLOCK_D)
    k1_base = k1_ptr + batch * stride_k1b + key_head * stride_k1h
    k2_base = k2_ptr + batch * stride_k2b + key_head * stride_k2h
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh
    lo = tl.load(ranges_ptr + 2 * batch)
    hi = tl.load(ranges_ptr + 2 * batch + 1)
    if HAS_LEFT:
        lo = tl.maximum(lo, offset + first_row - left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, offset + tl.minimum(first_row + BLOCK_M, num_queries) + right)
    acc1 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    max1 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    max2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum1 = tl.zeros([BLOCK_M], tl.float32)
    sum2 = tl.zeros([BLOCK_M], tl.float32)
    for first in range(lo, hi, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        keys64 = keys.to(tl.int64)
        exists = keys < hi
        k1 = load_columns(k1_base, keys64, stride_k1n, exists, D, BLOCK_D)
        v = load_rows(v_base, keys64, stride_vn, exists, DV, BLOCK_DV)
        keep = within_band(
            exists[None, :], position[:, None], keys[None, :], left, right, HAS_LEFT, HAS_RIGHT
        )
        scores = tl.where(keep, tl.dot(q1, k1, input_precision="ieee") * qk_scale, float("-inf"))
        acc1, max1, sum1 = fold_softmax(acc1, max1, sum1, scores, v)
        if SHARED_KEY:
            k2 = k1
        else:
            k2 = load_columns(k2_base, keys64, stride_k2n, exists, D, BLOCK_D)
        scores = tl.where(keep, tl.dot(q2, k2, input_precision="ieee") * qk_scale, float("-inf"))
        acc2, max2, sum2 = fold_softmax(acc2, max2, sum2, scores, v)
    weight = tl.load(
        weight_ptr + batch * stride_wb + head * stride_wh + rows64 * stride_wm, mask=live, other=0.0
    )
    # a dead row is dead in both: its outputs are zero, its maxima minus infinity
    sum1, lse1 = close_softmax(max1, sum1)
    sum2, lse2 = close_softmax(max2, sum2)
    place = (batch * heads + head) * num_queries + rows64
    if KEEP_SECOND:
        store_rows(second_ptr, place, acc2 / sum2[:, None], live, DV, BLOCK_DV)
    out = acc1 / sum1[:, None] - (weight / sum2)[:, None] * acc2
    tl.store(lse1_ptr + place, lse1, mask=live)
    tl.store(lse2_ptr + place, lse2, mask=live)
    store_rows(out_ptr, place, out, live, DV, BLOCK_DV)
