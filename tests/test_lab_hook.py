"""Our kernels inside transformers models compute what the model's own eager attention computes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    StaticCache,
    ViTConfig,
    ViTModel,
)
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_causal_mask_function

from attnlab.hook import Hook, LayerCall, cache_keyword
from attnlab.probes.maps import element_mask
from attnlab.swap import Shape, Swap, plan_swap
from attnlab.transformers_masks import describe_mask
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Full, Padding, Window
from attnlab_kernels.operations.softmax.api import Unsupported

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 40,
}
DECODER: dict[str, Any] = SMALL | {"vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0}


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**DECODER, num_key_value_heads=2))


def _mistral(window: int = 5) -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=window))


def _gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=48, n_layer=2, n_head=6, vocab_size=97, n_positions=64)
    return GPT2LMHeadModel(config)


def _bert() -> BertModel:
    return BertModel(BertConfig(**SMALL, vocab_size=97, max_position_embeddings=64))


def _albert() -> AlbertModel:
    return AlbertModel(AlbertConfig(**SMALL, vocab_size=97, embedding_size=16, max_position_embeddings=64))


def _modern_bert() -> ModernBertModel:
    config = ModernBertConfig(**SMALL, vocab_size=97, local_attention=6, layer_types=LAYERS, pad_token_id=0)
    return ModernBertModel(config)


LAYERS = ["full_attention", "sliding_attention"]

MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "gpt2": _gpt2,
    "bert": _bert,
    "albert": _albert,
    "modern_bert": _modern_bert,
}


def build(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = make().eval().requires_grad_(False)
    # the default initialisation attends almost evenly; sharper weights show mistakes
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(3)
    return model


def tokens(batch: int = 1, length: int = 13) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(5))


def padding(side: str, batch: int = 3, length: int = 13) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    for element, pad in enumerate((0, 4, 7)):
        mask[element, slice(0, pad) if side == "left" else slice(length - pad, length)] = 0
    return mask


def result(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def eager(model: Any, **inputs: Any) -> Any:
    model.set_attn_implementation("eager")
    return model(**inputs)


def through_hook(model: Any, swap: Swap, **inputs: Any) -> tuple[Tensor, list[LayerCall]]:
    hook, calls = Hook(model, swap), []
    with hook.installed():
        output = hook.forward(lambda: model(**inputs), calls.append)
    return result(output), calls


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword of the cache, which transformers renamed in 5.24."""
    return {cache_keyword(model): cache}


def rebuilt(call: LayerCall, head: int, batch: int = 0) -> Tensor:
    group = call.query.shape[1] // call.key.shape[1]
    made = SoftmaxMap(
        call.query[batch, head].numpy(),
        call.key[batch, head // group].numpy(),
        call.lse[batch, head].numpy(),
        call.scale,
        element_mask(call.mask, batch),
    )
    return torch.from_numpy(made.tile(slice(None), slice(None)))


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_the_same_with_our_kernels(name: str, side: str) -> None:
    model = build(MODELS[name])
    ids = tokens(3)
    mask = None if side == "none" else padding(side)
    own = result(eager(model, input_ids=ids, attention_mask=mask))
    ours, calls = through_hook(model, Swap(), input_ids=ids, attention_mask=mask)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert (ours - own)[real].abs().max() < 2e-5
    assert len(calls) == 2


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_maps_rebuilt_from_q_k_and_lse_are_the_models_own(name: str, side: str) -> None:
    model = build(MODELS[name])
    ids = tokens(3)
    mask = None if side == "none" else padding(side)
    attentions = eager(model, input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    _, calls = through_hook(model, Swap(), input_ids=ids, attention_mask=mask)
    for layer, call in enumerate(calls):
        for batch in range(3):
            real = torch.ones(13, dtype=torch.bool) if mask is None else mask[batch].bool()
            for head in range(6):
                ours = rebuilt(call, head, batch)
                assert (ours - attentions[layer][batch, head])[real].abs().max() < 1e-5
                assert (ours.sum(-1)[real] - 1).abs().max() < 5e-6


def test_a_zeroed_attention_would_be_noticed() -> None:
    model = build(_llama)
    own = result(eager(model, input_ids=tokens()))
    ours, _ = through_hook(model, Swap(window_size=1), input_ids=tokens())
    assert (ours - own).abs().max() > 1e-2


@pytest.mark.parametrize("window", [1, 3, 12, 13, 40])
def test_a_window_in_llama_is_mistral(window: int) -> None:
    llama, mistral = build(_llama), build(lambda: _mistral(window))
    mistral.load_state_dict(llama.state_dict())
    own = result(eager(mistral, input_ids=tokens()))
    ours, calls = through_hook(
        llama, plan_swap("sliding_window", {"window_size": window}, "auto"), input_ids=tokens()
    )
    assert (ours - own).abs().max() < 2e-5
    assert all(call.mask.band().left == window - 1 for call in calls)


def test_a_window_in_an_encoder_looks_both_ways() -> None:
    model = build(_bert)
    _, calls = through_hook(model, Swap(window_size=3), input_ids=tokens())
    assert {call.mask for call in calls} == {Window(2, 2)}


def test_pooled_heads_are_the_model_with_averaged_projections() -> None:
    model, pooled = (
        build(_llama),
        build(lambda: LlamaForCausalLM(LlamaConfig(**DECODER, num_key_value_heads=1))),
    )
    state = model.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name].unflatten(0, (2, 8)).mean(0)
    pooled.load_state_dict(state)
    own = result(eager(pooled, input_ids=tokens()))
    ours, calls = through_hook(model, Swap(num_kv_heads=1), input_ids=tokens())
    assert (ours - own).abs().max() < 2e-5
    assert {call.key.shape[1] for call in calls} == {1}


def test_heads_that_cannot_be_pooled_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"num_kv_heads: must divide the model's 2 .* got 3"):
        through_hook(build(_llama), Swap(num_kv_heads=3), input_ids=tokens())


