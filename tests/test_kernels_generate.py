"""Whole models of transformers, their attention run by our modules: chunked, windowed and paged, token for token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnlab_kernels import GroupedQueryAttention, PagedAttention, SlidingWindowAttention
from attnlab_kernels.paged_cache import PagedKV
from attnlab_kernels.paged_sequences import PagedSequences

STEPS = 6


def model(kind: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    shape: dict[str, Any] = {
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
    torch.manual_seed(0)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=8)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def modules(theirs: Any, make: Callable[[int], nn.Module]) -> list[nn.Module]:
    """Ours with the weights of each layer."""
    found = []
    for index, layer in enumerate(theirs.model.layers):
        module = make(index).eval()
        module.load_state_dict(layer.self_attn.state_dict(), strict=True)
        found.append(module)
    return found


def logits(theirs: Any, ids: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
    x = theirs.model.embed_tokens(ids)
    for index, layer in enumerate(theirs.model.layers):
        x = x + attend(index, layer.input_layernorm(x))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return theirs.lm_head(theirs.model.norm(x))


@torch.no_grad()
def greedy(
    theirs: Any, attentions: list[nn.Module], prompt: Tensor, chunk: int, caches: list[Any]
) -> list[int]:
    def attend(index: int, x: Tensor) -> Tensor:
        result = attentions[index](x, past_key_value=caches[index], use_cache=True, return_dict=True)
        caches[index] = result.cache
        return result.output

    last = torch.empty(0)
    for part in prompt.split(chunk, dim=1):
        last = logits(theirs, part, attend)
    found = []
    for _ in range(STEPS):
        found.append(int(last[0, -1].argmax()))
        last = logits(theirs, torch.tensor([[found[-1]]]), attend)
    return found


def prompt(count: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("chunk", [5, 16])
def test_a_prompt_in_chunks_gives_the_tokens_of_transformers_chunks(kind, chunk):
    theirs = model(kind)

    def make(index: int) -> nn.Module:
        if kind == "mistral":
            return SlidingWindowAttention(32, 4, 8, 2, use_rotary=True)
        return GroupedQueryAttention(32, 4, 2, use_rotary=True)

    ids = prompt(23)
    with torch.no_grad():
        want = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            prefill_chunk_size=chunk,
            max_new_tokens=STEPS,
            do_sample=False,
        )
    got = greedy(theirs, modules(theirs, make), ids, chunk, [None, None])
    assert got == want[0, 23:].tolist()
    assert len(set(got)) > 2  # a model that always says the same would agree with any attention


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' own batching calls what is going away
def test_pages_give_the_tokens_of_transformers_paged_batches():
    from transformers import GenerationConfig

    theirs = model("llama")
    pages = PagedKV(40, 4, 2, 8, layers=2)

    def make(index: int) -> nn.Module:
        return PagedAttention(32, 4, num_kv_heads=2, use_rotary=True, layer_idx=index, pages=pages)

    prompts = [prompt(count, seed) for seed, count in enumerate((23, 3, 11))]
    theirs.set_attn_implementation("paged|sdpa")
    config = GenerationConfig(
        max_new_tokens=STEPS,
        do_sample=False,
        num_blocks=64,
        block_size=8,
        max_batch_tokens=32,
        eos_token_id=-1,
        pad_token_id=0,
    )
    batch = theirs.generate_batch(
        [ids[0].tolist() for ids in prompts], generation_config=config, progress_bar=False
    )
    found = sorted(batch.values(), key=lambda output: len(output.prompt_ids))
    ours = modules(theirs, make)
    for ids, output in zip(sorted(prompts, key=lambda ids: ids.shape[1]), found, strict=True):
        # both layers write into one sequence of one pool
        caches: list[Any] = [PagedSequences.fresh(pages, 1)] * 2
        assert greedy(theirs, ours, ids, 5, caches) == list(output.generated_tokens)
