"""The Triton kernel of expert projections: a matrix product in groups, gates applied on the way out. Needs triton.

Assignments (a token, a head, one of its chosen experts) are sorted by expert; a program multiplies a block of them with
their expert's matrix, scales each row by its gate and writes it to the assignment's own row, so nothing is added by
atomics. Csordás et al., "SwitchHead", https://arxiv.org/abs/2312.07987.
"""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = knobs.runtime.interpret


@triton.jit
def expert_projection_kernel(
    x_ptr, weight_ptr, gate_ptr, order_ptr, group_ptr, start_ptr, stop_ptr, out_ptr,
    stride_xm, stride_wg, stride_wk, divisor, width_in, width_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[a] = gate[a] * x[a // divisor] @ weight[group]`` for the assignments a of one block.

    ``order`` int64, assignments sorted by group; for each block its ``group``, and ``start`` and ``stop`` in the order
    (start == stop: nothing to do). ``weight`` [groups, width_in, width_out] with unit stride in the last dimension;
    ``out`` contiguous [assignments, width_out].
    """
    block = tl.program_id(0)
    start = tl.load(start_ptr + block)
    stop = tl.load(stop_ptr + block)
    if start < stop:
        group = tl.load(group_ptr + block).to(tl.int64)
        lane = start + tl.arange(0, BLOCK_M)
        live = lane < stop
        assignment = tl.load(order_ptr + lane, mask=live, other=0).to(tl.int64)
        source = assignment // divisor
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = columns < width_out
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, width_in, BLOCK_K):
            inner = first + tl.arange(0, BLOCK_K)
            in_k = inner < width_in
            x_ptrs = x_ptr + source[:, None] * stride_xm + inner[None, :]
            x = tl.load(x_ptrs, mask=live[:, None] & in_k[None, :], other=0.0)
            w_ptrs = (
                weight_ptr + group * stride_wg + inner[:, None].to(tl.int64) * stride_wk + columns[None, :]
            )
            weight = tl.load(w_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
            acc = tl.dot(x, weight, acc, input_precision="ieee")
        gate = tl.load(gate_ptr + assignment, mask=live, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + assignment[:, None] * width_out + columns[None, :]
        out = (acc * gate[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs, out, mask=live[:, None] & in_n[None, :])
