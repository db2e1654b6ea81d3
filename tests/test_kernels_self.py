"""Self-attention as a module: against independent implementations, and its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from attnlab_kernels import BaseAttention, MultiHeadSelfAttention, SelfAttention


def make(seed: int = 0, **changes) -> SelfAttention:
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"hidden_size": 24, "num_heads": 3} | changes
    return SelfAttention(**arguments).eval()


def hidden(tokens: int, batch: int = 2, width: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def test_the_constructor_and_returns_of_the_guide_work_as_written():
    module = SelfAttention(
        hidden_size=24, num_heads=8, dropout=0.0, bias=True, is_causal=False, max_seq_length=2048
    )
    x = hidden(5)
    assert module(x).shape == x.shape
    output, weights = module(x, return_attention=True)
    assert torch.equal(output, module(x))
    assert weights.shape == (2, 8, 5, 5)
    assert SelfAttention(16).num_heads == 8


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_torch(causal, bias):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True).eval()
    mine = make(bias=bias, is_causal=causal)
    with torch.no_grad():
        for part, projection in enumerate((mine.q_proj, mine.k_proj, mine.v_proj)):
            projection.weight.copy_(theirs.in_proj_weight.chunk(3)[part])
            if bias:
                projection.bias.copy_(theirs.in_proj_bias.chunk(3)[part])
    mine.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x = hidden(11)
    future = torch.ones(11, 11, dtype=torch.bool).triu(1) if causal else None
    want, weights = theirs(x, x, x, attn_mask=future, average_attn_weights=False)
    got, maps = mine(x, return_attention=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps, weights, atol=1e-6, rtol=0)


def test_causal_equals_gpt2():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    config = GPT2Config(n_embd=24, n_head=3, n_positions=32)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    theirs = GPT2Attention(config, layer_idx=0).eval()
    mine = make(is_causal=True)
    with torch.no_grad():
        theirs.c_attn.bias.normal_()
        for part, projection in enumerate((mine.q_proj, mine.k_proj, mine.v_proj)):
            projection.weight.copy_(theirs.c_attn.weight.T.chunk(3)[part])
            projection.bias.copy_(theirs.c_attn.bias.chunk(3)[part])
        mine.o_proj.weight.copy_(theirs.c_proj.weight.T)
        mine.o_proj.bias.copy_(theirs.c_proj.bias)
    torch.testing.assert_close(mine(hidden(13)), theirs(hidden(13))[0], atol=1e-6, rtol=0)


def test_bidirectional_equals_bert():
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    config = BertConfig(hidden_size=24, num_attention_heads=3)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs, mine = BertSelfAttention(config).eval(), make()
    for name in ("query", "key", "value"):
        getattr(mine, f"{name[0]}_proj").load_state_dict(getattr(theirs, name).state_dict())
    with torch.no_grad():
        mine.o_proj.weight.copy_(torch.eye(24))
        mine.o_proj.bias.zero_()
    want, weights = theirs(hidden(9))
    got, maps = mine(hidden(9), return_attention=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps, weights, atol=1e-6, rtol=0)


def test_no_table_limits_the_length():
    module = make(is_causal=True, max_seq_length=4, use_rotary=True)
    assert module(hidden(9)).shape == (2, 9, 24)
    assert not dict(module.named_buffers())


def test_a_causal_prompt_of_one_token_is_its_own_value():
    module, x = make(is_causal=True), hidden(1)
    torch.testing.assert_close(module(x), module.o_proj(module.v_proj(x)), atol=1e-6, rtol=0)


def test_permuting_the_tokens_permutes_the_output():
    module, x = make(), hidden(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order], atol=2e-6, rtol=0)


def test_causal_left_padding_makes_dead_rows_not_nan():
    module, x = make(is_causal=True), hidden(7).requires_grad_()
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, :4] = False
    result = module(x, attention_mask=keep, return_dict=True, return_attention=True)
    assert torch.isneginf(result.lse[1, :, :4]).all()
    assert not result.attentions[1, :, :4].any()
    torch.testing.assert_close(result.output[1, :4], module.o_proj.bias.expand(4, 24))
    torch.testing.assert_close(result.output[1:, 4:], module(x[1:, 4:]), atol=2e-6, rtol=0)
    result.output.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_map_times_the_values_is_the_output():
    module, x = make(is_causal=True), hidden(9)
    output, maps = module(x, return_attention=True)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 9), atol=2e-6, rtol=0)
    values = module.v_proj(x).unflatten(-1, (3, 8)).transpose(1, 2)
    rebuilt = module.o_proj((maps @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(rebuilt, output, atol=2e-6, rtol=0)


def test_gradients_are_those_of_the_formula():
    module = make(hidden_size=6, num_heads=2, is_causal=True, implementation="eager").double()
    assert torch.autograd.gradcheck(module, (hidden(5, width=6).double().requires_grad_(),))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make(hidden_size=10), r"multiple of num_heads.*10 and 3"),
        (lambda: make(max_seq_length=0), r"max_seq_length must be at least 1 token; got 0"),
        (lambda: make(is_causal=True, causal=False), r"two names of one argument; got True and False"),
        (lambda: make()(hidden(3), hidden(3)), r"context must be None in self-attention"),
        (lambda: make()(hidden(3), key_value_states=hidden(3)), r"context must be None in self-attention"),
        (lambda: make()(hidden(3), use_cache=True), r"use_cache needs return_dict=True"),
        (lambda: make()(hidden(3, width=20)), r"\[batch, tokens, 24\]; got \[2, 3, 20\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_other_names_of_self_attention_compute_the_same():
    module, x = MultiHeadSelfAttention(24, 4).eval(), torch.randn(2, 9, 24)
    plain = BaseAttention(24, 4).eval()
    same = SelfAttention(24, 4).eval()
    same.load_state_dict(module.state_dict())
    assert module.dropout == plain.dropout == 0.1
    assert torch.equal(module(x), same(x))
    assert not any(name.endswith("bias") for name in plain.state_dict())
    assert plain(x, return_dict=True).aux["implementation"] == "eager"
    fused = BaseAttention(24, 4, use_flash_attention=True).eval()
    assert fused(x, return_dict=True).aux["implementation"] != "eager"
    assert BaseAttention(24, 4, attention_scale=0.5).scale == 0.5
    with pytest.raises(
        ValueError, match="use_flash_attention=False means eager; got implementation 'sdpa_flash'"
    ):
        BaseAttention(24, 4, implementation="sdpa_flash")
