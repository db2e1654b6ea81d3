"""The Triton kernels of softmax attention, backward. Importing this needs triton.

FlashAttention-2 (Dao, https://arxiv.org/abs/2307.08691), without atomic additions: one kernel walks the keys of a block
of queries and adds up dQ, the other walks the queries of a block of keys, head after head of the group, and adds up dK
and dV. Two runs give the same bits. Probabilities are made again from the log-sum-exp.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
import triton
import triton.language as tl
from triton import knobs

from attnlab_kernels.operations.softmax.triton_kernel import hyperbolic_tangent

INTERPRETED = knobs.runtime.interpret


@triton.jit
def _score_gradient(
    scores,
    products,
    lse,
    delta,
    position,
    keys,
    slope,
    bias_rows,
    stride_bias_n,
    inside,
    lo,
    hi,
    left,
    right,
    qk_scale,
    softcap,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Weights, and the gradient of ``q . k`` without the scale, from the q . k and dO . v of a tile.

    lse, delta, position and bias_rows are ``[M, 1]`` and keys ``[1, N]``, or ``[1, M]`` and ``[N, 1]``.
    """
    if HAS_SOFTCAP:
        bent = hyperbolic_tangent(scores * (qk_scale / softcap))
        scores = softcap * bent
    else:
        scores = scores * qk_scale
    if HAS_ALIBI:
        scores -= slope * 1.4426950408889634 * tl.abs(position - keys).to(tl.float32)
    if HAS_BIAS:
        added = tl.load(bias_rows + keys.to(tl.int64) * stride_bias_n, mask=inside, other=0.0)
        scores += added.to(tl.float32) * 1.4426950408889634
    keep = inside & (keys >= lo) & (keys < hi)
    if HAS_LEFT:
        keep = keep & (keys >= position - left)
    if HAS_RIGHT:
        keep = keep & (keys <= position + right)
    # a dead row has weights of 2 ** (score - infinity)
    alive = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    weights = tl.where(keep, tl.math.exp2(scores - alive), 0.0)
    gradient = weights * (products - delta)
    if HAS_SOFTCAP:
        gradient = gradient * (1.0 - bent * bent)
    return weights, gradient


