"""The Triton kernels along block lists against the dense definition in float64, and that they visit nothing else.

Without the interpreter and without a GPU each call must be refused; ``test_kernels_triton_operations`` runs this file
again in a process with TRITON_INTERPRET=1, where the numbers are checked.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attnlab_kernels import SparseAttention
from attnlab_kernels.masks import Causal, Mask, Padding
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.sparse import reference
from attnlab_kernels.operations.sparse.api import sparse_attend, supports
from attnlab_kernels.operations.sparse.dense import dense
from attnlab_kernels.patterns import BigBird, Dense, Fixed, Local, LocalGlobal, Longformer, Pattern, Strided

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, HEADS = 61, 4
PATTERNS: dict[str, Pattern] = {
    "local": Local(True, 7),
    "local, both sides": Local(False, 20),
    "strided": Strided(True, 11),
    "strided, both sides": Strided(False, 11),
    "fixed": Fixed(True, 13, 3),
    "local and global": LocalGlobal(False, 9, 5),
    "longformer": Longformer(True, 6, 2),
    "bigbird": BigBird(True, 8, 2, layer=4),
    "bigbird, both sides": BigBird(False, 8, 1),
    "dense": Dense(True),
}


def tensors(dtype: torch.dtype, n: int = LENGTH, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, n, 12), (HEADS // 2, LENGTH, 12), (HEADS // 2, LENGTH, 20))
    made = [torch.randn(batch, *size, generator=generator).to(DEVICE, dtype) for size in sizes]
    # a layout that is not contiguous
    return [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in made]


def able(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> bool:
    if supports("triton", q, k, v):
        return True
    with pytest.raises(Unsupported, match="cannot run this call"):
        sparse_attend(q, k, v, pattern, implementation="triton")
    return False


@pytest.fixture
def poisoned(monkeypatch):
    plain = torch.empty

    def empty(*size, **named):
        made = plain(*size, **named)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return lambda: monkeypatch.setattr(torch, "empty", empty)


def worst(got: Tensor, want: Tensor) -> float:
    both = torch.isneginf(got.double()) & torch.isneginf(want.double())
    return float((got.double() - want.double()).masked_fill(both, 0).abs().max())


def gradients(run, given: list[Tensor], pattern: Pattern, mask: Mask | None) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    output = run(*leaves, pattern, mask=mask)
    weight = torch.linspace(-1, 1, output.shape[-1], device=DEVICE, dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def by_kernel(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **named) -> Tensor:
    return sparse_attend(q, k, v, pattern, **named, implementation="triton").result.output


def by_tiles(*given, **named) -> Tensor:
    return reference.run(*given, **named).output


HIDDEN = Padding(((3, 50), (0, 0)))


@pytest.mark.parametrize(
    ("name", "dtype", "mask"),
    [
        *((name, torch.float32, None) for name in PATTERNS if "both" not in name),
        ("strided", torch.float16, None),
        ("bigbird", torch.float16, HIDDEN),
        ("longformer", torch.float32, HIDDEN),
        ("local and global", torch.float32, Causal()),
    ],
    ids=str,
)
def test_triton_output_and_gradients_are_those_of_the_dense_definition(name, dtype, mask, poisoned):
    pattern = PATTERNS[name]
    q, k, v = given = tensors(dtype, batch=1 if mask is None else 2)
    if not able(q, k, v, pattern):
        return
    want = gradients(dense, [tensor.double() for tensor in given], pattern, mask)
    base = gradients(by_tiles, given, pattern, mask)
    if mask is not None and mask is HIDDEN:
        for tensor in given[1:]:
            tensor[0, :, 50:], tensor[1] = torch.nan, torch.nan
    poisoned()
    got = gradients(by_kernel, given, pattern, mask)
    for mine, fair, exact in zip(got, base, want, strict=True):
        step = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert worst(mine, exact) <= 2 * worst(fair, exact) + step + 4e-6


@pytest.mark.parametrize("name", ["strided", "bigbird", "dense"])
def test_triton_newest_queries_are_the_last_rows_and_their_lse_the_tiles(name):
    pattern, (q, k, v) = PATTERNS[name], tensors(torch.float32, n=19)
    if not able(q, k, v, pattern):
        return
    got = sparse_attend(q, k, v, pattern, implementation="triton").result
    want = reference.run(q.double(), k.double(), v.double(), pattern)
    assert worst(got.output, want.output) < 4e-6
    assert worst(got.lse, want.lse) < 4e-6


@pytest.mark.parametrize("name", PATTERNS)
def test_triton_reads_no_key_outside_the_lists(name):
    pattern, (q, k, v) = PATTERNS[name], tensors(torch.float32)
    if not able(q, k, v, pattern):
        return
    q, k, v = q[:1, :2], k[:1], v[:1]
    clean = by_kernel(q, k, v, pattern)
    start, stop = 39, 52
    rows = np.arange(start, stop)
    seen = np.zeros(LENGTH, bool)
    for head in range(2):
        seen |= pattern.allowed(rows, np.arange(LENGTH), num_keys=LENGTH, head=head).any(axis=0)
    unseen = torch.from_numpy(~seen).to(DEVICE)
    ends = stop if pattern.causal else LENGTH
    dirty_k, dirty_v = (t.masked_fill(unseen[:, None], torch.nan)[:, :, :ends] for t in (k, v))
    part = by_kernel(q[:, :, start:stop], dirty_k, dirty_v, pattern, start=start)
    assert part.isfinite().all()
    assert worst(part, clean[:, :, start:stop]) < 2e-6
    # the same poison in one key that the rows do see reaches them
    first = int(np.flatnonzero(seen)[0])
    dirty_v[:, :, first] = torch.nan
    assert by_kernel(q[:, :, start:stop], dirty_k, dirty_v, pattern, start=start).isnan().any()


def test_triton_runs_inside_the_module_and_says_so():
    torch.manual_seed(0)
    x = torch.randn(1, 23, 24, device=DEVICE)
    for name in ("strided", "longformer"):
        layer = SparseAttention(24, 3, name, local_window=4, stride=5, global_tokens=3).to(DEVICE).eval()
        with torch.no_grad():
            want = layer(x, implementation="tiled", return_dict=True)
            if not supports("triton", x[None], x[None], x[None]):
                with pytest.raises(Unsupported, match="triton"):
                    layer(x, implementation="triton")
                continue
            got = layer(x, implementation="triton", return_dict=True)
        assert got.aux["implementation"] == "triton"
        assert worst(got.output, want.output) < 2e-6


def test_triton_says_why_not():
    q, k, v = tensors(torch.float32)
    here = bool(supports("triton", q, k, v))
    changes = {
        "bias": (torch.zeros(LENGTH, LENGTH), "takes no bias"),
        "dropout": (0.1, "drops no probabilities"),
    }
    for name, (value, says) in changes.items():
        support = supports("triton", q, k, v, **{name: value})
        assert not support
        assert (says if here else "TRITON_INTERPRET=1") in support.reason
    with pytest.raises(ValueError, match="implementation must be one of auto, tiled, fused, triton"):
        sparse_attend(q, k, v, PATTERNS["local"], implementation="fast")
