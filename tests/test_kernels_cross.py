"""Cross-attention as a module: against independent implementations, and its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from attnlab_kernels import CrossAttention, CrossAttentionLayer
from attnlab_kernels.caches import ContiguousKV
from attnlab_kernels.catalog import MECHANISMS
from attnlab_kernels.cross_cache import CrossKV
from attnlab_kernels.masks import Causal, Padding


def make(seed: int = 0, **changes) -> CrossAttention:
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"query_dim": 24, "key_dim": 20, "num_heads": 3} | changes
    return CrossAttention(**arguments).eval()


def hidden(tokens: int, batch: int = 2, width: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def contexts(tokens: int, batch: int = 2) -> torch.Tensor:
    return hidden(tokens, batch, 20, seed=2)


@pytest.mark.parametrize("name", ["key_dim", "kv_dim", "context_dim"])
def test_the_constructor_and_returns_of_the_guide_work_as_written(name):
    named: dict[str, Any] = {name: 20}
    attn = CrossAttention(
        query_dim=24, num_heads=8, dropout=0.1, use_flash_attention=True, max_seq_len=2048, **named
    ).eval()
    x, context = hidden(5), contexts(7)
    assert attn(x, context).shape == (2, 5, 24)
    output, weights = attn(x, context, None, True)
    assert torch.equal(output, attn(x, context))
    assert weights.shape == (2, 8, 5, 7)
    assert CrossAttention(24).context_dim == 24


@pytest.mark.parametrize("masked", [True, False])
def test_it_equals_torch_with_widths_of_their_own(masked):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, kdim=20, vdim=20, batch_first=True).eval()
    mine = make()
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        for part, name in enumerate("qkv"):
            projection = getattr(mine, f"{name}_proj")
            projection.weight.copy_(getattr(theirs, f"{name}_proj_weight"))
            projection.bias.copy_(theirs.in_proj_bias.chunk(3)[part])
    mine.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x, context = hidden(5), contexts(11)
    keep = torch.ones(2, 11, dtype=torch.bool)
    if masked:
        keep[1, [0, 4, 9, 10]] = False
    want, weights = theirs(x, context, context, key_padding_mask=~keep, average_attn_weights=False)
    got, maps = mine(x, context, attention_mask=keep, return_attention=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps, weights, atol=1e-6, rtol=0)


def test_it_equals_bart():
    from transformers import BartConfig
    from transformers.models.bart.modeling_bart import BartAttention

    config = BartConfig(d_model=24, encoder_attention_heads=3, decoder_attention_heads=3)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = BartAttention(24, 3, config=config, layer_idx=0).eval()
    mine = make(key_dim=24)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(mine, name).load_state_dict(getattr(theirs, name).state_dict())
    mine.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x, context = hidden(5), hidden(9, seed=4)
    want, weights = theirs(x, key_value_states=context)
    got, maps = mine(x, context, return_attention=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps, weights, atol=1e-6, rtol=0)


def test_the_context_is_projected_once_and_the_cache_never_grows():
    module, x, context = make(), hidden(6), contexts(7)
    whole, cache, projections = module(x, context), CrossKV(), []
    module.k_proj.register_forward_hook(lambda *_: projections.append(1))
    with torch.no_grad():
        first = module(x[:, :3], context, past_key_value=cache, use_cache=True)
        rest = [
            module(x[:, i : i + 1], context if i % 2 else None, past_key_value=cache, use_cache=True)
            for i in range(3, 6)
        ]
    torch.testing.assert_close(torch.cat([first, *rest], dim=1), whole, atol=2e-6, rtol=0)
    assert len(projections) == 1
    assert cache.seq_len == 7
    shape = {"heads": 3, "kv_heads": 3, "head_dim": 8, "layers": 1, "bytes_per_element": 4}
    assert cache.nbytes() == 2 * MECHANISMS["cross"].cache_bytes(tokens=7, **shape)


def test_a_pair_of_keys_and_values_is_a_cache():
    module, x, context = make(), hidden(5), contexts(7)
    filled = module(x, context, use_cache=True, return_dict=True).cache
    torch.testing.assert_close(module(x, past_key_value=tuple(filled)), module(x, context))


def test_the_cache_follows_a_reordered_batch():
    module, x, context = make(), hidden(5), contexts(7)
    cache = module(x, context, use_cache=True, return_dict=True).cache
    other = cache.clone()
    other.reorder(torch.tensor([1, 1]))
    got = module(x, past_key_value=other)
    torch.testing.assert_close(got, module(x, context[[1, 1]]), atol=2e-6, rtol=0)
    torch.testing.assert_close(module(x, past_key_value=cache), module(x, context), atol=2e-6, rtol=0)


def test_every_query_sees_the_whole_context():
    module, x, context = make(), hidden(9), contexts(4)
    _, maps = module(x, context, return_attention=True)
    assert maps.min() > 0
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 9), atol=2e-6, rtol=0)


def test_queries_do_not_see_each_other():
    module, x, context = make(), hidden(9), contexts(4)
    before = module(x, context)
    x[:, 3] += 3
    change = (module(x, context) - before).abs().amax(dim=(0, 2)) > 1e-6
    assert change.nonzero().flatten().tolist() == [3]


def test_the_map_times_the_values_is_the_output():
    module, x, context = make(head_dim=5), hidden(9), contexts(4)
    output, maps = module(x, context, return_attention=True)
    values = module.v_proj(context).unflatten(-1, (3, 5)).transpose(1, 2)
    rebuilt = module.o_proj((maps @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(rebuilt, output, atol=2e-6, rtol=0)


def test_a_context_without_tokens_gives_zeros():
    module, x = make(bias=False), hidden(5).requires_grad_()
    nothing = contexts(7)[:, :0]
    nobody = torch.ones(2, 0, dtype=torch.bool)
    result = module(x, nothing, nobody, return_attention=True, return_dict=True, use_cache=True)
    assert not result.output.any()
    assert result.attentions.shape == (2, 3, 5, 0)
    assert torch.isneginf(result.lse).all()
    assert result.cache.nbytes() == 0
    assert not module(x, past_key_value=result.cache).any()


@pytest.mark.parametrize("kind", ["bool", "integer", "range"])
def test_a_padded_context_equals_each_context_alone(kind):
    module, x, context = make(), hidden(5, batch=3), contexts(7, batch=3)
    lengths = [7, 3, 0]
    keep = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    mask = {"bool": keep, "integer": keep.long(), "range": Padding(tuple((0, n) for n in lengths))}[kind]
    context = context.masked_fill(~keep[..., None], torch.nan)
    together = module(x, context, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = module(x[row : row + 1], context[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, atol=2e-6, rtol=0)


def test_without_flash_attention_the_reference_runs():
    module = make(use_flash_attention=False)
    result = module(hidden(5), contexts(7), return_dict=True)
    assert result.aux["implementation"] == "eager"
    torch.testing.assert_close(result.output, make()(hidden(5), contexts(7)), atol=2e-6, rtol=0)


def test_gradients_are_those_of_the_formula():
    module = make(query_dim=6, key_dim=5, num_heads=2, use_flash_attention=False).double()
    x, context = hidden(4, width=6).double(), hidden(3, width=5).double()
    assert torch.autograd.gradcheck(module, (x.requires_grad_(), context.requires_grad_()))


def test_a_cross_cache_is_filled_once_and_never_cut():
    cache = CrossKV()
    cache.update(1, torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="layer 1 of a cross-attention cache is filled once; it holds 3"):
        cache.update(1, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    with pytest.raises(ValueError, match=r"one that holds a context \(1\); got 0"):
        cache.view(0)
    with pytest.raises(ValueError, match="cannot be cut; got length 2"):
        cache.crop(2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make(context_dim=21), r"context's width must agree; got key_dim=20, context_dim=21"),
        (lambda: make(key_dim=0), r"key_dim must be at least 1; got 0"),
        (lambda: make(causal=True), r"causal must be False in cross-attention"),
        (lambda: make(use_rotary=True), r"rotary positions need one axis"),
        (lambda: make(max_seq_len=0), r"max_seq_len must be at least 1 token; got 0"),
        (lambda: make(use_flash_attention=False, implementation="flex"), r"means eager; got .*'flex'"),
        (lambda: make()(hidden(3), contexts(3), causal=True), r"causal must be False"),
        (lambda: make()(hidden(3), contexts(3), attention_mask=Causal()), r"one axis; got causal"),
        (lambda: make()(hidden(3)), r"context must be given, or be in the cross-attention cache"),
        (lambda: make()(hidden(3), hidden(3)), r"context must be \[batch, tokens, 20\]; got \[2, 3, 24\]"),
        (lambda: make()(hidden(3)[0], contexts(3)), r"hidden_states must be \[batch, tokens, 24\]"),
        (lambda: make()(hidden(3), contexts(3, batch=1)), r"batch of hidden_states, 2; got 1 \(expand"),
        (lambda: make()(hidden(3), contexts(3), use_cache=True), r"use_cache needs return_dict=True"),
        (
            lambda: make()(hidden(3), contexts(3), past_key_value=ContiguousKV()),
            r"must be a CrossKV or .*got ContiguousKV",
        ),
        (
            lambda: make()(
                hidden(3),
                contexts(4),
                past_key_value=(torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 8)),
            ),
            r"context must be the one in past_key_value, \[2, 7, ..\]; got \[2, 4, 20\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_layer_adds_what_it_gathers_to_its_input():
    torch.manual_seed(0)
    layer = CrossAttentionLayer({"hidden_size": 24, "num_heads": 4, "key_dim": 12}).eval()
    torch.nn.init.uniform_(layer.norm.weight, 0.3, 2.0)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 3, 12)
    with torch.no_grad():
        want = x + layer.attention(layer.norm(x), context)
        assert torch.equal(layer(x, context), want)
        assert torch.equal(layer(x, context, return_dict=True).output, want)
        output, maps = layer(x, context, return_attention=True)
        assert torch.equal(output, want)
        assert maps.shape == (2, 4, 5, 3)
        hidden = torch.tensor([[True, True, False]]).expand(2, -1)
        torch.testing.assert_close(layer(x, context, hidden), layer(x, context[:, :2]), atol=1e-6, rtol=0)


def test_a_layer_knows_the_arguments_of_cross_attention_and_no_others():
    assert CrossAttentionLayer().attention.dim == 256
    assert CrossAttentionLayer({"d_model": 16}, num_heads=2).attention.num_heads == 2
    with pytest.raises(ValueError, match="num_heads must be given once"):
        CrossAttentionLayer({"num_heads": 2}, num_heads=2)
    with pytest.raises(TypeError, match="unknown argument 'attention_dropout'"):
        CrossAttentionLayer({"attention_dropout": 0.1})
