"""A decoded token of linear attention: the row of its map, from a state that was told to keep the keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnlab_kernels import LinearAttention
from attnlab_kernels.attention_call import AttentionCall, hearing
from attnlab_kernels.linear_map import LinearMap
from attnlab_kernels.linear_state import LinearState

FEATURES: list[dict[str, Any]] = [{}, {"feature_map": "softmax_kernel"}, {"feature_map": "identity"}]


def make(**changes: Any) -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(24, 3, **changes).eval()


def hidden(tokens: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, 24, generator=torch.Generator().manual_seed(1))


def decoded(
    module: LinearAttention, x: Tensor, state: LinearState, *cuts: int
) -> tuple[AttentionCall, Tensor]:
    """The prompt in pieces up to the cuts, then what is told of the rest."""
    calls: list[AttentionCall] = []
    with torch.no_grad():
        for start, stop in zip((0, *cuts), cuts, strict=False):
            module(x[:, start:stop], past_key_value=state, use_cache=True)
        with hearing(calls.append):
            output = module(x[:, cuts[-1] :], past_key_value=state, use_cache=True)[0]
    (call,) = calls
    return call, output


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("cuts", [(12,), (5, 12), (7,)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_the_rows_of_a_step_are_those_of_the_whole_map(features, cuts, causal):
    module, x = make(causal=causal, **features), hidden(13)
    call, _ = decoded(module, x, LinearState(keep_keys=True), *cuts)
    assert not call.unmapped
    assert call.key.shape[2] == call.value.shape[2] == 13
    for batch, head in ((0, 0), (1, 2)):
        query, key, below = (part[batch, head].numpy() for part in (call.query, call.key, call.normaliser))
        drawn = LinearMap(query, key, below, call.mask)
        rows = torch.from_numpy(drawn.tile(slice(None), slice(None)))
        torch.testing.assert_close(
            rows @ call.value[batch, head], call.output[batch, head], atol=1e-5, rtol=1e-4
        )
        if causal:
            with torch.no_grad():
                whole = module(x, output_attentions=True, return_dict=True).attentions[batch, head]
            torch.testing.assert_close(rows, whole[cuts[-1] :], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for again in (call.run, call.reference):
            torch.testing.assert_close(again(*call.operands), call.output, atol=1e-5, rtol=1e-4)


def test_what_is_kept_for_a_map_changes_no_number_and_no_count_of_bytes():
    module, x = make(), hidden(13)
    plain, keeping = LinearState(), LinearState(keep_keys=True)
    _, expected = decoded(module, x, plain, 5, 12)
    _, given = decoded(module, x, keeping, 5, 12)
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)
    assert keeping.nbytes() == plain.nbytes()
    assert plain.seen() is None
    keys, values = keeping.seen() or pytest.fail("no keys were kept")
    assert keys.shape == values.shape == (2, 3, 13, 8)


def test_kept_keys_are_reordered_and_cloned_with_the_state():
    module, x = make(), hidden(9)
    state = LinearState(keep_keys=True)
    decoded(module, x, state, 8)
    before = state.seen() or pytest.fail("no keys were kept")
    other = state.clone()
    other.reorder(torch.tensor([1, 1]))
    with torch.no_grad():
        module(x[:, :2], past_key_value=other, use_cache=True)
    after = other.seen() or pytest.fail("no keys were kept")
    assert after[0].shape[2] == 11
    assert torch.equal(after[0][0, :, :9], before[0][1])
    assert state.seen()[0].shape[2] == 9  # type: ignore[index]


@pytest.mark.parametrize("keep_keys", [True, False])
def test_a_state_whose_past_is_only_a_sum_has_no_map_and_says_so(keep_keys):
    module, x = make(), hidden(9)
    with torch.no_grad():
        pair = tuple(module(x[:, :8], use_cache=True)[1])
    state = LinearState.from_tuple(pair)
    state.keep_keys = keep_keys
    calls: list[AttentionCall] = []
    with torch.no_grad(), hearing(calls.append):
        module(x[:, 8:], past_key_value=state, use_cache=True)
    assert "no key of the past is kept" in calls[0].unmapped
