"""Latent attention: against DeepseekV3Attention, its two forms against each other, and what its cache keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnlab_kernels import MECHANISMS, MultiHeadLatentAttention, MultiHeadLatentAttentionV2
from attnlab_kernels.caches import CacheError, ContiguousKV
from attnlab_kernels.latent_cache import LatentKV
from attnlab_kernels.operations.latent.reference import LatentInputs, latent_attend
from attnlab_kernels.operations.softmax.api import observing
from attnlab_kernels.positions import rope_tables

SIZES: dict[str, Any] = {"kv_lora_rank": 11, "qk_rope_head_dim": 6, "qk_nope_head_dim": 5, "v_head_dim": 7}


def make(seed: int = 0, **changes) -> MultiHeadLatentAttention:
    torch.manual_seed(seed)
    module = MultiHeadLatentAttention(dim=24, num_heads=3, **(SIZES | changes)).eval()
    # a norm weight of one would hide a norm that is missing or in the wrong place
    torch.nn.init.uniform_(module.kv_a_layernorm.weight, 0.3, 2.0)
    if module.q_lora_rank is not None:
        torch.nn.init.uniform_(module.q_a_layernorm.weight, 0.3, 2.0)
    return module


def hidden(tokens: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("q_lora_rank", [None, 9])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_takes_the_weights_of_deepseek_v3_and_gives_its_numbers(q_lora_rank, interleave, bias):
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=q_lora_rank,
        attention_bias=bias,
        rope_interleave=interleave,
        **SIZES,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    theirs = DeepseekV3Attention(config, layer_idx=0).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.uniform_(parameter, *((0.3, 2.0) if "norm" in name else (-0.3, 0.3)))
    ours = make(q_lora_rank=q_lora_rank, rope_interleave=interleave, bias=bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, tables = hidden(13), rope_tables(torch.arange(13), 6)
    forbidden = torch.full((13, 13), -torch.inf).triu(1)[None, None]
    batched: tuple = tuple(table[None] for table in tables)
    with torch.no_grad():
        expected, weights = theirs(x, batched, forbidden)[:2]
        for form in ("naive", "absorbed"):
            result = ours(x, form=form, output_attentions=True, return_dict=True)
            torch.testing.assert_close(result.output, expected, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(result.attentions, weights, atol=1e-6, rtol=0)
        given = ours(x, position_embeddings=tables)[0]
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[17, 1, 1, 1, 3], [1] * 23, [23], [2, 21]], ids=str)
@pytest.mark.parametrize("form", ["auto", "naive", "absorbed"])
def test_prefill_then_decode_equals_the_full_pass(chunks, form):
    module, x = make(form=form), hidden(23)
    with torch.no_grad():
        whole = module(x, form="naive")[0]
        cache, parts = None, []
        for part in x.split(chunks, dim=1):
            output, _, cache = module(part, past_key_value=cache, use_cache=True)
            parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-6, rtol=1e-5)


def test_a_prompt_runs_naive_and_a_decoding_step_absorbed():
    module, x = make(), hidden(9)
    with torch.no_grad():
        first = module(x[:, :8], use_cache=True, return_dict=True)
        calls = []
        with observing(calls.append):
            step = module(x[:, 8:], past_key_value=first.cache, use_cache=True, return_dict=True)
    assert (first.aux["form"], step.aux["form"]) == ("naive", "absorbed")
    # one key head of latent and rotary key: nothing was expanded, and the scale is still that of a head's own key
    assert calls[0].k.shape == (2, 1, 9, 11 + 6)
    assert calls[0].v.shape == (2, 1, 9, 11)
    assert calls[0].scale == pytest.approx((5 + 6) ** -0.5)


@pytest.mark.parametrize("kwargs", [{}, {"kv_lora_rank": 4, "qk_rope_head_dim": 2}])
def test_the_cache_takes_the_bytes_of_the_catalog_and_no_head_counts(kwargs):
    sizes = SIZES | kwargs
    for heads in (1, 4):
        module = MultiHeadLatentAttention(dim=24, num_heads=heads, **sizes)
        cache = module(hidden(13, batch=1), use_cache=True)[2]
        assert cache.nbytes() == MECHANISMS["multi_head_latent"].cache_bytes(
            heads, heads, 8, 13, 1, 4, **sizes
        )
        latent, key_rope = cache
        assert latent.shape == (1, 13, sizes["kv_lora_rank"])
        assert key_rope.shape == (1, 13, sizes["qk_rope_head_dim"])


def test_what_is_cached_is_the_latent_after_its_norm():
    module, x = make(), hidden(5)
    latent, _ = module(x, use_cache=True)[2]
    expected = module.kv_a_layernorm(module.kv_a_proj_with_mqa(x)[..., :11])
    torch.testing.assert_close(latent, expected)


def test_a_legacy_pair_continues_like_the_cache_and_stays_as_it_is():
    module, x = make(), hidden(8)
    with torch.no_grad():
        whole = module(x)[0]
        latent, key_rope = module(x[:, :6], use_cache=True)[2]
        before = latent.clone()
        output = module(x[:, 6:], past_key_value=(latent, key_rope))[0]
    torch.testing.assert_close(output, whole[:, 6:], atol=2e-6, rtol=1e-5)
    assert torch.equal(latent, before)


def test_crop_and_clone_then_continue_equal_fresh():
    module, x = make(), hidden(10)
    with torch.no_grad():
        cache = module(x, use_cache=True)[2]
        copy = cache.clone()
        copy.crop(4)
        again = module(x[:, 4:], past_key_value=copy, use_cache=True)[0]
        whole = module(x)[0]
    torch.testing.assert_close(again, whole[:, 4:], atol=2e-6, rtol=1e-5)
    assert cache.seq_len == copy.seq_len == 10


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_a_future_token_changes_no_past_output(form):
    module, x = make(form=form), hidden(12)
    before = module(x)[0]
    x[:, 7] += 3
    after = module(x)[0]
    torch.testing.assert_close(after[:, :7], before[:, :7], atol=1e-6, rtol=0)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-5


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_a_padded_batch_equals_each_sequence_alone(form):
    module, x = make(form=form), hidden(9)
    kept = torch.ones(2, 9, dtype=torch.bool)
    kept[1, 5:] = False
    x[1, 5:] = torch.nan
    with torch.no_grad():
        together = module(x, attention_mask=kept)[0]
        torch.testing.assert_close(together[0], module(x[:1])[0][0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(together[1, :5], module(x[1:, :5])[0][0], atol=2e-6, rtol=1e-5)


def test_the_two_score_parts_sum_to_the_scores_of_the_map():
    module, x = make(), hidden(7)
    with torch.no_grad():
        parts = module.score_parts(x)
        scores = (parts.nope + parts.rope).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        maps = module(x, output_attentions=True)[1]
        torch.testing.assert_close(scores.softmax(-1), maps, atol=1e-6, rtol=0)
        # the same content everywhere: only the rotary part tells positions apart
        same = module.score_parts(x[:, :1].expand(-1, 7, -1))
    assert (same.nope - same.nope[..., :1]).abs().max() < 1e-5
    assert (same.rope - same.rope[..., :1]).abs().max() > 1e-3


def test_score_parts_of_a_step_leave_the_cache_as_it_is():
    module, x = make(), hidden(7)
    with torch.no_grad():
        whole = module.score_parts(x)
        cache = module(x[:, :6], use_cache=True)[2]
        step = module.score_parts(x[:, 6:], past_key_value=cache)
    assert cache.seq_len == 6
    torch.testing.assert_close(step.rope, whole.rope[:, :, 6:], atol=1e-5, rtol=0)
    torch.testing.assert_close(step.nope, whole.nope[:, :, 6:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_gradients_are_those_of_finite_differences(form):
    generator = torch.Generator().manual_seed(0)

    def number(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    tensors = number(1, 2, 2, 3), number(1, 2, 2, 2), number(1, 3, 4), number(1, 3, 2), number(2, 5, 4)

    def run(*inputs):
        return latent_attend(LatentInputs(*inputs), form=form, implementation="eager").output

    assert torch.autograd.gradcheck(run, tensors)


def test_the_whole_module_has_the_gradients_of_finite_differences():
    module = make(q_lora_rank=3).double()
    x = hidden(3, batch=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x, implementation="eager")[0], (x,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank must be at least 1; got 0"),
        ({"d_latent": -1}, "kv_lora_rank must be at least 1; got -1"),
        ({"q_lora_rank": 0}, "q_lora_rank must be at least 1; got 0"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim must be even and at least 0; got 5"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"form": "fused"}, "form must be one of auto, naive, absorbed; got 'fused'"),
        ({"d_model": 25}, "names of the width must agree"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_another_kind_of_cache_is_refused():
    with pytest.raises(ValueError, match="must be a LatentKV"):
        make()(hidden(2), past_key_value=ContiguousKV())
    with pytest.raises(CacheError, match="latent must be"):
        LatentKV.from_tuple((torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)))
    with pytest.raises(ValueError, match="context must be None"):
        make()(hidden(2), context=hidden(3))


def test_yarn_also_multiplies_the_scores_as_in_deepseek_v3():
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
    )

    scaling = {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "original_max_position_embeddings": 64,
    }
    config = DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=9,
        max_position_embeddings=2560,
        rope_parameters={"rope_theta": 10000.0, **scaling},
        **SIZES,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    theirs = DeepseekV3Attention(config, layer_idx=0).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.uniform_(parameter, *((0.3, 2.0) if "norm" in name else (-0.3, 0.3)))
    ours = make(q_lora_rank=9, rope_scaling=scaling)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = hidden(90)
    forbidden = torch.full((90, 90), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        tables = DeepseekV3RotaryEmbedding(config)(x, torch.arange(90)[None])
        expected = theirs(x, tables, forbidden)[0]
        given = ours(x, position_embeddings=tables)[0]
        torch.testing.assert_close(given, expected, atol=2e-6, rtol=1e-5)
        # their angles are float32 products: 1e-5 of a turn at position 89
        torch.testing.assert_close(ours(x)[0], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_what_is_compressed_is_what_is_cached_and_decompresses_to_keys_and_values(form):
    module, x = make(), hidden(9)
    with torch.no_grad():
        result = module(x, use_cache=True, output_attentions=True, return_dict=True, form=form)
        latent, _ = result.cache
        torch.testing.assert_close(module.compress_kv(x), latent, atol=1e-6, rtol=0)
        key, value = module.decompress_kv(latent)
        heads = (result.attentions @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(module.o_proj(heads), result.output, atol=1e-6, rtol=1e-5)
        query = module.q_proj(x).unflatten(-1, (3, -1)).transpose(1, 2)[..., :5]
        scores = query @ key.transpose(-1, -2) * module.scale
        torch.testing.assert_close(scores, module.score_parts(x).nope, atol=1e-6, rtol=1e-5)


def test_the_ratio_of_cache_sizes_is_that_of_two_caches():
    module, x = make(), hidden(9)
    cache = module(x, use_cache=True)[2]
    whole = ContiguousKV()
    key, value = module.decompress_kv(module.compress_kv(x))
    whole.update(0, torch.cat((key, key.new_zeros(*key.shape[:3], 6)), dim=-1), value)
    assert module.get_cache_size_ratio() == pytest.approx(cache.nbytes() / whole.nbytes())


def make_v2(**changes) -> MultiHeadLatentAttentionV2:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"d_model": 24, "num_heads": 3, "d_latent": 9, "head_dim": 5} | changes
    module = MultiHeadLatentAttentionV2(**arguments).eval()
    if isinstance(module.kv_a_layernorm, torch.nn.LayerNorm):
        torch.nn.init.uniform_(module.kv_a_layernorm.weight, 0.3, 2.0)
        torch.nn.init.uniform_(module.kv_a_layernorm.bias, -1, 1)
    return module


@pytest.mark.parametrize("form", ["naive", "absorbed"])
@pytest.mark.parametrize("use_layer_norm", [True, False])
def test_without_a_rotary_key_it_is_attention_over_what_the_latent_decompresses_to(form, use_layer_norm):
    module, x = make_v2(use_layer_norm=use_layer_norm), hidden(11)
    with torch.no_grad():
        key, value = module.decompress_kv(module.compress_kv(x))
        query = module.q_proj(x).unflatten(-1, (3, 5)).transpose(1, 2)
        heads = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        want = module.o_proj(heads.transpose(1, 2).flatten(2))
        torch.testing.assert_close(module(x, form=form)[0], want, atol=1e-6, rtol=1e-5)


def test_its_cache_is_the_latent_alone_and_a_tuple_of_it_goes_on_where_it_ended():
    module, x = make_v2(), hidden(11)
    with torch.no_grad():
        want = module(x)[0]
        output, maps, cache = module(x[:, :7], use_cache=True)
        assert maps is None
        assert cache[0].shape == (2, 7, 9)
        assert cache.nbytes() == 2 * 7 * 9 * 4
        assert module.get_cache_size_ratio() == 9 / (2 * 3 * 5)
        latent = cache[0].clone()
        continued = module(x[:, 7:], past_key_value=(latent,))[0]
        torch.testing.assert_close(torch.cat((output, continued), dim=1), want, atol=1e-6, rtol=0)
        torch.testing.assert_close(module(x[:, 7:], past_key_value=cache)[0], continued, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_v2(d_latent=15), "d_latent must be below num_heads . head_dim = 15, or it compresses"),
        (
            lambda: make_v2(head_dim=None, num_heads=5),
            "d_model must be a multiple of num_heads.*got 24 and 5",
        ),
        (lambda: make_v2(d_model=None), "d_model .* must be given"),
        (lambda: make_v2(width=3), "unknown argument 'width'"),
        (lambda: make_v2()(hidden(2), past_key_value=(torch.zeros(2, 3, 4),)), "must hold a latent"),
        (
            lambda: make_v2()(hidden(2), position_embeddings=rope_tables(torch.arange(2), 4)),
            "position_embeddings must be None with qk_rope_head_dim = 0",
        ),
    ],
)
def test_what_does_not_fit_the_one_without_positions_is_refused_by_name(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_the_one_without_positions_has_the_gradients_of_finite_differences(form):
    module = make_v2().double()
    x = hidden(5, batch=1).double().requires_grad_()
    weights = list(module.parameters())
    assert torch.autograd.gradcheck(
        lambda x, *_: module(x, form=form, implementation="eager")[0], (x, *weights), fast_mode=True
    )
