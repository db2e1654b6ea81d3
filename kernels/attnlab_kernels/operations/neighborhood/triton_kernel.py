"""The Triton kernel of neighborhood attention on one or two axes, forward. Importing this needs triton.

A program has a rectangle of queries of one residue class and walks the keys that their windows span, the halo. A line
is a grid of height 1. Where a window starts and how many keys it has comes from tables, one entry a place on an axis,
so shifted corners, causal axes and strides need no code here.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
import triton
import triton.language as tl
from triton import knobs

from attnlab_kernels.operations.triton_tiles import (
    close_softmax,
    fold_softmax,
    load_columns,
    load_rows,
    store_rows,
)

INTERPRETED = knobs.runtime.interpret


@triton.jit
def neighborhood_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_y_ptr, count_y_ptr, first_x_ptr, count_x_ptr, visible_ptr,
    heads, height, width, dilation_y, dilation_x, tiles_x, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_VISIBLE: tl.constexpr,
):  # fmt: skip
    """Tensors are contiguous [B, H, height * width, D]; tables int32; ``visible`` uint8 [B, height * width]."""
    BLOCK_M: tl.constexpr = TILE_Y * TILE_X
    tile, residue = tl.program_id(0), tl.program_id(1)
    plane = tl.program_id(2).to(tl.int64) * height * width
    residue_y, residue_x = residue // dilation_x, residue % dilation_x
    lane = tl.arange(0, BLOCK_M)
    query_y = residue_y + (tile // tiles_x * TILE_Y + lane // TILE_X) * dilation_y
    query_x = residue_x + (tile % tiles_x * TILE_X + lane % TILE_X) * dilation_x
    live = (query_y < height) & (query_x < width)
    first_y = tl.load(first_y_ptr + query_y, mask=live, other=0)
    count_y = tl.load(count_y_ptr + query_y, mask=live, other=0)
    first_x = tl.load(first_x_ptr + query_x, mask=live, other=0)
    count_x = tl.load(count_x_ptr + query_x, mask=live, other=0)
    end_y = first_y + count_y * dilation_y
    end_x = first_x + count_x * dilation_x
    # the halo, in steps of the dilation; empty where the tile has no query
    low_y = tl.min(tl.where(live, first_y, height), 0)
    low_x = tl.min(tl.where(live, first_x, width), 0)
    rows = tl.maximum(tl.max(end_y, 0) - low_y, 0) // dilation_y
    columns = tl.maximum(tl.max(end_x, 0) - low_x, 0) // dilation_x

    pixel = plane + (query_y * width + query_x).to(tl.int64)
    q = load_rows(q_ptr, pixel, D, live, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, rows * columns, BLOCK_N):
        step = start + tl.arange(0, BLOCK_N)
        exists = step < rows * columns
        key_y = low_y + step // columns * dilation_y
        key_x = low_x + step % columns * dilation_x
        place = (key_y * width + key_x).to(tl.int64)
        keep = (key_y[None, :] >= first_y[:, None]) & (key_y[None, :] < end_y[:, None])
        keep = (
            keep & (key_x[None, :] >= first_x[:, None]) & (key_x[None, :] < end_x[:, None]) & exists[None, :]
        )
        if HAS_VISIBLE:
            batch = (tl.program_id(2) // heads).to(tl.int64)
            seen = tl.load(visible_ptr + batch * height * width + place, mask=exists, other=0)
            exists = exists & (seen != 0)
            keep = keep & exists[None, :]
        # a hidden pixel may hold anything, so it is not read
        k = load_columns(k_ptr, plane + place, D, exists, D, BLOCK_D)
        v = load_rows(v_ptr, plane + place, DV, exists, DV, BLOCK_DV)
        scores = tl.where(keep, tl.dot(q, k, input_precision="ieee") * qk_scale, float("-inf"))
        acc, row_max, row_sum = fold_softmax(acc, row_max, row_sum, scores, v)
    row_sum, lse = close_softmax(row_max, row_sum)
    tl.store(lse_ptr + pixel, lse, mask=live)
    store_rows(out_ptr, pixel, acc / row_sum[:, None], live, DV, BLOCK_DV)
