"""The laws of all seventeen modules, each written once: calls, causality, caches, dead rows, maps, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnlab_kernels
from attnlab_kernels import (
    MECHANISMS,
    AttentionOutput,
    ChunkedPrefill,
    CrossAttention,
    DifferentialAttention,
    EfficientAttention,
    FlashAttention,
    FlashAttention3,
    GroupedQueryAttention,
    LinearAttention,
    LinformerAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    NeighborhoodAttention,
    PagedAttention,
    RingAttention,
    SelfAttention,
    SlidingWindowAttention,
    SparseAttention,
    SwitchHeadAttention,
)
from attnlab_kernels.caches import ContiguousKV
from attnlab_kernels.paged_cache import PagedKV
from attnlab_kernels.paged_sequences import PagedSequences

WIDTH, HEADS = 24, 4
COMMON: dict[str, Any] = {
    "attention_mask": None,
    "position_ids": None,
    "position_embeddings": None,
    "position_bias": None,
    "past_key_value": None,
    "use_cache": False,
    "output_attentions": False,
    "causal": None,
}


@dataclass(frozen=True)
class Case:
    """One module and what it can do."""

    mechanism: str
    make: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    arity: int = 1
    causal: bool = True
    cached: bool = True
    crops: bool = True
    pads: bool = True
    """takes a mask of keys, and a sequence's own keys are all that matters to it"""
    plain: bool = True
    """its map times the values of ``v_proj`` is what goes into ``o_proj``"""
    grid: tuple[int, ...] | None = None

    def module(self, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.make(**(self.arguments | changes)).to(dtype).eval()


def chunked(**arguments: Any) -> ChunkedPrefill:
    return ChunkedPrefill(4, GroupedQueryAttention(WIDTH, HEADS, 2, **arguments))


TURNED = {"use_rotary": True}
NO_BIAS = {"bias": False}


def sparse(pattern: str, **more: Any) -> Case:
    shape = {"local_window": 4, "stride": 3, "block_size": 2}
    arguments = {"sparsity_pattern": pattern} | shape | TURNED | more
    return Case("sparse", lambda **a: SparseAttention(WIDTH, HEADS, **a), arguments, 3)


CASES = {
    "multi_head": Case(
        "multi_head", lambda **a: MultiHeadAttention(WIDTH, HEADS, 0.0, causal=True, **a), NO_BIAS | TURNED, 2
    ),
    "self": Case("self", lambda **a: SelfAttention(WIDTH, HEADS, is_causal=True, **a), NO_BIAS | TURNED),
    "cross": Case(
        "cross",
        lambda **a: CrossAttention(WIDTH, WIDTH, HEADS, 0.0, **a),
        NO_BIAS,
        causal=False,
        cached=False,
    ),
    "flash": Case("flash", lambda **a: FlashAttention(WIDTH, HEADS, causal=True, **a), NO_BIAS | TURNED),
    "linear": Case("linear", lambda **a: LinearAttention(WIDTH, HEADS, **a), arity=2, crops=False),
    "favor": Case(
        "linear",
        lambda **a: LinearAttention(WIDTH, HEADS, feature_map="softmax_kernel", **a),
        arity=2,
        crops=False,
    ),
    "linformer": Case(
        "linear",
        lambda **a: LinformerAttention(WIDTH, HEADS, 32, 5, **a),
        arity=3,
        causal=False,
        cached=False,
        plain=False,
    ),
    "local": sparse("local"),
    "strided": sparse("strided"),
    "fixed": sparse("fixed"),
    "local_global": sparse("local_global"),
    "bigbird": sparse("bigbird"),
    "longformer": sparse("longformer"),
    "sliding_window": Case(
        "sliding_window", lambda **a: SlidingWindowAttention(WIDTH, HEADS, 5, 2, **a), TURNED, 3
    ),
    "memory_efficient": Case(
        "efficient",
        lambda **a: EfficientAttention(WIDTH, HEADS, 0.0, 3, True, **a),
        NO_BIAS | TURNED,
    ),
    "separable": Case(
        "efficient",
        lambda **a: EfficientAttention(WIDTH, HEADS, 0.0, variant="linear", **a),
        NO_BIAS,
        causal=False,
        cached=False,
    ),
    "spatial_reduction": Case(
        "efficient",
        lambda **a: EfficientAttention(WIDTH, HEADS, 0.0, variant="spatial_reduction", **a),
        NO_BIAS,
        causal=False,
        cached=False,
        pads=False,
        plain=False,
        grid=(4, 4),
    ),
    "grouped_query": Case(
        "grouped_query", lambda **a: GroupedQueryAttention(WIDTH, HEADS, 2, **a), TURNED, 3
    ),
    "latent": Case(
        "multi_head_latent",
        lambda **a: MultiHeadLatentAttention(WIDTH, HEADS, 8, 9, 4, 6, 6, **a),
        arity=3,
        plain=False,
    ),
    "paged": Case(
        "paged",
        lambda **a: PagedAttention(WIDTH, HEADS, None, 4, 64, 2, **a),
        TURNED,
        3,
    ),
    "flash_attention_3": Case(
        "flash_attention_3",
        lambda **a: FlashAttention3(embed_dim=WIDTH, num_heads=HEADS, causal=True, **a),
        NO_BIAS | TURNED,
    ),
    "ring": Case("ring", lambda **a: RingAttention(WIDTH, HEADS, num_kv_heads=2, **a), TURNED),
    "differential": Case(
        "differential", lambda **a: DifferentialAttention(WIDTH, HEADS, **a), TURNED, 3, plain=False
    ),
    "differential_v2": Case(
        "differential",
        lambda **a: DifferentialAttention(WIDTH, HEADS, variant="v2", num_kv_heads=2, **a),
        TURNED,
        3,
    ),
    "neighborhood": Case(
        "neighborhood",
        lambda **a: NeighborhoodAttention(WIDTH, HEADS, 3, **a),
        NO_BIAS | {"causal": True},
        2,
        cached=False,
        plain=False,
    ),
    "switch_head": Case(
        "switch_head",
        lambda **a: SwitchHeadAttention(WIDTH, HEADS, top_k=2, **a),
        TURNED,
        3,
        plain=False,
    ),
    "chunked_prefill": Case("chunked_prefill", chunked, TURNED),
}
quick = settings(max_examples=6, deadline=None, derandomize=True)


def names(condition: Callable[[Case], bool] = lambda case: True) -> list[str]:
    return [name for name, case in CASES.items() if condition(case)]


def tokens(count: int, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        batch, count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def call(name: str, module: nn.Module, x: Tensor, **arguments: Any) -> AttentionOutput:
    case = CASES[name]
    if case.mechanism == "cross":
        arguments.setdefault("context", x)
    if case.grid:
        arguments["spatial_shape"] = case.grid
    if case.mechanism in ("paged", "chunked_prefill"):
        arguments.setdefault("use_cache", False)
    return module(x, **arguments, return_dict=True)


def step(name: str, module: nn.Module, x: Tensor, cache: Any) -> AttentionOutput:
    """New tokens after those of the cache."""
    if isinstance(module, ChunkedPrefill):
        module = module.attention_module or module
    return module(x, past_key_value=cache, use_cache=True, return_dict=True)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_all_seventeen_mechanisms_are_here():
    assert {case.mechanism for case in CASES.values()} == set(MECHANISMS)


@pytest.mark.parametrize("name", CASES)
def test_one_call_fits_all_and_gives_one_type(name):
    case, module = CASES[name], CASES[name].module()
    x = tokens(16)
    result = call(name, module, x, **COMMON)
    assert type(result) is AttentionOutput
    assert result.output.shape == x.shape
    more: dict[str, Any] = {"spatial_shape": case.grid} if case.grid else {}
    if case.mechanism == "cross":
        more["context"] = x
    if case.mechanism in ("paged", "chunked_prefill"):
        more["use_cache"] = False
    legacy = module(x, **more)
    parts = legacy if isinstance(legacy, tuple) else (legacy,)
    assert len(parts) == case.arity
    assert_same(parts[0], result.output)


@pytest.mark.parametrize("name", names(lambda case: case.causal))
def test_a_future_token_changes_no_past_output(name):
    module, x = CASES[name].module(), tokens(16)
    before = call(name, module, x).output
    for changed in (5, 11):
        other = x.clone()
        other[:, changed] += 3
        after = call(name, module, other).output
        assert (after[:, :changed] - before[:, :changed]).abs().max() < 1e-6
        assert (after[:, changed] - before[:, changed]).abs().max() > 1e-3


@pytest.mark.parametrize("name", names(lambda case: case.cached))
@quick
@given(data=st.data())
def test_any_chunks_equal_one_pass(name, data):
    module = CASES[name].module()
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6), label="chunks")
    x = tokens(sum(sizes), seed=len(sizes))
    cache, parts = None, []
    with torch.no_grad():
        for part in x.split(sizes, dim=1):
            result = step(name, module, part, cache)
            cache = result.cache
            parts.append(result.output)
        assert cache is not None
        assert cache.seq_len == sum(sizes)
        assert_same(torch.cat(parts, dim=1), call(name, module, x).output)


