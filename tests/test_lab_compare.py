"""Laws of the comparison: only what differs, honest ratios, validity notes, signed differences, distances."""

import json
import re

import numpy as np
import pytest

from attnlab import compare
from attnlab.views import aligned_map
from attnlab.views import difference as pixels
from attnlab.views.errors import NotFound, ViewError


@pytest.fixture
def made(sqlite_store, make_traced):
    return make_traced(sqlite_store, outcomes=["unsupported"])


def names(rows):
    return [(row.group, row.name) for row in rows]


def test_the_table_holds_what_differs_and_nothing_else(made):
    comparison = compare.compare_runs(made.store, made.run_ids[:2])
    assert all(len({json.dumps(value) for value in row.values}) == 2 for row in comparison.varying)
    assert all(len({json.dumps(value) for value in row.values}) == 1 for row in comparison.equal)
    assert ("spec", "mechanism") in names(comparison.varying)
    assert ("spec", "window_size") in names(comparison.varying)
    assert ("spec", "model") in names(comparison.equal)
    assert ("environment", "torch") in names(comparison.equal)


def test_ratios_are_to_the_first_run(made):
    rows = compare.compare_runs(made.store, made.run_ids).varying
    latency = next(row for row in rows if row.name == "latency_ms")
    assert latency.ratios == [1.0, latency.values[1] / latency.values[0], None]
    mechanism = next(row for row in rows if row.name == "mechanism")
    assert mechanism.ratios == [None, None, None]


def test_a_run_without_a_result_stays_and_is_noted(made):
    comparison = compare.compare_runs(made.store, made.run_ids)
    state = next(row for row in comparison.varying if row.name == "state")
    assert state.values == ["succeeded", "succeeded", "unsupported"]
    assert any("unsupported (made to be unsupported)" in note for note in comparison.notes)
    assert any(note.startswith("Approximate swap") for note in comparison.notes)
    json.dumps(comparison.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "other"}, "The models differ"),
        ({"dtype": "bfloat16"}, "The dtypes differ"),
        ({"batch_size": 4}, "Batch size or phase differ"),
        ({"phase": "decode"}, "Batch size or phase differ"),
        (
            {"environment": {"device": "cuda", "torch": "2.13.0", "threads": 1}},
            "environments differ (device)",
        ),
        (
            {"latency_ms": {"detail": {"conditions": {"disturbed": ["by others"]}}}},
            "was disturbed while timed: by others.",
        ),
        (
            {"latency_ms": {"detail": {"conditions": {"throttled": ["power cap"]}}}},
            "was throttled while timed: power cap.",
        ),
    ],
)
def test_what_makes_numbers_incomparable_is_said(made, change, says):
    document = compare.compare_runs(made.store, made.run_ids[:2]).documents[0]
    same = compare.validity_notes([document, document], [(("a",), ("a",))] * 2)
    notes = compare.validity_notes([document, document | change], [(("a",), ("a",))] * 2)
    assert same == []
    assert [note for note in notes if says in note] == notes


def test_runs_that_were_disturbed_alike_share_one_note(made):
    document = compare.compare_runs(made.store, made.run_ids[:2]).documents[0]
    runs = [
        document | {"id": number, "latency_ms": {"detail": {"conditions": {kind: [f"reason {number}"]}}}}
        for number, kind in ((1, "disturbed"), (2, "throttled"), (3, "disturbed"), (4, "disturbed"))
    ]
    assert compare.validity_notes(runs, [None] * 4) == [
        "#1, #3 and #4 were disturbed while timed: #1: reason 1. #3: reason 3. #4: reason 4.",
        "#2 was throttled while timed: reason 2.",
    ]


def test_what_only_a_timed_run_tells_of_its_machine_is_no_difference(made):
    document = compare.compare_runs(made.store, made.run_ids[:2]).documents[0]
    plain = document | {"environment": {"device": "cpu"}}
    timed = document | {"environment": {"device": "cpu", "ceilings": {"copy": 12.5}}}
    assert compare.validity_notes([plain, timed], [(("a",), ("a",))] * 2) == []


def test_another_module_on_the_same_machine_is_no_other_machine(made):
    document = compare.compare_runs(made.store, made.run_ids[:2]).documents[0]
    ours, theirs = (
        document | {"environment": {"device": "cpu", "model": {"architecture": name}}} for name in "ab"
    )
    assert compare.validity_notes([ours, theirs], [(("a",), ("a",))] * 2) == []


def test_different_inputs_are_said_and_a_longer_cut_of_the_same_text_is_told_apart(made):
    document = compare.compare_runs(made.store, made.run_ids[:2]).documents[0]
    longer = document | {"sequence_length": 78}
    other = compare.validity_notes([document, document], [(("a", "b"), ("a", "b")), (("a", "c"), ("a", "c"))])
    cut = compare.validity_notes([document, longer], [(("a",), ("a",)), (("a", "b"), ("a", "b"))])
    assert "differ in their tokens" in other[0]
    assert "differ in their lengths" in cut[0]
    assert compare.validity_notes([document, document], [None, (("a",), ("a",))]) == []


@pytest.mark.parametrize(
    ("run_ids", "says"),
    [([1], "2 to 16 run ids; got 1"), ([1, 1], "must not name a run twice"), (list(range(17)), "got 17")],
)
def test_too_few_too_many_or_repeated_runs_are_refused(made, run_ids, says):
    with pytest.raises(compare.CompareError, match=re.escape(says)):
        compare.compare_runs(made.store, run_ids)


def test_an_unknown_run_is_not_found(made):
    with pytest.raises(NotFound):
        compare.compare_runs(made.store, [made.run_ids[0], 999])


