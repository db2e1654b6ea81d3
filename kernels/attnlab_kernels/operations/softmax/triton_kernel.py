"""The Triton kernels of softmax attention, forward. Importing this needs triton.

FlashAttention-2 (Dao, https://arxiv.org/abs/2307.08691): one program for a block of query rows of one head, which walks
the keys that its rows may see with a running maximum m and sum l. Tiles that every row sees in full run without any
masking; only the tiles at the edges of the band compare positions. The same kernel decodes: the query heads of a key
head are packed into rows, the keys are split over programs, and ``softmax_merge_kernel`` joins the parts.

B batch, H heads, M query rows of a block, N keys of a tile, D and DV head dimensions, padded to powers of two.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = knobs.runtime.interpret


@triton.jit
def hyperbolic_tangent(x):
    """To float32's last digits also near 0, where ``1 - exp(-2x)`` has lost them."""
    size = tl.abs(x)
    shrunk = tl.math.exp2(-2.8853900817779268 * size)
    far = (1.0 - shrunk) / (1.0 + shrunk)
    square = x * x
    near = 1.0 + square * (
        -0.333333333333
        + square * (0.133333333333 + square * (-0.053968253968 + square * (0.021869488536 - square * 0.008863235530)))
    )  # fmt: skip
    return tl.where(size < 0.3, x * near, tl.where(x < 0, -far, far))


