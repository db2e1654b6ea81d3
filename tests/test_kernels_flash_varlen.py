"""flash-attn's varlen functions behind ``attend_packed``, with stand-ins of the signatures of 2.8.3 and version 3."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnlab_kernels.masks import Band, Causal, Full, Mask, Window, mask_from_band
from attnlab_kernels.operations.softmax import eager, external
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.packed import attend_packed
from attnlab_kernels.operations.softmax.support import Modifiers

STARTS = (torch.tensor([0, 5, 5, 42, 43]), torch.tensor([0, 9, 12, 49, 80]))
NAMES = ("flash_attn_2", "flash_attn_3")
HEADS = 4


def answer(q, k, v, starts, longest, *, left, right, scale, softcap=None, alibi=None):
    """[T, H, D] in, [T, H, D] and natural [H, T] out; dead rows have a log-sum-exp of +inf, as flash-attn's."""
    assert all(part.dtype == torch.int32 for part in starts)
    assert longest == tuple(int(part.diff().max()) for part in starts)
    assert q.dtype in (torch.float16, torch.bfloat16)
    mask = mask_from_band(Band(None if left == -1 else left, None if right == -1 else right))
    outputs, sums = [], []
    for (first, last), (start, stop) in zip(*(pairwise(part.tolist()) for part in starts), strict=True):
        parts = [part.transpose(0, 1)[None].float() for part in (q[first:last], k[start:stop], v[start:stop])]
        output, lse = eager.run(*parts, mask=mask, scale=scale, modifiers=Modifiers(softcap or None, alibi))
        outputs.append(output[0].transpose(0, 1))
        sums.append(lse[0])
    lse = torch.cat(sums, dim=-1)
    return torch.cat(outputs).to(q.dtype), lse.masked_fill(torch.isneginf(lse), math.inf)


def varlen2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None):  # fmt: skip
    left, right = (window_size[0], 0) if causal else window_size
    given = {"left": left, "right": right, "scale": softmax_scale, "softcap": softcap, "alibi": alibi_slopes}
    output, lse = answer(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), **given)
    return (output, lse, None) if return_attn_probs else output


def varlen3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False):  # fmt: skip
    left, right = (window_size[0], 0) if causal else window_size
    given = {"left": left, "right": right, "scale": softmax_scale}
    output, lse = answer(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), **given)
    return (output, lse) if return_attn_probs else output


def older3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
           softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0):  # fmt: skip
    given = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    cut = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return varlen3(q, k, v, *cut, **given, return_attn_probs=True)


def module(**symbols) -> ModuleType:
    made = ModuleType("stand_in")
    for name, value in symbols.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def install(monkeypatch):
    """Installs what is named, and lets CPU tensors say they lie on a Hopper card."""

    def installed(second=varlen2, third=varlen3):
        modules = {
            "flash_attn": module(),
            "flash_attn.flash_attn_interface": second and module(flash_attn_varlen_func=second),
            "flash_attn_interface": third and module(flash_attn_varlen_func=third),
        }
        for name, made in modules.items():
            monkeypatch.setitem(sys.modules, name, made)
        external.find.cache_clear()

    monkeypatch.setattr(external, "card", lambda q: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    yield installed
    external.find.cache_clear()


def tensors(dtype=torch.bfloat16, dim=40) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(n, h, dim, generator=made) for n, h in ((43, HEADS), (80, 2), (80, 2)))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def worst(got: Tensor, want: Tensor) -> float:
    both = torch.isneginf(got.float()) & torch.isneginf(want.float())
    return (got.float() - want.float()).masked_fill(both, 0).abs().max().item()


def check(name: str, mask: Mask, starts=STARTS, dtype=torch.bfloat16, **given) -> None:
    q, k, v = tensors(dtype)
    mine = attend_packed(q, k, v, *starts, mask=mask, scale=0.2, implementation=name, **given)
    want = attend_packed(q, k, v, *starts, mask=mask, scale=0.2, implementation="eager", **given)
    assert mine.aux["implementation"] == name
    assert mine.lse is not None
    assert want.lse is not None
    assert mine.output.shape == want.output.shape
    assert mine.lse.shape == (HEADS, 43)
    assert worst(mine.output, want.output) <= 2 * torch.finfo(dtype).eps * float(want.output.abs().max())
    assert worst(mine.lse, want.lse) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(9), Window(4, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_are_each_alone(name, mask, dtype, install):
    install()
    check(name, mask, dtype=dtype)
    check(name, mask, dtype=dtype, sinks=torch.tensor([0.3, -2.0, 4.0, 1.0]))


def test_version_2_takes_a_soft_cap_and_slopes_and_version_3_says_that_it_does_not(install):
    install()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    check("flash_attn_2", Causal(), softcap=1.5, alibi=slopes)
    refused: list[tuple[dict[str, Any], str]] = [({"softcap": 1.5}, "soft cap"), ({"alibi": slopes}, "ALiBi")]
    for given, word in refused:
        with pytest.raises(Unsupported, match=f"'flash_attn_3' cannot run this call: .*{word}"):
            check("flash_attn_3", Causal(), **given)


def test_rows_of_a_sequence_with_fewer_keys_than_queries_are_zero_or_refused(install):
    install()
    starts = (torch.tensor([0, 20, 43]), torch.tensor([0, 7, 80]))
    check("flash_attn_2", Causal(), starts)
    q, k, v = tensors()
    made = attend_packed(q, k, v, *starts, mask=Causal(), implementation="flash_attn_2")
    assert made.lse is not None
    assert not made.output[:13].any()
    assert torch.isneginf(made.lse[:, :13]).all()
    assert made.lse[:, 13:].isfinite().all()
    with pytest.raises(Unsupported, match="some queries may attend to no key"):
        check("flash_attn_3", Causal(), starts)


def test_a_release_of_version_3_that_always_tells_the_log_sum_exp_is_called_as_it_can_be(install):
    install(third=older3)
    check("flash_attn_3", Window(9))


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_goes_through_the_package(name, install):
    install()
    q, k, v = tensors()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    attend_packed(q, k, v, *STARTS, mask=Causal(), implementation=name).output.float().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    sinks = torch.zeros(HEADS)
    with pytest.raises(Unsupported, match="without a gradient"):
        attend_packed(q, k, v, *STARTS, mask=Causal(), implementation=name, sinks=sinks)


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_run_says_why(name, install):
    install()
    q, k, v = tensors(torch.float32)
    with pytest.raises(Unsupported, match="takes float16 and bfloat16"):
        attend_packed(q, k, v, *STARTS, implementation=name)
    q, k, v = tensors(dim=13)
    with pytest.raises(Unsupported, match="multiple of 8"):
        attend_packed(q, k, v, *STARTS, implementation=name)
    install(second=None, third=None)
    with pytest.raises(Unsupported, match="flash_attn_varlen_func cannot be imported"):
        attend_packed(*tensors(), *STARTS, implementation=name)


def test_a_name_that_is_none_of_them_is_told_which_there_are():
    with pytest.raises(
        ValueError, match="one of auto, eager, triton, flash_attn_2, flash_attn_3; got 'fast'"
    ):
        attend_packed(*tensors(), *STARTS, implementation="fast")


@pytest.mark.parametrize("scale", [0.0, -0.2])
@pytest.mark.parametrize("name", NAMES)
def test_a_scale_that_the_kernel_would_fold_wrongly_is_refused(name, scale, install):
    install()
    with pytest.raises(Unsupported, match=f"folds the scale into its exponent.*got {scale}"):
        attend_packed(*tensors(), *STARTS, scale=scale, implementation=name)
