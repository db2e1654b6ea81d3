"""The Triton forward for Hopper: tensor descriptors (TMA) and a producer warp split off. Importing this needs triton.

Shah et al., "FlashAttention-3", https://arxiv.org/abs/2407.08608, as far as stock Triton can say it: loads of whole
tiles move to warps of their own; two consumers in turn (ping-pong) cannot be asked for. The compiler splits the warps
only with num_warps=4, and ignores the request in silence otherwise: a test reads the compiled code.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = knobs.runtime.interpret


@triton.jit
def softmax_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    heads,
    group,
    num_queries,
    num_keys,
    qk_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``out`` and ``lse`` are contiguous ``[B, H, Sq, D]`` and ``[B, H, Sq]``. Grid: query blocks, batch x heads."""
    first_row = tl.program_id(0) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    key_head = head // group
    offset = num_keys - num_queries
    q_rows = tl.make_tensor_descriptor(
        q_ptr + batch * stride_qb + head * stride_qh, [num_queries, D], [stride_qm, 1], [BLOCK_M, D]
    )
    k_rows = tl.make_tensor_descriptor(
        k_ptr + batch * stride_kb + key_head * stride_kh, [num_keys, D], [stride_kn, 1], [BLOCK_N, D]
    )
    v_rows = tl.make_tensor_descriptor(
        v_ptr + batch * stride_vb + key_head * stride_vh, [num_keys, D], [stride_vn, 1], [BLOCK_N, D]
    )
    rows = first_row + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    q = q_rows.load([first_row, 0])

    # one loop, with a mask in it where some tile needs one: the compiler fails on a second loop beside a split one
    hi = num_keys
    if CAUSAL:
        hi = tl.minimum(num_keys, tl.maximum(offset + first_row + BLOCK_M, 0))
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, hi, BLOCK_N, warp_specialize=True):
        k = k_rows.load([start, 0])
        v = v_rows.load([start, 0])
        scores = tl.dot(q, tl.trans(k))
        if MASKED:
            keys = start + offs_n
            keep = keys[None, :] < num_keys
            if CAUSAL:
                keep = keep & (keys[None, :] <= offset + rows[:, None])
            scores = tl.where(keep, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        weights = tl.math.exp2(scores * qk_scale - shift[:, None])
        decay = tl.math.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc)
        row_max = new_max

    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    live = rows < num_queries
    flat = (batch * heads + head) * num_queries + rows.to(tl.int64)
    tl.store(lse_ptr + flat, (row_max + tl.math.log2(row_sum)) * 0.6931471805599453, mask=live)
    out_ptrs = out_ptr + flat[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_ptrs, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])