@triton.jit
def modified_scores(
    scores,
    position,
    keys,
    slopes,
    bias_rows,
    stride_bias_n,
    inside,
    qk_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Products ``[M, N]`` as scores in powers of two: soft cap, ALiBi, bias. ``softcap`` and slopes hold log2(e)."""
    if HAS_SOFTCAP:
        scores = softcap * hyperbolic_tangent(scores * (qk_scale / softcap))
    else:
        scores = scores * qk_scale
    if HAS_ALIBI:
        scores -= slopes[:, None] * tl.abs(position[:, None] - keys[None, :]).to(tl.float32)
    if HAS_BIAS:
        added = tl.load(
            bias_rows[:, None] + keys.to(tl.int64)[None, :] * stride_bias_n, mask=inside, other=0.0
        )
        scores += added.to(tl.float32) * 1.4426950408889634
    return scores


@triton.jit
def _visit(
    acc,
    row_max,
    row_sum,
    q,
    k_base,
    v_base,
    table,
    bias_rows,
    slopes,
    live,
    stride_kn,
    stride_vn,
    stride_kp,
    stride_vp,
    stride_bias_n,
    position,
    row_first,
    row_last,
    lo,
    hi,
    left,
    right,
    qk_scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Fold keys lo..hi into (acc, row_max, row_sum), which are in powers of two."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_n = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        keys = start + offs_n
        exists = keys < hi
        if PAGE > 0:
            page = tl.load(table + keys // PAGE, mask=exists, other=0).to(tl.int64)
            slot = (keys % PAGE).to(tl.int64)
            k_rows = page * stride_kp + slot * stride_kn
            v_rows = page * stride_vp + slot * stride_vn
        else:
            k_rows = keys.to(tl.int64) * stride_kn
            v_rows = keys.to(tl.int64) * stride_vn
        k_ptrs = k_base + k_rows[None, :] + offs_d[:, None]  # [D, N]
        v_ptrs = v_base + v_rows[:, None] + offs_dv[None, :]  # [N, DV]
        if MASKED:
            k = tl.load(k_ptrs, mask=exists[None, :] & (offs_d[:, None] < D), other=0.0)
            v = tl.load(v_ptrs, mask=exists[:, None] & (offs_dv[None, :] < DV), other=0.0)
        else:
            if BLOCK_D == D:
                k = tl.load(k_ptrs)
            else:
                k = tl.load(k_ptrs, mask=offs_d[:, None] < D, other=0.0)
            if BLOCK_DV == DV:
                v = tl.load(v_ptrs)
            else:
                v = tl.load(v_ptrs, mask=offs_dv[None, :] < DV, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")  # [M, N]
        if HAS_SOFTCAP or HAS_ALIBI or HAS_BIAS:
            scores = modified_scores(
                scores, position, keys, slopes, bias_rows, stride_bias_n, live[:, None] & exists[None, :],
                qk_scale, softcap, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS,
            )  # fmt: skip
            unit = 1.0
        else:
            unit = qk_scale
        if MASKED:
            keep = exists[None, :]
            if HAS_LEFT:
                keep = keep & (keys[None, :] >= position[:, None] - left)
            if HAS_RIGHT:
                keep = keep & (keys[None, :] <= position[:, None] + right)
            if HAS_LIMITS:
                keep = keep & (keys[None, :] >= row_first[:, None]) & (keys[None, :] < row_last[:, None])
            scores = tl.where(keep, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
        # a row that has seen no key yet: subtract 0, so that its exponentials are 0 and not NaN
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED or HAS_BIAS else new_max
        weights = tl.math.exp2(scores * unit - shift[:, None])
        decay = tl.math.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def softmax_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    ranges_ptr,
    limits_ptr,
    slopes_ptr,
    sinks_ptr,
    bias_ptr,
    starts_q_ptr,
    starts_k_ptr,
    table_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_os,
    stride_lb,
    stride_lh,
    stride_lm,
    stride_ls,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    stride_limits,
    stride_table,
    stride_kp,
    stride_vp,
    programs,
    group,
    num_queries,
    num_keys,
    left,
    right,
    splits,
    qk_scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PACK: tl.constexpr,
    PAGE: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """``qk_scale`` is scale * log2(e), above 0; ``softcap`` holds log2(e) too.

    Grid: query blocks, batch x programs (heads, or key heads where PACK query heads share the rows), splits.
    ``ranges`` is int32 [B, 2]; ``limits`` int32 [B, 2, Sq]: the first key of each query and one past the last, for
    masks that are not one band. VARLEN: ``starts_q`` int32 [B + 1] cuts packed queries ``[tokens, H, D]``; ``starts_k``
    cuts packed keys the same way, or, with PAGE slots a block, holds lengths [B], and ``table`` [B, blocks] the blocks.
    """
    block = tl.program_id(0)
    batch = (tl.program_id(1) // programs).to(tl.int64)
    program = (tl.program_id(1) % programs).to(tl.int64)
    split = tl.program_id(2)

    q_start = tl.zeros([], tl.int64)
    k_start = tl.zeros([], tl.int64)
    if VARLEN:
        q_start = tl.load(starts_q_ptr + batch).to(tl.int64)
        num_queries = (tl.load(starts_q_ptr + batch + 1) - q_start).to(tl.int32)
        if PAGE > 0:
            num_keys = tl.load(starts_k_ptr + batch).to(tl.int32)
        else:
            k_start = tl.load(starts_k_ptr + batch).to(tl.int64)
            num_keys = (tl.load(starts_k_ptr + batch + 1) - k_start).to(tl.int32)
    first_row = block * BLOCK_M
    if first_row < num_queries * PACK:
        rows = first_row + tl.arange(0, BLOCK_M)
        live = rows < num_queries * PACK
        offset = num_keys - num_queries
        queries = rows // PACK
        if PACK > 1:
            key_head = program
            heads = program * PACK + (rows % PACK).to(tl.int64)  # [M]
        else:
            key_head = program // group
            heads = program + tl.zeros([BLOCK_M], tl.int64)
        position = offset + queries
        offs_d = tl.arange(0, BLOCK_D)
        offs_dv = tl.arange(0, BLOCK_DV)
        places = q_start + queries.to(tl.int64)

        q_rows = q_ptr + batch * stride_qb + heads * stride_qh + places * stride_qm
        q = tl.load(q_rows[:, None] + offs_d[None, :], mask=live[:, None] & (offs_d[None, :] < D), other=0.0)
        k_base = k_ptr + batch * stride_kb + key_head * stride_kh + k_start * stride_kn
        v_base = v_ptr + batch * stride_vb + key_head * stride_vh + k_start * stride_vn
        # pointers that are not given are never followed
        table = q_ptr
        if PAGE > 0:
            table = table_ptr + batch * stride_table
        slopes = tl.zeros([BLOCK_M], tl.float32)
        if HAS_ALIBI:
            slopes = tl.load(slopes_ptr + heads, mask=live, other=0.0) * 1.4426950408889634
        bias_rows = q_rows
        if HAS_BIAS:
            bias_rows = (
                bias_ptr
                + batch * stride_bias_b
                + heads * stride_bias_h
                + queries.to(tl.int64) * stride_bias_m
            )

        # lo..hi: keys that some row sees; inner_lo..inner_hi: keys that every row sees
        lo = 0
        hi = num_keys
        if HAS_RANGES:
            lo = tl.load(ranges_ptr + 2 * batch)
            hi = tl.load(ranges_ptr + 2 * batch + 1)
        inner_lo = lo
        inner_hi = hi
        first = offset + first_row // PACK
        last = offset + (tl.minimum(first_row + BLOCK_M, num_queries * PACK) - 1) // PACK
        if HAS_LEFT:
            inner_lo = tl.maximum(inner_lo, last - left)
            lo = tl.maximum(lo, first - left)
        if HAS_RIGHT:
            inner_hi = tl.minimum(inner_hi, first + right + 1)
            hi = tl.minimum(hi, last + right + 1)
        row_first = position
        row_last = position
        if HAS_LIMITS:
            row_limits = limits_ptr + batch * stride_limits + queries
            row_first = tl.load(row_limits, mask=live, other=0)
            row_last = tl.load(row_limits + num_queries, mask=live, other=0)
            alive = row_first < row_last
            lo = tl.min(tl.where(alive, row_first, num_keys), 0)
            hi = tl.max(tl.where(alive, row_last, 0), 0)
            inner_lo = tl.max(tl.where(live, row_first, 0), 0)
            inner_hi = tl.min(tl.where(live, row_last, num_keys), 0)
        hi = tl.maximum(hi, lo)
        # whole tiles between them need no mask
        inner_lo = lo + tl.cdiv(tl.maximum(inner_lo - lo, 0), BLOCK_N) * BLOCK_N
        inner_lo = tl.minimum(inner_lo, hi)
        inner_hi = inner_lo + tl.maximum(inner_hi - inner_lo, 0) // BLOCK_N * BLOCK_N
        # this program's share, cut at tiles
        span = tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), splits) * BLOCK_N
        mine = tl.minimum(lo + split * span, hi)
        hi = tl.minimum(mine + span, hi)
        lo = mine
        inner_lo = tl.minimum(tl.maximum(inner_lo, lo), hi)
        inner_hi = tl.minimum(tl.maximum(inner_hi, inner_lo), hi)

        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        if HAS_SINKS:
            # a sink is a key that the first share has seen, of value zero
            sinks = tl.load(sinks_ptr + heads, mask=live, other=0.0) * 1.4426950408889634
            row_max = tl.where(split == 0, sinks, row_max)
            row_sum += tl.where(split == 0, 1.0, 0.0)
        if HAS_LEFT or HAS_LIMITS:
            acc, row_max, row_sum = _visit(
                acc, row_max, row_sum, q, k_base, v_base, table, bias_rows, slopes, live, stride_kn, stride_vn,
                stride_kp, stride_vp, stride_bias_n, position, row_first, row_last, lo, inner_lo, left, right,
                qk_scale, softcap, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PAGE, True, HAS_LEFT, HAS_RIGHT, HAS_LIMITS,
                HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS,
            )  # fmt: skip
        acc, row_max, row_sum = _visit(
            acc, row_max, row_sum, q, k_base, v_base, table, bias_rows, slopes, live, stride_kn, stride_vn,
            stride_kp, stride_vp, stride_bias_n, position, row_first, row_last, inner_lo, inner_hi, left, right,
            qk_scale, softcap, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PAGE, False, HAS_LEFT, HAS_RIGHT, HAS_LIMITS,
            HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS,
        )  # fmt: skip
        acc, row_max, row_sum = _visit(
            acc, row_max, row_sum, q, k_base, v_base, table, bias_rows, slopes, live, stride_kn, stride_vn,
            stride_kp, stride_vp, stride_bias_n, position, row_first, row_last, inner_hi, hi, left, right,
            qk_scale, softcap, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PAGE, True, HAS_LEFT, HAS_RIGHT, HAS_LIMITS,
            HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS,
        )  # fmt: skip

        dead = row_sum == 0.0
        row_sum = tl.where(dead, 1.0, row_sum)
        out = acc / row_sum[:, None]
        # log2 back to natural; the maximum of a dead row is minus infinity already
        lse = (row_max + tl.math.log2(row_sum)) * 0.6931471805599453
        share = split.to(tl.int64)
        lse_rows = lse_ptr + share * stride_ls + batch * stride_lb + heads * stride_lh + places * stride_lm
        tl.store(lse_rows, lse, mask=live)
        out_rows = out_ptr + share * stride_os + batch * stride_ob + heads * stride_oh + places * stride_om
        out_ptrs = out_rows[:, None] + offs_dv[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=live[:, None] & (offs_dv[None, :] < DV))


@triton.jit
def softmax_merge_kernel(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    rows_total,
    splits,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Join float32 parts ``[S, rows, DV]`` by their log-sum-exp ``[S, rows]`` into contiguous ``[rows, DV]``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    live = rows < rows_total
    inside = live[:, None] & (offs_dv[None, :] < DV)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    place = rows
    for _split in range(splits):
        lse = tl.load(part_lse_ptr + place, mask=live, other=float("-inf")) * 1.4426950408889634
        part = tl.load(parts_ptr + place[:, None] * DV + offs_dv[None, :], mask=inside, other=0.0)
        higher = tl.maximum(top, lse)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.math.exp2(top - shift)
        weight = tl.math.exp2(lse - shift)
        acc = acc * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        top = higher
        place += rows_total
    total = tl.where(total == 0.0, 1.0, total)
    out = acc / total[:, None]
    tl.store(out_ptr + rows[:, None] * DV + offs_dv[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + rows, (top + tl.math.log2(total)) * 0.6931471805599453, mask=live)
