"""Causal linear attention by our Triton kernels, forward and backward. ``triton_kernel`` is loaded on first use."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab_kernels.operations.linear.reference import LinearSums, Raw
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.triton_platform import grid_refusal, load_kernels, padded, triton_support

KERNELS = "attnlab_kernels.operations.linear.triton_kernel"
CHUNKS = (16, 32, 64)
MAX_WIDTH = 512
FULL = "tf32x3"


@dataclass(frozen=True)
class Config:
    """Blocks of the inner and outer width, and launch numbers."""

    block_e: int
    block_f: int
    num_warps: int
    num_stages: int


def choose_config(inner: int, outer: int, element_size: int) -> Config:
    """Blocks for the two widths and the bytes of a number; a test compiles some for every target."""
    # full float32 products keep whole rows alive: four warps would spill them
    widest, crowded = (32, max(inner, outer) > 16) if element_size == 4 else (64, False)
    return Config(min(widest, padded(inner)), min(widest, padded(outer)), 8 if crowded else 4, 2)


def run(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, past: LinearSums, chunk: int) -> Raw:
    """As ``reference.parallel``, for causal calls; products in the inputs' dtype, sums in float32."""
    assert causal
    numerator, denominator, state, normaliser = _Chunks.apply(
        query, key, value, past.state, past.normaliser, chunk
    )
    return Raw(numerator, denominator, LinearSums(state, normaliser))


def supports(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, chunk: int) -> Support:
    """Causal calls, chunks of 16 to 64 tokens, widths to 512, with gradients."""
    support = triton_support(query)
    if not support:
        return support
    if not causal:
        return Support(False, "without a causal order two matrix products are all there is: use chunked")
    if chunk not in CHUNKS:
        return Support(False, f"the Triton kernel takes chunks of {', '.join(map(str, CHUNKS))}; got {chunk}")
    if max(query.shape[3], value.shape[3]) > MAX_WIDTH:
        return Support(False, f"the Triton kernel holds widths to {MAX_WIDTH}; got {query.shape[3]}")
    if refusal := grid_refusal(query):
        return Support(False, refusal)
    if value.dtype != query.dtype or key.dtype != query.dtype:
        return Support(
            False, f"the Triton kernel needs one dtype; got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    return support


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, state: Tensor, normaliser: Tensor, chunk: int
    ) -> tuple[Tensor, ...]:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        before, last = _states(key, value, None, (state, normaliser), chunk, reverse=False)
        numerator, denominator = _read(query, key, value, before, chunk)
        ctx.save_for_backward(query, key, value, *before)
        ctx.chunk = chunk
        return numerator, denominator, *last

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, states, norms = ctx.saved_tensors
        numerator, denominator, state, normaliser = (gradient.contiguous() for gradient in gradients)
        chunk = ctx.chunk
        after, past = _states(query, numerator, denominator, (state, normaliser), chunk, reverse=True)
        rows = {"weight": denominator, "chunk": chunk, "dtype": query.dtype}
        query_gradient = _gradient(numerator, value, key, states, norms, mode=1, transposed=True, **rows)
        key_gradient = _gradient(value, numerator, query, *after, mode=2, transposed=True, **rows)
        value_gradient = _gradient(key, query, numerator, *after, mode=0, transposed=False, **rows)
        return query_gradient, key_gradient, value_gradient, *past, None


def _states(
    a: Tensor, b: Tensor, weight: Tensor | None, past: tuple[Tensor, Tensor], chunk: int, *, reverse: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """States ``[B, H, chunks, E, F]`` and norms ``[B, H, chunks, E]`` before each chunk, and after the last."""
    kernels, (batch, heads, length, inner), outer = _kernels(), a.shape, b.shape[3]
    chunks = -(-length // chunk)
    wide = {"dtype": torch.float32, "device": a.device}
    states = torch.empty(batch, heads, chunks, inner, outer, **wide)
    norms = torch.empty(batch, heads, chunks, inner, **wide)
    last = torch.empty(batch, heads, inner, outer, **wide), torch.empty(batch, heads, inner, **wide)
    config = choose_config(inner, outer, a.element_size())
    grid = (-(-inner // config.block_e), -(-outer // config.block_f), batch * heads)
    kernels.linear_state_kernel[grid](
        a, b, weight, states, norms, *(part.float().contiguous() for part in past), *last,
        a.shape[3], b.shape[3], length, chunks,
        E=inner, F=outer, CHUNK=chunk, BLOCK_E=config.block_e, BLOCK_F=config.block_f, REVERSE=reverse,
        HAS_WEIGHT=weight is not None, PRECISION=precision_of(a.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return (states, norms), last


def _read(
    q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    """Numerators ``[B, H, n, Dv]`` and denominators ``[B, H, n]``, float32."""
    numerator = torch.empty(*q.shape[:3], v.shape[3], dtype=torch.float32, device=q.device)
    denominator = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _launch(
        q,
        k,
        v,
        *before,
        None,
        numerator,
        denominator,
        chunk,
        mode=0,
        reverse=False,
        transposed=False,
        precision=precision_of(q.dtype),
    )
    return numerator, denominator


def _gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    norms: Tensor,
    *,
    weight: Tensor,
    chunk: int,
    dtype: torch.dtype,
    mode: int,
    transposed: bool,
) -> Tensor:
    """A reading with other roles; keys and values read the chunks that come after them."""
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    _launch(
        q,
        k,
        v,
        states,
        norms,
        weight,
        out,
        None,
        chunk,
        mode=mode,
        reverse=mode != 1,
        transposed=transposed,
        precision=precision_of(dtype),
    )
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    norms: Tensor,
    weight: Tensor | None,
    out: Tensor,
    denominator: Tensor | None,
    chunk: int,
    *,
    mode: int,
    reverse: bool,
    transposed: bool,
    precision: str,
) -> None:
    kernels, (batch, heads, length, inner), outer = _kernels(), q.shape, v.shape[3]
    chunks = -(-length // chunk)
    config = choose_config(inner, outer, 4 if precision == FULL else 2)
    strides = (1, states.shape[4]) if transposed else (states.shape[4], 1)
    kernels.linear_output_kernel[(chunks, -(-outer // config.block_f), batch * heads)](
        q, k, v, states, norms, weight, out, denominator,
        q.shape[3], k.shape[3], v.shape[3], *strides, length, chunks,
        E=inner, F=outer, CHUNK=chunk, BLOCK_E=config.block_e, BLOCK_F=config.block_f, REVERSE=reverse,
        DENOMINATOR=denominator is not None, WEIGHT=mode, WIDE=v.dtype != torch.bfloat16, PRECISION=precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def precision_of(dtype: torch.dtype) -> str:
    """Products with a float32 state: three passes (as good as float32) for float32 inputs, one for half types.

    One pass keeps ten bits, those of float16; plain float32 products would spill.
    """
    return FULL if dtype == torch.float32 else "tf32"


def _kernels() -> ModuleType:
    return load_kernels(KERNELS)
