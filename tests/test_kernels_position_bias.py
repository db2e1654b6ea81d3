"""Biases of position: against the models they come from, and the same in chunks as in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnlab_kernels import (
    ChunkedPrefill,
    CrossAttention,
    DifferentialAttention,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    NeighborhoodAttention,
    PagedAttention,
    SlidingWindowAttention,
    SparseAttention,
    SwitchHeadAttention,
)
from attnlab_kernels.position_bias import Alibi, BucketBias, WindowBias, alibi_slopes


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 20])
def test_slopes_are_blooms(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(heads), theirs[:, 0, 1], atol=1e-7, rtol=0)


def test_slopes_of_twelve_heads_are_the_published_ones():
    expected = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    expected += [0.70710678, 0.35355339, 0.17677670, 0.08838835]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected), atol=2e-8, rtol=0)


def test_a_causal_row_differs_from_blooms_by_a_constant_only():
    positions = torch.arange(7)
    ours = Alibi(4)(positions, positions)
    blooms = alibi_slopes(4)[:, None, None] * positions
    difference = (blooms - ours).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), 0)
    first = (blooms - ours)[..., :1]
    torch.testing.assert_close(difference, first.expand(4, 7, 7).tril(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20)])
def test_it_equals_t5_attention(decoder, buckets, distance):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        d_model=24,
        num_heads=3,
        d_kv=8,
        is_decoder=decoder,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    ours = MultiHeadAttention(24, 3, bias=False, causal=decoder, attention_scale=1.0).eval()
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    state = {
        f"{names[name[0]]}.weight": value for name, value in theirs.state_dict().items() if name[1] == "."
    }
    ours.load_state_dict(state, strict=True)
    bias = BucketBias(3, buckets, distance, bidirectional=not decoder)
    bias.relative_attention_bias.load_state_dict(theirs.relative_attention_bias.state_dict())
    x = torch.randn(2, 150, 24)
    future = torch.full((150, 150), -torch.inf).triu(1)[None, None] if decoder else None
    with torch.no_grad():
        expected, _, weights = theirs(x, mask=future)[:3]
        result = ours(x, position_bias=bias, output_attentions=True, return_dict=True)
    torch.testing.assert_close(result.output, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(result.attentions, weights, atol=1e-6, rtol=0)


def test_buckets_are_the_published_ones():
    both, before = BucketBias(1), BucketBias(1, bidirectional=False)
    assert both.buckets(torch.tensor([-128, -8, -1, 0, 1, 8, 128])).tolist() == [15, 8, 1, 0, 17, 24, 31]
    assert before.buckets(torch.tensor([-128, -20, -16, 0, 3])).tolist() == [31, 17, 16, 0, 0]


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_window_bias_is_the_neighborhoods_table(dilation):
    torch.manual_seed(0)
    theirs = NeighborhoodAttention(
        24, 3, kernel_size=5, dilation=dilation, relative_position_bias=True, dims=1, causal=True
    )
    ours = MultiHeadAttention(24, 3, dropout=0.0)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "position_table"}, strict=True)
    bias = WindowBias(3, 5, dilation)
    bias.load_state_dict({"position_table": theirs.state_dict()["position_table"]}, strict=True)
    x, steps = torch.randn(2, 13, 24), torch.arange(13)
    distance = steps[:, None] - steps
    seen = (distance >= 0) & (distance < 5 * dilation) & (distance % dilation == 0)
    with torch.no_grad():
        expected = theirs(x, return_dict=True).output
        output = ours(x, position_bias=bias, attention_mask=seen)[0]
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)


MODULES: dict[str, Any] = {
    "multi_head": lambda: MultiHeadAttention(24, 4, causal=True),
    "grouped_query": lambda: GroupedQueryAttention(24, 4, 2),
    "sliding_window": lambda: SlidingWindowAttention(24, 4, window_size=5),
    "sparse": lambda: SparseAttention(24, 4, local_window=5),
    "latent": lambda: MultiHeadLatentAttention(24, 4, 8, None, 4, 6, 6),
    "paged": lambda: PagedAttention(24, 4, block_size=4, num_blocks=32),
    "differential": lambda: DifferentialAttention(24, 4),
    "switch_head": lambda: SwitchHeadAttention(24, 4, top_k=2),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", [Alibi, BucketBias, lambda heads: WindowBias(heads, 6)], ids=str)
def test_chunks_see_the_bias_of_one_pass(name, kind):
    torch.manual_seed(0)
    module, bias = MODULES[name]().eval(), kind(4)
    x = torch.randn(2, 17, 24)
    with torch.no_grad():
        whole = module(x, position_bias=bias, use_cache=False, return_dict=True).output
        plain = module(x, use_cache=False, return_dict=True).output
        cache, parts = None, []
        for part in x.split([7, 1, 4, 1, 4], dim=1):
            step = module(part, position_bias=bias, past_key_value=cache, use_cache=True, return_dict=True)
            cache = step.cache
            parts.append(step.output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-6, rtol=0)
    assert (whole - plain).abs().max() > 1e-4


def test_a_tensor_for_all_keys_is_cut_to_those_that_a_window_kept():
    module, x = SlidingWindowAttention(24, 4, window_size=5).eval(), torch.randn(1, 12, 24)
    whole_bias = Alibi(4)(torch.arange(12), torch.arange(12))
    whole = module(x, position_bias=whole_bias)[0]
    cache = module(x[:, :11], position_bias=whole_bias[:, :11, :11], use_cache=True)[2]
    last = module(x[:, 11:], position_bias=whole_bias[:, 11:], past_key_value=cache)[0]
    torch.testing.assert_close(last, whole[:, 11:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["function", "pairs", "keys", "one row"])
def test_a_prompt_in_chunks_has_the_bias_of_the_whole(kind):
    torch.manual_seed(0)
    module, x = GroupedQueryAttention(24, 4, 2).eval(), torch.randn(2, 11, 24)
    steps, given = torch.arange(11), Alibi(4)
    whole = given(steps, steps)
    forms = {"function": given, "pairs": whole, "keys": whole[0, -1], "one row": whole[:, -1:]}
    bias: Any = forms[kind]
    with torch.no_grad():
        chunked = ChunkedPrefill(4, module)(x, position_bias=bias, use_cache=False)
        torch.testing.assert_close(chunked, module(x, position_bias=bias)[0], atol=1e-6, rtol=0)


def test_a_learned_bias_gets_its_gradient():
    bias = BucketBias(4)
    module = CrossAttention(24, num_heads=4, dropout=0.0, implementation="eager")
    module(torch.randn(1, 5, 24), torch.randn(1, 9, 24), position_bias=bias).sum().backward()
    grad = bias.relative_attention_bias.weight.grad
    assert grad is not None
    assert grad.abs().max() > 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: alibi_slopes(0), "num_heads must be at least 1; got 0"),
        (lambda: BucketBias(2, 6), "num_buckets must be a positive multiple of 4; got 6"),
        (lambda: BucketBias(2, 32, 8), "max_distance must be above 8; got 8"),
        (lambda: WindowBias(2, 0), "window_size must be at least 1; got 0"),
        (
            lambda: PagedAttention(24, 4)(torch.ones(1, 3, 24), position_bias=torch.ones(3, 3)),
            "position_bias must be a function of positions",
        ),
        (
            lambda: PagedAttention(24, 4, implementation="walk")(
                torch.ones(1, 3, 24), position_bias=Alibi(4)
            ),
            "'walk' adds no position_bias",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