@pytest.mark.parametrize("name", names(lambda case: case.cached))
@quick
@given(past=st.integers(1, 9), first=st.integers(1, 4), second=st.integers(1, 4))
def test_a_fork_goes_on_as_if_it_were_alone(name, past, first, second):
    module = CASES[name].module()
    x, ends = tokens(past), (tokens(first, seed=2), tokens(second, seed=3))
    with torch.no_grad():
        caches = [step(name, module, x, None).cache]
        caches.append(caches[0].clone())
        for end, cache in zip(ends, caches, strict=True):
            found = step(name, module, end, cache).output
            whole = call(name, module, torch.cat((x, end), dim=1)).output
            assert_same(found, whole[:, past:])


@pytest.mark.parametrize("name", names(lambda case: case.cached and case.crops))
@quick
@given(kept=st.integers(1, 9), dropped=st.integers(1, 4), more=st.integers(1, 4))
def test_cropped_slots_are_never_read_again_whatever_they_hold(name, kept, dropped, more):
    module, x = CASES[name].module(), tokens(kept + more)
    noise = torch.full((2, dropped, WIDTH), torch.nan)
    with torch.no_grad():
        cache = step(name, module, x[:, :kept], None).cache
        step(name, module, noise, cache)
        window = getattr(cache, "window", kept + dropped)
        if kept - min(kept, window - 1) < kept + dropped - window:
            with pytest.raises(ValueError, match="already dropped"):
                cache.crop(kept)
            return
        cache.crop(kept)
        found = step(name, module, x[:, kept:], cache).output
        assert_same(found, call(name, module, x).output[:, kept:])


