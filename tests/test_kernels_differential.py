"""Differential attention: the formula, transformers' DiffLlama, and the laws of a signed map."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from attnlab_kernels import MECHANISMS, DifferentialAttention
from attnlab_kernels.masks import Causal, Full, Padding
from attnlab_kernels.mechanisms.differential_attention import scheduled_lambda
from attnlab_kernels.operations.differential.reference import Pair, compose, run


def make(seed: int = 0, **changes) -> DifferentialAttention:
    torch.manual_seed(seed)
    return DifferentialAttention(**({"dim": 24, "num_heads": 3, "use_rotary": True} | changes)).eval()


def hidden(tokens: int, batch: int = 2, width: int = 24) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["v1", "v2"])
def variant(request) -> str:
    return request.param


@pytest.mark.parametrize(("layer", "kv_heads"), [(0, 4), (3, 2)])
def test_halves_load_and_equal_transformers_diffllama(layer, kv_heads):
    from transformers import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

    config = DiffLlamaConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=kv_heads, num_hidden_layers=4
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = DiffLlamaAttention(config, layer_idx=layer).eval()
    mine = DifferentialAttention(
        dim=48,
        num_heads=2,
        num_kv_heads=kv_heads // 2,
        lambda_init="schedule",
        layer_idx=layer,
        layout="halves",
        norm_affine=False,
        norm_eps=config.rms_norm_eps,
    ).eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    x = hidden(11, width=48)
    tables = DiffLlamaRotaryEmbedding(config)(x, torch.arange(11)[None])
    future = torch.zeros(1, 1, 11, 11).masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
    want, _ = theirs(x, position_embeddings=tables, attention_mask=future)
    got, _, _ = mine(x, position_embeddings=tables)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    mine.use_rotary = True
    torch.testing.assert_close(mine(x)[0], want, atol=1e-6, rtol=0)


def test_the_schedule_of_the_paper():
    assert [round(scheduled_lambda(layer), 4) for layer in range(4)] == [0.2, 0.3555, 0.4707, 0.5561]
    assert make(lambda_init="schedule", layer_idx=2).lambda_init == scheduled_lambda(2)


def test_the_two_layouts_are_one_permutation_of_rows():
    paper, halves = make(), make(layout="halves", seed=1)
    halves.load_state_dict(paper.state_dict())
    rows = torch.arange(24).unflatten(0, (3, 2, 4)).transpose(0, 1).flatten()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(halves, name).weight.copy_(getattr(paper, name).weight[rows])
    torch.testing.assert_close(halves(hidden(7))[0], paper(hidden(7))[0])


def test_v1_is_the_formula_written_out():
    module, x = make(use_rotary=False, causal=False).double(), hidden(7, batch=1).double()
    weight = module.lambda_weight(x)
    q, k, v = (projection(x[0]) for projection in (module.q_proj, module.k_proj, module.v_proj))
    heads = []
    for head in range(3):
        at = [slice(8 * head + 4 * part, 8 * head + 4 * part + 4) for part in (0, 1)]
        first, second = (torch.softmax(q[:, cut] @ k[:, cut].T / 2, dim=-1) for cut in at)
        mixed = (first - weight * second) @ v[:, 8 * head : 8 * head + 8]
        heads.append(mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 - 0.8))
    want = module.o_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(module(x)[0][0], want)


def test_v2_is_two_softmax_heads_of_one_group_subtracted():
    module, x = make(variant="v2", num_heads=4, num_kv_heads=2, use_rotary=False), hidden(9)
    q, k, v = (
        projection(x).unflatten(-1, (-1, 6)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    both = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    weight = torch.sigmoid(module.lambda_proj(x)).transpose(1, 2)[..., None]
    want = module.o_proj((both[:, 0::2] - weight * both[:, 1::2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x)[0], want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("mask", [Full(), Causal(), Padding(((0, 9), (3, 7))), Causal() & Padding(((4, 9),))])
def test_two_calls_equal_the_signed_map(mask):
    generator = torch.Generator().manual_seed(0)
    query, key = (
        Pair(*(torch.randn(2, heads, count, 5, generator=generator) for _ in range(2)))
        for heads, count in ((4, 6), (2, 9))
    )
    value = torch.randn(2, 2, 9, 10, generator=generator)
    for weight in (torch.tensor(0.3), torch.rand(2, 4, 6, generator=generator)):
        want, signed = run(query, key, value, weight, mask=mask)
        got = compose(query, key, value, weight, mask=mask)
        torch.testing.assert_close(got.output, want, atol=2e-6, rtol=0)
        alive = torch.isfinite(got.lse.first)
        sums = torch.where(alive, 1 - weight.expand(2, 4, 6), 0)
        torch.testing.assert_close(signed.sum(-1), sums, atol=2e-6, rtol=0)


def test_the_map_times_the_values_is_the_output_before_the_norm(variant):
    module, x = make(variant=variant), hidden(9)
    result = module(x, output_attentions=True, return_dict=True)
    values = module.v_proj(x).unflatten(-1, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(result.attentions @ values, result.aux["heads"], atol=2e-6, rtol=0)
    for head in range(3):
        signed = module.effective_map(x, head=head, batch=1)
        assert signed.shape == (9, 9)
        tile = signed.tile(slice(0, 9), slice(0, 9))
        np.testing.assert_allclose(tile @ values[1, head].detach().numpy(), numbers(result, head), atol=2e-6)
        np.testing.assert_allclose(tile[2:5, 1:8], signed.tile(slice(2, 5), slice(1, 8)), atol=1e-7)
        weight = result.aux["lambda"]
        want = 1 - (weight if weight.dim() == 0 else weight[1, head]).expand(9).numpy()
        np.testing.assert_allclose(signed.row_sums(), want, atol=2e-6)
        assert tile.min() < 0


def cells(tile: np.ndarray, height: int, width: int) -> list[list[np.ndarray]]:
    edges = [
        [side * part // count for part in range(count + 1)]
        for side, count in zip(tile.shape, (height, width), strict=True)
    ]
    return [[tile[a:b, c:d] for c, d in pairwise(edges[1])] for a, b in pairwise(edges[0])]


@pytest.mark.parametrize(("height", "width"), [(4, 3), (11, 5), (20, 20), (1, 1)])
def test_a_pixel_is_the_largest_signed_weight_or_the_mean_under_it(height, width, monkeypatch):
    monkeypatch.setattr("attnlab_kernels.tile_pooling.BLOCK_CELLS", 20)
    signed = make(causal=False).effective_map(hidden(13), head=1)
    rows, cols = slice(1, 12), slice(0, 13)
    tile = signed.tile(rows, cols)
    pixels = cells(tile, min(height, 11), min(width, 13))
    largest = [[part.flat[np.abs(part).argmax()] for part in line] for line in pixels]
    np.testing.assert_allclose(signed.pool(rows, cols, height, width), largest, atol=1e-7)
    means = [[part.mean() for part in line] for line in pixels]
    np.testing.assert_allclose(signed.pool(rows, cols, height, width, "mean"), means, atol=1e-7)


def numbers(result, head: int) -> np.ndarray:
    return result.aux["heads"][1, head].detach().numpy()


def test_grouped_keys_have_the_map_of_their_query_head():
    module, x = make(num_heads=4, num_kv_heads=2, dim=32), hidden(7, width=32)
    result = module(x, output_attentions=True, return_dict=True)
    for head in range(4):
        tile = module.effective_map(x, head=head).tile(slice(None), slice(None))
        np.testing.assert_allclose(tile, result.attentions[0, head].numpy(), atol=2e-6)


def test_the_guides_call_works_and_the_cache_has_the_catalogs_bytes():
    record = MECHANISMS["differential"]
    names: dict[str, Any] = {}
    exec(record.snippet, names)
    assert names["output"].shape == (1, 64, 512)
    _, _, cache = names["attn"](hidden(3, width=512), use_cache=True)
    shape = {"heads": 4, "kv_heads": 4, "head_dim": 64, "tokens": 3, "layers": 1, "bytes_per_element": 4}
    assert cache.nbytes() == 2 * record.cache_bytes(**shape)


def test_lambda_starts_near_its_initial_value_and_learns():
    module, x = make(lambda_init=0.4), hidden(5)
    assert 0 < (module.lambda_weight(x) - 0.4).abs() < 0.2
    module(x)[0].square().sum().backward()
    gradient = module.lambda_q1.grad
    assert gradient is not None
    assert gradient.any()
    fixed = make(lambda_init=0.4, lambda_learnable=False)
    assert fixed.lambda_weight(x) == torch.tensor(0.4)
    assert not [name for name, _ in fixed.named_parameters() if "lambda" in name]


def test_lambda_is_float32_also_in_half_types(variant):
    module, x = make(variant=variant), hidden(9)
    want = module(x)[0]
    half = module.to(torch.bfloat16)(x.bfloat16(), return_dict=True)
    assert half.output.dtype == torch.bfloat16
    assert half.aux["lambda"].dtype == torch.float32
    assert (half.output.float() - want).abs().max() < 0.03


def test_dead_rows_are_zero_with_finite_gradients(variant):
    module, x = make(variant=variant), hidden(7).requires_grad_()
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, :4] = False
    result = module(x, attention_mask=keep, output_attentions=True, return_dict=True)
    assert not result.aux["heads"][1, :, :4].any()
    assert not result.attentions[1, :, :4].any()
    assert all(torch.isneginf(lse[1, :, :4]).all() for lse in result.aux["lse"])
    result.output.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_context_is_attended_to_without_a_causal_mask():
    module, x, context = make(use_rotary=False), hidden(4), hidden(9)
    result = module(x, key_value_states=context, output_attentions=True, return_dict=True)
    assert result.attentions.shape == (2, 3, 4, 9)
    assert (result.attentions != 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "dropout must be 0"),
        ({"dim": 10}, "multiple of 6 = 2 \\* num_heads"),
        ({"lambda_init": 1.0}, "lambda_init must be"),
        ({"lambda_init": "linear"}, "lambda_init must be 'schedule'"),
        ({"variant": "v3"}, "variant must be one of v1, v2"),
        ({"layout": "hf"}, "layout must be one of paper, halves"),
        ({"num_kv_heads": 2}, "num_kv_heads must divide"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
