"""Other people's kernels behind the common call, with stand-ins of their released signatures: none can run here.

The signatures are those of flash-attn 2.8.3, FlashAttention-3's flash_attn_interface, flash-attn-4 4.0.0b36,
flashinfer 0.7.2 and xformers 0.0.35; a stand-in computes what the function promises, in its own layout and log base.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import product
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from attnlab.probes.kernel import KernelCall
from attnlab.probes.layout import copied_bytes, layout_latency
from attnlab_kernels.masks import Band, Causal, Documents, Full, Mask, Padding, Window, mask_from_band
from attnlab_kernels.operations.softmax import eager, external, flashinfer, hub, preference
from attnlab_kernels.operations.softmax.api import (
    FOLD_SCALE,
    IMPLEMENTATIONS,
    READ_DOCUMENTS,
    Unsupported,
    attend,
    choose,
    supports,
)
from attnlab_kernels.operations.softmax.support import Modifiers, Support

EXTERNAL = ("flash_attn_2", "flash_attn_3", "flash_attn_4", "flash_attn_hub", "flashinfer", "xformers")
MASKS: list[Mask] = [Full(), Causal(), Window(9), Window(4, 3), Padding(((2, 11),))]
DIMS = [(64, 64), (40, 40), (13, 13), (64, 32), (264, 264)]
HEADS = 4


def answer(q, k, v, *, left, right, scale, softcap=None, alibi=None, sinks=None, dead_lse=-math.inf):
    """[B, n, H, D] in, [B, n, H, Dv] and natural [B, H, n] out, as flash-attn lays them."""
    assert q.dim() == k.dim() == v.dim() == 4
    assert all(part.stride(-1) == 1 for part in (q, k, v))
    assert q.dtype in (torch.float16, torch.bfloat16)
    mask = mask_from_band(Band(None if left in (-1, None) else left, None if right in (-1, None) else right))
    heads_first = [part.transpose(1, 2).float() for part in (q, k, v)]
    modifiers = Modifiers(softcap or None, alibi, sinks)
    output, lse = eager.run(*heads_first, mask=mask, scale=scale, modifiers=modifiers)
    return output.transpose(1, 2).to(q.dtype), lse.masked_fill(torch.isneginf(lse), dead_lse)


def flash2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
           alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    left, right = (window_size[0], 0) if causal else window_size
    assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
    call = {"scale": softmax_scale, "softcap": softcap, "alibi": alibi_slopes, "dead_lse": math.inf}
    output, lse = answer(q, k, v, left=left, right=right, **call)
    return (output, lse, None) if return_attn_probs else output


def flash3(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
           window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
           sm_margin=0, return_attn_probs=False):  # fmt: skip
    left, right = (window_size[0], 0) if causal else window_size
    output, lse = answer(q, k, v, left=left, right=right, scale=softmax_scale, softcap=softcap)
    return (output, lse) if return_attn_probs else output


def flash4(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
           learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
           score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
           block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False,
           gather_bwd_token_chunk=None):  # fmt: skip
    left, right = (window_size[0], 0) if causal else window_size
    call = {"scale": softmax_scale, "softcap": softcap, "sinks": learnable_sink}
    output, lse = answer(q, k, v, left=left, right=right, **call)
    return output, lse if return_lse else None


def prefill(q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None, packed_custom_mask=None,
            causal=False, kv_layout="NHD", pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None,
            window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, backend="auto", return_lse=False,
            kv_cache_sf=None, k_scale=None, v_scale=None):  # fmt: skip
    assert all(part.is_contiguous() for part in (q, k, v))
    call = {
        "left": window_left,
        "right": 0 if causal else None,
        "scale": sm_scale,
        "softcap": logits_soft_cap,
    }
    output, lse = answer(q[None], k[None], v[None], **call)
    assert return_lse
    return output[0], lse[0].T / math.log(2)


def efficient(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    left, right = (None, None) if attn_bias is None else attn_bias
    if query.dim() == 5:
        groups = query.shape[3]
        assert key.stride(3) == value.stride(3) == 0
        query, key, value = query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
        output, lse = answer(query, key, value, left=left, right=right, scale=scale)
        output, lse = output.unflatten(2, (-1, groups)), lse.unflatten(1, (-1, groups))
    else:
        output, lse = answer(query, key, value, left=left, right=right, scale=scale)
    # the rows of the log-sum-exp are padded
    return output, torch.nn.functional.pad(lse, (0, 5), value=torch.nan)


def module(**symbols) -> ModuleType:
    made = ModuleType("stand_in")
    for name, value in symbols.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def stand_ins(monkeypatch):
    """All six packages installed, and CPU tensors that say they lie on a Hopper card."""
    biases = {
        "LowerTriangularFromBottomRightMask": lambda: (None, 0),
        "LocalAttentionFromBottomRightMask": lambda *, window_left, window_right: (window_left, window_right),
    }
    modules = {
        "flash_attn": module(),
        "flash_attn.flash_attn_interface": module(flash_attn_func=flash2),
        "flash_attn.cute": module(),
        "flash_attn.cute.interface": module(flash_attn_func=flash4),
        "flash_attn_interface": module(flash_attn_func=flash3),
        "flashinfer": module(),
        "flashinfer.prefill": module(single_prefill_with_kv_cache=prefill),
        "xformers": module(),
        "xformers.ops": module(),
        "xformers.ops.fmha": module(memory_efficient_attention_forward_requires_grad=efficient),
        "xformers.ops.fmha.attn_bias": module(**biases),
        "kernels": module(get_kernel=lambda repository: SimpleNamespace(flash_attn_func=flash2)),
    }
    for name, made in modules.items():
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(external, "card", lambda q: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    external.find.cache_clear()
    hub.load.cache_clear()
    yield
    external.find.cache_clear()
    hub.load.cache_clear()


def tensors(dtype, dim, value_dim, queries=7, keys=19) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(dim)
    q = torch.randn(2, HEADS, queries, dim, generator=made)
    k = torch.randn(2, 2, keys, dim, generator=made)
    v = torch.randn(2, 2, keys, value_dim, generator=made)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def features() -> dict[str, dict]:
    return {
        "plain": {},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
        "sinks": {"sinks": torch.tensor([0.3, -2.0, 4.0, 1.0])},
        "bias": {"bias": torch.randn(19, generator=torch.Generator().manual_seed(1)).expand(7, 19)},
    }


def worst(got: Tensor, want: Tensor) -> float:
    both = torch.isneginf(got.float()) & torch.isneginf(want.float())
    return (got.float() - want.float()).masked_fill(both, 0).abs().max().item()


@pytest.mark.parametrize("name", EXTERNAL)
def test_the_whole_matrix_is_the_reference_or_a_reason(name, stand_ins):
    ran = 0
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for dtype, mask, dims, (feature, given) in product(dtypes, MASKS, DIMS, features().items()):
        q, k, v = tensors(dtype, *dims)
        where = f"{name} {dtype} {mask} {dims} {feature}"
        support = supports(name, q, k, v, mask=mask, **given)
        if not support:
            assert len(support.reason) > 10, where
            with pytest.raises(Unsupported, match="cannot run this call"):
                attend(q, k, v, mask=mask, implementation=name, **given)
            continue
        ran += 1
        mine = attend(q, k, v, mask=mask, scale=0.2, implementation=name, **given)
        want = attend(q, k, v, mask=mask, scale=0.2, implementation="eager", **given)
        assert mine.aux["implementation"] == name
        assert mine.lse is not None
        assert want.lse is not None
        assert mine.output.shape == want.output.shape
        assert worst(mine.output, want.output) <= 2 * torch.finfo(dtype).eps * float(
            want.output.abs().max()
        ), where
        assert worst(mine.lse, want.lse) < 1e-5, where
    assert ran >= 12


@pytest.mark.parametrize("name", EXTERNAL)
def test_rows_that_see_no_key_are_zero_whatever_the_library_says(name, stand_ins):
    q, k, v = tensors(torch.bfloat16, 64, 64, queries=19, keys=7)
    if not supports(name, q, k, v, mask=Causal()):
        assert name == "flash_attn_3"
        return
    mine = attend(q, k, v, mask=Causal(), implementation=name)
    assert mine.lse is not None
    assert not mine.output[:, :, :12].any()
    assert torch.isneginf(mine.lse[:, :, :12]).all()
    assert mine.lse[:, :, 12:].isfinite().all()


@pytest.mark.parametrize("name", EXTERNAL)
def test_a_gradient_is_given_or_refused_never_dropped(name, stand_ins):
    leaves = [tensor.requires_grad_() for tensor in tensors(torch.bfloat16, 64, 64)]
    if not supports(name, *leaves, mask=Causal(), need_grad=True):
        assert name in {"flashinfer", "xformers"}
        with pytest.raises(Unsupported, match="forward only"):
            attend(*leaves, mask=Causal(), implementation=name)
        return
    attend(*leaves, mask=Causal(), implementation=name).output.float().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    sinks = torch.zeros(HEADS, requires_grad=True)
    assert not supports(name, *leaves, mask=Causal(), sinks=sinks, need_grad=True)


@pytest.mark.parametrize("name", EXTERNAL)
def test_without_the_package_the_reason_names_what_was_looked_for(name, monkeypatch):
    external.find.cache_clear()
    packages = ("flash_attn", "flash_attn_interface", "flashinfer", "xformers", "kernels")
    # what another test imported from them is found without asking the package again
    for name_loaded in [
        *packages,
        *(loaded for loaded in sys.modules if loaded.partition(".")[0] in packages),
    ]:
        monkeypatch.setitem(sys.modules, name_loaded, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    q, k, v = tensors(torch.bfloat16, 64, 64)
    reason = supports(name, q, k, v, mask=Causal()).reason
    external.find.cache_clear()
    assert "import" in reason
    assert any(word in reason for word in ("flash_attn", "flashinfer", "xformers", "kernels"))


def test_the_hub_is_never_asked_for_code_over_the_network(stand_ins, monkeypatch):
    asked: list[str] = []
    monkeypatch.setitem(sys.modules, "kernels", module(get_kernel=asked.append))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    external.find.cache_clear()
    q, k, v = tensors(torch.bfloat16, 64, 64)
    assert "HF_HUB_OFFLINE=1" in supports("flash_attn_hub", q, k, v).reason
    assert asked == []


def test_only_flashinfer_copies_for_its_layout(stand_ins):
    q, k, v = tensors(torch.bfloat16, 64, 64)
    assert all(part.is_contiguous() for part in flashinfer.arrange(q, k, v))
    assert flashinfer.arrange(q, k, v)[0].data_ptr() != q.data_ptr()
    assert q.transpose(1, 2).data_ptr() == q.data_ptr()


@pytest.mark.parametrize("name", EXTERNAL)
def test_the_copies_that_a_layout_needs_are_timed_apart_and_are_nothing_where_views_suffice(name, stand_ins):
    q, k, v = (part.contiguous() for part in tensors(torch.bfloat16, 64, 64))
    output = attend(q, k, v, mask=Causal(), implementation=name).output
    call = KernelCall(0, (q, k, v), attend, name, 0, False, None, output)
    row = layout_latency(call, 5, torch.device("cpu"))
    assert row is not None
    assert row.unit == "ms"
    copied = (row.detail or {})["copied_bytes"]
    if name == "flashinfer":
        # queries, keys and values in, the output back
        assert copied == sum(part.numel() * part.element_size() for part in (q, k, v, output))
        assert len(row.samples or []) == 5
        assert row.value > 0
    else:
        assert (copied, row.value) == (0, 0)


def test_tensors_that_lie_tokens_first_already_are_not_copied_for_flashinfer():
    lying = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in tensors(torch.bfloat16, 64, 64)]
    q, k, v = lying
    assert copied_bytes(flashinfer.arrange(q, k, v), (q, k, v)) == 0
    output = flashinfer.arrange_all(q, k, v)[3:]
    assert copied_bytes(output, (q, k, v)) == q.numel() * q.element_size()


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name not in EXTERNAL])
def test_what_takes_our_own_layout_has_no_time_of_a_conversion(name):
    operands = tensors(torch.bfloat16, 64, 64)
    call = KernelCall(0, operands, attend, name, 0, False, None, operands[0])
    assert layout_latency(call, 5, torch.device("cpu")) is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("mask", [Causal(), Window(9), Causal() & Documents([5, 14])], ids=str)
def test_auto_has_an_order_with_a_source_for_every_card_and_it_ends_with_the_reference(capability, mask):
    names, source = preference.order("cuda", capability, mask)
    assert set(names) <= set(IMPLEMENTATIONS)
    assert len(set(names)) == len(names)
    assert names[-1] == "eager"
    assert ":" in source


@pytest.mark.parametrize("mask", [Documents([5, 14]), Window(9) & Documents([5, 14])], ids=str)
def test_auto_asks_only_those_who_read_document_ids(mask):
    for capability in ((8, 0), (9, 0), (10, 0)):
        names, source = preference.order("cuda", capability, mask)
        assert set(names) <= set(READ_DOCUMENTS)
        assert source.startswith("packed documents")


@pytest.mark.parametrize("scale", [0.0, -0.2, math.nan])
@pytest.mark.parametrize("name", FOLD_SCALE)
def test_a_scale_that_a_kernel_would_fold_wrongly_is_refused(name, scale, stand_ins, monkeypatch):
    willing = replace(IMPLEMENTATIONS[name], supports=lambda *call, **given: Support(True))
    monkeypatch.setitem(IMPLEMENTATIONS, name, willing)
    q, k, v = tensors(torch.bfloat16, 64, 64)
    with pytest.raises(Unsupported, match=rf"{name} folds the scale .* above 0; got {scale}"):
        attend(q, k, v, mask=Causal(), scale=scale, implementation=name)


def test_auto_passes_over_a_kernel_that_would_fold_the_scale_wrongly(stand_ins, monkeypatch):
    q, k, v = tensors(torch.bfloat16, 64, 64)
    monkeypatch.setattr(preference, "order", lambda *asked: (("flash_attn_2", "eager"), "stated"))
    assert choose(q, k, v, mask=Causal(), scale=0.2)[0] == "flash_attn_2"
    made = attend(q, k, v, mask=Causal(), scale=-0.2)
    assert made.aux["implementation"] == "eager"
    assert "flash_attn_2 folds the scale" in made.aux["reason"]


def test_auto_takes_the_first_that_runs_and_names_the_source_of_its_order(stand_ins, monkeypatch):
    q, k, v = tensors(torch.bfloat16, 64, 64)
    monkeypatch.setattr(preference, "order", lambda *asked: (preference.HOPPER[0], "stated"))
    name, reason = choose(q, k, v, mask=Causal())
    assert name == "flash_attn_3"
    assert "(stated)" in reason
    capped, why = choose(q, k, v, mask=Causal(), modifiers=Modifiers(softcap=2.0))
    assert capped == "flash_attn_4"
    assert "flash_attn_3: FlashAttention-3 takes no soft cap" in why
