"""The Triton kernels of linear attention, forward and backward, against formulas in float64.

Without the interpreter and without a GPU each call must be refused; ``test_kernels_triton_operations`` runs this file
again in a process with TRITON_INTERPRET=1, where the numbers are checked.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab_kernels.operations.linear.api import linear_attend, supports
from attnlab_kernels.operations.linear.reference import LinearSums
from attnlab_kernels.operations.softmax.api import Unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    heads, tokens, inner, outer = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query, key = (torch.rand(1, heads, tokens, inner, generator=generator) + 0.1 for _ in range(2))
    value = torch.randn(1, heads, tokens, outer, generator=generator)
    return [tensor.to(DEVICE, dtype) for tensor in (query, key, value)]


def formula(query: Tensor, key: Tensor, value: Tensor, past: LinearSums | None) -> Tensor:
    weights = (query @ key.transpose(-1, -2)).tril()
    numerator, denominator = weights @ value, weights.sum(-1)
    if past is not None:
        numerator = numerator + query @ past.state.to(query)
        denominator = denominator + (query @ past.normaliser.to(query)[..., None])[..., 0]
    return numerator / (denominator + 1e-6)[..., None]


def refused(*call: Tensor, chunk: int) -> bool:
    """Whether the kernel cannot run here; then an explicit choice must raise."""
    if supports("triton", *call, causal=True, chunk=chunk):
        return False
    with pytest.raises(Unsupported, match="cannot run this call"):
        linear_attend(*call, causal=True, form="triton", chunk=chunk)
    return True


def exactly(query: Tensor, key: Tensor, value: Tensor, past: LinearSums | None) -> Tensor:
    return formula(query.double(), key.double(), value.double(), past)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max())


@pytest.mark.parametrize("shape", [(2, 37, 8, 20), (1, 64, 16, 16), (1, 5, 70, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_output_is_the_formula_after_a_past(dtype, shape, monkeypatch):
    query, key, value = inputs(shape, dtype)
    if refused(query, key, value, chunk=16):
        return
    monkeypatch.setattr(torch, "empty", lambda *size, **named: torch.full(_size(size), torch.nan, **named))
    past = LinearSums(
        torch.rand(1, shape[0], shape[2], shape[3], device=DEVICE),
        torch.rand(1, shape[0], shape[2], device=DEVICE),
    )
    want = exactly(query, key, value, past)
    result = linear_attend(query, key, value, causal=True, past=past, form="triton", chunk=16)
    assert result.form == "triton"
    assert error(result.output, want) <= 2 * error(formula(query, key, value, past), want) + 2e-6
    q, k, v = (tensor.double() for tensor in (query, key, value))
    plain = linear_attend(q, k, v, causal=True, past=past, form="parallel")
    for mine, other in zip(result.sums, plain.sums, strict=True):
        assert mine.dtype == torch.float32
        assert torch.allclose(mine.double(), other, rtol=1e-5, atol=1e-5)


def test_triton_gradients_are_those_of_the_formula(monkeypatch):
    leaves = inputs((2, 37, 8, 20), torch.float32)
    if refused(*leaves, chunk=16):
        return
    monkeypatch.setattr(torch, "empty", lambda *size, **named: torch.full(_size(size), torch.nan, **named))
    past = [torch.rand(1, 2, 8, 20, device=DEVICE), torch.rand(1, 2, 8, device=DEVICE)]
    probe = torch.randn(1, 2, 37, 20, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def gradients(dtype: torch.dtype, form: str) -> tuple[Tensor, ...]:
        wide = [tensor.detach().to(dtype).requires_grad_() for tensor in (*leaves, *past)]
        q, k, v, state, normaliser = wide
        sums_so_far = LinearSums(state, normaliser)
        result = linear_attend(q, k, v, causal=True, past=sums_so_far, form=form, chunk=16)
        sums = result.sums.state.square().sum() / 100 + result.sums.normaliser.square().sum() / 100
        return torch.autograd.grad((result.output * probe.to(dtype)).sum() + sums, wide)

    exact = gradients(torch.float64, "parallel")
    plain = gradients(torch.float32, "parallel")
    for mine, base, want in zip(gradients(torch.float32, "triton"), plain, exact, strict=True):
        assert error(mine, want) <= 2 * error(base, want) + 5e-6 * float(want.abs().max())


def test_triton_weights_beyond_the_range_of_float16_stay_finite():
    query, key, value = inputs((1, 33, 16, 16), torch.float16)
    if refused(query, key, value, chunk=16):
        return
    query, key = query * 100, key * 100
    want = exactly(query, key, value, None)
    got = linear_attend(query, key, value, causal=True, form="triton", chunk=16).output
    assert error(got, want) < 2e-3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"causal": False}, "two matrix products"),
        ({"chunk": 48}, "chunks of 16, 32, 64; got 48"),
    ],
    ids=str,
)
def test_triton_says_why_not(change, says):
    query, key, value = inputs((1, 4, 16, 16), torch.float32)
    if not supports("triton", query, key, value, causal=True):
        says = "TRITON_INTERPRET=1"
    named = {"causal": True, "chunk": 16} | change
    assert says in supports("triton", query, key, value, **named).reason
    assert not supports("triton", *(t.double() for t in (query, key, value)), causal=True)


def _size(size: tuple) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