@pytest.mark.parametrize("implementation", ["eager", "sdpa_math", "sdpa_flash"])
def test_every_implementation_gives_the_same_model(implementation: str) -> None:
    model = build(_llama)
    own = result(eager(model, input_ids=tokens()))
    ours, calls = through_hook(model, Swap(implementation=implementation), input_ids=tokens())
    assert (ours - own).abs().max() < 2e-5
    assert {call.implementation for call in calls} == {implementation}


def test_decoding_with_a_cache_is_the_last_row_of_prefill() -> None:
    model, ids = build(_llama), tokens(length=17)
    own = result(eager(model, input_ids=ids))[:, -1]
    hook, calls, cache = Hook(model, Swap()), [], DynamicCache()
    with hook.installed():
        model(input_ids=ids[:, :9], **cached(model, cache))
        model(input_ids=ids[:, 9:-1], **cached(model, cache))
        ours = hook.forward(
            lambda: model(input_ids=ids[:, -1:], **cached(model, cache)), calls.append
        ).logits[:, -1]
    assert (ours - own).abs().max() < 2e-5
    assert [(call.query.shape[2], call.key.shape[2]) for call in calls] == [(1, 17)] * 2


@pytest.mark.parametrize("make", [_llama, _mistral])
def test_a_static_cache_shows_no_empty_keys(make: Callable[[], Any]) -> None:
    model, ids = build(make), tokens(length=9)
    own = result(eager(model, input_ids=ids))
    hook, calls = Hook(model, Swap()), []
    with hook.installed():
        cache = StaticCache(model.config, max_cache_len=12)
        ours = hook.forward(lambda: model(input_ids=ids, **cached(model, cache)), calls.append).logits
    assert (ours - own).abs().max() < 2e-5
    assert {call.key.shape[2] for call in calls} <= {5, 9}


def test_a_shared_layer_is_named_by_how_often_it_ran() -> None:
    _, calls = through_hook(build(_albert), Swap(), input_ids=tokens())
    assert [call.layer for call in calls] == [0, 1]
    assert calls[1].name == f"{calls[0].name}#2"


def test_each_forward_counts_its_layers_from_zero() -> None:
    model = build(_llama)
    hook, calls = Hook(model, Swap()), []
    with hook.installed():
        for _ in range(2):
            hook.forward(lambda: model(input_ids=tokens()), calls.append)
    assert [call.layer for call in calls] == [0, 1, 0, 1]
    assert calls[0].name == "model.layers.0.self_attn"


def test_a_vision_model_without_masks_is_read() -> None:
    config = ViTConfig(**SMALL, image_size=8, patch_size=2, num_channels=1)
    model = build(lambda: ViTModel(config))
    pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    own = result(eager(model, pixel_values=pixels))
    ours, calls = through_hook(model, Swap(), pixel_values=pixels)
    assert (ours - own).abs().max() < 2e-5
    assert {call.mask for call in calls} == {Full()}


def test_cross_attention_of_an_encoder_decoder_is_read() -> None:
    config = BartConfig(
        d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=6, decoder_attention_heads=6,
        encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=97, max_position_embeddings=64,
    )  # fmt: skip
    model = build(lambda: BartModel(config))
    inputs = {"input_ids": tokens(3), "attention_mask": padding("right"), "decoder_input_ids": tokens(3, 5)}
    own = result(eager(model, **inputs))
    ours, calls = through_hook(model, Swap(), **inputs)
    assert (ours - own).abs().max() < 2e-5
    assert [call.name.split(".")[-1] for call in calls] == ["self_attn", "self_attn", "encoder_attn"]
    assert calls[2].key.shape[2] == 13


def test_the_models_own_attention_comes_back() -> None:
    model = build(_llama)
    model.set_attn_implementation("sdpa")
    installed = Hook(model, Swap()).installed()
    installed.__enter__()
    assert model.config._attn_implementation == "attnlab"
    assert not installed.__exit__(RuntimeError, RuntimeError("interrupted"), None)
    assert model.config._attn_implementation == "sdpa"


def test_what_our_kernels_would_ignore_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="head_mask: BertSelfAttention asks for it"):
        through_hook(build(_bert), Swap(), input_ids=tokens(), head_mask=torch.ones(6))


