"""A map rebuilt from Q, K and log-sum-exp is the float64 softmax, in any region, at any zoom."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window

MASKS = [Full(), Causal(), Window(6), Window(3, 4), Causal() & Padding(((5, 40),)), Padding(((0, 0),))]


def softmax64(query, key, scale, mask, batch=0):
    scores = scale * query.astype(np.float64) @ key.astype(np.float64).T
    rows, cols = np.arange(len(query)), np.arange(len(key))
    keep = mask.allowed(rows, cols, num_queries=len(query), num_keys=len(key), batch=batch)
    top = np.max(scores, axis=1, where=keep, initial=-np.inf)
    safe = np.where(np.isneginf(top), 0, top)
    weights = np.where(keep, np.exp(np.minimum(scores - safe[:, None], 700)), 0)
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore"):
        lse = safe + np.log(total)
    return weights / np.where(total == 0, 1, total)[:, None], lse


def make(num_queries: int, num_keys: int, mask: Mask, dim: int = 24, spread: float = 1.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    query = (spread * rng.standard_normal((num_queries, dim))).astype(np.float32)
    key = rng.standard_normal((num_keys, dim)).astype(np.float32)
    scale = dim**-0.5
    probabilities, lse = softmax64(query, key, scale, mask)
    return SoftmaxMap(query, key, lse.astype(np.float32), scale, mask), probabilities


def pooled(values, height, width, reduce):
    rows = [len(values) * i // height for i in range(height + 1)]
    cols = [values.shape[1] * i // width for i in range(width + 1)]
    pick = np.max if reduce == "max" else np.mean
    return np.array([[pick(values[a:b, c:d]) for c, d in pairwise(cols)] for a, b in pairwise(rows)])


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.describe())
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 41), (33, 47), (47, 33)])
def test_tile_equals_the_float64_softmax(mask, num_queries, num_keys):
    effective, expected = make(num_queries, num_keys, mask)
    assert effective.shape == (num_queries, num_keys)
    whole = effective.tile(slice(None), slice(None))
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, expected, atol=1e-6, rtol=0)
    part = effective.tile(slice(num_queries // 3, None), slice(2, num_keys - 3))
    np.testing.assert_allclose(part, expected[num_queries // 3 :, 2 : num_keys - 3], atol=1e-6, rtol=0)


def test_a_region_above_the_exact_limit_is_still_within_float32():
    effective, expected = make(700, 650, Causal())
    np.testing.assert_allclose(effective.tile(slice(None), slice(None)), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.describe())
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (64, 3), (16, 16), (200, 7)])
def test_pool_equals_pooling_the_tile(mask, reduce, height, width):
    effective, expected = make(131, 97, mask)
    rows, cols = slice(3, 131), slice(1, 97)
    got = effective.pool(rows, cols, height, width, reduce)
    want = pooled(expected[rows, cols], min(height, 128), min(width, 96), reduce)
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=0)


def test_reductions_that_are_pooled_together_are_those_pooled_alone():
    effective, _ = make(700, 1300, Causal())
    part = slice(50, 650), slice(7, 1290)
    together = effective.pools(*part, 40, 55, ("mean", "max"))
    for got, reduce in zip(together, ("mean", "max"), strict=True):
        np.testing.assert_array_equal(got, effective.pool(*part, 40, 55, reduce))
    assert (together[0] != together[1]).any()


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_pool_of_a_map_larger_than_one_block_equals_pooling_the_tile(reduce):
    effective, expected = make(1500, 1100, Causal())
    for height, width in [(3, 2), (100, 1100), (750, 11), (1499, 7)]:
        got = effective.pool(slice(None), slice(None), height, width, reduce)
        np.testing.assert_allclose(got, pooled(expected, height, width, reduce), atol=3e-6, rtol=0)


def test_a_region_smaller_than_the_screen_is_its_tile():
    effective, _ = make(40, 40, Causal())
    np.testing.assert_array_equal(
        effective.pool(slice(0, 9), slice(0, 11), 512, 512), effective.tile(slice(0, 9), slice(0, 11))
    )


def test_rows_sum_to_one_and_dead_rows_to_zero():
    effective, _ = make(47, 33, Causal())
    sums = effective.row_sums()
    assert sums.dtype == np.float64
    np.testing.assert_array_equal(sums[:14], 0)
    np.testing.assert_allclose(sums[14:], 1, atol=5e-6)
    np.testing.assert_allclose(effective.row_sums(slice(20, 25)), sums[20:25], rtol=1e-14)


def test_a_row_that_the_kernel_found_dead_is_empty_whatever_the_mask_says():
    effective, expected = make(20, 30, Causal())
    lse = effective.lse.copy()
    lse[7] = -np.inf
    dead = SoftmaxMap(effective.query, effective.key, lse, effective.scale, effective.mask)
    whole = dead.tile(slice(None), slice(None))
    assert not whole[7].any()
    np.testing.assert_allclose(np.delete(whole, 7, 0), np.delete(expected, 7, 0), atol=1e-6)
    assert dead.row_sums()[7] == 0


def test_a_wrong_log_sum_exp_shows_in_the_row_sums():
    effective, _ = make(20, 20, Causal())
    wrong = SoftmaxMap(effective.query, effective.key, effective.lse + 0.01, effective.scale, effective.mask)
    assert np.abs(wrong.row_sums() - 1).max() > 0.009


def test_scores_of_fifty_with_a_late_maximum_do_not_overflow():
    query = np.full((3, 1), 10, np.float32)
    key = np.linspace(-5, 5, 300, dtype=np.float32)[:, None]
    _, lse = softmax64(query, key, 1.0, Full())
    effective = SoftmaxMap(query, key, lse, 1.0, Full())
    np.testing.assert_allclose(effective.row_sums(), 1, atol=1e-12)
    expected, _ = softmax64(query, key, 1.0, Full())
    last = effective.pool(slice(None), slice(None), 3, 30)[:, -1]
    np.testing.assert_allclose(last, expected.max(), rtol=1e-5)


def test_what_lies_in_padded_key_slots_never_shows():
    mask = Causal() & Padding(((4, 30),))
    clean, expected = make(50, 50, mask)
    key = clean.key.copy()
    key[:4], key[30:40], key[40:] = np.nan, np.inf, 3e38
    dirty = SoftmaxMap(clean.query, key, clean.lse, clean.scale, mask)
    np.testing.assert_allclose(dirty.tile(slice(None), slice(None)), expected, atol=1e-6)
    for reduce in ("max", "mean"):
        got = dirty.pool(slice(None), slice(None), 9, 7, reduce)
        np.testing.assert_allclose(got, pooled(expected, 9, 7, reduce), atol=1e-6)
    np.testing.assert_array_equal(dirty.row_sums(), clean.row_sums())


def test_a_padding_mask_uses_its_own_batch_element():
    mask = Padding(((0, 3), (5, 9)))
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((2, 9, 8)).astype(np.float32)
    expected, lse = softmax64(query, key, 1.0, mask, batch=1)
    effective = SoftmaxMap(query, key, lse, 1.0, mask, batch=1)
    np.testing.assert_allclose(effective.tile(slice(None), slice(None)), expected, atol=1e-6)


def test_cost_follows_the_mask(monkeypatch):
    n, cells = 8192, []
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, n, 64), dtype=np.float32)
    inner = SoftmaxMap._log_weights

    def counting(self, r0, r1, c0, c1):
        cells.append((r1 - r0) * (c1 - c0))
        return inner(self, r0, r1, c0, c1)

    monkeypatch.setattr(SoftmaxMap, "_log_weights", counting)
    for mask, most in ((Window(127), 6.0), (Causal(), 1.1)):
        cells.clear()
        SoftmaxMap(query, key, np.full(n, 9, np.float32), 0.125, mask).pool(
            slice(None), slice(None), 512, 512
        )
        # blocks of rows see a little more than each row; a band of 128 in 8,192 stays a few per cent of the map
        assert mask.count(n, n) <= sum(cells) <= most * mask.count(n, n)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda m: m.pool(slice(None), slice(None), 5, 5, "median"), r"reduce must be .* got 'median'"),
        (lambda m: m.pool(slice(None), slice(None), 0, 5), r"at least 1 pixel; got 0 x 5"),
        (lambda m: m.tile(slice(None, None, 2), slice(None)), r"rows must be a slice with step 1"),
        (lambda m: SoftmaxMap(m.query, m.key[:, 1:], m.lse, 1.0, Full()), r"must share D"),
        (lambda m: SoftmaxMap(m.query, m.key, m.lse[1:], 1.0, Full()), r"lse must be \[20\]"),
    ],
)
def test_a_question_without_an_answer_is_refused_by_name(ask, says):
    effective, _ = make(20, 20, Causal())
    with pytest.raises(ValueError, match=says):
        ask(effective)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_a_large_region_is_as_exact_as_a_small_one(reduce: str) -> None:
    random = np.random.default_rng(7)
    query, key = (random.standard_normal((601, 16)).astype(np.float32) * 6 for _ in range(2))
    scores = query.astype(np.float64) @ key.astype(np.float64).T * 0.25
    top = scores.max(1)
    lse = top + np.log(np.exp(scores - top[:, None]).sum(1))
    wanted = np.exp(scores - lse[:, None])
    drawn = SoftmaxMap(query, key, lse, 0.25, Full())
    np.testing.assert_allclose(drawn.tile(slice(None), slice(None)), wanted, atol=1e-7)
    fold = np.max if reduce == "max" else np.mean
    pixels = fold(wanted.reshape(601, 601)[:600, :600].reshape(300, 2, 300, 2), axis=(1, 3))
    np.testing.assert_allclose(drawn.pool(slice(0, 600), slice(0, 600), 300, 300, reduce), pixels, atol=1e-7)
