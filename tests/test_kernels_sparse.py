"""Sparse attention: slow definitions, transformers' Longformer and BigBird, and the laws of a pattern that is fixed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab_kernels import BlockSparseAttention, ChunkedPrefill, Padding, SparseAttention, Window
from attnlab_kernels.operations.sparse.reference import full_map, run
from attnlab_kernels.patterns import (
    BigBird,
    Dense,
    Fixed,
    Local,
    LocalGlobal,
    Longformer,
    Pattern,
    PatternError,
    Strided,
)

LENGTH, HEADS = 83, 3
MAKERS = {
    "local": lambda causal: Local(causal, 7),
    "local_one": lambda causal: Local(causal, 1),
    "local_all": lambda causal: Local(causal, 500),
    "strided": lambda causal: Strided(causal, 11),
    "strided_one": lambda causal: Strided(causal, 1),
    "fixed": lambda causal: Fixed(causal, 13, 3),
    "local_global": lambda causal: LocalGlobal(causal, 9, 5),
    "longformer": lambda causal: Longformer(causal, 6, 2),
    "bigbird": lambda causal: BigBird(causal, 8, 2, layer=4),
    "bigbird_wide": lambda causal: BigBird(causal, 8, 1, global_blocks=2, sliding_blocks=5, seed=9),
    "dense": lambda causal: Dense(causal),
}
MODULES: dict[str, dict[str, Any]] = {
    "local": {"local_window": 7},
    "strided": {"stride": 5},
    "fixed": {"stride": 6, "summary_tokens": 2},
    "local_global": {"local_window": 5, "global_tokens": 3},
    "longformer": {"local_window": 4, "global_tokens": 3},
    "bigbird": {"block_size": 4, "num_random": 2},
}


@cache
def drawn_blocks(pattern: BigBird, row: int, n: int) -> list[list[int]]:
    return pattern.blocks(row, n, HEADS)[1].tolist()


def slow_pair(pattern: Pattern, i: int, j: int, n: int, head: int) -> bool:
    """The papers' definitions, one pair at a time."""
    if pattern.causal and j > i:
        return False
    match pattern:
        case Dense():
            return True
        case Local():
            return abs(i - j) < pattern.window
        case Strided():
            return abs(i - j) < pattern.stride or abs(i - j) in range(0, n + 1, pattern.stride)
        case Fixed():
            first = i - i % pattern.stride
            ends = range(pattern.stride - pattern.summary, pattern.stride)
            return first <= j < first + pattern.stride or j % pattern.stride in ends
        case Longformer():
            reach = pattern.window / 2
            return i - reach <= j <= i + reach or min(i, j) < pattern.global_tokens
        case LocalGlobal():
            return abs(i - j) < pattern.window or min(i, j) < pattern.global_tokens
        case BigBird():
            row, col, last = i // pattern.block_size, j // pattern.block_size, (n - 1) // pattern.block_size
            edges = set(range(pattern.global_blocks))
            if not pattern.causal:
                edges |= {last - at for at in range(pattern.global_blocks)}
            if edges & {row, col} or abs(row - col) <= (pattern.sliding_blocks - 1) / 2:
                return True
            return col in drawn_blocks(pattern, row, n)[head]
    raise AssertionError(pattern)


@cache
def slow_mask(pattern: Pattern, n: int = LENGTH) -> torch.Tensor:
    heads = HEADS if isinstance(pattern, BigBird) else 1
    return torch.tensor(
        [[[slow_pair(pattern, i, j, n, head) for j in range(n)] for i in range(n)] for head in range(heads)]
    ).expand(HEADS, n, n)


@pytest.fixture(
    scope="module", params=[(name, causal) for name in MAKERS for causal in (True, False)], ids=str
)
def case(request) -> tuple[Pattern, torch.Tensor]:
    name, causal = request.param
    pattern = MAKERS[name](causal)
    return pattern, slow_mask(pattern)


def tensors(n: int = LENGTH, dtype=torch.float32, kv_heads: int = HEADS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, 8), (kv_heads, 8), (kv_heads, 5))
    return [torch.randn(2, heads, n, dim, generator=generator, dtype=dtype) for heads, dim in sizes]


def module(name: str, causal: bool = True, **options: Any) -> SparseAttention:
    torch.manual_seed(1)
    return SparseAttention(24, 3, name, causal=causal, **(MODULES[name] | options)).eval()


def hidden(n: int = 41, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, n, 24, generator=torch.Generator().manual_seed(2))


