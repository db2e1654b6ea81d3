"""Soft cap, ALiBi, bias and sinks: one meaning in every implementation and in the map, that of the models."""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.operations.softmax import chunked, eager
from attnlab_kernels.operations.softmax.api import (
    IMPLEMENTATIONS,
    AttendCall,
    Unsupported,
    attend,
    observing,
    supports,
)
from attnlab_kernels.operations.softmax.support import Modifiers
from attnlab_kernels.score_bias import DenseBias, LowRankBias, RelativeBias

HEADS, KV_HEADS, QUERIES, KEYS, DIM = 4, 2, 21, 30, 16
MASKS: list[Mask] = [Full(), Causal(), Window(9), Causal() & Padding(((2, 20), (0, 30)))]
FEATURES: dict[str, tuple[str, ...]] = {
    "softcap": ("softcap",),
    "alibi": ("alibi",),
    "sinks": ("sinks",),
    "bias+alibi": ("bias", "alibi"),
    "everything": ("softcap", "alibi", "bias", "sinks"),
}


def tensors(dtype=torch.float64, num_queries=QUERIES, batch=2) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(num_queries)
    q = 2 * torch.randn(batch, HEADS, num_queries, DIM, generator=made, dtype=torch.float64)
    k, v = (torch.randn(batch, KV_HEADS, KEYS, DIM, generator=made, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def features(names, num_queries=QUERIES, dtype=torch.float64) -> dict:
    made = torch.Generator().manual_seed(3)
    every = {
        "softcap": 1.7,
        "alibi": torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64),
        "sinks": torch.tensor([0.3, -2.0, 4.0, 1.0], dtype=torch.float64),
        "bias": torch.randn(1, HEADS, num_queries, KEYS, generator=made, dtype=torch.float64),
    }
    return {
        name: value.to(dtype) if isinstance(value, Tensor) else value
        for name, value in every.items()
        if name in names
    }


def formula(q, k, v, mask, *, scale=0.25, softcap=None, alibi=None, sinks=None, bias=None):
    """The definition row by row in float64 numpy."""
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    size = {"num_queries": num_queries, "num_keys": num_keys}
    for b, h, i in product(range(batch), range(heads), range(num_queries)):
        keep = mask.allowed(np.array([i]), np.arange(num_keys), **size, batch=b)[0]
        scores = scale * (k[b, h // (heads // k.shape[1])].double() @ q[b, h, i].double()).numpy()
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if alibi is not None:
            scores = scores - float(alibi[h]) * np.abs(num_keys - num_queries + i - np.arange(num_keys))
        if bias is not None:
            scores = scores + bias[0, h, i].double().numpy()
        weights = np.exp(scores[keep])
        total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[h])))
        if total > 0:
            out[b, h, i] = weights @ v[b, h // (heads // k.shape[1])].double().numpy()[keep] / total
            lse[b, h, i] = np.log(total)
    return torch.from_numpy(out), torch.from_numpy(lse)


def plain(q, k, v, mask, *, softcap=None, alibi=None, sinks=None, bias=None):
    """The same as models write it in their own dtype, with the softmax in float32: the measure of a fair error."""
    group, num_queries, num_keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    scores = 0.25 * (q @ k.repeat_interleave(group, 1).transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        distance = torch.arange(num_keys) - (num_keys - num_queries + torch.arange(num_queries))[:, None]
        scores = scores - (alibi[:, None, None] * distance.abs()).to(q.dtype)
    scores = scores if bias is None else scores + bias.to(q.dtype)
    size = {"num_queries": num_queries, "num_keys": num_keys}
    rows, cols = np.arange(num_queries), np.arange(num_keys)
    keep = [torch.from_numpy(mask.allowed(rows, cols, **size, batch=b)) for b in range(q.shape[0])]
    scores = scores.masked_fill(~torch.stack(keep)[:, None], -torch.inf).float()
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., :num_keys].to(q.dtype)
    return weights @ v.repeat_interleave(group, 1), torch.logsumexp(scores, dim=-1)


def worst(got: Tensor, want: Tensor) -> float:
    both = torch.isneginf(got.double()) & torch.isneginf(want)
    return (got.double() - want).masked_fill(both, 0).abs().max().item()


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("names", FEATURES.values(), ids=FEATURES)
def test_the_reference_is_the_formula(names, mask):
    for num_queries in (QUERIES, 37):
        q, k, v = tensors(num_queries=num_queries)
        given = features(names, num_queries)
        want, want_lse = formula(q, k, v, mask, **given)
        result = attend(q, k, v, mask=mask, scale=0.25, implementation="eager", **given)
        assert result.lse is not None
        assert worst(result.output, want) < 1e-13
        assert worst(result.lse, want_lse) < 1e-13


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if "flash_attn" not in name])
def test_every_implementation_gives_the_formula_or_says_why_not(name, names, dtype, mask):
    q, k, v = tensors(dtype)
    given = features(names, dtype=torch.float32)
    support = supports(name, q, k, v, mask=mask, **given)
    if not support:
        assert len(support.reason) > 10
        with pytest.raises(Unsupported, match="cannot run this call"):
            attend(q, k, v, mask=mask, implementation=name, **given)
        return
    want, want_lse = formula(q, k, v, mask, **given)
    fair, fair_lse = plain(q, k, v, mask, **given)
    result = attend(q, k, v, mask=mask, scale=0.25, implementation=name, **given)
    assert result.lse is not None
    assert worst(result.output, want) <= 2 * worst(fair, want) + 2e-6
    assert worst(result.lse, want_lse) <= 2 * worst(fair_lse, want_lse) + 3e-6


