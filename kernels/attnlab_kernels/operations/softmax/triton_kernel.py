"""The Triton kernel of softmax attention, forward. Importing this needs triton.

FlashAttention-2 (Dao, https://arxiv.org/abs/2307.08691): one program for a block of queries of one head, which walks
the keys that its rows may see with a running maximum m and sum l. Tiles that every row sees in full run without any
masking; only the tiles at the edges of the band compare positions.

B batch, H heads, M query rows of a block, N keys of a tile, D and DV head dimensions, padded to powers of two.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = knobs.runtime.interpret


@triton.jit
def _visit(
    acc,
    row_max,
    row_sum,
    q,
    k_base,
    v_base,
    stride_kn,
    stride_vn,
    position,
    lo,
    hi,
    left,
    right,
    qk_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Fold keys lo..hi into (acc, row_max, row_sum), which are in powers of two."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_n = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        keys = start + offs_n
        rows_n = keys.to(tl.int64)
        k_ptrs = k_base + rows_n[None, :] * stride_kn + offs_d[:, None]  # [D, N]
        v_ptrs = v_base + rows_n[:, None] * stride_vn + offs_dv[None, :]  # [N, DV]
        if MASKED:
            exists = keys < hi
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
        if MASKED:
            keep = exists[None, :]
            if HAS_LEFT:
                keep = keep & (keys[None, :] >= position[:, None] - left)
            if HAS_RIGHT:
                keep = keep & (keys[None, :] <= position[:, None] + right)
            scores = tl.where(keep, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
        # a row that has seen no key yet: subtract 0, so that its exponentials are 0 and not NaN
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        weights = tl.math.exp2(scores * qk_scale - shift[:, None])
        decay = tl.math.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    ranges_ptr,
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
    heads,
    group,
    num_queries,
    num_keys,
    left,
    right,
    qk_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_RANGES: tl.constexpr,
):
    """``qk_scale`` is scale * log2(e), above 0; ``ranges`` is int32 [B, 2]; ``lse`` is contiguous [B, H, Sq]."""
    block = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    key_head = head // group

    first_row = block * BLOCK_M
    offset = num_keys - num_queries
    rows = first_row + tl.arange(0, BLOCK_M)
    position = offset + rows
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows64 = rows.to(tl.int64)

    q_ptrs = q_ptr + batch * stride_qb + head * stride_qh + rows64[:, None] * stride_qm + offs_d[None, :]
    q = tl.load(q_ptrs, mask=(rows[:, None] < num_queries) & (offs_d[None, :] < D), other=0.0)
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh

    # lo..hi: keys that some row sees; inner_lo..inner_hi: keys that every row sees
    lo = 0
    hi = num_keys
    if HAS_RANGES:
        lo = tl.load(ranges_ptr + 2 * batch)
        hi = tl.load(ranges_ptr + 2 * batch + 1)
    inner_lo = lo
    inner_hi = hi
    first = offset + first_row
    last = offset + tl.minimum(first_row + BLOCK_M, num_queries) - 1
    if HAS_LEFT:
        inner_lo = tl.maximum(inner_lo, last - left)
        lo = tl.maximum(lo, first - left)
    if HAS_RIGHT:
        inner_hi = tl.minimum(inner_hi, first + right + 1)
        hi = tl.minimum(hi, last + right + 1)
    # whole tiles between them need no mask
    inner_lo = lo + tl.cdiv(tl.maximum(inner_lo - lo, 0), BLOCK_N) * BLOCK_N
    inner_lo = tl.minimum(inner_lo, tl.maximum(hi, lo))
    inner_hi = inner_lo + tl.maximum(inner_hi - inner_lo, 0) // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_LEFT:
        acc, row_max, row_sum = _visit(
            acc, row_max, row_sum, q, k_base, v_base, stride_kn, stride_vn, position, lo, inner_lo, left, right,
            qk_scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
    acc, row_max, row_sum = _visit(
        acc, row_max, row_sum, q, k_base, v_base, stride_kn, stride_vn, position, inner_lo, inner_hi, left, right,
        qk_scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    acc, row_max, row_sum = _visit(
        acc, row_max, row_sum, q, k_base, v_base, stride_kn, stride_vn, position, inner_hi, hi, left, right,
        qk_scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip

    dead = row_sum == 0.0
    row_sum = tl.where(dead, 1.0, row_sum)
    out = acc / row_sum[:, None]
    # log2 back to natural; the maximum of a dead row is minus infinity already
    lse = (row_max + tl.math.log2(row_sum)) * 0.6931471805599453
    live = rows < num_queries
    tl.store(lse_ptr + (batch * heads + head) * num_queries + rows64, lse, mask=live)
    out_ptrs = out_ptr + batch * stride_ob + head * stride_oh + rows64[:, None] * stride_om + offs_dv[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=live[:, None] & (offs_dv[None, :] < DV))