@pytest.mark.parametrize("name", names(lambda case: case.cached))
def test_reordered_sequences_go_on_in_their_new_places(name):
    module, x = CASES[name].module(), tokens(9, batch=3)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = step(name, module, x[:, :6], None).cache
        cache.reorder(order)
        found = step(name, module, x[:, 6:], cache).output
        whole = call(name, module, torch.cat((x[order, :6], x[:, 6:]), dim=1)).output
        assert_same(found, whole[:, 6:])


@pytest.mark.parametrize("name", names(lambda case: case.pads and case.mechanism != "neighborhood"))
@quick
@given(lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3))
def test_a_ragged_batch_equals_each_sequence_alone(name, lengths):
    module = CASES[name].module()
    size = max(lengths)
    x = tokens(size, batch=len(lengths))
    keep = torch.arange(size) < torch.tensor(lengths)[:, None]
    together = call(name, module, x, attention_mask=keep).output
    for row, length in enumerate(lengths):
        alone = call(name, module, x[row : row + 1, :length]).output
        assert_same(together[row : row + 1, :length], alone)


@pytest.mark.parametrize("name", names(lambda case: case.pads and case.mechanism not in ("paged",)))
def test_rows_without_a_key_give_zeros_and_finite_gradients(name):
    module, queries = CASES[name].module(), tokens(9, seed=3).requires_grad_()
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1] = False
    result = call(name, module, queries, attention_mask=keep)
    assert not result.output[1].any()
    assert result.output[0].any()
    result.output.sum().backward()
    gradients = [queries.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("name", names(lambda case: case.plain))
def test_the_map_times_the_values_goes_into_the_output_projection(name):
    module, x = CASES[name].module(), tokens(13)
    inner: Any = getattr(module, "attention_module", None) or module
    seen: list[Tensor] = []
    inner.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        maps = call(name, module, x, output_attentions=True).attentions
        assert maps is not None
        values = inner.v_proj(x).unflatten(-1, (-1, inner.head_dim)).transpose(1, 2)
        values = values.repeat_interleave(maps.shape[1] // values.shape[1], dim=1)
        rebuilt = (maps @ values).transpose(1, 2).flatten(2)
        if name == "longformer":  # its global row reads values of its own
            rebuilt, seen = rebuilt[:, 1:], [torch.cat(seen, dim=1)[:, 1:]]
    assert_same(rebuilt, torch.cat(seen, dim=1))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    module = CASES[name].module(torch.float64)
    count = 16 if CASES[name].grid else 5
    x = tokens(count, batch=1, dtype=torch.float64).requires_grad_()
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert torch.autograd.gradcheck(
        lambda given, *_: call(name, module, given).output, (x, *weights), fast_mode=True
    )


def shape_of(name: str) -> tuple[dict[str, Any], int]:
    """What the catalog is told of the module here, and the parts that hold as much."""
    parameters: dict[str, dict[str, Any]] = {
        "favor": {"feature_map": "softmax_kernel"},
        "local": {"sparsity_pattern": "local", "local_window": 4},
        "sliding_window": {"window_size": 5, "num_kv_heads": 2},
        "grouped_query": {"num_kv_heads": 2},
        "differential_v2": {"num_kv_heads": 2},
        "latent": {"kv_lora_rank": 8, "qk_rope_head_dim": 4},
        "paged": {"block_size": 4, "num_kv_heads": 2},
        "ring": {"ring_size": 3},
    }
    if CASES[name].mechanism == "sparse" and name != "local":
        return {"sparsity_pattern": name}, 1
    return parameters.get(name, {}), 3 if name == "ring" else 1


@pytest.mark.parametrize("name", names(lambda case: case.cached))
@pytest.mark.parametrize("count", [1, 3, 14])
def test_a_cache_weighs_what_the_catalog_says(name, count):
    case = CASES[name]
    module = case.module()
    with torch.no_grad():
        cache = step(name, module, tokens(count, batch=1), None).cache
    parameters, ranks = shape_of(name)
    head_dim = WIDTH // HEADS // (2 if name == "differential" else 1)
    kv_heads = 2 if name in ("ring", "chunked_prefill") else HEADS
    # the second variant keeps what grouped heads keep
    record = MECHANISMS["grouped_query" if name == "differential_v2" else case.mechanism]
    said = record.cache_bytes(HEADS, kv_heads, head_dim, count, 1, 4, **parameters)
    assert cache.nbytes() == said * ranks


@pytest.mark.parametrize(
    "name", ["multi_head", "self", "flash", "grouped_query", "sliding_window", "local", "strided", "ring"]
)
def test_any_pool_of_blocks_can_hold_the_tokens(name):
    module, x = CASES[name].module(), tokens(11)
    kv_heads = 2 if name in ("grouped_query", "sliding_window", "ring") else HEADS
    pages = PagedKV(32, 4, kv_heads, WIDTH // HEADS)
    with torch.no_grad():
        cache: Any = PagedSequences.fresh(pages, 2)
        parts = [step(name, module, part, cache).output for part in x.split([6, 1, 4], dim=1)]
        assert_same(torch.cat(parts, dim=1), call(name, module, x).output)


@pytest.mark.parametrize("name", names(lambda case: case.cached and case.mechanism not in ("paged",)))
def test_a_pair_of_tensors_is_a_past_and_stays_as_it_is(name):
    module, x = CASES[name].module(), tokens(4)
    with torch.no_grad():
        cache = step(name, module, x[:, :3], None).cache
        pair = tuple(part.clone() for part in cache)
        kept = tuple(part.clone() for part in pair)
        found = step(name, module, x[:, 3:], pair).output
        assert_same(found, call(name, module, x).output[:, 3:])
    assert all(torch.equal(now, before) for now, before in zip(pair, kept, strict=True))


def test_a_cache_of_another_kind_is_refused_by_name():
    module = CASES["latent"].module()
    with pytest.raises(ValueError, match="past_key_value must be a LatentKV"):
        step("latent", module, tokens(2), ContiguousKV())
    latent = step("latent", module, tokens(2), None).cache
    with pytest.raises(ValueError, match="one of ContiguousKV, PagedSequences; got LatentKV"):
        step("grouped_query", CASES["grouped_query"].module(), tokens(2), latent)


def test_the_short_names_of_the_guide_are_the_same_classes():
    short = {
        "GQA": GroupedQueryAttention,
        "SWA": SlidingWindowAttention,
        "MLA": MultiHeadLatentAttention,
        "DSA": SparseAttention,
        "DiffAttn": DifferentialAttention,
        "SwitchHead": SwitchHeadAttention,
        "MemoryEfficientAttention": EfficientAttention,
        "CausalLinearAttention": LinearAttention,
    }
    assert {name: getattr(attnlab_kernels, name) for name in short} == short


@pytest.mark.parametrize("name", ["hidden_size", "dim", "d_model", "embed_dim", "query_dim"])
def test_the_width_answers_to_all_its_names(name):
    for record in MECHANISMS.values():
        if record.id != "chunked_prefill":
            kind = getattr(attnlab_kernels, record.class_name)
            assert kind(**{name: WIDTH, "num_heads": HEADS}).dim == WIDTH
            with pytest.raises(ValueError, match="names of the width must agree"):
                kind(**{name: WIDTH, "dim" if name != "dim" else "d_model": 2 * WIDTH, "num_heads": HEADS})
