"""Caches: the same tokens come back, a rolling one keeps no more than its window, and copies are independent."""

from __future__ import annotations

import pytest
import torch

from attnlab_kernels.caches import CacheError, ContiguousKV, RollingKV


def tokens(count: int, start: int = 0, batch: int = 2, dtype=torch.float32):
    """Keys whose every number is the token's position, values its negative."""
    line = torch.arange(start, start + count, dtype=dtype)
    key = line[None, None, :, None].expand(batch, 3, count, 4).contiguous()
    return key, -key


def positions_of(view) -> list[int]:
    assert torch.equal(view.value, -view.key)
    assert (view.key == view.key[:1, :1, :, :1]).all()
    assert view.positions.tolist() == view.key[0, 0, :, 0].long().tolist()
    return view.positions.tolist()


@pytest.mark.parametrize("chunks", [[5], [1] * 7, [3, 1, 9, 1, 1], [1, 20]])
def test_a_contiguous_cache_gives_everything_back_in_order(chunks):
    cache, seen = ContiguousKV(), 0
    for count in chunks:
        view = cache.update(0, *tokens(count, seen))
        seen += count
        assert positions_of(view) == list(range(seen))
        assert cache.seq_len == seen
    assert cache.nbytes() == 2 * 2 * 3 * seen * 4 * 4


@pytest.mark.parametrize("window", [1, 2, 5, 8])
@pytest.mark.parametrize("chunks", [[5], [1] * 12, [3, 1, 9, 1, 1], [1, 20, 2]])
def test_a_rolling_cache_gives_the_tokens_that_the_window_needs(window, chunks):
    cache, seen = RollingKV(window), 0
    for count in chunks:
        view = cache.update(0, *tokens(count, seen))
        first = max(0, seen - window + 1)
        seen += count
        assert positions_of(view) == list(range(first, seen))
        assert cache.seq_len == seen
        assert cache.nbytes() == 2 * 2 * 3 * min(seen, window) * 4 * 4


@pytest.mark.parametrize("make", [ContiguousKV, lambda: RollingKV(8)], ids=["contiguous", "rolling"])
def test_crop_then_continue_equals_fresh(make):
    cache = make()
    cache.update(0, *tokens(6))
    cache.crop(4)
    assert cache.seq_len == 4
    view = cache.update(0, *tokens(3, 4))
    assert positions_of(view) == list(range(7))


def test_a_rolling_cache_says_when_the_window_has_dropped_what_a_crop_needs():
    cache = RollingKV(4)
    cache.update(0, *tokens(10))
    cache.crop(9)
    assert positions_of(cache.update(0, *tokens(1, 9))) == [6, 7, 8, 9]
    with pytest.raises(CacheError, match="length 7 needs tokens that a window of 4 has already dropped"):
        cache.crop(7)
    assert cache.seq_len == 10


@pytest.mark.parametrize("make", [ContiguousKV, lambda: RollingKV(5)], ids=["contiguous", "rolling"])
def test_a_clone_goes_its_own_way(make):
    cache = make()
    cache.update(0, *tokens(3))
    other = cache.clone()
    other.update(0, *tokens(1, 3))
    key, value = tokens(1, 3)
    view = cache.update(0, key + 100, value - 100)
    assert view.key[0, 0, -1, 0] == 103
    assert other.update(0, *tokens(1, 4)).key[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_decoding_step_does_not_copy_the_past():
    cache = ContiguousKV()
    cache.update(0, *tokens(8))
    places = {cache.update(0, *tokens(1, 8 + step)).key.data_ptr() for step in range(8)}
    assert len(places) == 1


def test_a_cache_never_writes_into_the_callers_tensors():
    key, value = tokens(6)
    cache = ContiguousKV()
    cache.update(0, key, value)
    cache.crop(2)
    cache.update(0, *tokens(2, 50))
    assert key[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("make", [ContiguousKV, lambda: RollingKV(5)], ids=["contiguous", "rolling"])
def test_reorder_moves_whole_sequences(make):
    key, value = tokens(4)
    key[1] += 10
    value[1] -= 10
    cache = make()
    cache.update(0, key, value)
    cache.reorder(torch.tensor([1, 1]))
    new, _ = cache
    assert new[0, 0, :, 0].tolist() == new[1, 0, :, 0].tolist() == [10, 11, 12, 13]


def test_layers_keep_their_own_tokens_and_the_tuple_is_the_first():
    cache = ContiguousKV()
    cache.update(1, *tokens(2))
    cache.update(0, *tokens(5))
    key, value = cache
    assert key.shape[2] == value.shape[2] == 5
    assert torch.equal(cache[0], key)
    assert (cache.length(0), cache.length(1), cache.length(7)) == (5, 2, 0)


def test_gradients_flow_through_a_growing_cache():
    key = torch.randn(1, 1, 2, 4, requires_grad=True)
    cache = ContiguousKV()
    cache.update(0, key, key)
    view = cache.update(0, key * 2, key)
    view.key.sum().backward()
    assert key.grad is not None
    assert (key.grad == 3).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda c: c.update(0, *tokens(1, batch=3)),
            r"past_key_value holds batch and heads \(2, 3\).*\(3, 3\)",
        ),
        (lambda c: c.update(0, torch.ones(2, 3, 4), torch.ones(2, 3, 4)), r"must be \[B, Hkv, n, D\]"),
        (lambda c: c.crop(5), r"length must be between 0 and the 4 tokens in the cache; got 5"),
        (lambda c: RollingKV(0), r"window must be at least 1 token; got 0"),
        (lambda c: tuple(ContiguousKV()), r"cache is empty"),
    ],
)
def test_what_a_cache_cannot_do_is_refused_by_name(call, says):
    cache = ContiguousKV()
    cache.update(0, *tokens(4))
    with pytest.raises(CacheError, match=says):
        call(cache)
