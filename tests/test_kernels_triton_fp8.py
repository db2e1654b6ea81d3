"""The FP8 kernel against its simulation: the same rounded numbers, products and sums, and real e4m3 instructions.

Without the interpreter and without a GPU each call must be refused; ``test_kernels_triton_operations`` runs this file
again in a process with TRITON_INTERPRET=1, where the numbers are checked.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.mechanisms.flash_attention_3 import FlashAttention3Core
from attnlab_kernels.operations.fp8 import reference, triton_forward
from attnlab_kernels.operations.softmax.api import Unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS: list[Mask] = [Full(), Causal(), Window(20), Causal() & Padding(((3, 70), (0, 0)))]


def tensors(n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    sizes = ((4, n, 24), (2, 83, 24), (2, 83, 20))
    return [torch.randn(2, *size, generator=generator).to(DEVICE, dtype) for size in sizes]


def able(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if triton_forward.supports(q, v, bias=None, block_size=32):
        return True
    with pytest.raises(Unsupported, match="cannot run this call"):
        FlashAttention3Core(use_fp8=True, fp8_block_size=32).attend(
            q, k, v, mask=Full(), implementation="fp8_triton"
        )
    return False


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@pytest.mark.parametrize("n", [83, 19])
def test_triton_fp8_is_its_simulation(n, mask, monkeypatch):
    q, k, v = tensors(n)
    if not able(q, k, v):
        return
    want = reference.run(q, k, v, mask=mask, scale=0.2, block_size=32)
    if mask.form().ranges is not None:
        k[0, :, 70:], v[0, :, 70:], k[1], v[1] = (torch.nan,) * 4
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **named: plain(*size, **named).fill_(torch.nan))
    got = triton_forward.run(q, k, v, mask=mask, scale=0.2, block_size=32)
    dead = torch.isneginf(want.lse)
    assert torch.equal(torch.isneginf(got.lse), dead)
    assert float((got.output - want.output).abs().max()) < 2e-6
    assert float((got.lse - want.lse).masked_fill(dead, 0).abs().max()) < 2e-6


def test_triton_fp8_runs_inside_the_module_where_it_is_asked_for():
    q, k, v = tensors(19, torch.float16)
    if not able(q, k, v):
        return
    core = FlashAttention3Core(use_fp8=True, fp8_block_size=32)
    got = core.attend(q, k, v, mask=Causal(), implementation="fp8_triton")
    want = core.attend(q, k, v, mask=Causal(), implementation="fp8_reference")
    assert (got.aux["ran"], got.aux["implementation"]) == ("fp8 kernel", "fp8_triton")
    assert float((got.output - want.output).abs().max()) < 2e-3


def test_triton_fp8_says_why_not():
    q, k, v = tensors(19)
    here = bool(triton_forward.supports(q, v, bias=None, block_size=32))
    changes = {"block_size": (48, "a scale for every 32, 64, 128"), "bias": (q, "takes no bias")}
    for name, (value, says) in changes.items():
        support = triton_forward.supports(q, v, **{"bias": None, "block_size": 32} | {name: value})
        assert not support
        assert (says if here else "NVIDIA GPU") in support.reason
    with pytest.raises(Unsupported, match="cannot run FP8"):
        FlashAttention3Core(use_fp8=True).attend(q, k, v, mask=Full(), implementation="sdpa_flash")
