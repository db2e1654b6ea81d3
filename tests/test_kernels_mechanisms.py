"""The four modules: against independent implementations, and the laws that hold for each of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnlab_kernels import FlashAttention, GroupedQueryAttention, MultiHeadAttention, SlidingWindowAttention
from attnlab_kernels.caches import ContiguousKV, RollingKV
from attnlab_kernels.masks import Padding, Window
from attnlab_kernels.mechanisms.base import SoftmaxModule
from attnlab_kernels.mechanisms.build import build_mechanism
from attnlab_kernels.operations.softmax.api import Unsupported

PARAMETERS = {
    "multi_head": {},
    "grouped_query": {"num_kv_heads": 2},
    "sliding_window": {"num_kv_heads": 4, "window_size": 7},
    "flash": {},
}


@pytest.fixture(params=PARAMETERS)
def mechanism(request) -> str:
    return request.param


def make(mechanism: str, seed: int = 0, **changes) -> SoftmaxModule:
    torch.manual_seed(seed)
    arguments = {"causal": True, "use_rotary": True} | PARAMETERS[mechanism] | changes
    module = build_mechanism(mechanism, dim=64, num_heads=8, **arguments).eval()
    assert isinstance(module, SoftmaxModule)
    return module


def hidden(tokens: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunks", [[21, 1, 1, 1, 9], [1] * 33, [33], [2, 31]], ids=str)
def test_prefill_then_decode_equals_the_full_pass(mechanism, chunks):
    module, x = make(mechanism), hidden(33)
    with torch.no_grad():
        whole = module(x, return_dict=True).output
        cache, parts, start = None, [], 0
        for count in chunks:
            step = module(x[:, start : start + count], past_key_value=cache, use_cache=True, return_dict=True)
            cache, start = step.cache, start + count
            parts.append(step.output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-6, rtol=0)


def test_every_token_that_may_be_seen_has_a_say(mechanism):
    module = make(mechanism, causal=False)
    x = hidden(12)
    before = module(x, return_dict=True).output
    x[:, 11] += 3
    change = (module(x, return_dict=True).output - before).abs().amax(dim=(0, 2))
    reach = 7 if mechanism == "sliding_window" else 12
    assert (change[12 - reach :] > 1e-4).all()
    assert (change[: 12 - reach] < 1e-6).all()


def test_the_map_times_the_values_is_the_output_and_rows_sum_to_one(mechanism):
    module, x = make(mechanism), hidden(30)
    result = module(x, output_attentions=True, return_dict=True)
    maps = result.attentions
    assert maps.shape == (2, 8, 30, 30)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 8, 30), atol=5e-6, rtol=0)
    values = module.v_proj(x).unflatten(-1, (-1, 8)).transpose(1, 2)
    values = values.repeat_interleave(8 // values.shape[1], dim=1)
    rebuilt = module.o_proj((maps @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(rebuilt, result.output, atol=5e-6, rtol=0)
    if mechanism == "sliding_window":
        assert (maps > 0).sum(-1).amax() == 7


def test_permuting_the_heads_weights_permutes_the_maps(mechanism):
    module, x = make(mechanism), hidden(15)
    maps = module(x, output_attentions=True, return_dict=True).attentions
    groups = module.num_kv_heads
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for projection, heads in ((module.q_proj, 8), (module.k_proj, groups)):
            for parameter in projection.parameters():
                blocks = parameter.data.unflatten(0, (groups, heads // groups * 8))
                parameter.data = blocks[order].flatten(0, 1)
    permuted = module(x, output_attentions=True, return_dict=True).attentions
    torch.testing.assert_close(permuted, maps.unflatten(1, (groups, -1))[:, order].flatten(1, 2))


def test_left_padding_makes_dead_rows_not_nan(mechanism):
    module, x = make(mechanism), hidden(9)
    x.requires_grad_()
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, :6] = False
    result = module(x, attention_mask=keep, return_dict=True, output_attentions=True)
    assert result.output.isfinite().all()
    assert torch.isneginf(result.lse[1, :, :6]).all()
    assert not result.attentions[1, :, :6].any()
    result.output.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_lowest_finite_number_forbids_as_minus_infinity_does():
    module, x = make("multi_head"), hidden(9)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, :6] = False
    lowest = torch.zeros(2, 1, 1, 9).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    result = module(x, attention_mask=lowest, return_dict=True)
    assert torch.isneginf(result.lse[1, :, :6]).all()
    torch.testing.assert_close(result.output, module(x, attention_mask=keep, return_dict=True).output)


def test_all_forms_of_one_mask_mean_the_same(mechanism):
    module, x = make(mechanism), hidden(10)
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[1, 7:] = False
    additive = torch.zeros(2, 1, 1, 10).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    want = module(x, attention_mask=Padding(((0, 10), (0, 7))), return_dict=True).output
    four = keep[:, None, None].expand(2, 1, 10, 10)
    forms = [keep, keep.long(), four, additive.masked_fill(additive < 0, -torch.inf), additive]
    for form in forms:
        got = module(x, attention_mask=form, return_dict=True).output
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


def test_holes_in_a_key_mask_are_kept():
    module, x = make("multi_head", use_rotary=False, causal=False), hidden(6)
    keep = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    result = module(x, attention_mask=keep, return_dict=True).output
    alone = module(x[:1], context=x[:1, [0, 2, 3, 5]], return_dict=True).output
    torch.testing.assert_close(result[:1], alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_multi_head_equals_torch(bias, masked):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 8, bias=bias, batch_first=True).eval()
    mine = MultiHeadAttention(hidden_size=64, num_heads=8, bias=bias).eval()
    copy_packed(theirs, mine)
    x = hidden(19)
    keep = torch.ones(2, 19, dtype=torch.bool)
    if masked:
        keep[1, 11:] = False
    want, weights = theirs(x, x, x, key_padding_mask=~keep, average_attn_weights=False)
    got = mine(x, attention_mask=keep, output_attentions=True, return_dict=True)
    torch.testing.assert_close(got.output, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.attentions, weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_add_zero_attn_equals_torch(causal):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 8, add_zero_attn=True, batch_first=True).eval()
    mine = MultiHeadAttention(64, 8, add_zero_attn=True, causal=causal).eval()
    copy_packed(theirs, mine)
    x = hidden(9)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None
    want, weights = theirs(x, x, x, attn_mask=future, average_attn_weights=False)
    got = mine(x, output_attentions=True, return_dict=True)
    torch.testing.assert_close(got.output, want, atol=1e-6, rtol=0)
    # theirs is the last column, ours the first
    torch.testing.assert_close(got.attentions.roll(-1, dims=-1), weights, atol=1e-6, rtol=0)


def copy_packed(theirs: nn.MultiheadAttention, mine: MultiHeadAttention) -> None:
    with torch.no_grad():
        for part, projection in enumerate((mine.q_proj, mine.k_proj, mine.v_proj)):
            projection.weight.copy_(theirs.in_proj_weight.chunk(3)[part])
            if theirs.in_proj_bias is not None:
                projection.bias.copy_(theirs.in_proj_bias.chunk(3)[part])
    mine.o_proj.load_state_dict(theirs.out_proj.state_dict())


def test_context_equals_torchs_cross_attention():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 8, batch_first=True).eval()
    mine = MultiHeadAttention(64, 8, causal=True).eval()
    copy_packed(theirs, mine)
    x, context = hidden(7), hidden(23, seed=2)
    want, _ = theirs(x, context, context)
    got, _ = mine(x, key_value_states=context)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_grouped_query_loads_and_equals_llama(kv_heads):
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=kv_heads)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = LlamaAttention(config, layer_idx=0).eval()
    mine = GroupedQueryAttention(dim=64, num_heads=8, num_kv_heads=kv_heads).eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    x = hidden(17)
    positions = torch.arange(17)[None]
    tables = LlamaRotaryEmbedding(config)(x, positions)
    mask = create_causal_mask(config, x, None, None, position_ids=positions)
    want, weights = theirs(x, position_embeddings=tables, attention_mask=mask)
    got, maps, _ = mine(x, position_embeddings=tables, output_attentions=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps, weights, atol=1e-6, rtol=0)
    mine.use_rotary = True
    own, _, _ = mine(x)
    torch.testing.assert_close(own, want, atol=1e-6, rtol=0)


def test_sliding_window_loads_and_equals_mistral():
    from transformers import MistralConfig
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

    config = MistralConfig(
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = MistralAttention(config, layer_idx=0).eval()
    mine = SlidingWindowAttention(dim=64, num_heads=8, window_size=6, num_kv_heads=2).eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    x = hidden(25)
    positions = torch.arange(25)[None]
    tables = MistralRotaryEmbedding(config)(x, positions)
    mask = create_sliding_window_causal_mask(config, x, None, None, position_ids=positions)
    want, weights = theirs(x, position_embeddings=tables, attention_mask=mask)
    got, maps, _ = mine(x, position_embeddings=tables, output_attentions=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps, weights, atol=1e-6, rtol=0)


def test_constructors_and_returns_of_the_guide_work_as_written():
    x = torch.randn(1, 5, 96)
    output, cache = MultiHeadAttention(hidden_size=96, num_heads=12, dropout=0.1).eval()(x)
    assert cache is None
    output, cache = MultiHeadAttention(96, 12).eval()(x, use_cache=True)
    key, value = cache
    assert key.shape == value.shape == (1, 12, 5, 8)
    output, maps, cache = GroupedQueryAttention(dim=96, num_heads=12, num_kv_heads=3)(x, use_cache=True)
    assert maps is None
    assert cache[0].shape == (1, 3, 5, 8)
    output = FlashAttention(hidden_size=96, num_heads=12, block_size=1024, causal=True)(x)
    assert output.shape == x.shape
    output, maps, cache = SlidingWindowAttention(96, 12, window_size=3)(x, use_cache=True)
    assert cache.nbytes() == 2 * 12 * 3 * 8 * 4


@pytest.mark.parametrize("name", ["hidden_size", "dim", "d_model", "embed_dim", "query_dim"])
@pytest.mark.parametrize(
    "kind", [MultiHeadAttention, GroupedQueryAttention, SlidingWindowAttention, FlashAttention]
)
def test_the_width_answers_to_all_its_names(kind, name):
    assert kind(**{name: 32}, num_heads=4).dim == 32
    with pytest.raises(ValueError, match="names of the width must agree"):
        kind(32, num_heads=4, **{"d_model" if name != "d_model" else "embed_dim": 48})
    with pytest.raises(TypeError, match="unknown argument 'width'"):
        kind(32, num_heads=4, width=32)


def test_flash_never_forms_the_scores():
    module, x = make("flash"), hidden(9)
    result = module(x, return_dict=True)
    assert result.aux["implementation"] == "sdpa_flash"
    for name in ("eager", "sdpa_math"):
        with pytest.raises(Unsupported, match="forms the n x n scores"):
            module(x, implementation=name)
    with pytest.raises(Unsupported, match="no fused kernel here drops"):
        make("flash", dropout=0.1).train()(x)


def test_dropout_acts_in_training_only():
    module, x = make("multi_head", dropout=0.5, use_rotary=False), hidden(40)
    quiet = module(x)[0]
    assert torch.equal(module(x)[0], quiet)
    torch.manual_seed(0)
    assert (module.train()(x)[0] - quiet).abs().max() > 1e-2


def test_a_map_too_large_for_memory_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr("attnlab_kernels.mechanisms.base.MAP_LIMIT_BYTES", 1000)
    with pytest.raises(ValueError, match="would take 25,600 bytes, more than 1,000; look at regions"):
        make("multi_head")(hidden(20), output_attentions=True)


def test_half_types_run_in_their_own_dtype(mechanism):
    module = make(mechanism).to(torch.bfloat16)
    result = module(hidden(20).bfloat16(), return_dict=True)
    assert result.output.dtype == torch.bfloat16
    exact = make(mechanism)(hidden(20), return_dict=True).output
    assert (result.output.float() - exact).abs().max() < 0.03


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: MultiHeadAttention(hidden_size=10, num_heads=3), r"multiple of num_heads.*10 and 3"),
        (lambda: MultiHeadAttention(hidden_size=12, num_heads=0), r"num_heads must be at least 1; got 0"),
        (lambda: MultiHeadAttention(num_heads=2), r"hidden_size \(or .*\) must be given"),
        (lambda: MultiHeadAttention(-4, num_heads=2), r"hidden_size must be at least 1; got -4"),
        (lambda: MultiHeadAttention(12, 3, dropout=1.0), r"dropout must be .* got 1.0"),
        (
            lambda: GroupedQueryAttention(dim=96, num_heads=12, num_kv_heads=5),
            r"num_kv_heads must divide num_heads = 12 \(1, 2, 3, 4, 6, 12\); got 5",
        ),
        (
            lambda: GroupedQueryAttention(dim=8, num_heads=2, num_kv_heads=4),
            r"num_kv_heads must divide .* got 4",
        ),
        (
            lambda: GroupedQueryAttention(dim=8, num_heads=2, head_dim=-1),
            r"head_dim must be at least 1; got -1",
        ),
        (lambda: SlidingWindowAttention(8, 2, window_size=0), r"window_size must be at least 1.*got 0"),
        (lambda: FlashAttention(8, 2, block_size=0), r"block_size must be at least 1 key; got 0"),
        (
            lambda: make("flash")(torch.ones(2, 64)),
            r"hidden_states must be \[batch, tokens, 64\]; got \[2, 64\]",
        ),
        (
            lambda: make("flash")(hidden(3), hidden(3)[:1]),
            r"context must have the batch of hidden_states, 2; got 1",
        ),
        (lambda: make("multi_head")(hidden(3), hidden(3), use_cache=True), r"use_cache with a context"),
        (lambda: make("multi_head")(hidden(3), hidden(3), key_value=hidden(3)), r"two names of one argument"),
        (
            lambda: make("multi_head")(hidden(3), attention_mask=torch.ones(3, 3)),
            r"only 0 and 1, which may mean",
        ),
        (lambda: make("multi_head")(hidden(5), attention_mask=torch.ones(4, 5).bool()), r"got \[4, 5\]"),
        (lambda: make("multi_head")(hidden(5), attention_mask=torch.ones(2, 4).bool()), r"end in 5 keys"),
        (lambda: make("multi_head")(hidden(5), implementation="eager", backend="flex"), r"must agree"),
        (
            lambda: make("multi_head")(hidden(5), past_key_value=RollingKV(4)),
            r"one of ContiguousKV, PagedS.*got Roll",
        ),
        (lambda: make("sliding_window")(hidden(5), past_key_value=RollingKV(4)), r"keep the window of 7"),
        (lambda: build_mechanism("sliding_window", dim=64, num_heads=8, window_size=0), r"at least 1; got 0"),
        (
            lambda: build_mechanism("flash", dim=64, num_heads=8, chunk=3),
            r"chunk is not a parameter of flash",
        ),
        (lambda: build_mechanism("magic", dim=64, num_heads=8), r"mechanism must be one of multi_head"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_an_unknown_argument_of_forward_is_no_silent_option():
    with pytest.raises(TypeError, match="unknown argument 'tempo' of forward"):
        make("multi_head")(hidden(3), tempo=3)


def test_a_windowed_module_continues_a_full_cache():
    module, x = make("sliding_window"), hidden(20)
    whole = module(x, return_dict=True).output
    cache = ContiguousKV()
    module(x[:, :15], past_key_value=cache)
    rest = module(x[:, 15:], past_key_value=cache, attention_mask=Window(100), return_dict=True).output
    torch.testing.assert_close(rest, whole[:, 15:], atol=2e-6, rtol=0)
