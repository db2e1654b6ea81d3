"""Distances between maps against scipy and the definitions; tokens aligned where inputs differ."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr

from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.alignment import align_tokens, words_of
from attnlab.views.difference import allowed_difference, difference, map_distance
from attnlab.views.distances import head_distances, row_distances, run_distances
from attnlab.views.errors import ViewError
from attnlab.views.viewport import load_map
from attnlab_storage import results
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


def test_other_words_of_the_same_number_are_aligned_as_well(
    sqlite_store: Store, make_traced: Callable[..., Any]
) -> None:
    a = make_traced(sqlite_store)
    b = make_traced(sqlite_store, seed=1, words=[*a.tokens[:20], "Ġnew", *a.tokens[20:-1]])
    run_a, run_b = a.run_ids[0], b.run_ids[0]
    grid = run_distances(sqlite_store, run_a, run_b, max_rows=1000)
    places = np.arange(76), np.array([*range(20), *range(21, 77)])
    p, q = a.reference(run_a, 1, 2)[places[0]], b.reference(run_b, 1, 2)[places[1]]
    lost = [one.sum(1) - one[:, at].sum(1) for one, at in zip((p, q), places, strict=True)]
    wanted = row_distances(p[:, places[0]], q[:, places[1]], *lost)["total_variation"]
    assert (grid.rows_total, grid.matched) == (76, pytest.approx(76 / 77))
    assert grid.measures["total_variation"][1, 2] == pytest.approx(wanted.mean(), abs=1e-5)


@pytest.fixture
def signed(sqlite_store: Store) -> tuple[Store, list[int]]:
    """Two runs of differential attention whose weights are of both signs, with different λ."""
    spec = {
        "name": "signed",
        "module": {"dim": 24, "num_heads": 2},
        "vary": {
            "mechanism": [{"differential": {"lambda_init": value}} for value in (0.9, 0.6)],
            "sequence_length": [19],
        },
        "record": ["maps"],
        "repeats": 1,
    }
    experiment = run_here(sqlite_store, parse_spec(spec))
    return sqlite_store, [run.id for run in results.runs_of(sqlite_store, experiment_id=experiment)]


def test_signed_maps_have_a_total_variation_and_no_divergence(signed: tuple[Store, list[int]]) -> None:
    store, (a, b) = signed
    whole = slice(None), slice(None)
    maps = [[load_map(store, run, 0, head).tile(*whole).astype(float) for head in (0, 1)] for run in (a, b)]
    assert all((one < 0).any() and (one > 0).any() for run in maps for one in run)
    grid, distance = run_distances(store, a, b), map_distance(store, a, b)
    for head in (0, 1):
        wanted = 0.5 * np.abs(maps[0][head] - maps[1][head]).sum(1).mean()
        assert wanted > 0.01
        assert grid.measures["total_variation"][0, head] == pytest.approx(wanted, abs=1e-9)
        assert distance.total_variation[0, head] == pytest.approx(wanted, abs=1e-9)
    wanted = 0.5 * np.abs(maps[0][0] - maps[0][1]).sum(1).mean()
    assert head_distances(store, a, 0).measures["total_variation"][0, 1] == pytest.approx(wanted, abs=1e-9)
    for found in (grid, distance):
        assert "no Jensen-Shannon divergence where weights may be negative" in found.note
        assert "NaN" not in json.dumps(found.to_json())
    assert np.isnan(grid.measures["jensen_shannon"]).all()
    assert np.isnan(distance.jensen_shannon).all()
    with pytest.raises(ViewError, match=r"that these maps have, got 'jensen_shannon': .* no distribution"):
        grid.most_changed("jensen_shannon")


def test_a_key_of_negative_weight_alone_counts() -> None:
    p, q = np.array([[1.5, -0.5]]), np.array([[1.5, -0.25]])
    found = row_distances(p, q)
    assert found["total_variation"] == pytest.approx(0.125)
    assert found["spearman"] == pytest.approx(1)
    assert np.isnan(found["jensen_shannon"]).all()


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


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (["The", " bank", "ing"], ["[CLS]", "the", "bank", "##ing"], ["the", "bank", "ing"]),
        (["ĠThe", "Ġbank"], ["▁The", "▁bank"], ["The", "bank"]),
        (["C", "(", "c"], ["C", "(", "c"], ["C", "(", "c"]),
        ([" ", "##", "Ġ"], [" ", "##", "Ġ"], [" ", "##", "Ġ"]),
    ],
)
def test_tokens_of_two_tokenizers_are_matched_by_what_they_say(
    a: list[str], b: list[str], words: list[str]
) -> None:
    said = words_of(a, b)
    found = align_tokens(*said)
    assert [said[0][i] for i in found.a] == [said[1][i] for i in found.b] == words


def test_two_models_are_compared_at_the_words_of_their_text(
    sqlite_store: Store, make_traced: Callable[..., Any]
) -> None:
    one = make_traced(sqlite_store, tokens=5, words=["The", " bank", " of", " the", " bank"])
    lower = ["[CLS]", "the", "bank", "of", "the", "bank", "[SEP]"]
    other = make_traced(sqlite_store, tokens=7, seed=1, words=lower, model="another")
    same = make_traced(sqlite_store, tokens=7, seed=1, words=lower)
    a, b = one.run_ids[0], other.run_ids[0]
    p, q = one.reference(a, 1, 2), other.reference(b, 1, 2)[1:6]
    grid = run_distances(sqlite_store, a, b)
    assert (grid.matched, grid.rows_used) == (5 / 7, 5)
    assert grid.measures["total_variation"][1, 2] == pytest.approx(
        row_distances(p, q[:, 1:6], 0.0, q[:, 0])["total_variation"].mean(), abs=1e-7
    )
    with pytest.raises(ViewError, match="none in common"):
        run_distances(sqlite_store, a, same.run_ids[0])


def test_what_only_the_second_of_two_texts_may_attend_to_is_no_masked_difference(
    sqlite_store: Store, make_traced: Callable[..., Any]
) -> None:
    words = [f"word{at}" for at in range(40)]
    narrow = make_traced(sqlite_store, tokens=40, words=words).run_ids[1]
    wide = make_traced(sqlite_store, tokens=41, words=["first", *words], seed=2)
    heads = (narrow, 0, 1), (wide.run_ids[0], 0, 1)
    for pixels in (40, 11):
        view = difference(sqlite_store, narrow, wide.run_ids[0], 0, 1, height=pixels, width=pixels)
        edges = np.arange(pixels) * 40 // pixels
        seen = np.maximum.reduceat(np.maximum.reduceat(np.tri(40), edges, 0), edges, 1) > 0
        np.testing.assert_array_equal(allowed_difference(sqlite_store, view, *heads), seen)


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
