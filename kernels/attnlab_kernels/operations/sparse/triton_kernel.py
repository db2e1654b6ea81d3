"""The Triton kernels of attention along block lists, forward and backward. Importing this needs triton.

A program has one tile of rows and walks the blocks of its list and no others. Rows and columns are named by the list,
so a pattern whose keys lie apart costs what its pairs cost. No atomic additions: queries and keys each have lists of
their own. The layout is ``BlockLists``'s. ``qk_scale`` is scale * log2(e).
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
import triton
import triton.language as tl
from triton import knobs

from attnlab_kernels.operations.triton_tiles import (
    close_softmax,
    fold_softmax,
    load_columns,
    load_lse,
    load_rows,
    store_rows,
    weights_again,
    within_band,
)

INTERPRETED = knobs.runtime.interpret


@triton.jit
def _kept(
    masks_ptr, keep_ptr, block, queries, keys, exists, offset, left, right,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Pairs [HEIGHT, WIDTH] of a block that count; ``queries`` and ``keys`` broadcast against each other."""
    keep = exists
    if MASKED:
        which = tl.load(masks_ptr + block)
        cell = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        # a block without a mask reads none
        listed = (cell >= 0) & (which >= 0)
        flags = tl.load(keep_ptr + which.to(tl.int64) * (HEIGHT * WIDTH) + cell, mask=listed, other=1)
        keep = keep & (flags != 0)
    return within_band(keep, queries + offset, keys, left, right, HAS_LEFT, HAS_RIGHT)