@pytest.mark.parametrize(
    "mechanism", ["linear", "paged", "ring", "chunked_prefill", "neighborhood", "sparse"]
)
def test_what_a_mechanism_cannot_add_to_its_scores_is_refused_by_name(mechanism: str) -> None:
    gemma = build(lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER, num_key_value_heads=2, head_dim=8)))
    with pytest.raises(
        Unsupported, match=f"{mechanism}: has no softcap, which model.layers.0.self_attn asks"
    ):
        through_hook(gemma, plan_swap(mechanism, {}, "auto"), input_ids=tokens())


def test_dropout_is_refused_for_it_leaves_no_map() -> None:
    model = build(_bert).train()
    with pytest.raises(Unsupported, match="dropout"):
        through_hook(model, Swap(), input_ids=tokens())


def test_a_dense_mask_is_refused_with_its_shape() -> None:
    model = build(_llama)
    dense = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril()
    with pytest.raises(Unsupported, match=r"dense bool tensor \[1, 1, 13, 13\]"):
        through_hook(model, Swap(), input_ids=tokens(), attention_mask=dense)


def test_padding_with_holes_is_refused() -> None:
    mask = torch.ones(1, 13, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(Unsupported, match="batch element 0 are not one range"):
        through_hook(build(_llama), Swap(), input_ids=tokens(), attention_mask=mask)


def test_packed_sequences_are_refused() -> None:
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    with pytest.raises(Unsupported, match="cannot describe"):
        through_hook(build(_llama), Swap(), input_ids=tokens(), position_ids=positions, use_cache=False)


def test_a_known_mask_that_means_something_else_is_an_error() -> None:
    def one_key_more(sliding_window: int) -> Callable[..., Any]:
        def inner_mask(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
            return key > query - sliding_window - 1

        inner_mask.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
        return inner_mask

    with pytest.raises(Unsupported, match="means something else"):
        describe_mask(1, 30, 30, mask_function=and_masks(one_key_more(4), causal_mask_function))


@pytest.mark.parametrize(
    ("arguments", "mask", "num_keys"),
    [
        ({"q_length": 7, "kv_length": 7}, Causal(), 7),
        ({"q_length": 3, "kv_length": 9, "q_offset": 6}, Causal(), 9),
        ({"q_length": 7, "kv_length": 12}, Causal(), 7),
        ({"q_length": 1, "kv_length": 12, "q_offset": 4}, Causal(), 5),
        (
            {"q_length": 2, "kv_length": 6, "q_offset": 9, "kv_offset": 5,
             "mask_function": sliding_window_causal_mask_function(5)},
            Window(4),
            6,
        ),
    ],
)  # fmt: skip
def test_offsets_become_the_bottom_right_alignment(arguments: Any, mask: Any, num_keys: int) -> None:
    carrier = describe_mask(1, **arguments)
    assert (carrier.mask, carrier.num_keys) == (mask, num_keys)


def test_padding_is_cut_to_the_keys_that_exist() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    carrier = describe_mask(2, q_length=2, kv_length=4, q_offset=4, kv_offset=2, attention_mask=mask)
    assert carrier.mask == Causal()
    carrier = describe_mask(2, q_length=2, kv_length=6, q_offset=4, attention_mask=mask)
    assert carrier.mask == (Causal() & Padding(((2, 6), (0, 6))))


def test_the_scale_of_the_model_is_used() -> None:
    config = GPT2Config(
        n_embd=48, n_layer=2, n_head=6, vocab_size=97, n_positions=64, scale_attn_by_inverse_layer_idx=True
    )
    model = build(lambda: GPT2LMHeadModel(config))
    own = result(eager(model, input_ids=tokens()))
    ours, calls = through_hook(model, Swap(), input_ids=tokens())
    assert (ours - own).abs().max() < 2e-5
    assert [call.scale for call in calls] == pytest.approx([1 / math.sqrt(8), 1 / math.sqrt(8) / 2])


@pytest.mark.parametrize("implementation", ["eager", "sdpa_math"])
def test_flash_is_fused_or_refused(implementation: str) -> None:
    with pytest.raises(Unsupported, match="forms the n x n matrix"):
        plan_swap("flash", {}, implementation)
    _, calls = through_hook(build(_llama), plan_swap("flash", {}, "auto"), input_ids=tokens())
    assert {call.implementation for call in calls} == {"sdpa_flash"}


def test_a_swap_says_whether_it_is_exact() -> None:
    shape = Shape(tokens=9, kv_heads=3)
    assert plan_swap("sliding_window", {"window_size": 8}, "auto").kind(shape) == "approximate"
    assert plan_swap("sliding_window", {"window_size": 9}, "auto").kind(shape) == "exact"
    assert plan_swap("grouped_query", {"num_kv_heads": 1}, "auto").kind(shape) == "approximate"
    assert plan_swap("grouped_query", {"num_kv_heads": None}, "auto").kind(shape) == "exact"
    assert plan_swap("flash", {}, "auto").kind(shape) == "exact"
