"""The Triton kernels of neighborhoods, latents and experts against the plain references in float64.

Without the interpreter and without a GPU each call must be refused; ``test_kernels_triton_operations`` runs this file
again in a process with TRITON_INTERPRET=1, where the numbers are checked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full, Padding, Window
from attnlab_kernels.neighborhood import Neighborhood, inverse_limits
from attnlab_kernels.operations.expert_projection import api as experts
from attnlab_kernels.operations.expert_projection.triton_grouped import sort_into_blocks
from attnlab_kernels.operations.latent import triton_absorbed
from attnlab_kernels.operations.latent.reference import LatentInputs, latent_attend
from attnlab_kernels.operations.neighborhood.api import neighborhood_attend
from attnlab_kernels.operations.neighborhood.triton_forward import supports
from attnlab_kernels.operations.softmax.api import Unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# space, kernel, dilation, stride, causal
WINDOWS = {
    "line": Neighborhood((37,), (7,), (1,), (1,), (False,)),
    "dilated line": Neighborhood((41,), (4,), (3,), (2,), (False,)),
    "causal line": Neighborhood((29,), (5,), (2,), (1,), (True,)),
    "grid": Neighborhood((9, 13), (3, 5), (1, 1), (1, 1), (False, False)),
    "dilated grid": Neighborhood((11, 8), (3, 4), (2, 1), (1, 2), (False, True)),
}


def normal(*size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator).to(DEVICE, dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max())


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody wrote is NaN."""

    def full(*size, **named):
        return torch.full(tuple(size[0]) if len(size) == 1 else size, torch.nan, **named)

    return lambda: monkeypatch.setattr(torch, "empty", full)


