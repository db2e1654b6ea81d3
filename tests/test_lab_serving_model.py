"""A served language model answers each request as transformers' greedy generation does, whatever else runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.models import LoadedModel
from attnlab.probes.timing import kernels_that_ran
from attnlab.serving.engine import CacheShape, cut_cache, serve
from attnlab.serving.language import ModelRunner
from attnlab.serving.settings import Lengths, ServingSpec, Workload
from attnlab.serving.workload import Request
from attnlab_kernels.operations.softmax.api import Unsupported

ANY = Workload(requests=1, prompt_tokens=Lengths(tokens=1), output_tokens=Lengths(tokens=1))
SOURCE = [(7 * place * place + 3 * place) % 61 for place in range(83)]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "head_dim": 8,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
REQUESTS = st.lists(
    st.tuples(st.floats(0, 0.02), st.integers(1, 13), st.integers(1, 6)), min_size=1, max_size=4
)


def loaded(model: Any) -> LoadedModel:
    identity = {"name": "tiny", "parameters": 1}
    return LoadedModel("tiny", model.double().eval(), None, True, 512, 61, identity)


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return loaded(LlamaForCausalLM(LlamaConfig(**SHAPE)))


@pytest.fixture(scope="module")
def mistral() -> LoadedModel:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return loaded(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)))


def engine(**changed: Any) -> ServingSpec:
    return ServingSpec.model_validate({"workload": ANY, "num_blocks": 99, "block_size": 4} | changed)


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """The oracle: transformers' own greedy generation, of one sequence, with its own attention."""
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=count,
            do_sample=False,
            attention_mask=torch.ones(1, len(prompt)),
        )
    return ids[0, len(prompt) :].tolist()


@given(st.booleans(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), REQUESTS)
@settings(max_examples=8, deadline=None)
def test_every_answer_is_that_of_greedy_generation(llama, contiguous, chunk, budget, batch, rows):
    requests = [Request(i, *row) for i, row in enumerate(rows)]
    longest = max(request.tokens for request in requests)
    spec = engine(
        chunk_size=chunk, token_budget=budget, max_batch=batch, num_blocks=-(-longest // 3) + 2, block_size=3
    )
    runner = ModelRunner(llama, "multi_head", {}, SOURCE)
    shape = cut_cache(spec, "contiguous" if contiguous else "paged", longest, runner.token_bytes)
    with runner.ready():
        serve(requests, runner, shape, spec)
    answers, prompts = dict(runner.answers), runner.prompts()
    for request in requests:
        assert len(prompts[request.id]) == request.prompt_tokens
        assert answers[request.id] == generated(llama.model, list(prompts[request.id]), request.output_tokens)


@pytest.mark.parametrize(
    ("mechanism", "parameters"), [("multi_head", {}), ("multi_head_latent", {"kv_lora_rank": 32})]
)
def test_the_attention_of_prompts_and_of_decoding_can_be_run_again_to_name_its_kernels(
    llama, mechanism, parameters
):
    runner = ModelRunner(llama, mechanism, parameters, SOURCE)
    with runner.ready():
        serve([Request(0, 0.0, 7, 1)], runner, CacheShape(9, 4, runner.token_bytes), engine())
        assert set(runner.latest_attention()) == {"prompt"}
        requests = [Request(0, 0.0, 7, 3), Request(1, 0.0, 5, 2)]
        serve(requests, runner, CacheShape(9, 4, runner.token_bytes), engine())
    latest = runner.latest_attention()
    assert set(latest) == {"prompt", "decode"}
    for attention in latest.values():
        names = kernels_that_ran(attention, torch.device("cpu"))
        assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_preemption_and_shared_prefixes_change_no_answer(name, request):
    model = request.getfixturevalue(name)
    requests = [Request(i, 0.0, 11 + i, 9) for i in range(4)]
    spec = engine(prefix_sharing=True)
    runner = ModelRunner(model, "multi_head", {}, SOURCE, shared_prefix=9)
    with runner.ready():
        timeline = serve(requests, runner, CacheShape(11, 4, runner.token_bytes), spec)
    assert sum(served.preemptions for served in timeline.requests) > 0
    assert sum(served.reused for served in timeline.requests) > 0
    for one in requests:
        prompt = list(runner.prompts()[one.id])
        assert prompt[:9] == SOURCE[:9]
        assert runner.answers[one.id] == generated(model.model, prompt, one.output_tokens)


@pytest.mark.parametrize(
    ("mechanism", "parameters", "share"),
    [
        ("grouped_query", {"num_kv_heads": 1}, 0.5),
        # as many numbers as two heads of keys and values have: nothing is lost
        ("multi_head_latent", {"kv_lora_rank": 32}, 1.0),
        ("multi_head_latent", {"kv_lora_rank": 12}, 12 / 32),
    ],
)
def test_fewer_heads_and_latents_answer_as_the_same_mechanism_alone(llama, mechanism, parameters, share):
    requests = [Request(i, 0.0, 5 + 3 * i, 5) for i in range(3)]
    runner = ModelRunner(llama, mechanism, parameters, SOURCE)
    whole = ModelRunner(llama, "multi_head", {}, SOURCE).token_bytes
    assert whole == 2 * 2 * 2 * 8 * 8
    assert runner.token_bytes == whole * share
    with runner.ready():
        serve(requests, runner, CacheShape(9, 4, runner.token_bytes), engine(chunk_size=3))
    for one in requests:
        assert runner.answers[one.id] == runner.alone(one)
        if mechanism == "multi_head_latent" and share == 1.0:
            prompt = list(runner.prompts()[one.id])
            assert runner.answers[one.id] == generated(llama.model, prompt, one.output_tokens)


def test_a_model_that_looks_ahead_is_refused():
    from transformers import BertConfig, BertModel

    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    model = BertModel(BertConfig(**small, vocab_size=61))
    bert = LoadedModel("bert", model.eval(), None, False, 64, 61, {})
    with pytest.raises(Unsupported, match="serving needs a decoder of text, and bert is none"):
        ModelRunner(bert, "multi_head", {}, SOURCE)
