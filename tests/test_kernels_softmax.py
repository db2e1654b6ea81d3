"""Laws of softmax attention: every implementation gives the float64 reference's answer, or says why it will not.

The tolerance is a budget: at most twice the error that plain PyTorch of the same dtype makes against float64.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.operations.softmax.api import (
    IMPLEMENTATIONS,
    AttendCall,
    Unsupported,
    attend,
    observing,
    supports,
    survey,
)

# the matrix below walks all of them; other laws walk what this process can run (triton: under its interpreter)
HERE = [row["name"] for row in survey("cpu") if row["available"]]
# other people's kernels, which never run on a CPU, have their own matrix in test_kernels_external
OURS = [name for name in IMPLEMENTATIONS if not name.startswith(("flash_attn", "flashinfer", "xformers"))]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# batch, query heads, key heads, queries, keys, D, Dv
SHAPES = [
    (1, 1, 1, 1, 1, 16, 16),
    (2, 4, 2, 37, 37, 16, 16),
    (2, 3, 1, 1, 65, 24, 24),
    (1, 4, 4, 7, 41, 13, 13),
    (2, 2, 1, 40, 33, 8, 8),
    (1, 2, 2, 33, 70, 20, 12),
    (1, 2, 1, 300, 300, 16, 16),
]
MASKS: list[Mask] = [
    Full(),
    Causal(),
    Window(6),
    Window(4, 3),
    Window(40),
    Padding(((0, 30), (5, 20))),
    Causal() & Padding(((3, 33), (0, 1))),
    Window(9) & Padding(((4, 28), (30, 33))),
    Padding(((0, 0), (0, 33))),
]


@functools.cache
def case(shape, spread=1.0):
    batch, heads, kv_heads, num_queries, num_keys, dim, value_dim = shape
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    q = spread * torch.randn(batch, heads, num_queries, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, num_keys, dim, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, num_keys, value_dim, generator=generator, dtype=torch.float64)
    return q, k, v


def fitted(mask: Mask, batch: int) -> Mask:
    """The mask for a batch: the first of its sequences alone where there is one."""
    band = mask.band()
    if band.ranges is None or len(band.ranges) == batch:
        return mask
    parts = [part for part in getattr(mask, "parts", (mask,)) if not isinstance(part, Padding)]
    alone: Mask = Padding(band.ranges[:1])
    return functools.reduce(lambda a, b: a & b, parts, alone)


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, bias: Tensor | None = None):
    """The definition with numpy loops over heads, in float64; shares no code with the package but the mask."""
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.full(q.shape[:3], -np.inf)
    for b in range(batch):
        keep = mask.allowed(
            np.arange(num_queries), np.arange(num_keys), num_queries=num_queries, num_keys=num_keys, batch=b
        )
        for h in range(heads):
            g = h // (heads // k.shape[1])
            scores = scale * q[b, h].double().numpy() @ k[b, g].double().numpy().T
            if bias is not None:
                scores = scores + bias.double().expand(batch, heads, num_queries, num_keys)[b, h].numpy()
            for i in range(num_queries):
                seen = np.flatnonzero(keep[i] & ~np.isneginf(scores[i]))
                if len(seen):
                    top = scores[i, seen].max()
                    weights = np.exp(scores[i, seen] - top)
                    lse[b, h, i] = top + np.log(weights.sum())
                    out[b, h, i] = weights / weights.sum() @ v[b, g].double().numpy()[seen]
    return torch.from_numpy(out), torch.from_numpy(lse)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float):
    """What a careful PyTorch user writes in the inputs' own dtype: the measure of a fair error."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    size = {"num_queries": q.shape[2], "num_keys": k.shape[2]}
    rows, cols = np.arange(q.shape[2]), np.arange(k.shape[2])
    keep = torch.stack(
        [torch.from_numpy(mask.allowed(rows, cols, **size, batch=b)) for b in range(q.shape[0])]
    )
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~keep[:, None], -torch.inf)
    weights = torch.softmax(scores.float(), dim=-1).nan_to_num(0.0).to(q.dtype)
    return weights @ v, torch.logsumexp(scores.float(), dim=-1)


