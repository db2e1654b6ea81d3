"""Maps of models that nobody here wrote: every weight is the one that the model's own eager attention computes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from attnlab.hook import Hook, LayerCall
from attnlab.probes.accuracy import attention_errors
from attnlab.probes.maps import capture_call, finish
from attnlab.probes.statistics import statistics_of
from attnlab.swap import Swap
from attnlab.views.trace_map import AttentionMap, make_map
from attnlab_storage.results import TraceRow

TOKENS = 37
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 40,
}
DECODER: dict[str, Any] = SMALL | {"vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0}
GROUPED: dict[str, Any] = DECODER | {"num_key_value_heads": 2, "head_dim": 8}


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=7))


def gemma2() -> Any:
    layers = ["sliding_attention", "full_attention"]
    return Gemma2ForCausalLM(
        Gemma2Config(
            **GROUPED,
            sliding_window=9,
            attn_logit_softcapping=1.5,
            query_pre_attn_scalar=8,
            layer_types=layers,
        )
    )


def gpt_oss() -> Any:
    model: Any = GptOssForCausalLM(GptOssConfig(**GROUPED, num_local_experts=4, sliding_window=6))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=1.5)
    return model


def deepseek() -> Any:
    sizes: dict[str, Any] = {
        "q_lora_rank": 12,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
    }
    experts: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **DECODER,
            **sizes,
            **experts,
            v_head_dim=10,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            num_key_value_heads=6,
        )
    )


def diff_llama() -> Any:
    return DiffLlamaForCausalLM(DiffLlamaConfig(**DECODER, num_key_value_heads=2))


def bert() -> Any:
    return BertModel(BertConfig(**SMALL, vocab_size=97, max_position_embeddings=64))


def vit() -> Any:
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=24, patch_size=4, num_channels=3))


def t5() -> Any:
    sizes: dict[str, Any] = {
        "d_model": 48,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 6,
        "vocab_size": 97,
    }
    return T5ForConditionalGeneration(
        T5Config(
            **sizes,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            pad_token_id=0,
        )
    )


def written(length: int = TOKENS, seed: int = 5) -> Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def text() -> dict[str, Any]:
    return {"input_ids": written()}


def picture() -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(5))}


def pair() -> dict[str, Any]:
    return {"input_ids": written(), "decoder_input_ids": written(21, 6)}


def each_layer(output: Any) -> list[Tensor]:
    return list(output.attentions)


def twice(output: Any) -> list[Tensor]:
    """Both halves of the values go through the same attention."""
    return [weights for weights in output.attentions for _ in range(2)]


def encoder_then_decoder(output: Any) -> list[Tensor]:
    alternating = zip(output.decoder_attentions, output.cross_attentions, strict=True)
    return [*output.encoder_attentions, *(weights for both in alternating for weights in both)]


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], Callable[[Any], list[Tensor]]]] = {
    "Mistral, a window": (mistral, text, each_layer),
    "Gemma 2, soft cap and windows in turn": (gemma2, text, each_layer),
    "gpt-oss, sinks": (gpt_oss, text, each_layer),
    "DeepSeek V3, latents": (deepseek, text, each_layer),
    "DiffLlama": (diff_llama, text, twice),
    "BERT": (bert, text, each_layer),
    "ViT": (vit, picture, each_layer),
    "T5, biases by distance": (t5, pair, encoder_then_decoder),
}


class Traced:
    """A call as it is stored, finished and drawn, without a store."""

    def __init__(self, call: LayerCall) -> None:
        capture = capture_call(call)
        arrays = {name: array for name, array, _ in capture.arrays}
        self.row: TraceRow
        self.row, normalisers = finish(capture, lambda name, heads: arrays[name], torch.device("cpu"))
        self.arrays = arrays | {name: array for name, array, _ in normalisers}

    def map(self, head: int) -> AttentionMap:
        return make_map(self.row, head, lambda name, at: self.arrays[name][at])


@pytest.fixture(scope="module", params=MODELS)
def heard(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, list[LayerCall], list[Tensor]]:
    """The model's own answer, ours, what our kernels were asked, the model's own weights."""
    make, given, order = MODELS[request.param]
    torch.manual_seed(2)
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            # the default initialisation attends almost evenly; sharper weights show mistakes
            parameter.mul_(2)
    inputs, calls = given(), []
    model.set_attn_implementation("eager")
    theirs = model(**inputs, output_attentions=True)
    hook = Hook(model, Swap())
    with hook.installed():
        ours = hook.forward(lambda: model(**inputs), calls.append)
    return answer(theirs), answer(ours), calls, order(theirs)


def answer(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def test_the_model_answers_as_by_itself(heard) -> None:
    theirs, ours, calls, weights = heard
    assert len(calls) == len(weights)
    assert (ours - theirs).abs().max() < 2e-4


def test_any_region_is_what_the_model_computes(heard) -> None:
    _, _, calls, weights = heard
    for call, wanted in zip(calls, weights, strict=True):
        traced = Traced(call)
        for head in range(call.query.shape[1]):
            drawn, own = traced.map(head), wanted[0, head].numpy()
            np.testing.assert_allclose(drawn.tile(slice(None), slice(None)), own, atol=1e-5)
            rows, cols = slice(3, 3 + own.shape[0] // 2), slice(2, own.shape[1] - 1)
            np.testing.assert_allclose(drawn.tile(rows, cols), own[rows, cols], atol=1e-5)


def test_any_region_is_the_float64_softmax_of_its_queries_and_keys(heard) -> None:
    for call in heard[2]:
        traced, wanted = Traced(call), exact_weights(call)
        for head, own in enumerate(wanted):
            np.testing.assert_allclose(traced.map(head).tile(slice(None), slice(None)), own, atol=1e-6)
            mean = traced.map(head).pool(slice(None), slice(None), 1, 1, "mean")
            np.testing.assert_allclose(mean, own.mean(), atol=1e-6)


def test_the_checks_hold(heard) -> None:
    for call in heard[2]:
        row = Traced(call).row
        assert row.row_sum_defect < 1e-6
        assert row.output_defect < 1e-4
        assert (row.detail or {})["lse_defect"] < 1e-4
        for error in attention_errors(call):
            if error.name == "attention_error":
                assert error.value <= 2 * (error.detail or {})["plain_error"] + 1e-6


def test_statistics_are_those_of_the_rows_as_they_are_shared_among_the_keys(heard) -> None:
    for call in heard[2]:
        weights = exact_weights(call)
        shares = weights / weights.sum(-1, keepdims=True)
        largest = shares.max(-1).mean(-1)
        found = [row.value for row in statistics_of(call).rows if row.name == "max_weight"]
        np.testing.assert_allclose(found, largest, atol=1e-5)


def exact_weights(call: LayerCall) -> np.ndarray:
    """[Hq, Sq, Sk] in float64 by the book, from what the kernel was given."""
    heads, queries, keys = *call.query.shape[1:3], call.key.shape[2]
    key = call.key[0].double().repeat_interleave(heads // call.key.shape[1], 0)
    scores = call.query[0].double() @ key.transpose(-1, -2) * call.scale
    if (cap := call.extras.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if (bias := call.extras.get("bias")) is not None:
        scores = scores + bias[0].double()
    allowed = call.mask.allowed(np.arange(queries), np.arange(keys), num_queries=queries, num_keys=keys)
    scores = scores.masked_fill(~torch.from_numpy(allowed), -torch.inf)
    sinks = call.extras.get("sinks")
    if sinks is None:
        return scores.softmax(-1).numpy()
    column = sinks.double()[:, None, None].expand(-1, queries, 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1].numpy()


def test_every_rule_is_met_by_some_model() -> None:
    """The file would prove little if transformers stopped passing them."""
    met: set[str] = set()
    for make, given, _ in (
        MODELS[name] for name in MODELS if name.split(",")[0] in ("Gemma 2", "gpt-oss", "T5")
    ):
        torch.manual_seed(2)
        model = make().eval().requires_grad_(False)
        hook = Hook(model, Swap())
        with hook.installed():
            hook.forward(
                lambda model=model, given=given: model(**given()), lambda call: met.update(call.extras)
            )
    assert met == {"softcap", "sinks", "bias"}
