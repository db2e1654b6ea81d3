"""The Triton kernel of attention in e4m3 with block scales, forward. Importing this needs triton.

One tile of keys is one block of one scale, so that the weights are rounded against the same running maximum as in
``reference.run``: the kernel computes what the simulation computes. Values lie transposed, ``[DV, keys]``: Hopper's
eight-bit products want both operands along the summed dimension.
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
    fold_maximum,
    load_columns,
    load_rows,
    store_rows,
    within_band,
)

INTERPRETED = knobs.runtime.interpret


@triton.jit
def nearest_e4m3(x):
    """Numbers of 0 to 448, float32, as the nearest e4m3 number, ties to even, still float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
    normal = bits.to(tl.float32, bitcast=True)
    # below 2 ** -6 the numbers lie 2 ** -9 apart
    return tl.where(x < 0.015625, (x + 24576.0) - 24576.0, normal)


@triton.jit
def fp8_forward_kernel(
    q_ptr, k_ptr, v_ptr, scale_q_ptr, scale_k_ptr, scale_v_ptr, out_ptr, lse_ptr, ranges_ptr,
    heads, group, num_queries, num_keys, stride_vd, query_blocks, key_blocks, left, right, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGES: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """All contiguous: q [B, H, n, D], k [B, Hkv, m, D], scales float32 [B, H, blocks].

    v is [B, Hkv, DV, m], rows ``stride_vd`` apart. ``qk_scale`` is scale * log2(e). BLOCK_N keys share a scale, and
    SCALE_ROWS queries, a multiple of BLOCK_M.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    plane = batch * heads + head
    key_plane = batch * (heads // group) + head // group
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    live = rows < num_queries
    offset = num_keys - num_queries
    position = rows + offset
    offs_dv = tl.arange(0, BLOCK_DV)
    place = plane * num_queries + rows.to(tl.int64)
    q = load_rows(q_ptr, place, D, live, D, BLOCK_D)
    # one head's keys and values stay below 2 ** 31 numbers
    k_base = k_ptr + key_plane * num_keys * D
    v_base = v_ptr + key_plane * DV * stride_vd
    unit = tl.load(scale_q_ptr + plane * query_blocks + first_row // SCALE_ROWS) * qk_scale
    lo = 0
    hi = num_keys
    if HAS_RANGES:
        lo = tl.load(ranges_ptr + 2 * batch)
        hi = tl.load(ranges_ptr + 2 * batch + 1)
    start = lo
    if HAS_LEFT:
        start = tl.maximum(start, offset + first_row - left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, offset + tl.minimum(first_row + BLOCK_M, num_queries) + right)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for block in range(start // BLOCK_N, tl.cdiv(hi, BLOCK_N)):
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = (keys >= lo) & (keys < hi)
        k = load_columns(k_base, keys, D, exists, D, BLOCK_D)
        scores = tl.dot(q, k) * (unit * tl.load(scale_k_ptr + key_plane * key_blocks + block))
        keep = within_band(
            exists[None, :], position[:, None], keys[None, :], left, right, HAS_LEFT, HAS_RIGHT
        )
        scores = tl.where(keep, scores, float("-inf"))
        row_max, row_sum, weights, decay = fold_maximum(row_max, row_sum, scores)
        in_v = exists[:, None] & (offs_dv[None, :] < DV)
        v = tl.load(v_base + offs_dv[None, :] * stride_vd + keys[:, None], mask=in_v, other=0.0)
        # weights lie in [0, 1]; times 256 they use the exponents of e4m3
        if EMULATED:
            # the interpreter's cast to e4m3 loses the carry of a mantissa that rounds up
            product = tl.dot(nearest_e4m3(weights * 256.0), v.to(tl.float32), input_precision="ieee")
        else:
            product = tl.dot((weights * 256.0).to(v.dtype), v)
        acc = acc * decay[:, None] + product * tl.load(scale_v_ptr + key_plane * key_blocks + block)
    row_sum, lse = close_softmax(row_max, row_sum)
    tl.store(lse_ptr + place, lse, mask=live)
    store_rows(out_ptr, place, acc / (row_sum[:, None] * 256.0), live, DV, BLOCK_DV)