@pytest.mark.parametrize("names", FEATURES.values(), ids=FEATURES)
def test_chunks_give_the_reference_and_its_gradients(names):
    def run(attention, dtype):
        leaves = [tensor.requires_grad_() for tensor in tensors(dtype)]
        given = features(names, dtype=dtype)
        learned = [value.requires_grad_() for value in given.values() if isinstance(value, Tensor)]
        modifiers = Modifiers(given.get("softcap"), given.get("alibi"), given.get("sinks"))
        out, lse = attention(
            *leaves, mask=Causal(), scale=0.25, bias=given.get("bias"), modifiers=modifiers, **size[attention]
        )
        (out * torch.linspace(-1, 1, DIM, dtype=dtype)).sum().backward()
        return [out, lse, *(leaf.grad for leaf in (*leaves, *learned))]

    size = {eager.run: {}, chunked.run: {"chunk": 8}}
    for mine, theirs in zip(run(chunked.run, torch.float64), run(eager.run, torch.float64), strict=True):
        assert mine is not None
        assert theirs is not None
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


def test_the_reference_passes_gradcheck_with_everything():
    q, k, v = (
        torch.randn(1, heads, n, 3, dtype=torch.float64, requires_grad=True)
        for heads, n in ((2, 5), (1, 4), (1, 4))
    )
    bias = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    slopes, sinks = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(q, k, v, bias, slopes, sinks):
        call = {"bias": bias, "alibi": slopes, "sinks": sinks, "softcap": 0.8}
        return attend(q, k, v, mask=Causal(), implementation="eager", **call).output

    assert torch.autograd.gradcheck(run, (q, k, v, bias, slopes, sinks))


def lower_right(num_queries, num_keys) -> Tensor:
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    return torch.zeros(num_queries, num_keys).masked_fill(~allowed, -torch.inf)


