"""Linear attention: its three forms are one function, its features estimate the softmax, and the module's laws."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from attnlab_kernels import FAVORPlusAttention, LinearAttention, LinformerAttention, Unsupported
from attnlab_kernels.catalog import MECHANISMS
from attnlab_kernels.linear_state import LinearState
from attnlab_kernels.masks import Causal, Padding, Window
from attnlab_kernels.operations.linear.api import FORMS, linear_attend
from attnlab_kernels.operations.linear.feature_maps import draw_projection, elu_plus_one, favor
from attnlab_kernels.operations.linear.reference import LinearSums

MAPS = ("elu", "relu", "softmax_kernel", "identity")


@pytest.fixture(params=MAPS)
def feature_map(request) -> str:
    return request.param


@pytest.fixture(params=FORMS)
def form(request) -> str:
    return request.param


def make(seed: int = 0, **changes) -> LinearAttention:
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"dim": 24, "num_heads": 3} | changes
    return LinearAttention(**arguments).eval()


def hidden(tokens: int, batch: int = 2, width: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def features(queries: int, keys: int, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, queries, 5), (2, 3, keys, 5), (2, 3, keys, 4))
    query, key, value = (torch.randn(*shape, generator=source, dtype=dtype) for shape in shapes)
    return query.exp(), key.exp(), value


def sums_of(tokens: int) -> LinearSums:
    _, key, value = features(1, tokens, seed=7)
    return LinearSums(key.transpose(-1, -2) @ value, key.sum(dim=2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("past", [0, 6])
def test_every_form_is_the_formula(form, causal, past):
    query, key, value = features(13, 13)
    got = linear_attend(
        query, key, value, causal=causal, eps=0.25, past=sums_of(past) if past else None, form=form, chunk=5
    )
    _, before, old = features(1, past, seed=7)
    keys, values = torch.cat((before, key), dim=2), torch.cat((old, value), dim=2)
    assert got.denominator is not None
    for row in range(13):
        stop = past + (row + 1 if causal else 13)
        weights = (query[:, :, row, None] * keys[:, :, :stop]).sum(-1)
        want = (weights[..., None] * values[:, :, :stop]).sum(2) / (weights.sum(-1) + 0.25)[..., None]
        torch.testing.assert_close(got.output[:, :, row], want)
        torch.testing.assert_close(got.denominator[:, :, row], weights.sum(-1) + 0.25)
    torch.testing.assert_close(got.sums.normaliser, keys.sum(2))
    torch.testing.assert_close(got.sums.state, keys.transpose(-1, -2) @ values)


def test_queries_and_keys_may_differ_in_number_where_there_is_no_order(form):
    query, key, value = features(4, 9)
    want = (query @ key.mT) @ value / ((query @ key.mT).sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(linear_attend(query, key, value, causal=False, form=form).output, want)


def test_sums_carry_a_sequence_across_any_cut(form):
    query, key, value = features(11, 11)
    whole = linear_attend(query, key, value, causal=True, form="parallel")
    sums, parts = None, []
    for start, stop in pairwise((0, 1, 4, 4, 11)):
        cut = (part[:, :, start:stop] for part in (query, key, value))
        step = linear_attend(*cut, causal=True, past=sums, form=form, chunk=3)
        sums = step.sums
        parts.append(step.output)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole.output)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_formula(form, causal):
    inputs = [part[:1, :1].clone().requires_grad_() for part in features(5, 5)]

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return linear_attend(query, key, value, causal=causal, form=form, chunk=2).output

    assert torch.autograd.gradcheck(call, inputs)


def test_sums_keep_growing_where_half_types_would_stop(form):
    ones = torch.ones(1, 1, 1025, 1, dtype=torch.bfloat16)
    result = linear_attend(ones, ones, ones, causal=True, form=form)
    assert result.sums.normaliser.item() == 1025
    assert result.output.dtype == torch.bfloat16
    assert torch.equal(result.output, ones)


def test_auto_takes_one_step_for_one_token_and_chunks_for_more():
    query, key, value = features(9, 9)
    assert linear_attend(query, key, value, causal=True).form == "chunked"
    one = (part[:, :, :1] for part in (query, key, value))
    assert linear_attend(*one, causal=True).form == "recurrent"


def test_a_query_that_sees_nothing_gets_zero_also_without_epsilon(form):
    query, key, value = features(3, 3)
    result = linear_attend(query, torch.zeros_like(key), value, causal=True, eps=0, form=form)
    assert not result.output.any()
    empty = linear_attend(query[:, :, :0], key[:, :, :0], value[:, :, :0], causal=True, form=form)
    assert empty.output.shape == (2, 3, 0, 4)


def test_elu_features_stay_above_zero_and_exact():
    x = torch.tensor([-50.0, -1.0, 0.0, 2.0], requires_grad=True)
    want = torch.tensor([-50.0, -1.0, 0.0, 2.0]).double()
    want = torch.where(want > 0, want + 1, want.exp())
    torch.testing.assert_close(elu_plus_one(x).double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(elu_plus_one(x)[1:], torch.nn.functional.elu(x)[1:] + 1)
    assert torch.autograd.gradcheck(elu_plus_one, torch.linspace(-3, 3, 7).double().requires_grad_())


def test_random_rows_are_orthogonal_and_as_long_as_normal_vectors():
    rows = draw_projection(4000, 5, generator=torch.Generator().manual_seed(0))
    blocks = rows.unflatten(0, (-1, 5))
    products = blocks @ blocks.mT
    off_diagonal = products - torch.diag_embed(torch.diagonal(products, dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-4
    lengths = rows.square().sum(1)
    assert lengths.mean().item() == pytest.approx(5, rel=0.05)
    assert lengths.var().item() == pytest.approx(10, rel=0.15)
    assert draw_projection(7, 5).shape == (7, 5)
    assert draw_projection(3, 5, orthogonal=False).shape == (3, 5)


def test_random_features_estimate_the_exponential_of_the_scaled_score():
    source = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 6, 5, generator=source) / 2 for _ in range(2))
    rows = draw_projection(10_000, 5, generator=source)
    guess = favor(query, rows, stabilise="none") @ favor(key, rows, stabilise="none").mT
    want = torch.exp(query @ key.mT * 5**-0.5)
    assert ((guess - want) / want).abs().max() < 0.08
    short = rows / rows.norm(dim=1, keepdim=True)
    toy = favor(query, short, stabilise="none") @ favor(key, short, stabilise="none").mT
    assert ((toy - want) / want).abs().mean() > 0.3


def test_stabilisers_cancel():
    query, key, value = (
        hidden(7, width=20, seed=s).unflatten(-1, (2, 10)).transpose(1, 2) for s in (1, 2, 3)
    )
    rows = draw_projection(23, 10)
    plain = (favor(query, rows, stabilise="none"), favor(key, rows, stabilise="none"))
    steady = (favor(query, rows, stabilise="row"), favor(key, rows, stabilise="all"))
    want, got = (linear_attend(*pair, value, causal=False, eps=0).output for pair in (plain, steady))
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    huge = favor(query * 40, rows, stabilise="row")
    assert huge.isfinite().all()
    assert huge.amax(dim=-1).min() >= 0


def test_many_random_features_approach_softmax_attention():
    x = hidden(9) / 2
    errors = []
    for count in (8, 4096):
        module = make(feature_map="softmax_kernel", num_features=count)
        parts = (proj(x).unflatten(-1, (3, 8)).transpose(1, 2) for proj in (module.q_proj, module.k_proj))
        query, key = parts
        scores = query @ key.mT * 8**-0.5
        future = torch.ones(9, 9, dtype=torch.bool).triu(1)
        want = scores.masked_fill(future, -torch.inf).softmax(-1)
        errors.append((module(x, output_attentions=True, return_dict=True).attentions - want).abs().max())
    assert errors[1] < 0.01 < 0.1 < errors[0]


@pytest.mark.parametrize("chunks", [[5, 1, 1, 4], [1] * 11, [2, 9]], ids=str)
def test_prefill_then_decode_equals_the_full_pass(feature_map, chunks):
    module, x = make(feature_map=feature_map), hidden(11)
    whole, _ = module(x)
    cache, parts, start = None, [], 0
    for count in chunks:
        output, cache = module(x[:, start : start + count], past_key_value=cache, use_cache=True)
        start += count
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=3e-6, rtol=1e-5)
    assert cache is not None
    assert cache.seq_len == 11


def test_a_future_token_changes_no_past_output(feature_map, form):
    module, x = make(feature_map=feature_map, implementation=form), hidden(9)
    before, _ = module(x)
    x[:, 5] += 9
    change = (module(x)[0] - before).abs().amax(dim=(0, 2))
    assert change[:5].max() == 0
    assert change[5:].min() > 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_the_map_times_the_values_is_the_output(feature_map, causal):
    module, x = make(feature_map=feature_map), hidden(9)
    result = module(x, causal=causal, output_attentions=True, return_dict=True)
    values = module.v_proj(x).unflatten(-1, (3, 8)).transpose(1, 2)
    rebuilt = module.o_proj((result.attentions @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(rebuilt, result.output, atol=3e-6, rtol=1e-5)
    if feature_map in ("elu", "softmax_kernel"):
        assert result.attentions.min() >= 0
        # epsilon is the only weight that goes nowhere
        want = 1 - module.eps / result.aux["denominator"]
        torch.testing.assert_close(result.attentions.sum(-1), want, atol=2e-6, rtol=0)
        assert want.min() > 0.999
    assert causal == (not result.attentions.triu(1).any())


def test_identity_is_the_plain_product_without_a_denominator():
    module, x = make(feature_map="identity"), hidden(7)
    query, key, value = (
        proj(x).unflatten(-1, (3, 8)).transpose(1, 2)
        for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    want = (query @ key.mT * 8**-0.5).tril() @ value
    torch.testing.assert_close(
        module(x)[0], module.o_proj(want.transpose(1, 2).flatten(2)), atol=2e-6, rtol=0
    )
    assert module(x, return_dict=True).aux["denominator"] is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_sequence_alone(feature_map, causal, side):
    module, x = make(feature_map=feature_map, causal=causal), hidden(9, batch=3)
    lengths = (9, 4, 0)
    ranges = [(9 - n, 9) if side == "left" else (0, n) for n in lengths]
    keep = torch.zeros(3, 9, dtype=torch.bool)
    for row, (start, stop) in enumerate(ranges):
        keep[row, start:stop] = True
    x = x.masked_fill(~keep[..., None], torch.nan)
    for mask in (keep, keep.long()[:, None, None], Padding(tuple(ranges))):
        together, _ = module(x, attention_mask=mask)
        for row, (start, stop) in enumerate(ranges):
            alone, _ = module(x[row : row + 1, start:stop])
            torch.testing.assert_close(together[row : row + 1, start:stop], alone, atol=3e-6, rtol=1e-5)


def test_a_row_without_keys_is_zero_with_finite_gradients():
    module, x = make(), hidden(5).requires_grad_()
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[1, :3] = False
    output, _ = module(x, attention_mask=keep)
    assert not output[1, :3].any()
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_padding_counts_from_the_start_of_the_sequence_also_after_a_past():
    module, x = make(), hidden(8)
    whole, _ = module(x, attention_mask=Padding(((2, 8), (0, 7))))
    _, cache = module(x[:, :5], attention_mask=Padding(((2, 8), (0, 7))), use_cache=True)
    for mask in (Padding(((2, 8), (0, 7))), torch.tensor([[0, 0, *[1] * 6], [*[1] * 7, 0]])):
        rest, _ = module(x[:, 5:], attention_mask=mask, past_key_value=cache.clone())
        torch.testing.assert_close(rest, whole[:, 5:], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_the_cache_has_the_catalogs_bytes_whatever_the_length(name):
    module = make(feature_map=name)
    shape = {"heads": 3, "kv_heads": 3, "head_dim": 8, "layers": 1, "bytes_per_element": 4}
    for tokens in (1, 9):
        _, cache = module(hidden(tokens), use_cache=True)
        want = MECHANISMS["linear"].cache_bytes(tokens=tokens, feature_map=name, **shape)
        assert cache.nbytes() == 2 * want


def test_a_legacy_pair_is_continued_and_left_as_it_is():
    module, x = make(), hidden(9)
    whole, nothing = module(x)
    assert nothing is None
    _, cache = module(x[:, :8], use_cache=True)
    pair = tuple(tensor.clone() for tensor in cache)
    last, grown = module(x[:, 8:], past_key_value=pair, use_cache=True)
    torch.testing.assert_close(last, whole[:, 8:], atol=2e-6, rtol=0)
    torch.testing.assert_close(pair[1], cache[1])
    assert (grown[1] > pair[1]).all()


def test_a_state_follows_a_reordered_batch_and_copies_stay_apart():
    module, x = make(), hidden(6)
    _, cache = module(x[:, :5], use_cache=True)
    other = cache.clone()
    other.reorder(torch.tensor([1, 1]))
    got, _ = module(x[[1, 1], 5:], past_key_value=other)
    want, _ = module(x[:, 5:], past_key_value=cache)
    torch.testing.assert_close(got, want[[1, 1]])
    with pytest.raises(ValueError, match=r"length must stay 6 in layer 0: sums .* got 3"):
        cache.crop(3)


def test_a_context_is_read_without_order():
    module, x, context = make(), hidden(4), hidden(7, seed=5)
    result = module(x, context, output_attentions=True, return_dict=True)
    assert result.attentions.shape == (2, 3, 4, 7)
    assert result.attentions.min() > 0


def test_features_are_kept_with_the_weights_and_redrawn_only_in_training():
    module = make(feature_map="softmax_kernel", redraw_features=True)
    assert module.num_features == 16
    before = module.projection.clone()
    module(hidden(3))
    assert torch.equal(module.projection, before)
    other = make(seed=3, feature_map="softmax_kernel")
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(hidden(3))[0], module(hidden(3))[0])
    module.train()(hidden(3))
    assert not torch.equal(module.projection, before)
    _, cache = module(hidden(3), use_cache=True)
    with pytest.raises(ValueError, match="redraw_features in training cannot continue"):
        module(hidden(1), past_key_value=cache)


def test_an_implementation_of_the_softmax_is_unsupported():
    with pytest.raises(Unsupported, match="got 'sdpa_flash'"):
        make()(hidden(3), implementation="sdpa_flash")


def test_performers_class_returns_the_output_alone():
    module = FAVORPlusAttention(dim=24, num_heads=3, num_features=5).eval()
    assert module.projection.shape == (5, 8)
    assert module(hidden(4), causal=True).shape == (2, 4, 24)
    assert make()(hidden(4).double().float())[1] is None


def test_half_types_run_in_their_own_dtype(feature_map):
    module = make(feature_map=feature_map)
    exact, _ = module(hidden(20))
    half, cache = module.to(torch.bfloat16)(hidden(20).bfloat16(), use_cache=True)
    assert half.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in cache} == {torch.float32}
    scale = exact.abs().max()
    assert (half.float() - exact).abs().max() < 0.06 * scale


def test_it_equals_flash_linear_attention(form):
    naive = pytest.importorskip("fla.ops.linear_attn.naive", reason="needs flash-linear-attention")
    query, key, value = (part.float() for part in features(16, 16))
    got = linear_attend(query, key, value, causal=True, eps=1e-10, form=form).output
    turned = (part.transpose(1, 2) for part in (query, key, value))
    want = naive.naive_recurrent_linear_attn(*turned, normalize=True)
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_random_features_equal_performers():
    theirs = pytest.importorskip("performer_pytorch.performer_pytorch", reason="needs performer-pytorch")
    query, key, value = (hidden(7, width=16, seed=s).unflatten(-1, (2, 8)).transpose(1, 2) for s in (1, 2, 3))
    rows = draw_projection(11, 8)
    want = theirs.linear_attention(
        theirs.softmax_kernel(query, projection_matrix=rows, is_query=True, eps=0),
        theirs.softmax_kernel(key, projection_matrix=rows, is_query=False, eps=0),
        value,
    )
    mine = (favor(query, rows, stabilise="row"), favor(key, rows, stabilise="all"))
    got = linear_attend(*mine, value, causal=False, eps=0).output
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_causal_random_features_equal_performers_fast_attention():
    """Its rule for eps: 1e-4 in each feature, under a maximum over all keys, and 1e-6 in each sum of keys."""
    theirs = pytest.importorskip("performer_pytorch.performer_pytorch", reason="needs performer-pytorch")
    # past its chunk of 128 tokens
    query, key, value = (
        hidden(131, width=16, seed=s).unflatten(-1, (2, 8)).transpose(1, 2) for s in (1, 2, 3)
    )
    fast = theirs.FastAttention(8, nb_features=11, causal=True)
    rows = fast.projection_matrix

    def floored(x: Tensor, *dims: int) -> Tensor:
        top = (x * 8**-0.25 @ rows.T).amax(dim=dims, keepdim=True)
        return favor(x, rows, stabilise="none") * torch.exp(-top) + 1e-4 * 11**-0.5

    mine = (floored(query, -1), floored(key, -1, -2))
    sums = LinearSums(torch.zeros(*key.shape[:2], 11, 8), torch.full((*key.shape[:2], 11), 1e-6))
    for form in ("parallel", "recurrent", "chunked"):
        got = linear_attend(*mine, value, causal=True, eps=0, past=sums, form=form).output
        torch.testing.assert_close(got, fast(query, key, value), atol=2e-6, rtol=0)


def linformer(**changes) -> LinformerAttention:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"dim": 24, "num_heads": 3, "max_seq_length": 11, "num_slots": 4} | changes
    return LinformerAttention(**arguments).eval()


@pytest.mark.parametrize("tokens", [11, 7])
def test_linformer_mixes_keys_and_values_before_the_softmax(tokens):
    module, x = linformer(), hidden(tokens)
    output, maps, cache = module(x, output_attentions=True)
    assert cache is None
    query, key, value = (
        proj(x).unflatten(-1, (3, 8)).transpose(1, 2)
        for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    keys = torch.einsum("mk,bhmd->bhkd", module.key_slots[:tokens], key)
    slots = (query @ keys.mT * 8**-0.5).softmax(-1)
    torch.testing.assert_close(maps, slots, atol=2e-6, rtol=0)
    heads = module.effective_map(maps, tokens) @ value
    torch.testing.assert_close(module.o_proj(heads.transpose(1, 2).flatten(2)), output, atol=2e-6, rtol=0)


def test_linformer_equals_its_package():
    theirs_of = pytest.importorskip("linformer", reason="needs linformer").LinformerSelfAttention
    theirs, mine = theirs_of(24, 11, k=4, heads=3).eval(), linformer()
    with torch.no_grad():
        for name in "qkv":
            getattr(mine, f"{name}_proj").weight.copy_(getattr(theirs, f"to_{name}").weight)
        mine.key_slots.copy_(theirs.proj_k)
        mine.value_slots.copy_(theirs.proj_v)
        mine.o_proj.weight.copy_(theirs.to_out.weight)
        theirs.to_out.bias.zero_()
    torch.testing.assert_close(mine(hidden(9))[0], theirs(hidden(9)), atol=1e-6, rtol=0)


def test_linformer_ignores_padding():
    module, x = linformer(bias=True), hidden(9)
    together, _, _ = module(x, attention_mask=Padding(((0, 9), (0, 4))))
    torch.testing.assert_close(together[1:, :4], module(x[1:, :4])[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make(feature_map="gelu"), r"feature_map must be one of elu, relu, .*; got 'gelu'"),
        (lambda: make(num_features=0), r"num_features must be at least 1; got 0"),
        (lambda: make(num_features=4), r"are for feature_map 'softmax_kernel'; got 'elu'"),
        (lambda: make(eps=-1.0), r"eps must be between 0 and 1; got -1.0"),
        (
            lambda: make(implementation="eager"),
            r"one of auto, parallel, recurrent, chunked, triton, fla; got 'eager'",
        ),
        (lambda: make(use_rotary=True), r"rotary positions do not stay relative"),
        (lambda: make()(hidden(3), hidden(3), causal=True), r"causal must be False with a context"),
        (lambda: make()(hidden(3), hidden(3), use_cache=True), r"use_cache with a context"),
        (lambda: make()(hidden(3), position_bias=torch.zeros(1)), r"position_bias is added to scores"),
        (lambda: make()(hidden(3), past_key_value=[]), r"must be a LinearState or .*; got list"),
        (lambda: make()(hidden(5), attention_mask=Window(2)), r"must be causal or padding here"),
        (
            lambda: make()(hidden(5), attention_mask=torch.ones(5, 5).bool().tril()),
            r"the same for every query here, .*got shape \[5, 5\]",
        ),
        (lambda: make()(hidden(5), attention_mask=torch.full((2, 5), 0.5)), r"holds other weights"),
        (
            lambda: make()(
                hidden(1),
                past_key_value=make()(hidden(3), use_cache=True)[1],
                output_attentions=True,
            ),
            r"output_attentions needs all keys",
        ),
        (lambda: LinearState.from_tuple((torch.zeros(2, 3), torch.zeros(2))), r"a state \[B, H, f, Dv\]"),
        (lambda: linear_attend(*features(3, 4), causal=True), r"as many queries as keys .* got 3 and 4"),
        (lambda: linear_attend(*features(3, 3), causal=True, form="fast"), r"form must be one of auto, p"),
        (lambda: linear_attend(*features(3, 3), causal=True, eps=-1), r"eps must be at least 0; got -1"),
        (lambda: linear_attend(*features(3, 3), causal=True, chunk=0), r"chunk must be at least 1 token"),
        (lambda: linear_attend(*features(3, 3)[:2], torch.zeros(2, 3, 4, 4), causal=True), r"shapes must be"),
        (lambda: linformer(causal=True), r"causal must be False for Linformer"),
        (lambda: linformer(num_slots=0), r"num_slots must be at least 1; got 0"),
        (lambda: linformer()(hidden(12)), r"at most max_seq_length = 11; got 12"),
        (lambda: linformer()(hidden(3), use_cache=True), r"a new token changes every slot"),
        (lambda: linformer()(hidden(3), causal=True), r"causal must be False for Linformer"),
        (lambda: linformer()(hidden(3), attention_mask=Causal()), r"must be padding of \[batch, keys\]"),
        (lambda: linformer()(hidden(3), position_bias=torch.zeros(1)), r"slots have no position"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