@triton.jit
def softmax_delta_kernel(
    out_ptr,
    grad_ptr,
    delta_ptr,
    stride_ob,
    stride_oh,
    stride_om,
    stride_gb,
    stride_gh,
    stride_gm,
    heads,
    num_queries,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """``delta = sum(dO * O)`` of each row, float32 ``[B, H, Sq]`` contiguous."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows64 = rows.to(tl.int64)
    offs = tl.arange(0, BLOCK_DV)
    live = rows < num_queries
    inside = live[:, None] & (offs[None, :] < DV)
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + rows64 * stride_om
    grad_rows = grad_ptr + batch * stride_gb + head * stride_gh + rows64 * stride_gm
    out = tl.load(out_rows[:, None] + offs[None, :], mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_rows[:, None] + offs[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(delta_ptr + (batch * heads + head) * num_queries + rows64, tl.sum(out * grad, 1), mask=live)


@triton.jit
def softmax_query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    ranges_ptr,
    limits_ptr,
    slopes_ptr,
    bias_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    stride_limits,
    heads,
    group,
    num_queries,
    num_keys,
    left,
    right,
    scale,
    qk_scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """dQ, contiguous ``[B, H, Sq, D]``. Grid: query blocks, batch x heads. ``limits`` as in the forward."""
    first_row = tl.program_id(0) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    key_head = head // group
    rows = first_row + tl.arange(0, BLOCK_M)
    rows64 = rows.to(tl.int64)
    live = rows < num_queries
    offset = num_keys - num_queries
    position = offset + rows
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_n = tl.arange(0, BLOCK_N)
    row_d = live[:, None] & (offs_d[None, :] < D)
    q_rows = q_ptr + batch * stride_qb + head * stride_qh + rows64 * stride_qm
    g_rows = grad_ptr + batch * stride_gb + head * stride_gh + rows64 * stride_gm
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=row_d, other=0.0)
    grad = tl.load(
        g_rows[:, None] + offs_dv[None, :], mask=live[:, None] & (offs_dv[None, :] < DV), other=0.0
    )
    flat = (batch * heads + head) * num_queries + rows64
    lse = tl.load(lse_ptr + flat, mask=live, other=float("-inf"))
    delta = tl.load(delta_ptr + flat, mask=live, other=0.0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head)
    bias_rows = q_rows
    if HAS_BIAS:
        bias_rows = bias_ptr + batch * stride_bias_b + head * stride_bias_h + rows64 * stride_bias_m
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh

    lo = 0
    hi = num_keys
    if HAS_RANGES:
        lo = tl.load(ranges_ptr + 2 * batch)
        hi = tl.load(ranges_ptr + 2 * batch + 1)
    if HAS_LEFT:
        lo = tl.maximum(lo, offset + first_row - left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, offset + tl.minimum(first_row + BLOCK_M, num_queries) + right)
    key_first = lo
    key_last = hi
    if HAS_LIMITS:
        row_limits = limits_ptr + batch * stride_limits + rows
        row_first = tl.load(row_limits, mask=live, other=0)
        row_last = tl.load(row_limits + num_queries, mask=live, other=0)
        alive = row_first < row_last
        lo = tl.min(tl.where(alive, row_first, num_keys), 0)
        hi = tl.max(tl.where(alive, row_last, 0), 0)
        key_first = row_first[:, None]
        key_last = row_last[:, None]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(lo, hi, BLOCK_N):
        keys = start + offs_n
        exists = keys < hi
        keys64 = keys.to(tl.int64)
        k_ptrs = k_base + keys64[:, None] * stride_kn + offs_d[None, :]  # [N, D]
        v_ptrs = v_base + keys64[None, :] * stride_vn + offs_dv[:, None]  # [DV, N]
        k = tl.load(k_ptrs, mask=exists[:, None] & (offs_d[None, :] < D), other=0.0)
        v = tl.load(v_ptrs, mask=exists[None, :] & (offs_dv[:, None] < DV), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        products = tl.dot(grad, v, input_precision="ieee")
        _, gradient = _score_gradient(
            scores, products, lse[:, None], delta[:, None], position[:, None], keys[None, :], slope,
            bias_rows[:, None], stride_bias_n, live[:, None] & exists[None, :], key_first, key_last,
            left, right, qk_scale, softcap,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS,
        )  # fmt: skip
        dq = tl.dot(gradient.to(k.dtype), k, dq, input_precision="ieee")
    dq_ptrs = dq_ptr + flat[:, None] * D + offs_d[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=row_d)


@triton.jit
def softmax_key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    ranges_ptr,
    limits_ptr,
    reach_ptr,
    slopes_ptr,
    bias_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    stride_limits,
    stride_reach,
    kv_heads,
    group,
    num_queries,
    num_keys,
    left,
    right,
    scale,
    qk_scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """dK and dV, contiguous ``[B, Hkv, Sk, .]``, summed over the group. Grid: key blocks, batch x key heads.

    ``reach`` int32 [B, 2, Sk]: the first query that sees each key and one past the last.
    """
    first_key = tl.program_id(0) * BLOCK_N
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    key_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    keys = first_key + tl.arange(0, BLOCK_N)
    keys64 = keys.to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offset = num_keys - num_queries

    lo = 0
    hi = num_keys
    if HAS_RANGES:
        lo = tl.load(ranges_ptr + 2 * batch)
        hi = tl.load(ranges_ptr + 2 * batch + 1)
    exists = (keys >= lo) & (keys < hi)
    k_rows = k_ptr + batch * stride_kb + key_head * stride_kh + keys64 * stride_kn
    v_rows = v_ptr + batch * stride_vb + key_head * stride_vh + keys64 * stride_vn
    k = tl.load(k_rows[:, None] + offs_d[None, :], mask=exists[:, None] & (offs_d[None, :] < D), other=0.0)
    v = tl.load(v_rows[:, None] + offs_dv[None, :], mask=exists[:, None] & (offs_dv[None, :] < DV), other=0.0)

    # rows that see some key of this block
    top = 0
    bottom = num_queries
    if HAS_RIGHT:
        top = tl.maximum(top, first_key - right - offset)
    if HAS_LEFT:
        bottom = tl.minimum(bottom, first_key + BLOCK_N + left - offset)
    if HAS_RANGES:
        bottom = tl.where((first_key < hi) & (first_key + BLOCK_N > lo), bottom, top)
    if HAS_LIMITS:
        key_reach = reach_ptr + batch * stride_reach + keys
        query_first = tl.load(key_reach, mask=exists, other=num_queries)
        query_last = tl.load(key_reach + num_keys, mask=exists, other=0)
        top = tl.min(query_first, 0)
        bottom = tl.max(query_last, 0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        head = key_head * group + member
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        g_base = grad_ptr + batch * stride_gb + head * stride_gh
        bias_base = q_base
        if HAS_BIAS:
            bias_base = bias_ptr + batch * stride_bias_b + head * stride_bias_h
        flat_base = (batch * (kv_heads * group) + head) * num_queries
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes_ptr + head)
        for start in range(top, bottom, BLOCK_M):
            rows = start + offs_m
            rows64 = rows.to(tl.int64)
            live = rows < bottom
            # everything lies keys first, so that no product has to be turned
            q_ptrs = q_base + rows64[:, None] * stride_qm + offs_d[None, :]
            g_ptrs = g_base + rows64[:, None] * stride_gm + offs_dv[None, :]
            q = tl.load(q_ptrs, mask=live[:, None] & (offs_d[None, :] < D), other=0.0)
            grad = tl.load(g_ptrs, mask=live[:, None] & (offs_dv[None, :] < DV), other=0.0)
            lse = tl.load(lse_ptr + flat_base + rows64, mask=live, other=float("-inf"))
            delta = tl.load(delta_ptr + flat_base + rows64, mask=live, other=0.0)
            key_first = lo
            key_last = hi
            if HAS_LIMITS:
                row_limits = limits_ptr + batch * stride_limits + rows
                key_first = tl.load(row_limits, mask=live, other=0)[None, :]
                key_last = tl.load(row_limits + num_queries, mask=live, other=0)[None, :]
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [N, M]
            products = tl.dot(v, tl.trans(grad), input_precision="ieee")
            weights, gradient = _score_gradient(
                scores, products, lse[None, :], delta[None, :], (offset + rows)[None, :], keys[:, None], slope,
                (bias_base + rows64 * stride_bias_m)[None, :], stride_bias_n, exists[:, None] & live[None, :],
                key_first, key_last, left, right, qk_scale, softcap,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS,
            )  # fmt: skip
            dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
            dk = tl.dot(gradient.to(q.dtype), q, dk, input_precision="ieee")
    stored = keys < num_keys
    flat = (batch * kv_heads + key_head) * num_keys + keys64
    dk_ptrs = dk_ptr + flat[:, None] * D + offs_d[None, :]
    dv_ptrs = dv_ptr + flat[:, None] * DV + offs_dv[None, :]
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=stored[:, None] & (offs_d[None, :] < D))
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=stored[:, None] & (offs_dv[None, :] < DV))
