"""The guide's classes as its readers write them: every name, argument, default and number of returned values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnlab_kernels

# argument names in their order, with their defaults; `...` where the guide gives none
CONSTRUCTORS = {
    "BaseAttention": "hidden_size, num_heads, dropout=0.1, use_flash_attention=False, attention_scale=None",
    "MultiHeadAttention": (
        "hidden_size, num_heads, dropout=0.1, bias=True, add_zero_attn=False, use_rotary=False, attention_scale=None"
    ),
    "SelfAttention": (
        "hidden_size, num_heads=8, dropout=0.0, bias=True, is_causal=False, max_seq_length=2048"
    ),
    "MultiHeadSelfAttention": "hidden_size, num_heads, dropout=0.1, bias=True",
    "CrossAttention": (
        "query_dim, key_dim, num_heads, dropout=0.1, use_flash_attention=True, max_seq_len=2048"
    ),
    "CrossAttentionLayer": "config",
    "FlashAttention": "hidden_size, num_heads, dropout=0.0, bias=True, block_size=1024, causal=False",
    "MemoryEfficientAttention": (
        "hidden_size, num_heads, dropout=0.1, chunk_size=128, causal=False, bias=True"
    ),
    "GroupedQueryAttention": (
        "dim, num_heads, num_kv_heads, head_dim=None, dropout=0.0, bias=False, max_position_embeddings=8192"
    ),
    "SlidingWindowAttention": (
        "dim, num_heads, window_size=4096, num_kv_heads=None, head_dim=None, dropout=0.0, bias=False, causal=True"
    ),
    "MultiHeadLatentAttention": (
        "dim, num_heads, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, "
        "v_head_dim=128, dropout=0.0, bias=False"
    ),
    "MultiHeadLatentAttentionV2": (
        "d_model, num_heads, d_latent, head_dim=None, dropout=0.0, bias=False, use_layer_norm=True"
    ),
    "LinearAttention": "dim, num_heads, head_dim=None, feature_map='elu', eps=1e-6, dropout=0.0, bias=False",
    "CausalLinearAttention": "dim, num_heads, head_dim=None",
    "FAVORPlusAttention": (
        "dim, num_heads, head_dim=None, num_features=None, ortho_features=True, redraw_features=False, bias=False"
    ),
    "SparseAttention": (
        "dim, num_heads, sparsity_pattern='local', local_window=256, global_tokens=1, num_random=3, stride=64, "
        "head_dim=None, dropout=0.0, bias=False, causal=True"
    ),
    "BlockSparseAttention": (
        "dim, num_heads, block_size=64, num_global_blocks=1, num_random_blocks=1, num_sliding_blocks=3"
    ),
    "PagedAttention": (
        "d_model, num_heads, head_dim=None, block_size=16, num_blocks=1024, num_kv_heads=None, dropout=0.0, bias=False"
    ),
    "BlockTable": "num_blocks, block_size, num_heads, head_dim",
    "PagedKVCache": "num_blocks",
    "FlashAttention3": "config",
    "FlashAttention3Core": "use_fp8=False, fp8_block_size=128, use_async=True",
    "RingAttention": (
        "dim, num_heads, head_dim=None, ring_size=None, overlap_comm_compute=True, dropout=0.0, bias=False, causal=True"
    ),
    "BlockwiseRingAttention": "dim, num_heads, block_size=1024",
    "DifferentialAttention": (
        "dim, num_heads, head_dim=None, dropout=0.0, bias=False, lambda_init=0.8, lambda_learnable=True"
    ),
    "NeighborhoodAttention1D": (
        "d_model, num_heads, kernel_size=7, dilation=1, dropout=0.0, bias=True, head_dim=None"
    ),
    "NeighborhoodAttention2D": (
        "d_model, num_heads, kernel_size=7, dilation=1, dropout=0.0, bias=True, head_dim=None"
    ),
    "NeighborhoodAttention": (
        "d_model, num_heads, kernel_size=7, dilation=1, dropout=0.0, bias=True, head_dim=None"
    ),
    "SwitchHeadAttention": (
        "d_model, num_heads, num_experts=4, top_k=1, head_dim=None, dropout=0.0, bias=False, aux_loss_coeff=0.01"
    ),
    "ChunkedPrefill": (
        "chunk_size=512, attention_module=None, max_seq_len=131072, overlap_chunks=0, use_gradient_checkpointing=False"
    ),
    "ChunkedPrefillScheduler": "chunk_size=512, max_batch_tokens=8192, max_batch_sequences=32",
}
FORWARDS = {
    "BaseAttention": "hidden_states, attention_mask, return_attention",
    "MultiHeadAttention": (
        "hidden_states, attention_mask, key_value_states, position_bias, past_key_value, use_cache"
    ),
    "SelfAttention": "hidden_states, attention_mask, position_bias, return_attention",
    "MultiHeadSelfAttention": "hidden_states, attention_mask, return_attention",
    "FlashAttention": "hidden_states, attention_mask",
    "GroupedQueryAttention": (
        "hidden_states, attention_mask, position_embeddings, past_key_value, use_cache, output_attentions"
    ),
    "LinearAttention": "hidden_states, attention_mask, past_key_value, use_cache, causal",
    "FAVORPlusAttention": "hidden_states, causal",
    "PagedAttention": (
        "hidden_states, attention_mask, position_embeddings, seq_id, use_cache, output_attentions"
    ),
    "FlashAttention3": "x, attn_mask, key_value, causal",
    "RingAttention": "q, k, v, ring_group, attention_mask",
    "NeighborhoodAttention2D": "hidden_states, attention_mask, output_attentions",
    "ChunkedPrefill": "hidden_states, chunk_size, attention_mask, position_ids, use_cache, causal",
}
ALIASES = {
    "GQA": "GroupedQueryAttention",
    "SWA": "SlidingWindowAttention",
    "MLA": "MultiHeadLatentAttention",
    "DSA": "SparseAttention",
    "DiffAttn": "DifferentialAttention",
    "SwitchHead": "SwitchHeadAttention",
}
METHODS = {
    "MultiHeadLatentAttentionV2": "compress_kv, decompress_kv, get_cache_size_ratio",
    "PagedAttention": "free_sequence",
    "BlockTable": "allocate, free, get_block_ids, fork, num_free_blocks",
    "PagedKVCache": "write, write_batch, read, clear_block",
    "ChunkedPrefill": "prefill, decode_step, clear_cache, get_cache_size, set_attention_module",
    "ChunkedPrefillScheduler": "add_sequence, get_next_batch, has_pending",
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_takes_these_arguments_in_this_order_with_these_defaults(name):
    wanted = inspect.signature(eval(f"lambda {CONSTRUCTORS[name]}: None")).parameters
    ours = list(inspect.signature(getattr(attnlab_kernels, name)).parameters.values())
    for place, (argument, parameter) in enumerate(wanted.items()):
        assert ours[place].name == argument
        assert ours[place].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if parameter.default is not inspect.Parameter.empty:
            assert ours[place].default == parameter.default, argument


@pytest.mark.parametrize("name", CONSTRUCTORS | ALIASES)
def test_every_class_is_exported_and_says_what_it_is(name):
    assert name in attnlab_kernels.__all__
    assert (getattr(attnlab_kernels, name).__doc__ or "").strip()


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_a_short_name_is_the_class(alias, name):
    assert getattr(attnlab_kernels, alias) is getattr(attnlab_kernels, name)


@pytest.mark.parametrize(("name", "methods"), METHODS.items())
def test_the_methods_of_the_guide_are_there(name, methods):
    assert all(hasattr(getattr(attnlab_kernels, name), method) for method in methods.split(", "))


@pytest.mark.parametrize(("name", "arguments"), FORWARDS.items())
def test_a_call_may_name_each_argument(name, arguments):
    made, calls = CALLS[name]
    first, *others = arguments.split(", ")
    made()(**{first: calls[0][0][0]}, **dict.fromkeys(others))


X, IMAGE, CONTEXT = torch.randn(1, 16, 24), torch.randn(1, 5, 5, 24), torch.randn(1, 3, 12)
PROJECTED = torch.randn(1, 4, 16, 6)


def make(name: str, *arguments: Any, **named: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(attnlab_kernels, name)(*arguments, **named)


def wrapped() -> nn.Module:
    return attnlab_kernels.ChunkedPrefill(4, attnlab_kernels.GroupedQueryAttention(24, 4, 2))


# how it is made, how it is called, how many values come back (1: the bare output)
CALLS: dict[str, tuple[Callable[[], Any], list[tuple[tuple[Tensor, ...], dict[str, Any], int]]]] = {
    "BaseAttention": (
        make("BaseAttention", 24, 4),
        [((X,), {}, 1), ((X,), {"return_attention": True}, 2)],
    ),
    "MultiHeadAttention": (
        make("MultiHeadAttention", hidden_size=24, num_heads=4, dropout=0.1),
        [((X,), {}, 2), ((X,), {"use_cache": True}, 2)],
    ),
    "SelfAttention": (
        make("SelfAttention", 24, 4),
        [((X,), {}, 1), ((X,), {"return_attention": True}, 2)],
    ),
    "MultiHeadSelfAttention": (
        make("MultiHeadSelfAttention", 24, 4),
        [((X,), {}, 1), ((X,), {"return_attention": True}, 2)],
    ),
    "CrossAttention": (
        make("CrossAttention", query_dim=24, kv_dim=12, num_heads=4, head_dim=8),
        [((X, CONTEXT), {}, 1), ((X, CONTEXT), {"return_attention": True}, 2)],
    ),
    "CrossAttentionLayer": (
        make("CrossAttentionLayer", {"hidden_size": 24, "num_heads": 4, "dropout": 0.1}),
        [((X, X[:, :3]), {}, 1)],
    ),
    "FlashAttention": (
        make("FlashAttention", hidden_size=24, num_heads=4, block_size=1024, causal=True),
        [((X,), {}, 1)],
    ),
    "MemoryEfficientAttention": (make("MemoryEfficientAttention", 24, 4), [((X,), {}, 1)]),
    "EfficientAttention": (make("EfficientAttention", 24, 4), [((X,), {}, 1)]),
    "GroupedQueryAttention": (
        make("GroupedQueryAttention", dim=24, num_heads=4, num_kv_heads=2),
        [((X,), {"use_cache": True}, 3), ((X,), {"output_attentions": True}, 3)],
    ),
    "SlidingWindowAttention": (make("SlidingWindowAttention", 24, 4), [((X,), {"use_cache": True}, 3)]),
    "MultiHeadLatentAttention": (
        make("MultiHeadLatentAttention", 24, 4),
        [((X,), {"use_cache": True}, 3)],
    ),
    "MultiHeadLatentAttentionV2": (
        make("MultiHeadLatentAttentionV2", d_model=24, num_heads=4, d_latent=8),
        [((X,), {"use_cache": True}, 3)],
    ),
    "LinearAttention": (make("LinearAttention", 24, 4), [((X,), {"use_cache": True}, 2)]),
    "CausalLinearAttention": (make("CausalLinearAttention", 24, 4), [((X,), {}, 2)]),
    "FAVORPlusAttention": (make("FAVORPlusAttention", 24, 4), [((X,), {"causal": True}, 1)]),
    "SparseAttention": (make("SparseAttention", 24, 4), [((X,), {}, 3)]),
    "BlockSparseAttention": (make("BlockSparseAttention", 24, 4, block_size=4), [((X,), {}, 2)]),
    "PagedAttention": (
        make("PagedAttention", d_model=24, num_heads=4, block_size=16, num_blocks=1024),
        [((X,), {"seq_id": 0, "use_cache": True}, 3)],
    ),
    "FlashAttention3": (
        make("FlashAttention3", {"embed_dim": 24, "num_heads": 4, "use_fp8": False, "bias": True}),
        [((X,), {"causal": True}, 1)],
    ),
    "FlashAttention3Core": (make("FlashAttention3Core"), [((X[None],) * 3, {"causal": True}, 1)]),
    "RingAttention": (
        make("RingAttention", 24, 4),
        [((X,), {}, 1), ((PROJECTED,) * 3, {}, 1)],
    ),
    "BlockwiseRingAttention": (make("BlockwiseRingAttention", 24, 4), [((X,), {}, 1)]),
    "DifferentialAttention": (make("DifferentialAttention", 24, 3), [((X,), {}, 3)]),
    "NeighborhoodAttention1D": (make("NeighborhoodAttention1D", 24, 4), [((X,), {}, 2)]),
    "NeighborhoodAttention2D": (
        make("NeighborhoodAttention2D", 24, 4, kernel_size=5),
        [((IMAGE,), {"output_attentions": True}, 2)],
    ),
    "SwitchHeadAttention": (make("SwitchHeadAttention", 24, 4), [((X,), {}, 3)]),
    "ChunkedPrefill": (wrapped, [((X,), {"use_cache": False}, 1), ((X,), {"use_cache": True}, 2)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_returns_as_many_values_as_the_guide_unpacks(name):
    made, calls = CALLS[name]
    for tensors, options, arity in calls:
        result = made().eval()(*tensors, **options)
        assert (len(result) if isinstance(result, tuple) else 1) == arity


def test_every_constructor_that_makes_a_module_is_called_here():
    others = {"NeighborhoodAttention", "BlockTable", "PagedKVCache", "ChunkedPrefillScheduler"}
    assert CONSTRUCTORS.keys() <= CALLS.keys() | others


def test_the_helpers_of_paged_attention_are_made_as_the_guide_writes_them():
    table = attnlab_kernels.BlockTable(num_blocks=1024, block_size=16, num_heads=2, head_dim=6)
    assert table.allocate(num_blocks=3) == [0, 1, 2] == table.get_block_ids(0)
    cache = attnlab_kernels.PagedKVCache(num_blocks=16, block_size=4, num_heads=2, head_dim=6)
    key, value = torch.randn(2, 2, 6)
    cache.write(block_idx=5, slot_idx=0, key=key, value=value)
    keys, values = cache.read(block_ids=[5], seq_len=1)
    assert torch.equal(keys[0], key)
    assert torch.equal(values[0], value)


def test_switch_head_in_training_gives_its_auxiliary_loss_in_third_place():
    module = attnlab_kernels.SwitchHeadAttention(24, 4, top_k=1)
    assert module.train()(X)[2].ndim == 0
    assert module.eval()(X)[2] is None


def test_neighborhood_attention_gives_a_weight_for_every_neighbour():
    module = attnlab_kernels.NeighborhoodAttention2D(24, 4, kernel_size=5).eval()
    output, weights = module(IMAGE, output_attentions=True)
    assert output.shape == IMAGE.shape
    assert weights.shape == (1, 4, 25, 25)