@triton.jit
def _fold(
    acc, row_max, row_sum, q, k_base, v_base, columns_ptr, masks_ptr, keep_ptr, rows, first, last, lo, hi,
    stride_kn, stride_vn, offset, left, right, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_RANGES: tl.constexpr,
):  # fmt: skip
    """Fold blocks first..last of the list into (acc, row_max, row_sum), which are in powers of two."""
    offs_n = tl.arange(0, BLOCK_N)
    for block in range(first, last):
        keys = tl.load(columns_ptr + block * BLOCK_N + offs_n)
        exists = keys >= 0
        if HAS_RANGES:
            exists = (keys >= lo) & (keys < hi)
        keys64 = keys.to(tl.int64)
        k = load_columns(k_base, keys64, stride_kn, exists, D, BLOCK_D)
        v = load_rows(v_base, keys64, stride_vn, exists, DV, BLOCK_DV)
        scores = tl.dot(q, k, input_precision="ieee") * qk_scale
        if MASKED or HAS_LEFT or HAS_RIGHT or HAS_RANGES:
            keep = _kept(
                masks_ptr, keep_ptr, block, rows[:, None], keys[None, :], exists[None, :], offset, left, right,
                BLOCK_M, BLOCK_N, MASKED, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            scores = tl.where(keep, scores, float("-inf"))
        acc, row_max, row_sum = fold_softmax(acc, row_max, row_sum, scores, v)
    return acc, row_max, row_sum


@triton.jit
def sparse_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rows_ptr, spans_ptr, columns_ptr, masks_ptr, keep_ptr, ranges_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, group, lists, num_queries, offset, left, right, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGES: tl.constexpr,
):  # fmt: skip
    """``out`` [B, H, n, DV] and ``lse`` float32 [B, H, n] are contiguous. Grid: tiles of queries, batch x heads."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    tile = (head % lists) * tl.num_programs(0) + tl.program_id(0)
    rows = tl.load(rows_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    live = rows >= 0
    rows64 = rows.to(tl.int64)
    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, rows64, stride_qm, live, D, BLOCK_D)
    k_base = k_ptr + batch * stride_kb + (head // group) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group) * stride_vh
    lo = 0
    hi = 0
    if HAS_RANGES:
        lo = tl.load(ranges_ptr + 2 * batch)
        hi = tl.load(ranges_ptr + 2 * batch + 1)
    first = tl.load(spans_ptr + 3 * tile)
    middle = tl.load(spans_ptr + 3 * tile + 1)
    last = tl.load(spans_ptr + 3 * tile + 2)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, row_max, row_sum = _fold(
        acc, row_max, row_sum, q, k_base, v_base, columns_ptr, masks_ptr, keep_ptr, rows, first, middle, lo, hi,
        stride_kn, stride_vn, offset, left, right, qk_scale,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, HAS_LEFT, HAS_RIGHT, HAS_RANGES,
    )  # fmt: skip
    acc, row_max, row_sum = _fold(
        acc, row_max, row_sum, q, k_base, v_base, columns_ptr, masks_ptr, keep_ptr, rows, middle, last, lo, hi,
        stride_kn, stride_vn, offset, left, right, qk_scale,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_LEFT, HAS_RIGHT, HAS_RANGES,
    )  # fmt: skip
    row_sum, lse = close_softmax(row_max, row_sum)
    place = (batch * heads + head) * num_queries + rows64
    tl.store(lse_ptr + place, lse, mask=live)
    store_rows(out_ptr, place, acc / row_sum[:, None], live, DV, BLOCK_DV)


@triton.jit
def sparse_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    rows_ptr, spans_ptr, columns_ptr, masks_ptr, keep_ptr, ranges_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, heads, group, lists, num_queries, offset, left, right, scale, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGES: tl.constexpr,
):  # fmt: skip
    """dQ of one pass, float32 contiguous [B, H, n, D]. Grid: tiles of queries, batch x heads."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    tile = (head % lists) * tl.num_programs(0) + tl.program_id(0)
    rows = tl.load(rows_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    live = rows >= 0
    rows64 = rows.to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, rows64, stride_qm, live, D, BLOCK_D)
    grad = load_rows(grad_ptr + batch * stride_gb + head * stride_gh, rows64, stride_gm, live, DV, BLOCK_DV)
    place = (batch * heads + head) * num_queries + rows64
    lse = load_lse(lse_ptr, place, live)
    delta = tl.load(delta_ptr + place, mask=live, other=0.0)
    k_base = k_ptr + batch * stride_kb + (head // group) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group) * stride_vh
    lo = 0
    hi = 0
    if HAS_RANGES:
        lo = tl.load(ranges_ptr + 2 * batch)
        hi = tl.load(ranges_ptr + 2 * batch + 1)
    first = tl.load(spans_ptr + 3 * tile)
    last = tl.load(spans_ptr + 3 * tile + 2)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(first, last):
        keys = tl.load(columns_ptr + block * BLOCK_N + offs_n)
        exists = keys >= 0
        if HAS_RANGES:
            exists = (keys >= lo) & (keys < hi)
        keys64 = keys.to(tl.int64)
        k = load_rows(k_base, keys64, stride_kn, exists, D, BLOCK_D)
        v = load_columns(v_base, keys64, stride_vn, exists, DV, BLOCK_DV)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        products = tl.dot(grad, v, input_precision="ieee")
        keep = _kept(
            masks_ptr, keep_ptr, block, rows[:, None], keys[None, :], exists[None, :], offset, left, right,
            BLOCK_M, BLOCK_N, True, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
        weights = weights_again(scores, lse[:, None], keep)
        gradient = weights * (products - delta[:, None])
        dq = tl.dot(gradient.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr, place, dq * scale, live, D, BLOCK_D)


@triton.jit
def sparse_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    rows_ptr, spans_ptr, columns_ptr, masks_ptr, keep_ptr, ranges_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm,
    programs, members, group, lists, num_queries, num_keys, offset, left, right, scale, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of one pass, float32 contiguous [B, programs, m, .]. Grid: tiles of keys, batch x programs.

    A program adds up ``members`` query heads: all of a key head's where they share a list, else one. Here the rows of
    the lists are keys, BLOCK_N of them, and their columns queries, BLOCK_M at a time.
    """
    batch = (tl.program_id(1) // programs).to(tl.int64)
    program = (tl.program_id(1) % programs).to(tl.int64)
    tile = (program % lists) * tl.num_programs(0) + tl.program_id(0)
    keys = tl.load(rows_ptr + tile * BLOCK_N + tl.arange(0, BLOCK_N))
    exists = keys >= 0
    stored = exists
    if HAS_RANGES:
        lo = tl.load(ranges_ptr + 2 * batch)
        hi = tl.load(ranges_ptr + 2 * batch + 1)
        exists = (keys >= lo) & (keys < hi)
    keys64 = keys.to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    key_head = program * members // group
    k = load_rows(k_ptr + batch * stride_kb + key_head * stride_kh, keys64, stride_kn, exists, D, BLOCK_D)
    v = load_rows(v_ptr + batch * stride_vb + key_head * stride_vh, keys64, stride_vn, exists, DV, BLOCK_DV)
    first = tl.load(spans_ptr + 3 * tile)
    last = tl.load(spans_ptr + 3 * tile + 2)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(members):
        head = program * members + member
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        g_base = grad_ptr + batch * stride_gb + head * stride_gh
        flat = (batch * programs * members + head) * num_queries
        for block in range(first, last):
            rows = tl.load(columns_ptr + block * BLOCK_M + offs_m)
            live = rows >= 0
            rows64 = rows.to(tl.int64)
            q = load_rows(q_base, rows64, stride_qm, live, D, BLOCK_D)
            grad = load_rows(g_base, rows64, stride_gm, live, DV, BLOCK_DV)
            lse = load_lse(lse_ptr, flat + rows64, live)
            delta = tl.load(delta_ptr + flat + rows64, mask=live, other=0.0)
            # everything lies keys first, so that no product has to be turned
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
            products = tl.dot(v, tl.trans(grad), input_precision="ieee")
            keep = _kept(
                masks_ptr, keep_ptr, block, rows[None, :], keys[:, None], exists[:, None] & live[None, :],
                offset, left, right, BLOCK_N, BLOCK_M, True, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            weights = weights_again(scores, lse[None, :], keep)
            gradient = weights * (products - delta[None, :])
            dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
            dk = tl.dot(gradient.to(q.dtype), q, dk, input_precision="ieee")
    place = (batch * programs + program) * num_keys + keys64
    store_rows(dk_ptr, place, dk * scale, stored, D, BLOCK_D)
    store_rows(dv_ptr, place, dv, stored, DV, BLOCK_DV)