def dense_windows(q: Tensor, k: Tensor, v: Tensor, windows: Neighborhood, seen: Tensor | None) -> Tensor:
    """Softmax over a dense mask, in the inputs' own dtype."""
    q, k, v = (tensor.flatten(2, -2) for tensor in (q, k, v))
    pixels = torch.arange(windows.size).numpy()
    keep = torch.from_numpy(windows.allowed(pixels, pixels)).to(DEVICE)[None, None]
    if seen is not None:
        keep = keep & seen.flatten(1)[:, None, None]
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0)
    return (weights @ v.masked_fill(torch.isnan(v), 0)).unflatten(2, windows.space)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_windows_are_those_of_a_dense_mask(dtype, windows, hidden, poisoned):
    q, k = (normal(1, 2, *windows.space, 10 + side, dtype=dtype)[..., :10] for side in range(2))
    v = normal(1, 2, *windows.space, 20, dtype=dtype)
    if not supports(q, v, windows, bias=None, dropout=0, need_windows=False):
        with pytest.raises(Unsupported):
            neighborhood_attend(q, k, v, windows, implementation="triton")
        return
    seen = (torch.arange(windows.size, device=DEVICE) % 3 > 0).view(1, *windows.space) if hidden else None
    want = dense_windows(q.double(), k.double(), v.double(), windows, seen)
    base = dense_windows(q, k, v, windows, seen)
    _, exact_lse, _ = neighborhood_attend(
        q.double(), k.double(), v.double(), windows, visible=seen, implementation="tiled"
    ).result
    if seen is not None:
        k, v = (tensor.masked_fill(~seen[:, None, ..., None], torch.nan) for tensor in (k, v))
    poisoned()
    result, ran, _ = neighborhood_attend(q, k, v, windows, visible=seen, implementation="triton")
    assert ran == "triton"
    assert error(result.output, want) <= 2 * error(base, want) + 2e-6
    dead = torch.isneginf(exact_lse)
    assert torch.equal(torch.isneginf(result.lse), dead)
    assert not result.output[dead].any()
    assert error(result.lse.masked_fill(dead, 0), exact_lse.masked_fill(dead, 0)) < 1e-5


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_triton_window_gradients_are_those_of_a_dense_mask(windows, hidden, poisoned):
    dtype = torch.float16 if windows.causal[-1] and not hidden else torch.float32
    q, k, v = (normal(1, 2, *windows.space, size, dtype=dtype) for size in (10, 10, 20))
    k = k.flip(2)
    if not supports(q, v, windows, bias=None, dropout=0, need_windows=False):
        with pytest.raises(Unsupported):
            neighborhood_attend(q, k, v, windows, implementation="triton")
        return
    seen = (torch.arange(windows.size, device=DEVICE) % 3 > 0).view(1, *windows.space) if hidden else None
    slope = torch.linspace(-1, 1, 20, device=DEVICE)

    def gradients(attend, *given: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        return torch.autograd.grad((attend(*leaves) * slope).sum(), leaves)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_windows(q, k, v, windows, seen)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attend(q, k, v, windows, visible=seen, implementation="triton").result.output

    want = gradients(plain, q.double(), k.double(), v.double())
    base = gradients(plain, q, k, v)
    if seen is not None:
        k, v = (tensor.masked_fill(~seen[:, None, ..., None], torch.nan) for tensor in (k, v))
    poisoned()
    for mine, fair, exact in zip(gradients(kernel, q, k, v), base, want, strict=True):
        step = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert error(mine, exact) <= 2 * error(fair, exact) + step + 4e-6


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_queries_of_a_key_are_a_run_on_every_axis_triton(windows):
    for (first, count), step in zip(windows.limits, windows.dilation, strict=True):
        start, size = inverse_limits(first, count, step)
        for key in range(len(first)):
            seeing = [
                q for q in range(len(first)) if key in range(first[q], first[q] + count[q] * step, step)
            ]
            assert seeing == list(range(start[key], start[key] + size[key] * step, step))


def test_triton_windows_say_why_not():
    windows = WINDOWS["line"]
    q = normal(1, 2, 37, 8, dtype=torch.float32)
    plain: dict[str, Any] = {"bias": None, "dropout": 0.0, "need_windows": False}
    here = bool(supports(q, q, windows, **plain))
    changes = {
        "dropout": (0.1, "keeps no weights"),
        "bias": (q, "no table"),
    }
    for name, (value, says) in changes.items():
        support = supports(q, q, windows, **plain | {name: value})
        assert not support
        assert (says if here else "TRITON_INTERPRET=1") in support.reason
    cube = Neighborhood((3, 3, 3), (3, 3, 3), (1, 1, 1), (1, 1, 1), (False,) * 3)
    assert not supports(q, q, cube, **plain)


def latent_inputs(num_queries: int, num_keys: int, dtype: torch.dtype) -> LatentInputs:
    return LatentInputs(
        normal(2, 3, num_queries, 6, dtype=dtype),
        normal(2, 3, num_queries, 4, dtype=dtype),
        normal(2, num_keys, 24, dtype=dtype),
        normal(2, num_keys, 4, dtype=dtype),
        normal(3, 11, 24, dtype=dtype) / 5,
    )


MASKS = (Full(), Causal(), Window(9), Causal() & Padding(((3, 33), (0, 12))), Padding(((0, 0), (7, 9))))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@pytest.mark.parametrize("num_queries", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_latents_are_the_naive_form(dtype, num_queries, mask, monkeypatch, poisoned):
    given = latent_inputs(num_queries, 37, dtype)
    named = {"form": "absorbed", "mask": mask, "implementation": "latent_triton"}
    nope = torch.zeros(2, 3, num_queries, 24, dtype=dtype, device=DEVICE)
    if not triton_absorbed.supports(nope, given.latent, bias=None, dropout=0, need_grad=False):
        with pytest.raises(Unsupported):
            latent_attend(given, **named)
        return
    exact = LatentInputs(*(tensor.double() for tensor in given))
    want = latent_attend(exact, form="naive", mask=mask, implementation="eager")
    base = latent_attend(given, form="absorbed", mask=mask, implementation="eager")
    monkeypatch.setattr(triton_absorbed, "_splits", lambda *ignored: 3)
    poisoned()
    got = latent_attend(given, **named)
    assert got.aux["implementation"] == "latent_triton"
    assert want.lse is not None
    assert got.lse is not None
    assert error(got.output, want.output) <= 2 * error(base.output, want.output) + 2e-5
    dead = torch.isneginf(want.lse)
    assert torch.equal(torch.isneginf(got.lse), dead)
    assert error(got.lse.masked_fill(dead, 0), want.lse.masked_fill(dead, 0)) < (
        5e-2 if dtype == torch.float16 else 1e-4
    )


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_experts_are_every_expert_times_its_gate(dtype, top_k, poisoned):
    x, heads = normal(2, 19, 20, dtype=dtype), normal(2, 3, 19, 12, dtype=dtype)
    into, out = normal(3, 4, 20, 12, dtype=dtype), normal(3, 4, 12, 20, dtype=dtype)
    routing = experts.route(normal(2, 19, 3, 4, dtype=torch.float32), top_k)
    if not experts.supports("triton", x, into):
        with pytest.raises(Unsupported):
            experts.project_in(x, into, routing, implementation="triton")
        return
    exact = routing._replace(gates=routing.gates.double(), scores=routing.scores.double())
    want_in = experts.project_in(x.double(), into.double(), exact, implementation="dense")[0]
    want_out = experts.project_out(heads.double(), out.double(), exact, implementation="dense")[0]
    base_in, base_out = plain_experts(x, into, routing), plain_out(heads, out, routing)
    poisoned()
    got_in, choice = experts.project_in(x, into, routing, implementation="triton")
    got_out, _ = experts.project_out(heads, out, routing, implementation="triton")
    assert choice.implementation == "triton"
    assert error(got_in, want_in) <= 2 * error(base_in, want_in) + 4e-6
    assert error(got_out, want_out) <= 2 * error(base_out, want_out) + 4e-6


def plain_experts(x: Tensor, weight: Tensor, routing: experts.Routing) -> Tensor:
    products = torch.einsum("bnc,hecd->bhend", x, weight)
    return torch.einsum("bhend,bnhe->bhnd", products, routing.dense().to(x.dtype))


def plain_out(heads: Tensor, weight: Tensor, routing: experts.Routing) -> Tensor:
    products = torch.einsum("bhnd,hedc->bhenc", heads, weight)
    return torch.einsum("bhenc,bnhe->bnc", products, routing.dense().to(heads.dtype))


def test_blocks_cover_every_assignment_once_and_hold_one_expert_each():
    chosen = torch.randint(0, 5, (2, 23, 3, 2), generator=torch.Generator().manual_seed(1))
    blocks = sort_into_blocks(chosen, 5, block_m=4)
    seen: list[int] = []
    for group, start, stop in zip(*(part.tolist() for part in blocks[1:]), strict=True):
        rows = blocks.order[start:stop]
        seen += rows.tolist()
        head = rows // 2 % 3
        assert torch.equal(head * 5 + chosen.flatten()[rows], torch.full_like(rows, group))
        assert len(rows) <= 4
    assert sorted(seen) == list(range(chosen.numel()))
