"""The Triton kernel that writes new keys and values into the blocks of a pool. Importing this needs triton."""

from __future__ import annotations

# the arguments of a kernel are pointers, scalars and constexprs: triton types them at launch
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = knobs.runtime.interpret


@triton.jit
def paged_write_kernel(
    new_ptr,
    pool_ptr,
    slots_ptr,
    stride_nt,
    stride_nh,
    stride_pb,
    stride_ps,
    stride_ph,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Token t of ``[T, H, D]`` goes to slot ``slots[t]`` (int64), counted over the pool; -1 is skipped. Grid: T, H."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        offs = tl.arange(0, BLOCK_D)
        values = tl.load(new_ptr + token * stride_nt + head * stride_nh + offs, mask=offs < D)
        place = pool_ptr + (slot // PAGE) * stride_pb + (slot % PAGE) * stride_ps + head * stride_ph
        tl.store(place + offs, values.to(pool_ptr.dtype.element_ty), mask=offs < D)