def worst(got: Tensor, want: Tensor) -> float:
    both_dead = torch.isneginf(got.double()) & torch.isneginf(want)
    return (got.double() - want).masked_fill(both_dead, 0).abs().max().item()


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_every_implementation_equals_the_reference_or_says_why_not(name, dtype, shape, mask):
    mask = fitted(mask, shape[0])
    exact = case(shape)
    q, k, v = (tensor.to(dtype) for tensor in exact)
    support = supports(name, q, k, v, mask=mask)
    if not support:
        assert len(support.reason) > 10
        with pytest.raises(Unsupported, match="cannot run this call") as caught:
            attend(q, k, v, mask=mask, implementation=name)
        assert support.reason in str(caught.value)
        return
    scale = shape[5] ** -0.5
    want, want_lse = formula(q, k, v, mask, scale)
    result = attend(q, k, v, mask=mask, implementation=name)
    assert result.aux["implementation"] == name
    assert result.output.dtype == dtype
    assert result.lse is not None
    assert result.lse.dtype == torch.float32
    assert result.output.shape == want.shape
    base, base_lse = plain(q, k, v, mask, scale)
    assert worst(result.output, want) <= 2 * worst(base, want) + 2e-6
    assert worst(result.lse, want_lse) <= 2 * worst(base_lse, want_lse) + 2e-6
    dead = torch.isneginf(want_lse)
    assert torch.equal(torch.isneginf(result.lse), dead)
    assert not result.output[dead].any()


def test_the_reference_equals_the_formula_to_the_last_digits():
    for shape in SHAPES:
        q, k, v = case(shape)
        for mask in MASKS:
            mask = fitted(mask, shape[0])
            want, want_lse = formula(q, k, v, mask, 0.3)
            result = attend(q, k, v, mask=mask, scale=0.3, implementation="eager")
            assert result.output.dtype == torch.float64
            assert worst(result.output, want) < 1e-13
            assert result.lse is not None
            assert worst(result.lse, want_lse) < 1e-13


def available(**call) -> list[str]:
    q, k, v = (torch.zeros(1, 2, 48, 16) for _ in range(3))
    return [name for name in IMPLEMENTATIONS if supports(name, q, k, v, **call)]