def test_a_soft_cap_is_gemma_2s():
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    q, k, v = tensors(torch.float32)
    module: Any = SimpleNamespace(head_dim=DIM, num_key_value_groups=HEADS // KV_HEADS, training=False)
    theirs, weights = eager_attention_forward(
        module, q, k, v, lower_right(QUERIES, KEYS), scaling=0.25, softcap=1.7
    )
    mine = attend(q, k, v, mask=Causal(), scale=0.25, softcap=1.7, implementation="eager")
    torch.testing.assert_close(mine.output, theirs.transpose(1, 2), atol=2e-6, rtol=0)
    assert mine.lse is not None
    drawn = SoftmaxMap(q[1, 3].numpy(), k[1, 1].numpy(), mine.lse[1, 3].numpy(), 0.25, Causal(), softcap=1.7)
    np.testing.assert_allclose(drawn.tile(slice(None), slice(None)), weights[1, 3].numpy(), atol=2e-6)


def test_sinks_are_gpt_oss_s():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v = tensors(torch.float32)
    sinks = features(("sinks",), dtype=torch.float32)["sinks"]
    module: Any = SimpleNamespace(sinks=sinks, num_key_value_groups=HEADS // KV_HEADS, training=False)
    theirs, weights = eager_attention_forward(module, q, k, v, lower_right(QUERIES, KEYS), scaling=0.25)
    for name in ("eager", "sdpa_flash", "flex"):
        mine = attend(q, k, v, mask=Causal(), scale=0.25, sinks=sinks, implementation=name)
        torch.testing.assert_close(mine.output, theirs.transpose(1, 2), atol=2e-6, rtol=0)
        assert mine.lse is not None
        arrays = q[0, 2].numpy(), k[0, 1].numpy(), mine.lse[0, 2].numpy()
        drawn = SoftmaxMap(*arrays, 0.25, Causal(), sink=float(sinks[2]))
        np.testing.assert_allclose(drawn.tile(slice(None), slice(None)), weights[0, 2].numpy(), atol=2e-6)
        np.testing.assert_allclose(drawn.row_sums() + drawn.sink_shares(), 1, atol=5e-6)
        assert drawn.row_sums().max() < 0.9


def test_a_bias_of_the_distance_is_t5s():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    torch.manual_seed(0)
    config = T5Config(d_model=64, d_kv=DIM, num_heads=HEADS, is_decoder=False)
    config._attn_implementation = "eager"
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    states = torch.randn(1, 150, 64)
    with torch.no_grad():
        theirs, bias, weights = module(states, output_attentions=True)[:3]
        q, k, v = (
            part(states).view(1, 150, HEADS, DIM).transpose(1, 2) for part in (module.q, module.k, module.v)
        )
        mine = attend(q, k, v, scale=1.0, bias=bias, implementation="sdpa_flash")
        torch.testing.assert_close(
            module.o(mine.output.transpose(1, 2).flatten(2)), theirs, atol=1e-5, rtol=0
        )
    assert mine.lse is not None
    # the first row holds the distances 0..149, the first column 0..-149
    by_distance = torch.cat((bias[0, 1, :, 0].flip(0), bias[0, 1, 0, 1:])).numpy()
    arrays = q[0, 1].numpy(), k[0, 1].numpy(), mine.lse[0, 1].numpy()
    drawn = SoftmaxMap(*arrays, 1.0, Full(), bias=RelativeBias(by_distance, -149))
    np.testing.assert_allclose(drawn.tile(slice(None), slice(None)), weights[0, 1].numpy(), atol=5e-6)


def test_alibi_is_blooms_where_the_mask_is_causal():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    q, k, v = tensors(torch.float32, num_queries=KEYS)
    added = build_alibi_tensor(torch.ones(1, KEYS), HEADS, torch.float32)  # [heads, 1, keys], slope * j
    slopes = added[:, 0, 1].clone()
    want = attend(q, k, v, mask=Causal(), bias=added, implementation="eager").output
    for name in ("eager", "sdpa_flash", "flex"):
        mine = attend(q, k, v, mask=Causal(), alibi=slopes, implementation=name)
        torch.testing.assert_close(mine.output, want, atol=3e-6, rtol=0)


def test_a_row_that_only_sees_its_sink_is_zero_and_its_lse_the_sink():
    q, k, v = tensors(torch.float32, num_queries=37)
    sinks = features(("sinks",), dtype=torch.float32)["sinks"]
    for name in ("eager", "sdpa_math", "sdpa_flash", "flex"):
        result = attend(q, k, v, mask=Causal(), sinks=sinks, implementation=name)
        assert result.lse is not None
        assert not result.output[:, :, :7].any()
        torch.testing.assert_close(result.lse[:, :, :7], sinks[None, :, None].expand(2, -1, 7))
    empty = attend(q, k[:, :, :0], v[:, :, :0], sinks=sinks)
    assert empty.lse is not None
    torch.testing.assert_close(empty.lse, sinks[None, :, None].expand(2, -1, 37))


def test_no_fused_kernel_drops_a_gradient_that_was_asked_for():
    q, k, v = (tensor.requires_grad_() for tensor in tensors(torch.float32))
    for name, asked in product(("sdpa_flash", "flex"), ("bias", "alibi", "sinks")):
        given = features((asked,), dtype=torch.float32)
        given[asked].requires_grad_()
        assert not supports(name, q, k, v, **given, need_grad=True), (name, asked)
        result = attend(q, k, v, **given)
        result.output.sum().backward()
        assert given[asked].grad.abs().max() > 0


def test_an_observer_is_told_what_the_map_needs():
    q, k, v = tensors(torch.float32)
    given = features(("softcap", "alibi", "bias", "sinks"), dtype=torch.float32)
    calls: list[AttendCall] = []
    with observing(calls.append):
        attend(q, k, v, mask=Causal(), **given)
    for name, value in given.items():
        assert getattr(calls[0], name) is value


BIASES = {
    "none": None,
    "dense": DenseBias(np.random.default_rng(1).standard_normal((47, 61))),
    "one row": DenseBias(np.random.default_rng(2).standard_normal((1, 61))),
    "relative": RelativeBias(np.random.default_rng(3).standard_normal(31), -20),
    "low rank": LowRankBias(*(np.random.default_rng(4 + n).standard_normal((n, 3)) for n in (47, 61))),
}


def written_out(bias) -> np.ndarray:
    if bias is None:
        return np.zeros((47, 61))
    if isinstance(bias, DenseBias):
        return np.broadcast_to(bias.values, (47, 61))
    if isinstance(bias, LowRankBias):
        return np.einsum("ir,jr->ij", bias.left, bias.right)
    return np.array(
        [[bias.values[min(max(j - i - 14 - bias.first, 0), 30)] for j in range(61)] for i in range(47)]
    )


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("softcap", [None, 1.3])
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(12)], ids=str)
def test_a_map_with_modifiers_is_the_float64_softmax_at_any_zoom(mask, softcap, bias):
    rng = np.random.default_rng(0)
    query, key = (3 * rng.standard_normal((n, 8)) for n in (47, 61))
    scores = 0.5 * query @ key.T
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    position = np.arange(47)[:, None] + 14
    scores = scores - 0.11 * np.abs(position - np.arange(61)) + written_out(bias)
    keep = mask.allowed(np.arange(47), np.arange(61), num_queries=47, num_keys=61)
    weights = np.where(keep, np.exp(scores), 0)
    total = weights.sum(axis=1) + np.exp(0.7)
    drawn = SoftmaxMap(
        *(query, key, np.log(total), 0.5, mask), softcap=softcap, alibi=0.11, bias=bias, sink=0.7
    )
    want = weights / total[:, None]
    np.testing.assert_allclose(drawn.tile(slice(None), slice(None)), want, atol=1e-7)
    np.testing.assert_allclose(drawn.tile(slice(5, 20), slice(7, 50)), want[5:20, 7:50], atol=1e-7)
    np.testing.assert_allclose(drawn.row_sums(), want.sum(axis=1), atol=1e-12)
    np.testing.assert_allclose(drawn.sink_shares(), 1 - want.sum(axis=1), atol=1e-12)
    rows, cols = [47 * i // 5 for i in range(6)], [61 * i // 7 for i in range(8)]
    for reduce, pick in (("max", np.max), ("mean", np.mean)):
        pooled = [[pick(want[a:b, c:d]) for c, d in pairwise(cols)] for a, b in pairwise(rows)]
        got = drawn.pool(slice(None), slice(None), 5, 7, reduce)
        np.testing.assert_allclose(got, pooled, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"softcap": 0.0}, "softcap must be a finite number above 0; got 0.0"),
        ({"softcap": float("inf")}, "softcap must be a finite number"),
        ({"sinks": torch.zeros(3)}, r"sinks must be one float for each of 4 query heads.*\(3,\)"),
        ({"sinks": torch.zeros(4, dtype=torch.long)}, "sinks must be one float .*int64"),
        ({"alibi": torch.zeros(1, 4)}, r"alibi must be one float .*\(1, 4\)"),
    ],
)
def test_modifiers_that_mean_nothing_are_refused_by_name(change, says):
    with pytest.raises(ValueError, match=says):
        attend(*tensors(torch.float32), **change)


@pytest.mark.parametrize(
    ("bias", "says"),
    [
        (DenseBias(np.zeros((2, 9))), r"bias must broadcast to \[9, 9\]; got \(2, 9\)"),
        (RelativeBias(np.zeros((2, 9)), 0), r"values must be \[distances\]"),
        (LowRankBias(np.zeros((9, 2)), np.zeros((8, 2))), r"right \[9, R\]; got \(9, 2\) and \(8, 2\)"),
    ],
)
def test_a_bias_that_does_not_cover_the_map_is_refused(bias, says):
    with pytest.raises(ValueError, match=says):
        SoftmaxMap(np.zeros((9, 4)), np.zeros((9, 4)), np.zeros(9), 1.0, Full(), bias=bias)