def test_nested_environments_become_dotted_names():
    document = {"a": {"b": 1}, "kernels": [{"name": "flex", "available": False}], "list": [1, 2]}
    assert compare.flatten(document) == {"a.b": 1, "kernels.flex.available": False, "list": [1, 2]}


@pytest.mark.parametrize("region", [((0, 77), (0, 77)), ((30, 77), (3, 50)), ((76, 77), (0, 77))])
def test_the_difference_is_a_minus_b_cell_by_cell(made, region):
    a, b = made.run_ids[:2]
    view = compare.difference(made.store, a, b, 1, 3, *region)
    whole = made.reference(a, 1, 3) - made.reference(b, 1, 3)
    assert view.exact
    np.testing.assert_allclose(view.values, whole[slice(*region[0]), slice(*region[1])], atol=2e-6)
    swapped = compare.difference(made.store, b, a, 1, 3, *region)
    np.testing.assert_array_equal(swapped.values, -view.values)


@pytest.mark.parametrize("size", [(1, 1), (9, 11), (77, 5)])
@pytest.mark.parametrize("block", [1, 500, 2**20])
def test_a_pooled_difference_shows_the_cell_furthest_from_zero(made, size, block, monkeypatch):
    monkeypatch.setattr(pixels, "BLOCK_CELLS", block)
    a, b = made.run_ids[:2]
    view = compare.difference(made.store, a, b, 0, 1, None, None, size[0], size[1])
    whole = compare.difference(made.store, a, b, 0, 1).values
    assert view.values.shape == size
    for y in range(size[0]):
        for x in range(size[1]):
            down = slice(y * 77 // size[0], (y + 1) * 77 // size[0])
            part = whole[down, x * 77 // size[1] : (x + 1) * 77 // size[1]]
            assert view.values[y, x] == pytest.approx(part.flat[np.abs(part).argmax()], abs=2e-6)


def test_a_mean_difference_is_the_mean_of_the_differences(made):
    a, b = made.run_ids[:2]
    view = compare.difference(made.store, a, b, 0, 1, (0, 70), (0, 70), 7, 10, "mean")
    whole = (made.reference(a, 0, 1) - made.reference(b, 0, 1))[:70, :70]
    np.testing.assert_allclose(view.values, whole.reshape(7, 10, 10, 7).mean(axis=(1, 3)), atol=2e-6)


def test_maps_of_other_sizes_that_no_token_aligns_or_other_heads_are_refused(
    sqlite_store, make_traced, monkeypatch
):
    short, long = make_traced(sqlite_store, tokens=33), make_traced(sqlite_store, tokens=35)
    a, b = short.run_ids[0], long.run_ids[0]
    with monkeypatch.context() as patched:
        patched.setattr(aligned_map.results, "run_input", lambda *_: None)
        with pytest.raises(
            ViewError, match=rf"tokens to align them by; run {a} has 33 x 33, run {b} 35 x 35"
        ):
            compare.difference(sqlite_store, a, b, 0, 0)
    with pytest.raises(ViewError, match="maps of the same size"):
        compare.map_distance(sqlite_store, a, b)
    with pytest.raises(ViewError, match="signed_max, mean; got 'max'"):
        compare.difference(sqlite_store, a, a, 0, 0, reduce="max")
    with pytest.raises(ViewError, match=r"both runs recorded, \[0, 1\]; got \[5\]"):
        compare.map_distance(sqlite_store, a, a, layers=[5])


def test_map_distances_equal_their_definitions(made):
    a, b = made.run_ids[:2]
    distance = compare.map_distance(made.store, a, b)
    assert not distance.sampled
    for layer in range(2):
        for head in range(4):
            p, q = made.reference(a, layer, head), made.reference(b, layer, head)
            variation = 0.5 * np.abs(p - q).sum(axis=1).mean()
            assert distance.total_variation[layer, head] == pytest.approx(variation, abs=1e-6)
            middle = (p + q) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
                kl = [np.nansum(np.where(x > 0, x * np.log2(x / middle), 0), axis=1) for x in (p, q)]
            assert distance.jensen_shannon[layer, head] == pytest.approx(np.mean(kl), abs=1e-5)
    assert distance.to_json()["rows_used"] == 77


def test_a_run_is_no_distance_from_itself_and_disjoint_maps_are_at_one(made):
    a = made.run_ids[0]
    same = compare.map_distance(made.store, a, a)
    assert same.total_variation.max() == 0
    assert same.jensen_shannon.max() == 0
    far = [np.eye(8), np.roll(np.eye(8), 1, axis=1)]
    entropy = [pixels._plogp(x) for x in (far[0], far[1], (far[0] + far[1]) / 2)]
    assert (entropy[2] - (entropy[0] + entropy[1]) / 2) / 8 == pytest.approx(1.0)


@pytest.mark.parametrize(("total", "most"), [(1, 1), (77, 128), (77, 16), (2048, 128), (100, 3), (9, 8)])
def test_sampled_rows_are_disjoint_inside_and_reach_the_last_row(total, most):
    spans = pixels.sample_rows(total, most)
    rows = [row for span in spans for row in range(*span)]
    assert len(rows) == len(set(rows)) <= most
    assert rows == sorted(rows)
    assert rows[0] >= 0
    assert rows[-1] == total - 1
    if total <= most:
        assert rows == list(range(total))


def test_sampling_is_stated(made):
    distance = compare.map_distance(made.store, *made.run_ids[:2], layers=[1], max_rows=16)
    assert distance.sampled
    assert distance.rows_used == 16
    assert distance.note == "mean over 16 of 77 query rows: evenly spaced blocks of 8"
    assert distance.total_variation.shape == (1, 4)
