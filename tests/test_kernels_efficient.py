"""The three mechanisms called efficient attention: against independent implementations, and their laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnlab_kernels import EfficientAttention, MemoryEfficientAttention
from attnlab_kernels.masks import Causal, Full, Padding, Window
from attnlab_kernels.operations.linear.separable import separable_attend, separate
from attnlab_kernels.operations.softmax import chunked, eager
from attnlab_kernels.operations.softmax.api import attend, observing

MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(3, 1),
    "padding": Padding(((2, 11), (0, 0))),
    "causal and padding": Causal() & Padding(((3, 13), (0, 6))),
}


def make(variant: str = "memory_efficient", seed: int = 0, **changes) -> EfficientAttention:
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"hidden_size": 24, "num_heads": 3, "variant": variant} | changes
    return EfficientAttention(**arguments).eval()


def hidden(tokens: int, batch: int = 2, width: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def heads(queries: int, keys: int, kv_heads: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 5))
    query, key, value = (torch.randn(*shape, generator=source, dtype=torch.float64) for shape in shapes)
    return query, key, value


def split(module: EfficientAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        proj(x).unflatten(-1, (3, 8)).transpose(1, 2)
        for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    return query, key, value


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("queries", "chunk"), [(13, 5), (7, 1), (13, 64)], ids=str)
def test_any_chunk_gives_the_reference(mask, queries, chunk):
    query, key, value = heads(queries, 13, kv_heads=2)
    bias = torch.randn(2, 1, queries, 13, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    bias[0, :, 2, :] = -torch.inf
    want, want_lse = eager.run(query, key, value, mask=mask, scale=0.3, bias=bias)
    got, lse = chunked.run(query, key, value, mask=mask, scale=0.3, bias=bias, chunk=chunk)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)
    assert not got[0, :, 2].any()


def test_a_late_maximum_and_large_scores_change_nothing():
    query, key, value = heads(9, 17)
    query, key = query * 8, key * torch.linspace(0.1, 8, 17, dtype=torch.float64)[:, None]
    want, want_lse = eager.run(query, key, value, mask=Full(), scale=0.4)
    got, lse = chunked.run(*(part.float() for part in (query, key, value)), mask=Full(), scale=0.4, chunk=4)
    torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-6)


def test_what_lies_in_a_padded_slot_is_never_read():
    query, key, value = heads(6, 9)
    mask = Padding(((0, 5), (3, 9)))
    want, _ = chunked.run(query, key, value, mask=mask, scale=0.4, chunk=4)
    for part in (key, value):
        part[0, :, 5:] = torch.nan
        part[1, :, :3] = torch.nan
    got, _ = chunked.run(query, key, value, mask=mask, scale=0.4, chunk=4)
    assert torch.equal(got, want)


def test_chunks_outside_the_mask_are_not_visited(monkeypatch):
    visited: list[int] = []
    allowed = chunked._allowed

    def count(*arguments) -> Tensor:
        visited.append(1)
        return allowed(*arguments)

    monkeypatch.setattr(chunked, "_allowed", count)
    query, key, value = heads(12, 12)
    for mask, tiles in ((Full(), 16), (Causal(), 10), (Window(2), 7), (Padding(((0, 3),)), 4)):
        visited.clear()
        chunked.run(query, key, value, mask=mask, scale=1.0, chunk=3)
        assert len(visited) == tiles
    visited.clear()
    make(chunk_size=4)(hidden(12))
    assert len(visited) == 9


@pytest.mark.parametrize("mask", [Causal() & Padding(((2, 5), (0, 5)))], ids=["causal and padding"])
def test_chunked_gradients_are_those_of_the_formula(mask):
    inputs = [part[:, :1].clone().requires_grad_() for part in heads(5, 5)]
    bias = torch.randn(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return chunked.run(query, key, value, mask=mask, scale=0.4, bias=bias, chunk=2)[0]

    assert torch.autograd.gradcheck(call, (*inputs, bias))


def test_scores_of_one_chunk_are_all_that_is_kept_for_the_backward_pass():
    query, key, value = (part.requires_grad_() for part in heads(16, 16))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tuple(tensor.shape)), tensor)[1], lambda tensor: tensor
    ):
        chunked.run(query, key, value, mask=Causal(), scale=0.3, chunk=4)
    assert kept
    assert not [shape for shape in kept if shape[-2:] == (4, 4)]


def test_dropped_probabilities_keep_their_mean_and_their_gradient():
    query, key, value = heads(3, 40)
    torch.manual_seed(0)
    quiet, _ = chunked.run(query, key, value, mask=Full(), scale=0.1)
    many = [
        chunked.run(query, key, value, mask=Full(), scale=0.1, dropout=0.5, chunk=16)[0] for _ in range(200)
    ]
    assert (many[0] - quiet).abs().max() > 0.05
    assert (torch.stack(many).mean(0) - quiet).abs().max() < 0.1
    value.requires_grad_()
    output, _ = chunked.run(query, key, value, mask=Full(), scale=0.1, dropout=0.5, chunk=16)
    gradient = torch.autograd.grad(output.sum(), value)[0]
    # what the forward pass dropped, the recomputed one drops too: output is linear in the values
    torch.testing.assert_close((gradient * value).sum(), output.sum())


def test_the_constructor_and_returns_of_the_guide_work_as_written():
    assert MemoryEfficientAttention is EfficientAttention
    module = MemoryEfficientAttention(24, 3, dropout=0.1, chunk_size=4, causal=True, bias=True).eval()
    x = hidden(9)
    assert module(x).shape == x.shape
    keep = torch.ones(2, 9, dtype=torch.long)
    torch.testing.assert_close(module(x, attention_mask=keep), module(x))
    assert module.train()(x).shape == x.shape


@pytest.mark.parametrize("causal", [True, False])
def test_memory_efficient_equals_torch(causal):
    torch.manual_seed(0)
    theirs, mine = nn.MultiheadAttention(24, 3, batch_first=True).eval(), make(causal=causal, chunk_size=4)
    with torch.no_grad():
        for part, projection in enumerate((mine.q_proj, mine.k_proj, mine.v_proj)):
            projection.weight.copy_(theirs.in_proj_weight.chunk(3)[part])
            projection.bias.copy_(theirs.in_proj_bias.chunk(3)[part])
    mine.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x = hidden(11)
    future = torch.ones(11, 11, dtype=torch.bool).triu(1) if causal else None
    want, weights = theirs(x, x, x, attn_mask=future, average_attn_weights=False)
    got = mine(x, output_attentions=True, return_dict=True)
    torch.testing.assert_close(got.output, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.attentions, weights, atol=1e-6, rtol=0)
    assert got.aux["implementation"] == "chunked"


@pytest.mark.parametrize("variant", ["memory_efficient", "spatial_reduction"])
def test_an_observer_sees_what_was_attended_to(variant):
    module, calls = make(variant), []
    grid = {"spatial_shape": (2, 4)} if variant == "spatial_reduction" else {}
    with observing(calls.append):
        result = module(hidden(8), return_dict=True, **grid)
    (call,) = calls
    again = attend(
        call.q, call.k, call.v, mask=call.mask, scale=call.scale, bias=call.bias, implementation="eager"
    )
    torch.testing.assert_close(call.output, again.output, atol=2e-6, rtol=0)
    torch.testing.assert_close(call.lse, again.lse, atol=2e-6, rtol=0)
    assert call.implementation == result.aux["implementation"]


def test_the_linear_variant_is_two_softmaxes():
    module, x = make("linear"), hidden(9)
    query, key, value = split(module, x)
    weights = query.softmax(-1) @ key.softmax(2).mT
    result = module(x, output_attentions=True, return_dict=True)
    torch.testing.assert_close(result.attentions, weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 9), atol=1e-6, rtol=0)
    rebuilt = module.o_proj((result.attentions @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(rebuilt, result.output, atol=2e-6, rtol=0)
    assert torch.equal(module(x), result.output)


def test_the_linear_variant_reads_a_context():
    module, x, context = make("linear"), hidden(4), hidden(7, seed=5)
    result = module(x, context, output_attentions=True, return_dict=True)
    assert result.attentions.shape == (2, 3, 4, 7)
    assert module(x, context[:, :0]).shape == (2, 4, 24)


@pytest.mark.parametrize("variant", ["memory_efficient", "linear"])
def test_a_padded_batch_equals_each_sequence_alone(variant):
    module, x = make(variant, chunk_size=4), hidden(9, batch=3)
    ranges = ((0, 9), (2, 6), (0, 0))
    keep = torch.zeros(3, 9, dtype=torch.bool)
    for row, (start, stop) in enumerate(ranges):
        keep[row, start:stop] = True
    x = x.masked_fill(~keep[..., None], torch.nan)
    for mask in (keep, Padding(ranges)):
        together = module(x, attention_mask=mask)
        for row, (start, stop) in enumerate(ranges):
            alone = module(x[row : row + 1, start:stop])
            torch.testing.assert_close(together[row : row + 1, start:stop], alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("variant", ["memory_efficient", "linear"])
def test_without_any_key_the_heads_are_zero_and_gradients_finite(variant):
    module, x = make(variant, bias=False), hidden(5).requires_grad_()
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[1] = False
    output = module(x, attention_mask=keep)
    assert not output[1].any()
    assert output[0].all()
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_separable_gradients_are_those_of_the_formula():
    inputs = [part[:, :1].clone().requires_grad_() for part in heads(4, 5)]
    keep = torch.tensor([[True, True, False, True, True], [False] * 5])
    assert torch.autograd.gradcheck(lambda q, k, v: separable_attend(q, k, v, keep), inputs)
    _, weights = separate(inputs[0], inputs[1], keep)
    torch.testing.assert_close(weights.sum(2)[0], torch.ones(1, 8, dtype=torch.float64))
    assert not weights[0, :, 2].any()
    assert not weights[1].any()


@pytest.mark.parametrize("reduction", [1, 2, 3])
@pytest.mark.parametrize("flat", [True, False])
def test_spatial_reduction_equals_segformer(reduction, flat):
    from transformers import SegformerConfig
    from transformers.models.segformer.modeling_segformer import SegformerAttention

    config = SegformerConfig(attention_probs_dropout_prob=0.0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = SegformerAttention(config, 24, 3, reduction).eval()
    mine = make("spatial_reduction", reduction=reduction)
    renamed = {
        name.replace("sequence_reduction.layer_norm", "layer_norm").replace(
            "sequence_reduction.sequence_reduction", "sequence_reduction"
        ): value
        for name, value in theirs.state_dict().items()
    }
    mine.load_state_dict(renamed, strict=True)
    x = hidden(6 * 12)
    want, weights = theirs(x, 6, 12)
    given, grid = (x, (6, 12)) if flat else (x.unflatten(1, (6, 12)), None)
    got = mine(given, spatial_shape=grid, output_attentions=True, return_dict=True)
    assert got.output.shape == given.shape
    torch.testing.assert_close(got.output.reshape(want.shape), want, atol=3e-6, rtol=0)
    torch.testing.assert_close(got.attentions, weights, atol=1e-6, rtol=0)
    assert got.aux["reduced_shape"] == (6 // reduction, 12 // reduction)


def test_half_types_run_in_their_own_dtype():
    for variant in ("memory_efficient", "linear", "spatial_reduction"):
        module = make(variant)
        grid = {"spatial_shape": (4, 4)} if variant == "spatial_reduction" else {}
        exact = module(hidden(16), **grid)
        half = module.to(torch.bfloat16)(hidden(16).bfloat16(), **grid)
        assert half.dtype == torch.bfloat16
        assert (half.float() - exact).abs().max() < 0.03


@pytest.mark.parametrize("causal", [True, False])
def test_chunks_equal_the_lucidrains_package(causal):
    package = pytest.importorskip("memory_efficient_attention_pytorch", reason="needs that package")
    query, key, _ = (part.float() for part in heads(16, 16))
    want = package.memory_efficient_attention(
        query, key, key, causal=causal, q_bucket_size=4, k_bucket_size=8
    )
    mask = Causal() if causal else Full()
    got, _ = chunked.run(query, key, key, mask=mask, scale=8**-0.5, chunk=5)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_the_linear_variant_equals_its_package_up_to_the_packages_extra_scale():
    package = pytest.importorskip(
        "linear_attention_transformer.linear_attention_transformer",
        reason="needs linear-attention-transformer",
    )
    query, key, _ = heads(9, 9)
    want = package.linear_attn(query, key, key) * 8**0.5
    torch.testing.assert_close(separable_attend(query, key, key, None), want)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make("quick"), r"variant must be one of memory_efficient, linear, .*; got 'quick'"),
        (lambda: make(chunk_size=0), r"chunk_size must be at least 1; got 0"),
        (lambda: make("spatial_reduction", reduction=0), r"reduction must be at least 1; got 0"),
        (lambda: make("linear", causal=True), r"causal is not for variant 'linear'"),
        (lambda: make("spatial_reduction", use_rotary=True), r"rotary is not for variant 'spatial"),
        (lambda: make("linear")(hidden(3), causal=True), r"causal is not for variant 'linear'"),
        (lambda: make("linear")(hidden(3), attention_mask=Causal()), r"causal is not for variant 'linear'"),
        (lambda: make("linear")(hidden(3), use_cache=True), r"cache is not for .*: a new token changes"),
        (lambda: make("linear")(hidden(4), spatial_shape=(2, 2)), r"grid is not for variant 'linear'"),
        (lambda: make("linear")(hidden(3), implementation="flex"), r"runs as 'eager'; got .*'flex'"),
        (lambda: make()(hidden(3), implementation="flex"), r"runs as 'chunked'; got .*'flex'"),
        (lambda: make()(hidden(4), spatial_shape=(2, 2)), r"spatial_shape is for variant 'spatial_red"),
        (lambda: make()(hidden(3), use_cache=True), r"use_cache needs return_dict=True"),
        (lambda: make("spatial_reduction")(hidden(4)), r"spatial_shape=\(height, width\) must come"),
        (lambda: make("spatial_reduction")(hidden(6), spatial_shape=(2, 2)), r"hold the 6 tokens; got 2 x 2"),
        (lambda: make("spatial_reduction")(hidden(6), spatial_shape=(2, 3)), r"multiples of reduction = 2"),
        (
            lambda: make("spatial_reduction")(hidden(4).unflatten(1, (2, 2)), spatial_shape=(1, 4)),
            r"that of the input, \(2, 2\); got \(1, 4\)",
        ),
        (
            lambda: make("spatial_reduction")(hidden(4), hidden(4), spatial_shape=(2, 2)),
            r"context must be None in variant 'spatial_reduction'",
        ),
        (
            lambda: make("spatial_reduction")(hidden(4), attention_mask=Full(), spatial_shape=(2, 2)),
            r"attention_mask must be None in variant",
        ),
        (lambda: chunked.run(*heads(2, 2), mask=Full(), scale=1.0, chunk=0), r"chunk must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
