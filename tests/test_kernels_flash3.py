"""FlashAttention-3: the exact function, the rules of eight-bit attention, and what it says of itself."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from attnlab_kernels import FlashAttention3, FlashAttention3Core, Unsupported, is_flash_attention_3_available
from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.operations.fp8 import reference as fp8
from attnlab_kernels.operations.fp8.hadamard import random_signs, rotate
from attnlab_kernels.operations.fp8.quantize import E4M3, E4M3_MAX, cast, quantize
from attnlab_kernels.operations.softmax import eager, hopper
from attnlab_kernels.operations.softmax.api import AttendCall, observing


def draw(seed: int, *shape: int, outliers: float = 0.0) -> torch.Tensor:
    """Float64 normal numbers, a share of them ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
    large = torch.rand(*shape, generator=generator) < outliers
    return torch.where(large, 10 * numbers, numbers)


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draws(seed: int, *shape: int, outliers: float = 0.0) -> Tensors:
    q, k, v = (draw(3 * seed + index, *shape, outliers=outliers) for index in range(3))
    return q, k, v


def make(seed: int = 0, **changes: Any) -> FlashAttention3:
    torch.manual_seed(seed)
    return FlashAttention3({"embed_dim": 24, "num_heads": 3} | changes).eval()


def rounded(q, k, v, *, mask: Mask | None = None, **options: Any) -> fp8.Fp8Attention:
    scale = options.pop("scale", q.shape[-1] ** -0.5)
    floats = (tensor.float() for tensor in (q, k, v))
    return fp8.run(*floats, mask=mask or Full(), scale=scale, **options)


def mean_square(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).square().mean())


def rounding_of_weights(ran: fp8.Fp8Attention, maps: torch.Tensor) -> torch.Tensor:
    """How far P8 v8 may lie from P v8: half a step of a 3-bit mantissa, and half the smallest number of e4m3.

    The shift makes the largest weight of a row so far 256, so that number is at most 2**-18 of it, and of the sum.
    """
    values = ran.value.dequantize().double().abs()
    return maps @ values * 2.0**-4 + values.sum(dim=2, keepdim=True) * 2.0**-18 + 1e-5


# the exact function


@pytest.mark.parametrize("causal", [False, True])
def test_without_fp8_the_core_equals_float64_sdpa(causal):
    q, k, v = draws(0, 2, 3, 13, 8)
    got = FlashAttention3Core()(q, k, v, causal=causal)
    want = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_without_fp8_the_module_equals_projected_float64_sdpa():
    module, x = make().double(), draw(1, 2, 9, 24)
    q, k, v = (
        functional.linear(x, p.weight, p.bias).view(2, 9, 3, 8).transpose(1, 2)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 24)
    torch.testing.assert_close(module(x), module.o_proj(attended), rtol=0, atol=1e-13)


