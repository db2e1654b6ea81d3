"""Distances between maps against scipy and the definitions; tokens aligned where inputs differ."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr

from attnlab.views.alignment import align_tokens
from attnlab.views.distances import head_distances, row_distances, run_distances
from attnlab.views.errors import ViewError
from attnlab_storage.database import Store

RNG = np.random.default_rng(3)


def some_rows(ties: bool) -> np.ndarray:
    rows = RNG.random((9, 31)) ** 4
    if ties:
        rows = np.round(rows, 1) + 0.05
    return rows / rows.sum(1, keepdims=True)


@pytest.mark.parametrize("ties", [False, True])
def test_row_distances_are_those_of_scipy(ties: bool) -> None:
    p, q = some_rows(ties), some_rows(ties)
    found = row_distances(p, q)
    wanted = [jensenshannon(one, other, base=2) ** 2 for one, other in zip(p, q, strict=True)]
    np.testing.assert_allclose(found["jensen_shannon"], wanted, atol=1e-12)
    np.testing.assert_allclose(found["total_variation"], np.abs(p - q).sum(1) / 2)
    wanted = np.array([spearmanr(one, other)[0] for one, other in zip(p, q, strict=True)], dtype=float)
    np.testing.assert_allclose(found["spearman"], wanted, atol=1e-12)


def test_what_only_one_row_has_counts_as_on_a_key_of_its_own() -> None:
    p, q = some_rows(False), some_rows(False)
    found = row_distances(p[:, :20], q[:, :20], p[:, 20:].sum(1), np.zeros(9))
    apart_p = np.concatenate([p[:, :20], p[:, 20:].sum(1, keepdims=True)], 1)
    apart_q = np.concatenate([q[:, :20], np.zeros((9, 1))], 1)
    wanted = row_distances(apart_p, apart_q)
    for name in ("total_variation", "jensen_shannon"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-12)


def test_two_runs_are_compared_head_by_head(traced: Any) -> None:
    a, b = traced.run_ids
    grid = run_distances(traced.store, a, b, max_rows=1000)
    assert (grid.pairs.shape, grid.matched, grid.rows_used) == ((2, 4, 4), 1.0, 77)
    for layer in range(2):
        for head in range(4):
            wanted = row_distances(traced.reference(a, layer, head), traced.reference(b, layer, head))
            for name, table in grid.measures.items():
                assert table[layer, head] == pytest.approx(np.nanmean(wanted[name]), abs=1e-5), name
    far = grid.most_changed("total_variation", 3)
    assert [one.value for one in far] == sorted(grid.measures["total_variation"].ravel())[::-1][:3]
    assert [one.value for one in grid.most_changed("spearman", 2)] == sorted(
        grid.measures["spearman"].ravel()
    )[:2]
    assert len(grid.to_json()["measures"]["spearman"]) == 2


def test_a_run_is_no_distance_from_itself(traced: Any) -> None:
    grid = run_distances(traced.store, traced.run_ids[0], traced.run_ids[0], max_rows=11)
    assert grid.rows_used < 77
    assert "evenly" in grid.note
    np.testing.assert_allclose(grid.measures["total_variation"], 0)
    np.testing.assert_allclose(grid.measures["spearman"], 1)


def test_the_heads_of_one_run_are_compared_with_each_other(traced: Any) -> None:
    run_id = traced.run_ids[0]
    grid = head_distances(traced.store, run_id, 0, 1, max_rows=100)
    wanted = row_distances(traced.reference(run_id, 0, 3), traced.reference(run_id, 1, 2))["total_variation"]
    assert grid.measures["total_variation"][3, 2] == pytest.approx(wanted.mean(), abs=1e-5)
    same = head_distances(traced.store, run_id, 0)
    np.testing.assert_allclose(np.diag(same.measures["jensen_shannon"]), 0, atol=1e-12)
    np.testing.assert_allclose(same.measures["jensen_shannon"], same.measures["jensen_shannon"].T, atol=1e-9)


def test_runs_of_another_length_are_aligned_by_their_tokens(
    sqlite_store: Store, make_traced: Callable[..., Any]
) -> None:
    long = make_traced(sqlite_store, tokens=77)
    short = make_traced(sqlite_store, tokens=60, seed=1)
    a, b = long.run_ids[0], short.run_ids[0]
    grid = run_distances(sqlite_store, a, b, layers=[0], max_rows=1000)
    # token0 to token57 come first in both, then two tokens of the end
    places = np.array([*range(58), 75, 76]), np.arange(60)
    assert (grid.rows_total, grid.matched) == (60, pytest.approx(60 / 77))
    p = long.reference(a, 0, 1)[places[0]]
    q = short.reference(b, 0, 1)[places[1]]
    lost = p.sum(1) - p[:, places[0]].sum(1)
    wanted = row_distances(p[:, places[0]], q[:, places[1]], lost, np.zeros(60))
    for name in ("total_variation", "jensen_shannon"):
        assert grid.measures[name][0, 1] == pytest.approx(wanted[name].mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "matched"),
    [
        ("abcdef", "abcdef", "abcdef"),
        ("abXcdef", "abcdYef", "abcdef"),
        ("abc", "xyz", ""),
        ("", "abc", ""),
        ("aaaa", "aa", "aa"),
        ("abcabc", "cab", "cab"),
    ],
)
def test_tokens_are_matched_in_order(a: str, b: str, matched: str) -> None:
    found = align_tokens(list(a), list(b))
    assert "".join(a[i] for i in found.a) == "".join(b[i] for i in found.b) == matched
    assert (np.diff(found.a) > 0).all()
    assert (np.diff(found.b) > 0).all()
    assert found.identical is (a == b)


def test_what_cannot_be_compared_is_refused(traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = traced.run_ids
    with pytest.raises(ViewError, match=r"layers must be some of .*\[0, 1\]; got \[5\]"):
        run_distances(traced.store, a, b, layers=[5])
    with pytest.raises(ViewError, match="max_rows must be at least 1; got 0"):
        head_distances(traced.store, a, 0, max_rows=0)
    with pytest.raises(ViewError, match="measure must be one of total_variation"):
        head_distances(traced.store, a, 0, max_rows=1).most_changed("size")
    monkeypatch.setattr("attnlab.views.alignment.MOST_COMPARED", 2)
    with pytest.raises(ViewError, match="at most 2 neighbouring tokens; got 3 and 4"):
        align_tokens(list("a123b"), list("a4567b"))
