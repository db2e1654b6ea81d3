"""The Triton kernels of differential attention, backward. Importing this needs triton.

The output is ``P1 V - w P2 V``. One kernel walks the keys of a block of queries and adds up dQ1 and dQ2, the other the
queries of a block of keys and adds up dK1, dK2 and dV: no atomic additions, two runs give the same bits. The product of
dO and V is the same for both maps and is made once.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false
import triton
import triton.language as tl
from triton import knobs

from attnlab_kernels.operations.triton_tiles import (
    load_columns,
    load_lse,
    load_rows,
    store_rows,
    weights_again,
    within_band,
)

INTERPRETED = knobs.runtime.interpret


@triton.jit
def difference_query_gradient_kernel(
    q1_ptr, q2_ptr, k1_ptr, k2_ptr, v_ptr, grad_ptr, weight_ptr, lse1_ptr, lse2_ptr, delta1_ptr, delta2_ptr,
    dq1_ptr, dq2_ptr, ranges_ptr,
    stride_q1b, stride_q1h, stride_q1m, stride_q2b, stride_q2h, stride_q2m,
    stride_k1b, stride_k1h, stride_k1n, stride_k2b, stride_k2h, stride_k2n, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm,
    heads, group, num_queries, num_keys, left, right, scale, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """dQ1 and dQ2, contiguous [B, H, n, D]; weight, lse and delta are float32 contiguous [B, H, n]."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    key_head = head // group
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    rows64 = rows.to(tl.int64)
    offset = num_keys - num_queries
    position = rows + offset
    live = rows < num_queries
    q1 = load_rows(q1_ptr + batch * stride_q1b + head * stride_q1h, rows64, stride_q1m, live, D, BLOCK_D)
    q2 = load_rows(q2_ptr + batch * stride_q2b + head * stride_q2h, rows64, stride_q2m, live, D, BLOCK_D)
    grad = load_rows(grad_ptr + batch * stride_gb + head * stride_gh, rows64, stride_gm, live, DV, BLOCK_DV)
    place = (batch * heads + head) * num_queries + rows64
    lse1 = load_lse(lse1_ptr, place, live)
    lse2 = load_lse(lse2_ptr, place, live)
    delta1 = tl.load(delta1_ptr + place, mask=live, other=0.0)
    delta2 = tl.load(delta2_ptr + place, mask=live, other=0.0)
    weight = tl.load(weight_ptr + place, mask=live, other=0.0)
    k1_base = k1_ptr + batch * stride_k1b + key_head * stride_k1h
    k2_base = k2_ptr + batch * stride_k2b + key_head * stride_k2h
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh
    lo = tl.load(ranges_ptr + 2 * batch)
    hi = tl.load(ranges_ptr + 2 * batch + 1)
    if HAS_LEFT:
        lo = tl.maximum(lo, offset + first_row - left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, offset + tl.minimum(first_row + BLOCK_M, num_queries) + right)
    dq1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq2 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(lo, hi, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        keys64 = keys.to(tl.int64)
        exists = keys < hi
        v = load_columns(v_base, keys64, stride_vn, exists, DV, BLOCK_DV)
        products = tl.dot(grad, v, input_precision="ieee")
        keep = within_band(
            exists[None, :], position[:, None], keys[None, :], left, right, HAS_LEFT, HAS_RIGHT
        )
        k = load_rows(k1_base, keys64, stride_k1n, exists, D, BLOCK_D)
        scores = tl.dot(q1, tl.trans(k), input_precision="ieee") * qk_scale
        gradient = weights_again(scores, lse1[:, None], keep) * (products - delta1[:, None])
        dq1 = tl.dot(gradient.to(k.dtype), k, dq1, input_precision="ieee")
        k = load_rows(k2_base, keys64, stride_k2n, exists, D, BLOCK_D)
        scores = tl.dot(q2, tl.trans(k), input_precision="ieee") * qk_scale
        gradient = (
            weights_again(scores, lse2[:, None], keep) * (products - delta2[:, None]) * -weight[:, None]
        )
        dq2 = tl.dot(gradient.to(k.dtype), k, dq2, input_precision="ieee")
    store_rows(dq1_ptr, place, dq1 * scale, live, D, BLOCK_D)
    store_rows(dq2_ptr, place, dq2 * scale, live, D, BLOCK_D)


@triton.jit
def difference_key_gradient_kernel(
    q1_ptr, q2_ptr, k1_ptr, k2_ptr, v_ptr, grad_ptr, weight_ptr, lse1_ptr, lse2_ptr, delta1_ptr, delta2_ptr,
    dk1_ptr, dk2_ptr, dv_ptr, ranges_ptr,
    stride_q1b, stride_q1h, stride_q1m, stride_q2b, stride_q2h, stride_q2m,
    stride_k1b, stride_k1h, stride_k1n, stride_k2b, stride_k2h, stride_k2n, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm,
    kv_heads, group, num_queries, num_keys, left, right, scale, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """dK1, dK2 and dV, contiguous [B, Hkv, m, .], summed over the group. Grid: key blocks, batch x key heads."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    key_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    first_key = tl.program_id(0) * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    keys64 = keys.to(tl.int64)
    offset = num_keys - num_queries
    lo = tl.load(ranges_ptr + 2 * batch)
    hi = tl.load(ranges_ptr + 2 * batch + 1)
    exists = (keys >= lo) & (keys < hi)
    k1_base = k1_ptr + batch * stride_k1b + key_head * stride_k1h
    k2_base = k2_ptr + batch * stride_k2b + key_head * stride_k2h
    k1 = load_rows(k1_base, keys64, stride_k1n, exists, D, BLOCK_D)
    k2 = load_rows(k2_base, keys64, stride_k2n, exists, D, BLOCK_D)
    v = load_rows(v_ptr + batch * stride_vb + key_head * stride_vh, keys64, stride_vn, exists, DV, BLOCK_DV)
    # rows that see some key of this block
    top = 0
    bottom = num_queries
    if HAS_RIGHT:
        top = tl.maximum(top, first_key - right - offset)
    if HAS_LEFT:
        bottom = tl.minimum(bottom, first_key + BLOCK_N + left - offset)
    bottom = tl.where((first_key < hi) & (first_key + BLOCK_N > lo), bottom, top)
    dk1 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk2 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        head = key_head * group + member
        q1_base = q1_ptr + batch * stride_q1b + head * stride_q1h
        q2_base = q2_ptr + batch * stride_q2b + head * stride_q2h
        g_base = grad_ptr + batch * stride_gb + head * stride_gh
        flat = (batch * (kv_heads * group) + head) * num_queries
        for start in range(top, bottom, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            rows64 = rows.to(tl.int64)
            live = rows < bottom
            grad = load_rows(g_base, rows64, stride_gm, live, DV, BLOCK_DV)
            weight = tl.load(weight_ptr + flat + rows64, mask=live, other=0.0)
            position = (offset + rows)[None, :]
            exist = exists[:, None] & live[None, :]
            keep = within_band(exist, position, keys[:, None], left, right, HAS_LEFT, HAS_RIGHT)
            # everything lies keys first, so that no product has to be turned
            products = tl.dot(v, tl.trans(grad), input_precision="ieee")
            q = load_rows(q1_base, rows64, stride_q1m, live, D, BLOCK_D)
            scores = tl.dot(k1, tl.trans(q), input_precision="ieee") * qk_scale
            signed = weights_again(scores, load_lse(lse1_ptr, flat + rows64, live)[None, :], keep)
            delta = tl.load(delta1_ptr + flat + rows64, mask=live, other=0.0)
            gradient = signed * (products - delta[None, :])
            dk1 = tl.dot(gradient.to(q.dtype), q, dk1, input_precision="ieee")
            q = load_rows(q2_base, rows64, stride_q2m, live, D, BLOCK_D)
            scores = tl.dot(k2, tl.trans(q), input_precision="ieee") * qk_scale
            second = (
                weights_again(scores, load_lse(lse2_ptr, flat + rows64, live)[None, :], keep)
                * weight[None, :]
            )
            delta = tl.load(delta2_ptr + flat + rows64, mask=live, other=0.0)
            gradient = second * (delta[None, :] - products)
            dk2 = tl.dot(gradient.to(q.dtype), q, dk2, input_precision="ieee")
            dv = tl.dot((signed - second).to(grad.dtype), grad, dv, input_precision="ieee")
    place = (batch * kv_heads + key_head) * num_keys + keys64
    stored = keys < num_keys
    store_rows(dk1_ptr, place, dk1 * scale, stored, D, BLOCK_D)
    store_rows(dk2_ptr, place, dk2 * scale, stored, D, BLOCK_D)
    store_rows(dv_ptr, place, dv, stored, DV, BLOCK_DV)