@pytest.mark.parametrize("mask", [Causal(), Window(20), Full()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_fifty_with_a_late_maximum_stay_exact(dtype, mask):
    n, dim = 200, 16
    ramp = torch.linspace(-1, 1, n, dtype=torch.float64)
    q = torch.full((1, 2, n, dim), 50 / dim, dtype=torch.float64)
    k = ramp[None, None, :, None].expand(1, 2, n, dim).contiguous()
    v = torch.randn(1, 2, n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    want, want_lse = formula(q, k, v, mask, 1.0)
    assert want_lse.abs().max() > 45
    base, base_lse = plain(q, k, v, mask, 1.0)
    ran = [name for name in IMPLEMENTATIONS if supports(name, q, k, v, mask=mask)]
    assert {"eager", "sdpa_math", "sdpa_flash", "flex"} <= set(ran)
    for name in ran:
        result = attend(q, k, v, mask=mask, scale=1.0, implementation=name)
        assert result.lse is not None
        assert worst(result.output, want) <= 2 * worst(base, want) + 2e-6, name
        assert worst(result.lse, want_lse) <= 2 * worst(base_lse, want_lse) + 8e-6, name


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    "mask", [Padding(((3, 30), (0, 12))), Causal() & Padding(((3, 30), (0, 12)))], ids=str
)
def test_what_lies_in_padded_slots_never_shows(name, mask):
    mask = mask & Window(25) if name == "banded" else mask
    q, k, v = (torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    clean = attend(q, k, v, mask=mask, implementation=name)
    for poison in (torch.nan, torch.inf, 3e38):
        dirty_k, dirty_v = k.clone(), v.clone()
        for batch, (start, stop) in enumerate(((3, 30), (0, 12))):
            for tensor in (dirty_k, dirty_v):
                tensor[batch, :, :start] = poison
                tensor[batch, :, stop:] = poison
        dirty = attend(q, dirty_k, dirty_v, mask=mask, implementation=name)
        assert dirty.lse is not None
        assert clean.lse is not None
        assert torch.equal(dirty.output, clean.output)
        assert torch.equal(dirty.lse, clean.lse)


@pytest.mark.parametrize("name", HERE)
def test_what_lies_in_padded_slots_gets_and_gives_no_gradient(name):
    mask = Window(25) & Padding(((3, 30),))
    q, k, v = (torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for tensor in (k, v):
        tensor[:, :, :3] = tensor[:, :, 30:] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    if not supports(name, *leaves, mask=mask, need_grad=True):
        return
    attend(*leaves, mask=mask, implementation=name).output.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert k.grad is not None
    assert not k.grad[:, :, 30:].any()


@pytest.mark.parametrize("name", ["eager", "sdpa_math", "sdpa_flash"])
def test_a_row_that_the_bias_kills_has_no_gradient_and_no_nan(name):
    leaves = [torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3)]
    bias = torch.zeros(9, 9)
    bias[4] = -torch.inf
    attend(*leaves, mask=Causal(), bias=bias, implementation=name).output.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert leaves[0].grad is not None
    assert not leaves[0].grad[:, :, 4].any()


@pytest.mark.parametrize("name", HERE)
def test_a_future_token_changes_no_past_output(name):
    q, k, v = (torch.randn(1, 2, 50, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = Window(20) if name == "banded" else Causal()
    before = attend(q, k, v, mask=mask, implementation=name).output
    k[:, :, 31], v[:, :, 31] = 9.0, -9.0
    after = attend(q, k, v, mask=mask, implementation=name).output
    torch.testing.assert_close(after[:, :, :31], before[:, :, :31], atol=1e-6, rtol=0)
    assert (after[:, :, 31:] - before[:, :, 31:]).abs().amax(dim=(0, 1, 3)).min() > 1e-5


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((2, 4, 2, 19, 19, 8, 8), Causal()),
        ((1, 2, 2, 5, 23, 8, 8), Causal()),
        ((2, 2, 1, 33, 33, 8, 8), Causal() & Padding(((4, 20), (0, 33)))),
        ((1, 2, 1, 90, 90, 8, 8), Window(7)),
        ((1, 4, 2, 12, 12, 8, 8), Full()),
        ((1, 2, 2, 20, 12, 8, 8), Causal()),
    ],
    ids=str,
)
def test_gradients_equal_the_references(name, shape, mask):
    def gradients(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in case(shape)]
        result = attend(*leaves, mask=mask, implementation=implementation)
        (result.output * torch.linspace(-1, 1, result.output.shape[-1])).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    q, k, v = (tensor.float() for tensor in case(shape))
    support = supports(name, q, k, v, mask=mask, need_grad=True)
    if not support:
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        with pytest.raises(Unsupported):
            attend(*leaves, mask=mask, implementation=name)
        return
    want = gradients("eager", torch.float64)
    got = gradients(name, torch.float32)
    assert len(got) == len(want) == 3
    for mine, theirs in zip(got, want, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), theirs, atol=5e-6, rtol=1e-5)


def test_the_reference_passes_gradcheck_also_with_dead_rows_and_a_bias():
    leaves = [tensor.clone().requires_grad_() for tensor in case((1, 2, 1, 5, 4, 3, 2))]
    bias = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, bias):
        return attend(q, k, v, mask=Causal(), bias=bias, implementation="eager").output

    assert torch.autograd.gradcheck(run, (*leaves, bias))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(9), Causal() & Padding(((2, 20),))], ids=str)
