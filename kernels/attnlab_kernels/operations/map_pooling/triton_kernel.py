"""The Triton kernels that read attention maps: rows, columns, pooled cells. Importing this needs triton.

Each walks the tiles that the mask allows and forms ``P = exp2(scale q k - lse)`` in registers. Columns have a grid of
their own over blocks of keys, so nothing is added by atomics and every result is the same in every run.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false
import triton
import triton.language as tl
from triton import knobs

from attnlab_kernels.operations.triton_tiles import load_rows, within_band

INTERPRETED = knobs.runtime.interpret


@triton.jit
def _load(base, places, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``places`` [N] of a matrix, as [N, BLOCK_D], zeros beyond ``limit`` and D."""
    return load_rows(base, places.to(tl.int64), stride, (places >= 0) & (places < limit), D, BLOCK_D)


@triton.jit
def _log_weights(
    q, k, lse, rows, keys, offset, num_queries, lo, hi, left, right, qk_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """``log2 P`` [M, N] of a tile, minus infinity where nothing is attended; ``lse`` [M] is natural."""
    keep = (keys[None, :] >= lo) & (keys[None, :] < hi) & (rows[:, None] < num_queries)
    # also false for a dead row, whose lse is minus infinity
    keep = keep & (lse[:, None] > float("-inf"))
    keep = within_band(keep, rows[:, None] + offset, keys[None, :], left, right, HAS_LEFT, HAS_RIGHT)
    # a padded key may hold anything: its product is thrown away
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    norm = tl.where(lse > float("-inf"), lse, 0.0) * 1.4426950408889634
    return tl.where(keep, scores - norm[:, None], float("-inf"))


@triton.jit
def map_row_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr, ranges_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_out,
    heads, group, num_queries, num_keys, left, right, sinks, qk_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Seven numbers of every row: float32 ``out`` [7, B, H, Sq], planes stride_out apart; ``ranges`` int32 [B, 2]."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    offset = num_keys - num_queries
    q = _load(q_ptr + batch * stride_qb + head * stride_qh, rows, stride_qm, num_queries, D, BLOCK_D)
    k_base = k_ptr + batch * stride_kb + head // group * stride_kh
    place = (batch * heads + head) * num_queries + rows.to(tl.int64)
    lse = tl.load(lse_ptr + place, mask=rows < num_queries, other=float("-inf"))
    lo = tl.load(ranges_ptr + 2 * batch)
    hi = tl.load(ranges_ptr + 2 * batch + 1)
    start, stop = lo, hi
    if HAS_LEFT:
        start = tl.maximum(start, offset + first_row - left)
    if HAS_RIGHT:
        stop = tl.minimum(stop, offset + tl.minimum(first_row + BLOCK_M, num_queries) + right)
    total = tl.zeros([BLOCK_M], tl.float32)
    entropy = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    distance = tl.zeros([BLOCK_M], tl.float32)
    sink = tl.zeros([BLOCK_M], tl.float32)
    previous = tl.zeros([BLOCK_M], tl.float32)
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k = _load(k_base, keys, stride_kn, hi, D, BLOCK_D)
        logs = _log_weights(
            q, k, lse, rows, keys, offset, num_queries, lo, hi, left, right, qk_scale, HAS_LEFT, HAS_RIGHT
        )
        weights = tl.math.exp2(logs)
        away = (rows[:, None] + offset - keys[None, :]).to(tl.float32)
        total += tl.sum(weights, 1)
        entropy -= tl.sum(weights * tl.where(weights > 0.0, logs, 0.0), 1)
        highest = tl.maximum(highest, tl.max(weights, 1))
        squares += tl.sum(weights * weights, 1)
        distance += tl.sum(weights * tl.abs(away), 1)
        sink += tl.sum(tl.where(keys[None, :] < lo + sinks, weights, 0.0), 1)
        previous += tl.sum(tl.where(away == 1.0, weights, 0.0), 1)
    live = rows < num_queries
    # a number that is 1 at the launch has no method
    plane = tl.zeros([], tl.int64) + stride_out
    tl.store(out_ptr + place, total, mask=live)
    tl.store(out_ptr + plane + place, entropy * 0.6931471805599453, mask=live)
    tl.store(out_ptr + 2 * plane + place, highest, mask=live)
    tl.store(out_ptr + 3 * plane + place, squares, mask=live)
    tl.store(out_ptr + 4 * plane + place, distance, mask=live)
    tl.store(out_ptr + 5 * plane + place, sink, mask=live)
    tl.store(out_ptr + 6 * plane + place, previous, mask=live)


@triton.jit
def map_column_kernel(
    q_ptr, k_ptr, lse_ptr, sum_ptr, max_ptr, ranges_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    heads, group, num_queries, num_keys, left, right, qk_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Sum and maximum of every column: float32 [B, H, Sk]; a program has a block of keys and walks their queries."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first_key = tl.program_id(0) * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    offset = num_keys - num_queries
    lo = tl.load(ranges_ptr + 2 * batch)
    hi = tl.load(ranges_ptr + 2 * batch + 1)
    k = _load(k_ptr + batch * stride_kb + head // group * stride_kh, keys, stride_kn, hi, D, BLOCK_D)
    q_base = q_ptr + batch * stride_qb + head * stride_qh
    lse_base = lse_ptr + (batch * heads + head) * num_queries
    start = tl.program_id(0) * 0
    stop = num_queries
    if HAS_RIGHT:
        start = tl.maximum(start, first_key - right - offset)
    if HAS_LEFT:
        stop = tl.minimum(stop, first_key + BLOCK_N + left - offset)
    if (first_key >= hi) | (first_key + BLOCK_N <= lo):
        stop = start
    total = tl.zeros([BLOCK_N], tl.float32)
    highest = tl.zeros([BLOCK_N], tl.float32)
    for first in range(start, stop, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q = _load(q_base, rows, stride_qm, num_queries, D, BLOCK_D)
        lse = tl.load(lse_base + rows, mask=rows < num_queries, other=float("-inf"))
        logs = _log_weights(
            q, k, lse, rows, keys, offset, num_queries, lo, hi, left, right, qk_scale, HAS_LEFT, HAS_RIGHT
        )
        weights = tl.math.exp2(logs)
        total += tl.sum(weights, 0)
        highest = tl.maximum(highest, tl.max(weights, 0))
    place = (batch * heads + head) * num_keys + keys.to(tl.int64)
    tl.store(sum_ptr + place, total, mask=keys < num_keys)
    tl.store(max_ptr + place, highest, mask=keys < num_keys)


@triton.jit
def map_pool_kernel(
    q_ptr, k_ptr, lse_ptr, max_ptr, mean_ptr, ranges_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    heads, group, num_queries, num_keys, cells_down, cells_across, left, right, qk_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CELL_M: tl.constexpr, CELL_N: tl.constexpr, PATCH_M: tl.constexpr, PATCH_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Maximum and mean of cells [CELL_M, CELL_N]: float32 [B, H, cells_down, cells_across].

    A program has PATCH_M rows (a tile, or a cell where cells are taller) and walks patches of PATCH_N keys.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    top = tl.program_id(0) * PATCH_M
    offset = num_keys - num_queries
    SHORT_M: tl.constexpr = CELL_M if CELL_M < BLOCK_M else BLOCK_M
    SHORT_N: tl.constexpr = CELL_N if CELL_N < BLOCK_N else BLOCK_N
    DOWN: tl.constexpr = BLOCK_M // SHORT_M
    ACROSS: tl.constexpr = BLOCK_N // SHORT_N
    q_base = q_ptr + batch * stride_qb + head * stride_qh
    k_base = k_ptr + batch * stride_kb + head // group * stride_kh
    lse_base = lse_ptr + (batch * heads + head) * num_queries
    lo = tl.load(ranges_ptr + 2 * batch)
    hi = tl.load(ranges_ptr + 2 * batch + 1)
    start, stop = lo, hi
    if HAS_LEFT:
        start = tl.maximum(start, offset + top - left)
    if HAS_RIGHT:
        stop = tl.minimum(stop, offset + tl.minimum(top + PATCH_M, num_queries) + right)
    cell_rows = top // CELL_M + tl.arange(0, DOWN)
    out_rows = (batch * heads + head) * cells_down * cells_across + cell_rows.to(tl.int64) * cells_across
    # at least 1: a tile may hold cells beyond the map, which are not stored
    heights = tl.maximum(tl.minimum(num_queries - cell_rows * CELL_M, CELL_M), 1).to(tl.float32)
    for patch in range(tl.cdiv(num_keys, PATCH_N)):
        corner = patch * PATCH_N
        highest = tl.zeros([DOWN, ACROSS], tl.float32)
        total = tl.zeros([DOWN, ACROSS], tl.float32)
        if (corner < stop) & (corner + PATCH_N > start):
            for down in range(0, PATCH_M, BLOCK_M):
                rows = top + down + tl.arange(0, BLOCK_M)
                q = _load(q_base, rows, stride_qm, num_queries, D, BLOCK_D)
                lse = tl.load(lse_base + rows, mask=rows < num_queries, other=float("-inf"))
                for across in range(0, PATCH_N, BLOCK_N):
                    keys = corner + across + tl.arange(0, BLOCK_N)
                    k = _load(k_base, keys, stride_kn, hi, D, BLOCK_D)
                    logs = _log_weights(
                        q, k, lse, rows, keys, offset, num_queries, lo, hi, left, right, qk_scale,
                        HAS_LEFT, HAS_RIGHT,
                    )  # fmt: skip
                    cells = tl.reshape(tl.math.exp2(logs), [DOWN, SHORT_M, ACROSS, SHORT_N])
                    highest = tl.maximum(highest, tl.max(tl.max(cells, 3), 1))
                    total += tl.sum(tl.sum(cells, 3), 1)
        columns = corner // CELL_N + tl.arange(0, ACROSS)
        widths = tl.maximum(tl.minimum(num_keys - columns * CELL_N, CELL_N), 1).to(tl.float32)
        keep = (cell_rows[:, None] < cells_down) & (columns[None, :] < cells_across)
        place = out_rows[:, None] + columns[None, :]
        tl.store(max_ptr + place, highest, mask=keep)
        tl.store(mean_ptr + place, total / (heights[:, None] * widths[None, :]), mask=keep)
