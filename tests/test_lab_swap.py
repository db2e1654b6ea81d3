"""Every mechanism that can stand in a trained model does, by its own operation, under the label that it deserves."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from attnlab.hook import Hook, LayerCall, cache_keyword
from attnlab.probes.map_change import MapSample
from attnlab.probes.map_checks import call_arrays, map_of
from attnlab.probes.maps import first_element, trace_of
from attnlab.swap import Shape, Swap, plan_swap
from attnlab.swaps.softmax import output_of
from attnlab_kernels.catalog import MECHANISMS
from attnlab_kernels.operations.softmax.api import Unsupported

LENGTH = 45
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 40,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
READ = Shape(LENGTH, kv_heads=2, heads=6, head_dim=8)
EXACT: list[tuple[str, dict[str, Any], str]] = [
    ("multi_head", {}, "sdpa_flash"),
    ("self", {}, "sdpa_flash"),
    ("flash", {}, "sdpa_flash"),
    ("flash_attention_3", {}, "sdpa_flash"),
    ("grouped_query", {}, "sdpa_flash"),
    ("paged", {"block_size": 4}, "sdpa_flash"),
    ("ring", {}, "ring"),
    ("ring", {"ring_size": 3, "layout": "striped", "block_size": 5}, "ring"),
    ("ring", {"ring_size": 2, "layout": "zigzag"}, "ring"),
    ("sparse", {"local_window": LENGTH}, "fused"),
    ("chunked_prefill", {"chunk_size": 7}, "sdpa_flash"),
    ("efficient", {"chunk_size": 8}, "chunked"),
    ("multi_head_latent", {"kv_lora_rank": 32}, "sdpa_flash"),
]
APPROXIMATE: list[tuple[str, dict[str, Any], str]] = [
    ("sliding_window", {"window_size": 5}, "banded"),
    ("grouped_query", {"num_kv_heads": 1}, "sdpa_flash"),
    ("flash_attention_3", {"use_fp8": True, "fp8_block_size": 16}, "fp8_reference"),
    ("multi_head_latent", {"kv_lora_rank": 11}, "sdpa_flash"),
    ("sparse", {"local_window": 5}, "fused"),
    ("sparse", {"sparsity_pattern": "strided", "stride": 5}, "fused"),
    ("sparse", {"sparsity_pattern": "fixed", "stride": 6}, "fused"),
    ("sparse", {"sparsity_pattern": "local_global", "local_window": 4, "global_tokens": 2}, "fused"),
    ("sparse", {"sparsity_pattern": "longformer", "local_window": 6}, "fused"),
    ("sparse", {"sparsity_pattern": "bigbird", "block_size": 4, "num_random": 1}, "fused"),
    ("neighborhood", {"dilation": 2}, "tiled"),
    ("linear", {}, "linear chunked"),
    ("linear", {"feature_map": "softmax_kernel"}, "linear chunked"),
]


def llama() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(3)
    return model


def tokens(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(5))


def through(model: Any, swap: Swap, **inputs: Any) -> tuple[Tensor, list[LayerCall]]:
    hook, calls = Hook(model, swap), []
    with hook.installed():
        output = hook.forward(lambda: model(**inputs), calls.append)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state, calls


def eager(model: Any, **inputs: Any) -> Tensor:
    model.set_attn_implementation("eager")
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def padded(batch: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    for index, pad in enumerate((0, 4, 17)):
        mask[index, :pad] = 0
    return {"input_ids": tokens(batch), "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize(("mechanism", "parameters", "ran"), EXACT)
def test_an_exact_swap_leaves_the_logits_and_says_what_ran(
    mechanism: str, parameters: dict[str, Any], ran: str
) -> None:
    model, swap = llama(), plan_swap(mechanism, parameters, "auto")
    ours, calls = through(model, swap, input_ids=tokens())
    assert (ours - eager(model, input_ids=tokens())).abs().max() < 2e-5
    assert {call.implementation for call in calls} == {ran}
    assert swap.kind(READ) == "exact"


@pytest.mark.parametrize(("mechanism", "parameters", "ran"), EXACT)
def test_an_exact_swap_honours_padding(mechanism: str, parameters: dict[str, Any], ran: str) -> None:
    model, (inputs, real) = llama(), padded()
    ours, _ = through(model, plan_swap(mechanism, parameters, "auto"), **inputs)
    assert (ours - eager(model, **inputs))[real].abs().max() < 2e-5


@pytest.mark.parametrize(("mechanism", "parameters", "ran"), EXACT)
def test_decoding_through_an_exact_swap_is_the_last_row_of_the_prompt(
    mechanism: str, parameters: dict[str, Any], ran: str
) -> None:
    model, ids = llama(), tokens(2)
    hook, cache, calls = Hook(model, plan_swap(mechanism, parameters, "auto")), DynamicCache(), []
    given = {cache_keyword(model): cache}
    own = eager(model, input_ids=ids)[:, -1]
    with hook.installed():
        model(input_ids=ids[:, :-1], **given)
        for _ in range(2):  # a step is repeated when it is timed
            made = hook.forward(lambda: model(input_ids=ids[:, -1:], **given), calls.append)
            assert (made.logits[:, -1] - own).abs().max() < 2e-5
            cache.crop(-1)
    assert {call.key.shape[2] for call in calls} == {LENGTH}


@pytest.mark.parametrize(("mechanism", "parameters", "ran"), APPROXIMATE)
def test_an_approximate_swap_that_binds_changes_the_logits(
    mechanism: str, parameters: dict[str, Any], ran: str
) -> None:
    model, swap = llama(), plan_swap(mechanism, parameters, "auto")
    ours, calls = through(model, swap, input_ids=tokens())
    assert (ours - eager(model, input_ids=tokens())).abs().max() > 1e-3
    assert {call.implementation for call in calls} == {ran}
    assert swap.kind(READ) == "approximate"


@pytest.mark.parametrize(("mechanism", "parameters", "ran"), EXACT + APPROXIMATE)
def test_the_map_of_a_swap_times_its_values_is_its_output(
    mechanism: str, parameters: dict[str, Any], ran: str
) -> None:
    _, calls = through(llama(), plan_swap(mechanism, parameters, "auto"), input_ids=tokens(2))
    tolerance = 0.1 if parameters.get("use_fp8") else 2e-5
    for call in map(first_element, calls):
        row, arrays = trace_of(call), call_arrays(call)
        for head in (0, 5):
            weights = torch.from_numpy(map_of(row, arrays, head).tile(slice(None), slice(None)))
            value = call.value[0, head * call.value.shape[1] // 6]
            assert (weights @ value - call.output[0, head]).abs().max() < tolerance
            assert not weights.triu(1).any()
        if call.attention is not None:
            assert (call.attention.reference() - call.attention.run())[0].abs().max() < 2e-5


@pytest.mark.parametrize(("mechanism", "parameters", "ran"), EXACT + APPROXIMATE)
def test_a_swap_runs_again_alone(mechanism: str, parameters: dict[str, Any], ran: str) -> None:
    _, calls = through(llama(), plan_swap(mechanism, parameters, "auto"), input_ids=tokens())
    for call in calls:
        if call.again is not None:
            made: Any = call.again()
            assert torch.equal(output_of(made), call.output)


# a scale of eight bits and a fitted basis depend on which tokens are there when they are made
@pytest.mark.parametrize(
    ("mechanism", "parameters", "ran"),
    [case for case in APPROXIMATE if case[0] not in ("flash_attention_3", "multi_head_latent")],
)
def test_decoding_through_an_approximation_is_the_last_row_of_the_prompt(
    mechanism: str, parameters: dict[str, Any], ran: str
) -> None:
    model, ids, cache = llama(), tokens(2), DynamicCache()
    own, _ = through(model, plan_swap(mechanism, parameters, "auto"), input_ids=ids)
    hook, given = Hook(model, plan_swap(mechanism, parameters, "auto")), {cache_keyword(model): cache}
    with hook.installed():
        model(input_ids=ids[:, :-1], **given)
        for _ in range(2):
            if mechanism == "neighborhood":
                with pytest.raises(Unsupported, match="it has no cache"):
                    hook.forward(lambda: model(input_ids=ids[:, -1:], **given))
                break
            made = hook.forward(lambda: model(input_ids=ids[:, -1:], **given))
            assert (made.logits[:, -1] - own[:, -1]).abs().max() < 2e-5
            cache.crop(-1)


@pytest.mark.parametrize(
    ("mechanism", "parameters", "ran"),
    [case for case in EXACT + APPROXIMATE if case[0] != "multi_head_latent"],
)
def test_no_swap_of_a_causal_model_sees_a_later_token(
    mechanism: str, parameters: dict[str, Any], ran: str
) -> None:
    model, changed = llama(), tokens()
    changed[0, 32:] = 5
    ours, _ = through(model, plan_swap(mechanism, parameters, "auto"), input_ids=tokens())
    other, _ = through(model, plan_swap(mechanism, parameters, "auto"), input_ids=changed)
    assert (ours - other)[:, :32].abs().max() < 2e-5
    assert (ours - other)[:, 32:].abs().max() > 1e-2


def test_random_features_estimate_the_models_own_softmax() -> None:
    model = llama()
    own = eager(model, input_ids=tokens())
    errors = []
    for features in (8, 128, 2048):
        given = {"feature_map": "softmax_kernel", "num_features": features}
        ours, _ = through(model, plan_swap("linear", given, "auto"), input_ids=tokens())
        errors.append(float((ours - own).square().mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_a_softmax_on_each_side_is_for_models_that_look_both_ways() -> None:
    swap = plan_swap("efficient", {"variant": "linear"}, "auto")
    with pytest.raises(Unsupported, match="must not see later ones"):
        through(llama(), swap, input_ids=tokens())
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SHAPE)).eval().requires_grad_(False)
    inputs, real = padded()
    ours, calls = through(model, swap, **inputs)
    assert (ours - eager(model, **inputs))[real].abs().max() > 1e-4
    for call in calls:
        row, arrays = trace_of(first_element(call)), call_arrays(first_element(call))
        weights = torch.from_numpy(map_of(row, arrays, 3).tile(slice(None), slice(None)))
        assert (weights.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("mechanism", "parameters", "reason"),
    [
        ("linear", {"variant": "linformer"}, "need training"),
        ("linear", {"feature_map": "identity"}, "divide by nothing"),
        ("efficient", {"variant": "spatial_reduction"}, "trained convolution"),
        ("neighborhood", {"dims": 2}, "one axis"),
    ],
)
def test_a_variant_that_needs_training_is_refused(
    mechanism: str, parameters: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Unsupported, match=f"{mechanism}: .*{reason}"):
        plan_swap(mechanism, parameters, "auto")


@pytest.mark.parametrize(
    "mechanism", [name for name in MECHANISMS if MECHANISMS[name].swap == "not_applicable"]
)
def test_what_needs_training_is_refused_with_the_reason(mechanism: str) -> None:
    with pytest.raises(Unsupported, match=f"{mechanism}: cannot be put into trained weights: .{{20}}"):
        plan_swap(mechanism, {}, "auto")


def test_an_encoder_has_no_prompt_to_chunk() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SHAPE)).eval()
    with pytest.raises(Unsupported, match="not causal"):
        through(model, plan_swap("chunked_prefill", {}, "auto"), input_ids=tokens())


@pytest.mark.parametrize("mechanism", ["paged", "ring", "efficient", "multi_head_latent"])
def test_an_encoder_takes_what_knows_no_order(mechanism: str) -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SHAPE)).eval().requires_grad_(False)
    inputs, real = padded()
    parameters = {"kv_lora_rank": 96} if mechanism == "multi_head_latent" else {}
    ours, _ = through(model, plan_swap(mechanism, parameters, "auto"), **inputs)
    assert (ours - eager(model, **inputs))[real].abs().max() < 2e-5


def test_a_ring_refuses_a_window_that_it_does_not_know() -> None:
    model = MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=5)).eval()
    with pytest.raises(Unsupported, match="causal and padding only"):
        through(model, plan_swap("ring", {}, "auto"), input_ids=tokens())


def test_a_pool_that_is_too_small_is_refused_by_its_parameter() -> None:
    with pytest.raises(Unsupported, match="num_blocks"):
        through(llama(), plan_swap("paged", {"block_size": 4, "num_blocks": 3}, "auto"), input_ids=tokens())


def test_pages_are_walked_by_a_decoded_token() -> None:
    model, ids, cache, calls = llama(), tokens(), DynamicCache(), []
    hook = Hook(model, plan_swap("paged", {"block_size": 4}, "auto"))
    with hook.installed():
        model(input_ids=ids[:, :-1], **{cache_keyword(model): cache})
        hook.forward(lambda: model(input_ids=ids[:, -1:], **{cache_keyword(model): cache}), calls.append)
    assert {call.implementation for call in calls} == {"paged walk"}


def test_a_fitted_latent_loses_less_the_wider_it_is() -> None:
    model = llama()
    own = eager(model, input_ids=tokens())
    losses = []
    for rank in (4, 16, 28, 32):
        ours, _ = through(
            model, plan_swap("multi_head_latent", {"kv_lora_rank": rank}, "auto"), input_ids=tokens()
        )
        losses.append(float((ours - own).square().mean()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-9 < losses[-2]


def sampled(exact: list[LayerCall], swapped: list[LayerCall]) -> MapSample:
    sample = MapSample(len(exact))
    for call in exact:
        sample.keep(call)
    for call in swapped:
        sample.compare(call)
    return sample


def test_the_change_of_a_map_is_the_total_variation_from_the_models_own() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    own = model(input_ids=tokens(), output_attentions=True).attentions
    window = plan_swap("sliding_window", {"window_size": 4}, "auto")
    _, exact = through(model, Swap(), input_ids=tokens())
    _, calls = through(model, window, input_ids=tokens())
    found = {(row.layer, row.head): row for row in sampled(exact, calls).measurements({})}
    band = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-3)
    # the input of the first layer is the same in both, so its scores are
    scores = own[0][0].log().masked_fill(~band, -torch.inf)
    rows = torch.linspace(0, LENGTH - 1, 16).long()
    wanted = (scores.softmax(-1) - own[0][0]).abs().sum(-1)[:, rows].mean(-1) / 2
    ours = torch.tensor([found[0, head].value for head in range(6)])
    assert (ours - wanted).abs().max() < 1e-6
    every = [row.value for place, row in found.items() if place != (None, None)]
    assert len(every) == 12
    assert found[None, None].value == pytest.approx(sum(every) / 12)


def test_equal_maps_have_not_changed_and_few_rows_are_kept_of_long_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, exact = through(llama(), Swap(), input_ids=tokens())
    _, flash = through(llama(), plan_swap("flash", {}, "auto"), input_ids=tokens())
    assert sampled(exact, flash).measurements({})[0].value < 1e-6
    monkeypatch.setattr("attnlab.probes.map_change.CELLS", 2 * 6 * LENGTH * 3)
    few = sampled(exact, flash)
    assert few.rows == 3


def test_cross_attention_is_for_models_that_have_it() -> None:
    swap = plan_swap("cross", {}, "auto")
    with pytest.raises(Unsupported, match="not applicable to LlamaForCausalLM: it reads one sequence"):
        through(llama(), swap, input_ids=tokens())
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "d_model": 48,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 6,
    }
    shape |= {"decoder_attention_heads": 6, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 97}
    model = BartModel(BartConfig(**shape)).eval().requires_grad_(False)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(1, 7)}
    ours, calls = through(model, swap, **inputs)
    assert (ours - eager(model, **inputs)).abs().max() < 2e-5
    # a window over one sequence says nothing of places in another
    _, calls = through(model, plan_swap("sliding_window", {"window_size": 3}, "auto"), **inputs)
    assert [call.mask.band().left for call in calls] == [2, 2, None]


def test_random_features_of_a_swap_follow_the_seed_of_the_spec() -> None:
    drawn = [
        through(
            llama(),
            plan_swap("linear", {"feature_map": "softmax_kernel"}, "auto", seed=seed),
            input_ids=tokens(),
        )[0]
        for seed in (0, 0, 7)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