@pytest.mark.parametrize("bias_shape", [(1, 4, 21, 30), (21, 30), (2, 1, 1, 30)], ids=str)
def test_a_bias_is_added_to_the_scores(name, mask, bias_shape):
    q, k, v = (tensor.float() for tensor in case((2, 4, 2, 21, 30, 16, 16)))
    bias = torch.randn(bias_shape, generator=torch.Generator().manual_seed(5))
    bias[..., 3] = -torch.inf
    if len(bias_shape) == 4 and bias_shape[2] > 1:
        bias[0, 1, 7] = -torch.inf  # a row that only the bias kills
    if not supports(name, q, k, v, mask=mask, bias=bias):
        assert name not in {"eager", "sdpa_math", "sdpa_flash", "flex"}
        return
    want, want_lse = formula(q, k, v, mask, 0.25, bias)
    result = attend(q, k, v, mask=mask, bias=bias, implementation=name)
    assert result.lse is not None
    assert worst(result.output, want) < 3e-6
    assert worst(result.lse, want_lse) < 3e-6


def test_grouped_heads_are_sdpas_enable_gqa():
    q, k, v = (tensor.float() for tensor in case((2, 6, 2, 19, 19, 16, 16)))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for name in available(mask=Causal()):
        mine = attend(q, k, v, mask=Causal(), implementation=name).output
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0)


