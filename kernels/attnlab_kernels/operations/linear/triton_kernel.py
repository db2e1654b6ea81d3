"""The Triton kernels of causal linear attention. Importing this needs triton.

Two kernels do forward and backward: ``linear_state_kernel`` runs over the chunks and keeps the sums before each of
them, in float32; ``linear_output_kernel`` reads weights inside a chunk and the state before it. Every gradient is a
reading of the same kind with other tensors, so the backward is one state pass in reverse and three more readings. C
chunk, E inner width (that of the two tensors whose product is a weight), F outer width (that of what is summed).
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
def linear_state_kernel(
    a_ptr,
    b_ptr,
    weight_ptr,
    state_ptr,
    norm_ptr,
    past_state_ptr,
    past_norm_ptr,
    last_state_ptr,
    last_norm_ptr,
    stride_an,
    stride_bn,
    length,
    chunks,
    E: tl.constexpr,
    F: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """States ``sum a_i b_i^T`` and norms ``sum a_i w_i`` over the chunks before each (after each if REVERSE).

    ``a`` [BH, n, E] and ``b`` [BH, n, F] with rows stride_an and stride_bn apart; ``state`` float32 [BH, chunks, E, F],
    ``norm`` float32 [BH, chunks, E], ``past`` and ``last`` float32 [BH, E, F] and [BH, E].
    """
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = tl.program_id(2).to(tl.int64)
    in_e, in_f = offs_e < E, offs_f < F
    square = offs_e[:, None] * F + offs_f[None, :]
    in_square = in_e[:, None] & in_f[None, :]
    first = tl.program_id(1) == 0
    state = tl.load(past_state_ptr + row * E * F + square, mask=in_square, other=0.0)
    norm = tl.load(past_norm_ptr + row * E + offs_e, mask=in_e, other=0.0)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        place = row * chunks + chunk
        tl.store(state_ptr + place * E * F + square, state, mask=in_square)
        tl.store(norm_ptr + place * E + offs_e, norm, mask=in_e & first)
        tokens = chunk * CHUNK + tl.arange(0, CHUNK).to(tl.int64)
        exists = tokens < length
        a_rows = row * length * stride_an + tokens * stride_an
        b_rows = row * length * stride_bn + tokens * stride_bn
        a = tl.load(
            a_ptr + a_rows[None, :] + offs_e[:, None], mask=exists[None, :] & in_e[:, None], other=0.0
        )
        b = tl.load(
            b_ptr + b_rows[:, None] + offs_f[None, :], mask=exists[:, None] & in_f[None, :], other=0.0
        )
        state = tl.dot(a, b.to(a.dtype), state, input_precision=PRECISION)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + row * length + tokens, mask=exists, other=0.0)
            norm += tl.sum(a.to(tl.float32) * weight[None, :], 1)
        else:
            norm += tl.sum(a.to(tl.float32), 1)
    tl.store(last_state_ptr + row * E * F + square, state, mask=in_square)
    tl.store(last_norm_ptr + row * E + offs_e, norm, mask=in_e & first)


@triton.jit
def linear_output_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    state_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    denominator_ptr,
    stride_qn,
    stride_kn,
    stride_vn,
    stride_se,
    stride_sf,
    length,
    chunks,
    E: tl.constexpr,
    F: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    REVERSE: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    WEIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out_i = sum_j P_ij v_j + q_i state``, P the products q_i k_j with j <= i (j >= i if REVERSE) inside the chunk.

    WEIGHT 1 adds w_i to row i of P and ``w_i norm`` to out; 2 adds w_j to column j and ``norm``; 0 adds nothing.
    DENOMINATOR also gives ``sum_j P_ij + q_i norm``. ``out`` is contiguous [BH, n, F], ``denominator`` [BH, n].
    """
    chunk = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = tl.program_id(2).to(tl.int64)
    place = row * chunks + chunk
    offs_c = tl.arange(0, CHUNK)
    tokens = chunk * CHUNK + offs_c
    exists = tokens < length
    in_f = offs_f < F
    q_rows = row * length * stride_qn + tokens * stride_qn
    k_rows = row * length * stride_kn + tokens * stride_kn
    weights = tl.zeros([CHUNK, CHUNK], tl.float32)
    out = tl.zeros([CHUNK, BLOCK_F], tl.float32)
    denominator = tl.zeros([CHUNK], tl.float32)
    for start in range(0, E, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        in_e = offs_e < E
        q = tl.load(
            q_ptr + q_rows[:, None] + offs_e[None, :], mask=exists[:, None] & in_e[None, :], other=0.0
        )
        k = tl.load(
            k_ptr + k_rows[None, :] + offs_e[:, None], mask=exists[None, :] & in_e[:, None], other=0.0
        )
        weights = tl.dot(q.to(k.dtype), k, weights, input_precision=PRECISION)
        state_ptrs = state_ptr + place * E * F + offs_e[:, None] * stride_se + offs_f[None, :] * stride_sf
        state = tl.load(state_ptrs, mask=in_e[:, None] & in_f[None, :], other=0.0)
        out = tl.dot(q.to(tl.float32), state, out, input_precision=PRECISION)
        if DENOMINATOR:
            norm = tl.load(norm_ptr + place * E + offs_e, mask=in_e, other=0.0)
            denominator += tl.sum(q.to(tl.float32) * norm[None, :], 1)
    if WEIGHT > 0:
        added = tl.load(weight_ptr + row * length + tokens, mask=exists, other=0.0)
        tail = tl.load(norm_ptr + place * F + offs_f, mask=in_f, other=0.0)
        if WEIGHT == 1:
            weights += added[:, None]
            out += added[:, None] * tail[None, :]
        else:
            weights += added[None, :]
            out += tail[None, :]
    if REVERSE:
        keep = offs_c[None, :] >= offs_c[:, None]
    else:
        keep = offs_c[None, :] <= offs_c[:, None]
    weights = tl.where(keep & exists[None, :], weights, 0.0)
    v_ptrs = v_ptr + row * length * stride_vn + tokens[:, None] * stride_vn + offs_f[None, :]
    v = tl.load(v_ptrs, mask=exists[:, None] & in_f[None, :], other=0.0)
    # float16 ends at 65504, which a sum of products may pass: such weights stay wide
    if WIDE:
        out = tl.dot(weights, v.to(tl.float32), out, input_precision=PRECISION)
    else:
        out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION)
    out_ptrs = out_ptr + (row * length + tokens)[:, None] * F + offs_f[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=exists[:, None] & in_f[None, :])
    if DENOMINATOR:
        denominator += tl.sum(weights, 1)
        tl.store(denominator_ptr + row * length + tokens, denominator, mask=exists & (tl.program_id(1) == 0))
