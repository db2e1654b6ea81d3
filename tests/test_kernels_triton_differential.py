"""The one-pass Triton kernel of differential attention against the signed map in float64.

Without the interpreter and without a GPU each call must be refused; ``test_kernels_triton_operations`` runs this file
again in a process with TRITON_INTERPRET=1, where the numbers are checked.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.operations.differential import reference
from attnlab_kernels.operations.differential.api import Pair, difference_attend, supports
from attnlab_kernels.operations.softmax.api import Unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAME = "difference_triton"
MASKS: list[Mask] = [
    Full(),
    Causal(),
    Window(6),
    Window(3, 5),
    Causal() & Padding(((2, 33), (5, 20))),
    Padding(((0, 0), (7, 9))),
]


def inputs(num_queries: int, num_keys: int, dtype: torch.dtype) -> tuple[Pair, Pair, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_queries)

    def make(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(2, heads, tokens, dim, generator=generator).to(DEVICE, dtype)

    query = Pair(make(2, num_queries, 10), make(2, num_queries, 10))
    key = Pair(make(1, num_keys, 10), make(1, num_keys, 10))
    return query, key, make(1, num_keys, 20), torch.rand(2, 2, num_queries, generator=generator).to(DEVICE)


def wide(pair: Pair) -> Pair:
    return Pair(pair.first.double(), pair.second.double())


def refused(query: Pair, key: Pair, value: Tensor, weight: Tensor) -> bool:
    """Whether the kernel cannot run here; then an explicit choice must raise."""
    if supports(NAME, query, key, value, weight):
        return False
    with pytest.raises(Unsupported, match="cannot run this call"):
        difference_attend(query, key, value, weight, implementation=NAME)
    return True


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max())


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@pytest.mark.parametrize("sizes", [(37, 37), (3, 23)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_output_is_the_signed_map_times_the_values(dtype, sizes, mask, monkeypatch):
    query, key, value, weight = inputs(sizes[0], sizes[1], dtype)
    if refused(query, key, value, weight):
        return
    monkeypatch.setattr(torch, "empty", lambda *size, **named: torch.full(size, torch.nan, **named))
    want, _ = reference.run(wide(query), wide(key), value.double(), weight.double(), mask=mask)
    plain = [reference.run(query, key, value, weight, mask=mask)[0]]
    plain += [
        reference.compose(query, key, value, weight.to(dtype), mask=mask, implementation="eager").output
    ]
    result = difference_attend(query, key, value, weight, mask=mask, implementation=NAME)
    assert result.implementation == NAME
    assert error(result.output, want) <= 2 * max(error(base, want) for base in plain) + 2e-6
    exact = difference_attend(
        wide(query), wide(key), value.double(), weight, mask=mask, implementation="maps"
    ).lse
    for mine, other in zip(result.lse, exact, strict=True):
        dead = torch.isneginf(other)
        assert torch.equal(torch.isneginf(mine), dead)
        assert not result.output[dead].any()
        assert error(mine.masked_fill(dead, 0), other.masked_fill(dead, 0).double()) < 2e-5


def gradients(
    name: str, dtype: torch.dtype, sizes: tuple[int, int], mask: Mask, shared: bool
) -> list[Tensor]:
    given = inputs(sizes[0], sizes[1], torch.float16 if dtype == torch.float16 else torch.float32)
    pairs, key, value, weight = given
    parts = [*pairs, key.first] if shared else [*pairs, *key]
    leaves = [part.detach().to(dtype).requires_grad_() for part in (*parts, value)]
    leaves.append(
        weight.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    )
    pair = Pair(leaves[2], leaves[2] if shared else leaves[3])
    query = Pair(leaves[0], leaves[1])
    output = difference_attend(query, pair, leaves[-2], leaves[-1], mask=mask, implementation=name).output
    return list(torch.autograd.grad((output * torch.linspace(-1, 1, 20, device=DEVICE)).sum(), leaves))


@pytest.mark.parametrize(
    ("mask", "sizes", "dtype", "shared"),
    [
        (Causal(), (37, 37), torch.float32, False),
        (Window(3, 5), (37, 37), torch.float32, False),
        (Causal() & Padding(((2, 33), (5, 20))), (19, 37), torch.float32, False),
        (Padding(((0, 0), (7, 9))), (3, 23), torch.float32, True),
        (Causal(), (19, 23), torch.float16, False),
    ],
    ids=["causal", "window", "padding", "dead rows, one key for both", "half"],
)
def test_triton_gradients_are_those_of_the_signed_map(mask, sizes, dtype, shared, monkeypatch):
    if refused(*inputs(sizes[0], sizes[1], dtype)):
        return
    want = gradients("maps", torch.float64, sizes, mask, shared)
    base = gradients("maps", dtype, sizes, mask, shared)
    monkeypatch.setattr(torch, "empty", _poisoned)
    got = gradients(NAME, dtype, sizes, mask, shared)
    for mine, fair, exact in zip(got, base, want, strict=True):
        step = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert error(mine, exact) <= 2 * error(fair, exact) + step + 4e-6


def _poisoned(*size, **named) -> Tensor:
    return torch.full(tuple(size[0]) if len(size) == 1 else size, torch.nan, **named)


def test_triton_scores_of_fifty_with_a_late_maximum_stay_exact():
    query, key, value, _ = inputs(45, 45, torch.float32)
    ramp = torch.linspace(-1, 1, 45, device=DEVICE)[:, None].expand(2, 1, 45, 10).contiguous()
    query = Pair(torch.full_like(query.first, 5), query.second)
    key = Pair(ramp * 10**0.5, key.second)
    weight = torch.tensor(0.3, device=DEVICE)
    if refused(query, key, value, weight):
        return
    want, signed = reference.run(wide(query), wide(key), value.double(), weight.double(), mask=Causal())
    base, _ = reference.run(query, key, value, weight, mask=Causal())
    got = difference_attend(query, key, value, weight, mask=Causal(), implementation=NAME)
    assert float(got.lse.first.max()) > 45
    assert error(got.output, want) <= 2 * error(base, want) + 2e-6
    assert signed.shape[-1] == 45


def test_triton_reads_one_key_for_both_maps_where_they_share_it():
    query, key, value, weight = inputs(19, 23, torch.float32)
    shared = Pair(key.first, key.first)
    if refused(query, shared, value, weight):
        return
    want, _ = reference.run(wide(query), wide(shared), value.double(), weight.double())
    assert error(difference_attend(query, shared, value, weight, implementation=NAME).output, want) < 2e-6


def test_triton_says_why_not():
    query, key, value, weight = inputs(5, 5, torch.float32)
    bias = torch.zeros(5, 5, device=DEVICE)
    with_bias = supports(NAME, query, key, value, weight, bias=bias)
    assert not with_bias
    assert "no bias" in with_bias.reason or "TRITON_INTERPRET=1" in with_bias.reason


def test_without_triton_two_calls_run_and_the_answer_says_so():
    query, key, value, weight = inputs(9, 9, torch.float64)
    weight = weight.double()
    result = difference_attend(query, key, value, weight)
    assert result.implementation != NAME
    want, _ = reference.run(query, key, value, weight)
    assert torch.allclose(result.output, want, atol=1e-12)
    with pytest.raises(ValueError, match="implementation must be one of auto, maps, pair, difference_triton"):
        difference_attend(query, key, value, weight, implementation="fast")