def test_causal_with_more_keys_than_queries_is_aligned_to_the_newest_token():
    q, k, v = (tensor.float() for tensor in case((1, 2, 2, 40, 40, 16, 16)))
    whole = attend(q, k, v, mask=Causal(), implementation="eager").output
    for name in available(mask=Causal()):
        for start in (39, 31, 1):
            part = attend(q[:, :, start:], k, v, mask=Causal(), implementation=name).output
            torch.testing.assert_close(part, whole[:, :, start:], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", HERE)
def test_inputs_in_any_layout_give_the_same_and_are_left_alone(name):
    mask = Window(9) if name == "banded" else Causal()
    packed = torch.randn(2, 33, 8, 3, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = (packed[..., i, :].transpose(1, 2) for i in range(3))
    k, v = k[:, ::4], v[:, ::4]
    copies = [tensor.clone() for tensor in (q, k, v)]
    strided = attend(q, k, v, mask=mask, implementation=name)
    tidy = attend(*(tensor.contiguous() for tensor in copies), mask=mask, implementation=name)
    torch.testing.assert_close(strided.output, tidy.output, atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize(("num_queries", "num_keys", "batch"), [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
@pytest.mark.parametrize("name", ["auto", *(name for name in HERE if name != "banded")])
def test_nothing_to_attend_to_gives_zeros_not_a_crash(name, num_queries, num_keys, batch):
    q, k = torch.ones(batch, 2, num_queries, 8), torch.ones(batch, 2, num_keys, 8)
    result = attend(q, k, k, implementation=name)
    assert result.output.shape == q.shape
    assert not result.output.any()
    assert result.lse is not None
    assert torch.isneginf(result.lse).all()


def test_auto_says_what_it_chose_and_whom_it_passed_over():
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    windowed = attend(q, k, v, mask=Window(7)).aux
    assert windowed["implementation"] == "banded"
    causal = attend(q, k, v, mask=Causal()).aux
    assert causal["implementation"] == "sdpa_flash"
    assert "banded: banded needs a window" in causal["reason"]
    wide = attend(q, k, torch.randn(1, 2, 64, 24), mask=Causal()).aux
    assert wide["implementation"] == "sdpa_math"
    assert "Dv = 24" in wide["reason"]


def test_a_window_as_long_as_the_keys_is_a_causal_mask():
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    result = attend(q, k, v, mask=Window(63))
    assert result.aux["implementation"] == "sdpa_flash"
    assert torch.equal(result.output, attend(q, k, v, mask=Causal()).output)
    both = attend(q, k, v, mask=Window(63, 63))
    assert torch.equal(both.output, attend(q, k, v).output)
    half = attend(q, k, v, mask=Window(63, 2))
    want, _ = formula(q, k, v, Window(63, 2), 0.25)
    assert worst(half.output, want) < 2e-6


def test_dropout_drops_after_the_softmax_and_only_in_eager():
    q, k, v = torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 16), torch.ones(1, 2, 400, 16)
    torch.manual_seed(0)
    result = attend(q, k, v, dropout=0.5)
    assert result.aux["implementation"] == "eager"
    assert result.output.std() > 0.01
    assert abs(result.output.mean() - 1) < 0.01
    with pytest.raises(Unsupported, match="only eager drops"):
        attend(q, k, v, dropout=0.5, implementation="sdpa_flash")


def test_observers_see_each_finished_call_of_their_block():
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    calls: list[AttendCall] = []
    inner: list[AttendCall] = []
    with observing(calls.append):
        first = attend(q, k, v, mask=Causal(), scale=0.5)
        with observing(inner.append):
            attend(q, k, v, mask=Window(2), implementation="eager")
    attend(q, k, v)
    assert [call.implementation for call in calls] == ["sdpa_flash", "eager"]
    assert len(inner) == 1
    assert calls[0].mask == Causal()
    assert calls[0].scale == 0.5
    assert calls[0].output is first.output
    assert calls[0].lse is first.lse
    assert calls[0].q is q


def test_an_observer_is_forgotten_when_its_block_fails():
    calls: list[AttendCall] = []
    with pytest.raises(RuntimeError, match="inside"), observing(calls.append):
        raise RuntimeError("inside")
    attend(*(torch.randn(1, 1, 2, 8) for _ in range(3)))
    assert calls == []


def test_the_survey_has_a_row_and_a_reason_for_everything():
    rows = {row["name"]: row for row in survey("cpu")}
    assert set(rows) == set(IMPLEMENTATIONS)
    assert {name for name, row in rows.items() if row["available"]} >= {
        *("eager", "sdpa_math", "sdpa_flash", "flex", "banded")
    }
    for row in rows.values():
        assert row["requires"]
        assert row["label"]
        assert row["available"] or row["reason"]
    assert "no log-sum-exp" in rows["flex"]["reason"]
    assert "CUDA" in rows["sdpa_cudnn"]["reason"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"implementation": "magic"}, r"implementation must be one of auto, eager, .*got 'magic'"),
        ({"q": torch.zeros(2, 9, 16)}, r"q must be \[batch, heads, tokens, dim\]; got shape \(2, 9, 16\)"),
        ({"k": torch.zeros(1, 2, 9, 24)}, r"q \[B, Hq, Sq, D\].*k \(1, 2, 9, 24\)"),
        ({"v": torch.zeros(1, 2, 8, 16)}, r"v \(1, 2, 8, 16\)"),
        ({"v": torch.zeros(1, 2, 9, 16, dtype=torch.float16)}, r"share one float dtype.*v is torch.float16"),
        ({"q": torch.zeros(1, 3, 9, 16)}, r"query heads must be a multiple of key heads; got 3 and 2"),
        ({"mask": Padding(((0, 1), (0, 2)))}, r"mask must describe 1 or 1 sequences, as q has; got 2"),
        ({"bias": torch.zeros(9, 8)}, r"bias must broadcast to \(1, 2, 9, 9\); got shape \(9, 8\)"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1; got 1.0"),
        ({"dropout": math.nan}, r"dropout must be .*got nan"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_by_name(change, says):
    call = {name: torch.zeros(1, 2, 9, 16) for name in "qkv"} | change
    with pytest.raises(ValueError, match=says):
        attend(call.pop("q"), call.pop("k"), call.pop("v"), **call)
