"""The Triton kernels of neighborhood attention on one or two axes, backward. Importing this needs triton.

No atomic additions: one kernel walks the keys of a rectangle of queries and adds up dQ; the other the queries of a
rectangle of keys, which on every axis are a run as well (``inverse_limits``), and adds up dK and dV.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
import triton
import triton.language as tl
from triton import knobs

from attnlab_kernels.operations.triton_tiles import (
    load_columns,
    load_lse,
    load_rows,
    store_rows,
    weights_again,
)

INTERPRETED = knobs.runtime.interpret


@triton.jit
def _rectangle(
    first_y_ptr, count_y_ptr, first_x_ptr, count_x_ptr, height, width, dilation_y, dilation_x, tiles_x,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Places and windows of this program's pixels, and the halo that the windows span, in steps of the dilation."""
    tile, residue = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, TILE_Y * TILE_X)
    y = residue // dilation_x + (tile // tiles_x * TILE_Y + lane // TILE_X) * dilation_y
    x = residue % dilation_x + (tile % tiles_x * TILE_X + lane % TILE_X) * dilation_x
    live = (y < height) & (x < width)
    first_y = tl.load(first_y_ptr + y, mask=live, other=0)
    first_x = tl.load(first_x_ptr + x, mask=live, other=0)
    end_y = first_y + tl.load(count_y_ptr + y, mask=live, other=0) * dilation_y
    end_x = first_x + tl.load(count_x_ptr + x, mask=live, other=0) * dilation_x
    # a pixel with an empty window on one axis spans nothing
    spans = live & (end_y > first_y) & (end_x > first_x)
    low_y = tl.min(tl.where(spans, first_y, height), 0)
    low_x = tl.min(tl.where(spans, first_x, width), 0)
    rows = tl.maximum(tl.max(tl.where(spans, end_y, 0), 0) - low_y, 0) // dilation_y
    columns = tl.maximum(tl.max(tl.where(spans, end_x, 0), 0) - low_x, 0) // dilation_x
    return live, y * width + x, first_y, end_y, first_x, end_x, low_y, low_x, rows, columns


@triton.jit
def neighborhood_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    first_y_ptr, count_y_ptr, first_x_ptr, count_x_ptr, visible_ptr,
    heads, height, width, dilation_y, dilation_x, tiles_x, scale, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_VISIBLE: tl.constexpr,
):  # fmt: skip
    """dQ. Tensors are contiguous [B, H, height * width, .]; tables as in the forward."""
    plane = tl.program_id(2).to(tl.int64) * height * width
    live, pixel, first_y, end_y, first_x, end_x, low_y, low_x, rows, columns = _rectangle(
        first_y_ptr, count_y_ptr, first_x_ptr, count_x_ptr, height, width, dilation_y, dilation_x, tiles_x,
        TILE_Y, TILE_X,
    )  # fmt: skip
    pixel = plane + pixel.to(tl.int64)
    q = load_rows(q_ptr, pixel, D, live, D, BLOCK_D)
    grad = load_rows(grad_ptr, pixel, DV, live, DV, BLOCK_DV)
    lse = load_lse(lse_ptr, pixel, live)
    delta = tl.load(delta_ptr + pixel, mask=live, other=0.0)
    dq = tl.zeros([TILE_Y * TILE_X, BLOCK_D], tl.float32)
    for start in range(0, rows * columns, BLOCK_N):
        step = start + tl.arange(0, BLOCK_N)
        exists = step < rows * columns
        key_y = low_y + step // columns * dilation_y
        key_x = low_x + step % columns * dilation_x
        place = (key_y * width + key_x).to(tl.int64)
        if HAS_VISIBLE:
            batch = (tl.program_id(2) // heads).to(tl.int64)
            exists = exists & (
                tl.load(visible_ptr + batch * height * width + place, mask=exists, other=0) != 0
            )
        keep = (key_y[None, :] >= first_y[:, None]) & (key_y[None, :] < end_y[:, None]) & exists[None, :]
        keep = keep & (key_x[None, :] >= first_x[:, None]) & (key_x[None, :] < end_x[:, None])
        k = load_rows(k_ptr, plane + place, D, exists, D, BLOCK_D)
        v = load_columns(v_ptr, plane + place, DV, exists, DV, BLOCK_DV)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        products = tl.dot(grad, v, input_precision="ieee")
        weights = weights_again(scores, lse[:, None], keep)
        gradient = weights * (products - delta[:, None])
        dq = tl.dot(gradient.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr, pixel, dq * scale, live, D, BLOCK_D)


@triton.jit
def neighborhood_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    first_y_ptr, count_y_ptr, first_x_ptr, count_x_ptr, visible_ptr,
    heads, height, width, dilation_y, dilation_x, tiles_x, scale, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_VISIBLE: tl.constexpr,
):  # fmt: skip
    """dK and dV. The tables say which queries see a key; the rectangle is of keys and the halo of queries."""
    plane = tl.program_id(2).to(tl.int64) * height * width
    live, pixel, first_y, end_y, first_x, end_x, low_y, low_x, rows, columns = _rectangle(
        first_y_ptr, count_y_ptr, first_x_ptr, count_x_ptr, height, width, dilation_y, dilation_x, tiles_x,
        TILE_Y, TILE_X,
    )  # fmt: skip
    seen = live
    if HAS_VISIBLE:
        batch = (tl.program_id(2) // heads).to(tl.int64)
        seen = live & (tl.load(visible_ptr + batch * height * width + pixel, mask=live, other=0) != 0)
    pixel = plane + pixel.to(tl.int64)
    # a hidden pixel may hold anything, so it is not read
    k = load_rows(k_ptr, pixel, D, seen, D, BLOCK_D)
    v = load_rows(v_ptr, pixel, DV, seen, DV, BLOCK_DV)
    dk = tl.zeros([TILE_Y * TILE_X, BLOCK_D], tl.float32)
    dv = tl.zeros([TILE_Y * TILE_X, BLOCK_DV], tl.float32)
    for start in range(0, rows * columns, BLOCK_N):
        step = start + tl.arange(0, BLOCK_N)
        exists = step < rows * columns
        query_y = low_y + step // columns * dilation_y
        query_x = low_x + step % columns * dilation_x
        place = plane + (query_y * width + query_x).to(tl.int64)
        keep = (query_y[None, :] >= first_y[:, None]) & (query_y[None, :] < end_y[:, None]) & seen[:, None]
        keep = keep & (query_x[None, :] >= first_x[:, None]) & (query_x[None, :] < end_x[:, None])
        keep = keep & exists[None, :]
        q = load_rows(q_ptr, place, D, exists, D, BLOCK_D)
        grad = load_rows(grad_ptr, place, DV, exists, DV, BLOCK_DV)
        lse = load_lse(lse_ptr, place, exists)
        delta = tl.load(delta_ptr + place, mask=exists, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
        products = tl.dot(v, tl.trans(grad), input_precision="ieee")
        weights = weights_again(scores, lse[None, :], keep)
        gradient = weights * (products - delta[None, :])
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
        dk = tl.dot(gradient.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(dk_ptr, pixel, dk * scale, live, D, BLOCK_D)
    store_rows(dv_ptr, pixel, dv, live, DV, BLOCK_DV)