def test_allowed_and_tiles_and_count_are_the_definition(case):
    pattern, mask = case
    everything = np.arange(LENGTH)
    tiled = np.zeros((HEADS, LENGTH, LENGTH), int)
    for tiles in pattern.passes(0, LENGTH, LENGTH, HEADS):
        for queries, keys, keep in tiles:
            for head in range(HEADS):
                pick = min(head, len(keys) - 1)
                tiled[head][np.ix_(queries, keys[pick])] += keep[pick]
        assert sorted(np.concatenate([tile.queries for tile in tiles])) == list(everything)
    for head in range(HEADS):
        assert (
            pattern.allowed(everything, everything, num_keys=LENGTH, head=head) == mask[head].numpy()
        ).all()
    # equality, not truth: a pair in two tiles would count twice
    assert (tiled == mask.numpy()).all()
    assert pattern.count(LENGTH, LENGTH, HEADS) == int(mask.sum())
    assert pattern.count(10, LENGTH, HEADS) == int(mask[:, -10:].sum())


def test_key_blocks_are_those_that_hold_a_pair(case):
    pattern, mask = case
    for block, size in ((0, 16), (4, 16), (5, 16), (3, 20)):
        rows = mask[2, block * size : (block + 1) * size]
        expected = [b for b in range(-(-LENGTH // size)) if bool(rows[:, b * size : (b + 1) * size].any())]
        assert pattern.key_blocks(block, size, LENGTH, head=2).tolist() == expected
    with pytest.raises(PatternError, match="query_block"):
        pattern.key_blocks(6, 16, LENGTH)


def test_output_and_lse_and_map_are_those_of_dense_attention_under_the_slow_mask(case):
    pattern, mask = case
    q, k, v = tensors()
    result = run(q, k, v, pattern)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(result.output, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(result.lse, scores.logsumexp(-1))
    torch.testing.assert_close(full_map(q, k, result.lse, pattern), scores.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_late_rows_alone_equal_late_rows_of_all(name):
    q, k, v = tensors(kv_heads=1)
    pattern = MAKERS[name](True)
    whole = run(q, k, v, pattern)
    for start, stop in ((0, 30), (30, 31), (31, LENGTH)):
        part = run(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], pattern)
        torch.testing.assert_close(part.output, whole.output[:, :, start:stop], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(part.lse, whole.lse[:, :, start:stop])


@pytest.mark.parametrize(
    "pattern", [Local(True, 3), Strided(True, 3), BigBird(False, 2, 1), Fixed(False, 4)], ids=str
)
def test_gradients_are_those_of_finite_differences(pattern):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 2, dtype=torch.float64, generator=generator) for _ in range(3))
    inputs = tuple(tensor.requires_grad_() for tensor in (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, pattern).output, inputs)


@pytest.mark.parametrize("name", ["local", "strided", "bigbird"])
def test_dead_rows_are_zero_with_finite_gradients_whatever_hidden_keys_hold(name):
    q, k, v = tensors()
    mask = Padding(((0, 60), (70, LENGTH)))
    allowed = slow_mask(MAKERS[name](True))[None].repeat(2, 1, 1, 1)
    allowed[0, ..., 60:] = False
    allowed[1, ..., :70] = False
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    for tensor in (k, v):
        tensor[0, :, 60:] = torch.nan
        tensor[1, :, :70] = torch.inf
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    result = run(q, k, v, MAKERS[name](True), mask=mask)
    torch.testing.assert_close(result.output, expected, atol=2e-6, rtol=1e-5)
    assert (result.output[1, :, :70] == 0).all()
    assert torch.isneginf(result.lse[1, :, :70]).all()
    result.output.sum().backward()
    assert all(bool(tensor.grad.isfinite().all()) for tensor in inputs if tensor.grad is not None)
    assert q.grad is not None
    assert bool(q.grad.any())


@pytest.mark.parametrize("name", ["local", "bigbird"])
def test_query_head_reads_the_key_head_of_its_group(name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 6, generator=generator) for heads in (6, 2, 2))
    all_k, all_v = (tensor.repeat_interleave(3, dim=1) for tensor in (k, v))
    pattern = MAKERS[name](True)
    assert torch.equal(run(q, k, v, pattern).output, run(q, all_k, all_v, pattern).output)


def test_a_window_and_a_bias_join_the_pattern():
    q, k, v = tensors()
    pattern = BigBird(True, 8, 2)
    bias = torch.randn(HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    allowed = slow_mask(pattern) & (distance <= 30)
    expected = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.masked_fill(~allowed, -torch.inf)
    )
    result = run(q, k, v, pattern, mask=Window(30), bias=bias)
    torch.testing.assert_close(result.output, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("pattern", [Strided(True, 11), Fixed(True, 13, 1), Strided(True, 1)], ids=str)
def test_two_hops_reach_every_past_token(pattern):
    links = slow_mask(pattern)[0].int()
    assert bool(((links @ links > 0) == torch.ones_like(links).tril().bool()).all())


class _Multiplications(TorchDispatchMode):
    """Of all batched matrix products."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.number += args[0].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))


def test_multiplications_are_those_of_the_visited_pairs(case):
    pattern, _ = case
    q, k, v = tensors()
    with _Multiplications() as counter, torch.no_grad():
        run(q, k, v, pattern)
    # 2 sequences; 8 for a score and 5 for a value
    assert counter.number == 2 * (8 + 5) * pattern.visited(LENGTH, LENGTH, HEADS)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("causal", [True, False])
def test_module_map_is_rows_of_one_that_give_its_output_and_the_tiles(name, causal):
    attention, x = module(name, causal, use_rotary=True), hidden()
    result = attention(x, output_attentions=True, return_dict=True)
    again = attention(x, return_dict=True)
    assert torch.equal(result.output, again.output)
    assert result.attentions.shape == (2, 3, 41, 41)
    torch.testing.assert_close(result.attentions.sum(-1), torch.ones(2, 3, 41))
    allowed = attention.pattern().allowed(np.arange(41), np.arange(41), num_keys=41, head=2)
    assert ((result.attentions[0, 2] > 0).numpy() == allowed).all()
    view = attention.effective_map(x, head=2, batch=1)
    np.testing.assert_allclose(
        view.tile(slice(1, 30), slice(2, 41)), result.attentions[1, 2, 1:30, 2:41], atol=1e-6
    )
    np.testing.assert_allclose(view.row_sums(), 1, atol=1e-6)
    if name != "longformer":
        value = attention.v_proj(x).unflatten(-1, (3, 8)).transpose(1, 2)
        torch.testing.assert_close(result.attentions @ value, result.aux["heads"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_longformer_with_its_projections_twice_is_local_and_global(causal):
    longformer = module("longformer", causal, use_rotary=True)
    plain = module("local_global", causal, use_rotary=True, local_window=3)
    plain.load_state_dict({n: p for n, p in longformer.state_dict().items() if "global" not in n})
    for short in "qkv":
        local = getattr(longformer, f"{short}_proj")
        getattr(longformer, f"{short}_global_proj").load_state_dict(local.state_dict())
    generator = torch.Generator().manual_seed(5)
    options: dict[str, Any] = {
        "position_bias": torch.randn(3, 41, 41, generator=generator),
        "position_ids": torch.arange(7, 48),
    }
    torch.testing.assert_close(longformer(hidden(), **options)[0], plain(hidden(), **options)[0])


def test_layers_draw_blocks_of_their_own():
    first, second = module("bigbird", layer_idx=0), module("bigbird", layer_idx=1)
    assert not torch.equal(first(hidden())[0], second(hidden())[0])


def test_dropout_is_for_training_only():
    attention, x = module("strided", dropout=0.5), hidden()
    assert torch.equal(attention(x)[0], module("strided")(x)[0])
    attention.train()
    assert not torch.equal(attention(x)[0], attention(x)[0])


def test_a_chunked_prompt_equals_the_whole():
    attention, x = module("bigbird"), hidden()
    output, cache = ChunkedPrefill(7, attention)(x)
    torch.testing.assert_close(output, attention(x)[0], atol=1e-6, rtol=1e-5)
    assert cache.seq_len == 41


@pytest.mark.parametrize("name", ["strided", "longformer"])
def test_half_types_are_summed_in_float32(name):
    q, k, v = (tensor.bfloat16() for tensor in tensors())
    result = run(q, k, v, MAKERS[name](True))
    exact = run(q.float(), k.float(), v.float(), MAKERS[name](True))
    assert result.output.dtype == torch.bfloat16
    assert torch.equal(result.output, exact.output.bfloat16())
    assert torch.equal(result.lse, exact.lse)


def test_longformer_equals_transformers_with_and_without_global_tokens():
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = longformer.LongformerConfig(
        hidden_size=24, num_attention_heads=3, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    oracle = longformer.LongformerSelfAttention(config, 0).eval()
    x = hidden(48)
    for count in (0, 3):
        ours = module("longformer", False, local_window=8, global_tokens=count, bias=True)
        for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
            getattr(ours, f"{short}_proj").load_state_dict(getattr(oracle, name).state_dict())
            getattr(ours, f"{short}_global_proj").load_state_dict(
                getattr(oracle, f"{name}_global").state_dict()
            )
        special = (torch.arange(48) < count).expand(2, 48)
        with torch.no_grad():
            expected = oracle(
                x,
                attention_mask=special * 10000.0,
                is_index_masked=torch.zeros(2, 48, dtype=torch.bool),
                is_index_global_attn=special,
                is_global_attn=count > 0,
            )[0]
            heads = ours(x, return_dict=True).aux["heads"]
        torch.testing.assert_close(heads.transpose(1, 2).flatten(2), expected, atol=1e-6, rtol=1e-5)


def test_bigbird_equals_transformers_given_our_random_blocks(monkeypatch):
    big_bird = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    config = big_bird.BigBirdConfig(
        hidden_size=24, num_attention_heads=3, block_size=8, num_random_blocks=2, use_bias=False
    )
    ours = module("bigbird", False, block_size=8)
    oracle = big_bird.BigBirdBlockSparseAttention(config, seed=0).train()
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        getattr(oracle, name).load_state_dict(getattr(ours, f"{short}_proj").state_dict())
    pattern = ours.pattern()
    assert isinstance(pattern, BigBird)
    rows = [pattern.blocks(block, 96, 3)[1] for block in range(1, 11)]
    drawn = [np.stack([row[head] for row in rows]) for head in range(3)]
    monkeypatch.setattr(oracle, "_bigbird_block_rand_mask_with_head", lambda **_: drawn)
    keep = torch.ones(2, 96)
    keep[1, 83:] = 0
    blocked, band, rows_mask, keys_mask = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(keep, 8)
    x = hidden(96)
    with torch.no_grad():
        expected = oracle(x, band, rows_mask, keys_mask, blocked, blocked)[0]
        heads = ours(x, attention_mask=keep.bool(), return_dict=True).aux["heads"]
    actual = heads.transpose(1, 2).flatten(2)
    torch.testing.assert_close(actual[0], expected[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(actual[1, :83], expected[1, :83], atol=1e-6, rtol=1e-5)


def test_seed_constructor_and_aliases_work_literally():
    attention = SparseAttention(
        dim=24,
        num_heads=3,
        sparsity_pattern="bigbird",
        local_window=256,
        global_tokens=1,
        num_random=3,
        stride=64,
    )
    output, maps, cache = attention(hidden())
    assert output.shape == (2, 41, 24)
    assert maps is None
    assert cache is None
    blocks = BlockSparseAttention(24, 3, block_size=4, num_global_blocks=2, num_random_blocks=1)
    output, cache = blocks(hidden(), use_cache=True)
    assert cache.seq_len == 41
    assert blocks.pattern() == BigBird(True, 4, 1, global_blocks=2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"sparsity_pattern": "dsa"}, "sparsity_pattern"),
        ({"sparsity_pattern": "longformer", "local_window": 5}, "even"),
        ({"sparsity_pattern": "strided", "stride": 0}, "stride"),
        ({"sparsity_pattern": "fixed", "stride": 4, "summary_tokens": 5}, "summary_tokens"),
        ({"sparsity_pattern": "bigbird", "block_size": 0}, "block_size"),
        ({"sparsity_pattern": "bigbird", "num_random": -1}, "num_random"),
        ({"sparsity_pattern": "bigbird", "sliding_blocks": 2}, "sliding"),
        ({"local_window": 0}, "local_window"),
        ({"implementation": "flash"}, "implementation"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(options, word):
    with pytest.raises(ValueError, match=word):
        SparseAttention(24, 3, **options)


def test_calls_that_would_not_be_the_full_forward_are_refused():
    x = hidden()
    with pytest.raises(PatternError, match="causal"):
        module("local", False)(x, use_cache=True)
    with pytest.raises(PatternError, match="context"):
        module("local")(x, key_value_states=x)
    with pytest.raises(ValueError, match="agree"):
        module("local")(x, implementation="auto", backend="tiled")
    with pytest.raises(TypeError, match="sequence_ids"):
        module("local")(x, sequence_ids=x)
    longformer = module("longformer")
    cache = longformer(x[:, :2], use_cache=True)[2]
    with pytest.raises(PatternError, match="first chunk"):
        longformer(x[:, 2:], past_key_value=cache, use_cache=True)
    rolling = module("local")(x, use_cache=True)[2]
    with pytest.raises(ValueError, match="past_key_value"):
        module("strided")(x, past_key_value=rolling)