def test_without_fp8_gradients_are_those_of_sdpa():
    ours = [tensor.requires_grad_() for tensor in draws(2, 1, 2, 7, 8)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    FlashAttention3Core()(*ours).square().sum().backward()
    q, k, v = theirs
    functional.scaled_dot_product_attention(q, k, v).square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_fp8", [False, True])
def test_causal_is_bottom_right_between_unequal_lengths(use_fp8):
    q, (_, k, v) = draw(50, 1, 2, 3, 16), draws(3, 1, 2, 7, 16)
    allowed = torch.ones(3, 7).tril(diagonal=4).bool()
    want = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    wrong = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    got = FlashAttention3Core(use_fp8=use_fp8)(q.float(), k.float(), v.float(), causal=True).double()
    # rounding moves values of about 2 by no more than a sixteenth or so
    assert (got - want).abs().max() < (0.2 if use_fp8 else 1e-5)
    assert (got - wrong).abs().max() > 0.5


@pytest.mark.parametrize("use_fp8", [False, True])
def test_dead_rows_are_zero_with_lse_minus_infinity(use_fp8):
    q, k, v = (tensor.float() for tensor in draws(4, 2, 2, 6, 16))
    core = FlashAttention3Core(use_fp8=use_fp8, fp8_block_size=4)
    result = core(q, k[:, :, :4], v[:, :, :4], causal=True, return_dict=True)
    assert (result.output[:, :, :2] == 0).all()
    assert torch.isneginf(result.lse[:, :, :2]).all()
    assert torch.isfinite(result.lse[:, :, 2:]).all()
    assert (result.output[:, :, 2:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("use_fp8", [False, True])
def test_what_lies_in_padded_slots_is_never_read(use_fp8):
    q, k, v = (tensor.float() for tensor in draws(5, 2, 2, 9, 16))
    core, mask = FlashAttention3Core(use_fp8=use_fp8, fp8_block_size=4), Padding(((0, 9), (2, 6)))
    clean = core(q, k, v, mask, return_dict=True)
    for tensor in (k, v):
        tensor[1, :, :2] = torch.nan
        tensor[1, :, 6:] = 1e30
    dirty = core(q, k, v, mask, return_dict=True)
    assert torch.equal(clean.output[0], dirty.output[0])
    if use_fp8:
        # hidden slots count as zeros, before and after
        assert torch.equal(clean.output, dirty.output)
        assert torch.equal(clean.lse, dirty.lse)
    else:
        torch.testing.assert_close(clean.output, dirty.output)


@pytest.mark.parametrize("use_fp8", [False, True])
def test_no_keys_and_no_queries_give_zeros(use_fp8):
    core, full = FlashAttention3Core(use_fp8=use_fp8), torch.ones(1, 2, 3, 8)
    assert torch.equal(core(full, full[:, :, :0], full[:, :, :0]), torch.zeros(1, 2, 3, 8))
    assert core(full[:, :, :0], full, full).shape == (1, 2, 0, 8)


# eight bits


def test_on_outliers_block_scales_beat_one_scale_and_rotation_beats_both_and_bf16_all():
    # one draw decides little between block and tensor scales, so errors are pooled over draws
    errors = {"tensor": 0.0, "block": 0.0, "block and rotation": 0.0, "bf16": 0.0}
    for seed in range(20):
        q, k, v = draws(seed, 1, 2, 384, 128, outliers=1e-3)
        want = functional.scaled_dot_product_attention(q, k, v)
        halves = (tensor.bfloat16() for tensor in (q, k, v))
        sixteen, _ = eager.run(*halves, mask=Full(), scale=128**-0.5)
        for name, options in {
            "tensor": {"block_size": None, "rotated": False},
            "block": {"block_size": 64, "rotated": False},
            "block and rotation": {"block_size": 64, "rotated": True},
        }.items():
            errors[name] += mean_square(rounded(q, k, v, **options).output, want)
        errors["bf16"] += mean_square(sixteen, want)
    root = {name: (total / 20) ** 0.5 for name, total in errors.items()}
    assert root["block"] < 0.98 * root["tensor"], root
    assert root["block and rotation"] < 0.85 * root["block"], root
    assert root["bf16"] < 0.3 * root["block and rotation"], root


@pytest.mark.parametrize("width", [1, 8, 24, 80])
def test_rotation_alone_changes_nothing_in_float64(width):
    q, k = draw(6, 2, 3, 5, width), draw(7, 2, 3, 7, width)
    signs = random_signs(width, seed=3)
    turned = rotate(q, signs) @ rotate(k, signs).transpose(-1, -2)
    torch.testing.assert_close(turned, q @ k.transpose(-1, -2), rtol=0, atol=1e-13)


def test_rotation_of_queries_alone_is_another_function():
    q, k = draw(8, 1, 1, 5, 16), draw(9, 1, 1, 5, 16)
    one_sided = rotate(q, random_signs(16)) @ k.transpose(-1, -2)
    assert (one_sided - q @ k.transpose(-1, -2)).abs().max() > 1


def test_rotation_is_the_hadamard_matrix_after_signs():
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    want = torch.diag(signs) @ torch.kron(two, two) / 2
    torch.testing.assert_close(rotate(torch.eye(4, dtype=torch.float64), signs), want, rtol=0, atol=1e-15)


def test_rotation_spreads_one_outlier_evenly():
    spike = torch.zeros(1, 64)
    spike[0, 17] = 40.0
    torch.testing.assert_close(rotate(spike, random_signs(64)).abs(), torch.full((1, 64), 5.0))


def test_casts_saturate_at_448_and_round_to_nearest():
    numbers = torch.tensor([448.0, 449.0, 1e9, torch.inf, -1e9, 1.06, 1.07, torch.nan])
    got = cast(numbers)
    assert got.dtype == E4M3
    assert got[:-1].float().tolist() == [448, 448, 448, 448, -448, 1.0, 1.125]
    assert torch.isnan(got[-1].float())


def test_every_block_of_rows_and_head_uses_the_whole_range_of_e4m3():
    numbers = draw(10, 2, 3, 11, 8) * torch.logspace(-6, 6, 11, dtype=torch.float64)[:, None]
    got = quantize(numbers, 4)
    assert got.values.dtype == E4M3
    assert got.scales.shape == (2, 3, 3)
    for index, rows in enumerate((slice(0, 4), slice(4, 8), slice(8, 11))):
        block = numbers[:, :, rows].float()
        assert (got.values[:, :, rows].float().abs().amax((-1, -2)) == E4M3_MAX).all()
        torch.testing.assert_close(got.scales[:, :, index], block.abs().amax((-1, -2)) / 448)


def test_dequantised_numbers_are_within_half_a_step():
    numbers = draw(11, 1, 2, 37, 24, outliers=0.01).float()
    got = quantize(numbers, 16)
    smallest = got.row_scales() * 2.0**-10
    assert ((got.dequantize() - numbers).abs() <= numbers.abs() * 2.0**-4 + smallest).all()


def test_a_block_of_zeros_stays_zero():
    assert torch.equal(quantize(torch.zeros(1, 1, 5, 4), 2).dequantize(), torch.zeros(1, 1, 5, 4))


def test_scales_are_not_dropped():
    q, k, v = draws(12, 1, 2, 40, 16)
    want = functional.scaled_dot_product_attention(q, k, v)
    plain = rounded(q, k, v, block_size=16)
    # what q loses k gains, exactly; values scale the output, exactly
    moved = rounded(q * 2**-7, k * 2**7, v * 2**5, block_size=16)
    torch.testing.assert_close(moved.output, plain.output * 2**5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.lse, plain.lse, rtol=1e-5, atol=1e-5)
    assert mean_square(plain.output, want) ** 0.5 < 0.03
    # every block and head has a scale of its own
    steps = 2.0 ** torch.arange(-2, 3).repeat_interleave(8)[:, None].double()
    uneven = rounded(q, k * steps, v * steps.flip(0), block_size=8)
    exact = functional.scaled_dot_product_attention(q, k * steps, v * steps.flip(0))
    assert mean_square(uneven.output, exact) < 0.01 * float(exact.square().mean())


def test_scores_are_the_products_of_the_kept_numbers_and_their_scales():
    q, k, v = draws(13, 2, 3, 21, 24)
    ran = rounded(q, k, v, block_size=8, mask=Causal())
    keys = ran.key.dequantize().double()
    scores = ran.query.dequantize().double() @ keys.transpose(-1, -2) * 24**-0.5
    scores = scores.masked_fill(torch.ones(21, 21).triu(1).bool(), -torch.inf)
    # the natural log of the sum before P is rounded
    torch.testing.assert_close(ran.lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
    maps = scores.softmax(-1)
    want = maps @ ran.value.dequantize().double()
    assert ((ran.output.double() - want).abs() <= rounding_of_weights(ran, maps)).all()


def test_a_row_sum_counts_weights_that_round_to_zero():
    # one key far ahead and 4095 so far behind that each rounds to zero even when shifted
    q, v = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 4096, 1)
    k = torch.full((1, 1, 4096, 1), -13.0)
    k[0, 0, 0] = 0
    ran = rounded(q, k, v, scale=1.0, block_size=4096, rotated=False)
    total = 1 + 4095 * np.exp(-13.0)
    assert float(ran.lse) == pytest.approx(np.log(total), rel=1e-4)
    assert float(ran.output) == pytest.approx(1 / total, rel=1e-5)


def test_shifted_weights_keep_what_unshifted_ones_lose():
    # exp(-8) is below half the smallest e4m3 number, 2**-10, and 256 times it is not
    k = torch.full((1, 1, 1001, 1), -8.0)
    k[0, 0, 0] = 0
    v = torch.ones(1, 1, 1001, 1)
    ran = rounded(torch.ones(1, 1, 1, 1), k, v, scale=1.0, block_size=1001, rotated=False)
    assert float(cast(torch.tensor(np.exp(-8.0))).float()) == 0
    assert float(ran.output) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
def test_a_block_size_need_not_divide_the_tokens(block_size):
    q, (_, k, v) = draw(60, 2, 4, 13, 16), draws(14, 2, 2, 37, 16)
    ran = rounded(q, k, v, block_size=block_size, mask=Window(20))
    assert ran.key.scales.shape == (2, 2, -(-37 // block_size))
    want, lse = eager.run(q, k, v, mask=Window(20), scale=0.25)
    assert mean_square(ran.output, want) ** 0.5 < 0.04
    assert (ran.lse.double() - lse).abs().max() < 0.2


@pytest.mark.parametrize("width", [3, 24, 80])
def test_a_head_that_is_no_power_of_two_is_padded_for_the_rotation(width):
    q, k, v = draws(15, 1, 2, 33, width)
    ran = rounded(q, k, v, block_size=16)
    assert ran.query.values.shape[-1] == 1 << (width - 1).bit_length()
    assert ran.output.shape == v.shape
    assert mean_square(ran.output, functional.scaled_dot_product_attention(q, k, v)) ** 0.5 < 0.04


def test_a_bias_is_added_to_the_scaled_scores():
    q, k, v = draws(16, 1, 2, 19, 16)
    bias = 3 * draw(70, 1, 2, 19, 19)
    got = rounded(q, k, v, bias=bias.float(), block_size=8)
    want = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert mean_square(got.output, want) ** 0.5 < 0.06


def test_fp8_with_a_gradient_or_dropout_raises():
    module, x = make(use_fp8=True), draw(17, 1, 5, 24).float()
    with pytest.raises(Unsupported, match="forward only"):
        module(x)
    with torch.no_grad():
        assert module(x).shape == (1, 5, 24)
        with pytest.raises(Unsupported, match="dropout"):
            make(use_fp8=True, dropout=0.1).train()(x)


# maps


@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"attn_mask": Padding(((0, 11), (3, 9)))}])
def test_map_times_values_is_the_output_before_the_projection(arguments):
    module, x = make(), draw(18, 2, 11, 24).float()
    calls: list[AttendCall] = []
    with torch.no_grad(), observing(calls.append):
        result = module(x, **arguments, return_dict=True, output_attentions=True)
    heads = calls[0].output
    torch.testing.assert_close(module.o_proj(heads.transpose(1, 2).flatten(2)), result.output)
    torch.testing.assert_close(result.attentions @ calls[0].v, heads, rtol=1e-5, atol=1e-6)
    tile = module.effective_map(x, head=1, batch=1, **arguments).tile(slice(0, 11), slice(0, 11))
    np.testing.assert_allclose(tile, result.attentions[1, 1].numpy(), atol=1e-6)


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_in_fp8_the_map_is_of_the_rounded_numbers_and_times_values_is_the_output(kv_heads):
    options = {"embed_dim": 36, "num_kv_heads": kv_heads, "fp8_block_size": 4}
    module, x = make(use_fp8=True, **options), draw(19, 2, 11, 36).float()
    calls: list[AttendCall] = []
    with torch.no_grad(), observing(calls.append):
        result = module(x, causal=True, return_dict=True, output_attentions=True)
    with torch.no_grad():
        exact = make(**options)(x, causal=True, return_dict=True, output_attentions=True)
    (call,) = calls
    values = call.v.repeat_interleave(3 // kv_heads, dim=1).double()
    maps = result.attentions.double()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 11).double(), rtol=0, atol=1e-5)
    allowed = maps @ values.abs() * 2.0**-4 + values.abs().sum(2, keepdim=True) * 2.0**-18 + 1e-6
    assert ((maps @ values - call.output.double()).abs() <= allowed).all()
    tile = module.effective_map(x, head=2, batch=1, causal=True).tile(slice(0, 11), slice(0, 11))
    np.testing.assert_allclose(tile, maps[1, 2].numpy(), atol=1e-5)
    assert (maps - exact.attentions).abs().max() > 1e-4


def test_a_map_with_a_bias_raises():
    bias = draw(20, 1, 3, 5, 5).float()
    with pytest.raises(ValueError, match="cannot hold a bias"):
        make().effective_map(draw(21, 1, 5, 24).float(), head=0, attn_mask=bias)


# options and what ran


def test_a_config_and_keywords_make_the_same_module():
    config = {"embed_dim": 24, "num_heads": 3, "use_fp8": True, "fp8_block_size": 7, "bias": False}
    torch.manual_seed(0)
    one = FlashAttention3(config)
    two = make(**config)
    three = FlashAttention3({"embed_dim": 24, "num_heads": 3}, use_fp8=True, fp8_block_size=7, bias=False)
    assert repr(one) == repr(two) == repr(three)
    x = draw(22, 1, 9, 24).float()
    with torch.no_grad():
        assert torch.equal(one(x), two(x))
    plain = FlashAttention3()
    assert (plain.dim, plain.num_heads, plain.dropout) == (512, 8, 0.0)
    assert (plain.core.use_fp8, plain.core.fp8_block_size, plain.core.use_async) == (False, 128, True)
    assert plain.q_proj.bias is not None
    assert FlashAttention3({"hidden_size": 64}).dim == 64


@pytest.mark.parametrize(
    ("config", "options", "error", "words"),
    [
        ({"num_heads": 4}, {"num_heads": 8}, ValueError, "num_heads must agree"),
        ({"embed_dim": 64}, {"dim": 32}, ValueError, "width must agree"),
        ({"fp8_block_size": 0}, {}, ValueError, "fp8_block_size must be at least 1"),
        ({"head_count": 4}, {}, TypeError, "unknown option 'head_count'"),
        ({"dropout": 1.0}, {}, ValueError, "dropout"),
        ({"embed_dim": 30}, {}, ValueError, "multiple of num_heads"),
    ],
)
def test_options_that_cannot_hold_name_the_rule(config, options, error, words):
    with pytest.raises(error, match=words):
        FlashAttention3(config, **options)


def test_key_value_is_what_is_attended_to():
    module, x, other = make(), draw(23, 1, 4, 24).float(), draw(24, 1, 6, 24).float()
    assert torch.equal(module(x, None, other), module(x, key_value=other))
    assert not torch.allclose(module(x, None, other), module(x))
    with pytest.raises(ValueError, match="two names of one argument"):
        module(x, torch.ones(1, 4).bool(), attention_mask=torch.ones(1, 4).bool())


def test_aux_says_what_ran_and_why():
    x = draw(25, 1, 5, 24).float()
    with torch.no_grad():
        exact = make()(x, return_dict=True).aux
        eight = make(use_fp8=True)(x, return_dict=True).aux
        calm = make(use_async=False)(x, return_dict=True).aux
    assert exact["ran"] == calm["ran"] == "exact simulation"
    assert exact["implementation"] == "sdpa_flash"
    assert "no Hopper kernel" in exact["reason"]
    assert "use_async is False" in calm["reason"]
    assert (eight["ran"], eight["implementation"]) == ("fp8 simulation", "fp8_reference")
    assert not exact["async"]


@pytest.mark.parametrize("use_fp8", [False, True])
def test_the_hopper_kernel_asked_for_where_it_cannot_run_raises(use_fp8):
    with torch.no_grad(), pytest.raises(Unsupported, match="hopper"):
        make(use_fp8=use_fp8, use_async=False)(draw(26, 1, 5, 24).float(), implementation="hopper")


@pytest.mark.parametrize(
    ("device", "capability", "kernel", "available"),
    [
        (False, (9, 0), True, False),
        (True, (8, 9), True, False),
        (True, (10, 0), True, False),
        (True, (9, 0), False, False),
        (True, (9, 0), True, True),
    ],
)
def test_available_means_the_kernel_imports_and_the_capability_is_exactly_9_0(
    monkeypatch, device, capability, kernel, available
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    # None in sys.modules is a module that does not import
    monkeypatch.setitem(sys.modules, hopper.KERNEL_MODULE, SimpleNamespace() if kernel else None)
    assert is_flash_attention_3_available() is available
    assert bool(hopper.available().reason) is not available


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(2)])
def test_the_hopper_kernel_is_called_in_its_layout_and_answers_in_ours(monkeypatch, asks, mask):
    q, k, v = draws(27, 2, 3, 6, 8)
    seen: dict[str, Any] = {}

    def answer(q, k, v, **options):
        seen.update(options, shape=tuple(q.shape))
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        output, lse = eager.run(*heads, mask=mask, scale=options["softmax_scale"])
        return output.transpose(1, 2), lse

    def old(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
        return answer(q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size)

    def new(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False):
        output, lse = old(q, k, v, softmax_scale, causal, window_size)
        return (output, lse) if return_attn_probs else output

    kernel = SimpleNamespace(flash_attn_func=new if asks else old)
    monkeypatch.setitem(sys.modules, hopper.KERNEL_MODULE, kernel)
    output, lse = hopper.run(q, k, v, mask=mask, scale=0.3)
    want = eager.run(q, k, v, mask=mask, scale=0.3)
    assert torch.equal(output, want[0])
    assert torch.equal(lse, want[1])
    assert seen["shape"] == (2, 6, 3, 8)
    assert seen["causal"] is (mask == Causal())
    assert seen["window_size"] == ((2, 0) if mask == Window(2) else (-1, -1))
