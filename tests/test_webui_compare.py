"""Laws of the compare page: what an address asks for, which maps are linked, what is said to differ."""

import json
from dataclasses import replace

import pytest

from attnlab.compare import compare_runs
from attnlab_storage import results
from attnlab_webui import compare_view
from attnlab_webui.pages import compare
from attnlab_webui.pages.compare import Asked


@pytest.mark.parametrize(
    ("query", "runs", "pair"),
    [
        ({}, (), None),
        ({"runs": "1,2"}, (1, 2), (1, 2)),
        ({"runs": "2,1"}, (2, 1), (2, 1)),
        ({"runs": " 1 , 2,"}, (1, 2), (1, 2)),
        ({"runs": "1,2,1"}, (1, 2), (1, 2)),
        ({"runs": "1,2,3", "pair": "3,1"}, (1, 2, 3), (3, 1)),
        ({"runs": "1,2,3", "pair": "3,9"}, (1, 2, 3), (1, 2)),
        ({"runs": "1"}, (1,), None),
    ],
)
def test_an_address_names_runs_and_the_pair_of_the_difference(sqlite_store, make_traced, query, runs, pair):
    make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])
    assert compare.read_address(sqlite_store, query) == Asked(runs, pair)


@pytest.mark.parametrize("text", ["1;2", "one", "1,-2", "1,<script>", "9" * 40])
def test_an_address_that_cannot_be_read_is_answered_in_one_sentence(traced, text):
    asked = compare.read_address(traced.store, {"runs": text})
    assert asked.runs == ()
    assert "runs must be run ids separated by commas" in asked.problem
    assert "<script>" not in "".join(str(value) for value in compare.page_values(traced.store, asked))


def test_an_unknown_run_is_left_out_and_named(traced):
    asked = compare.read_address(traced.store, {"runs": f"{traced.run_ids[0]},999"})
    assert asked.runs == (traced.run_ids[0],)
    assert "There is no run 999" in asked.problem


def test_the_maps_of_the_pair_come_first_and_runs_without_maps_are_left_out(sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])
    a, b, failed = made.run_ids
    value = json.loads(compare.map_value(sqlite_store, compare.chosen_runs([a, b, failed], b, a)))
    assert value["runs"] == [b, a]
    assert value["pair"] == [b, a]
    assert value["mode"] == "compare"
    assert "recorded maps" in json.loads(compare.map_value(sqlite_store, Asked((failed,))))["message"]


def test_only_what_differs_stands_in_the_table_and_the_rest_is_folded(traced):
    comparison = compare_runs(traced.store, traced.run_ids)
    text = compare_view.table(comparison)
    shown, folded = text.split("<details", 1)
    assert "multi_head" in shown
    assert "sliding_window" in shown
    assert "window size" in shown
    assert "float32" not in shown
    assert "float32" in folded
    assert f"{len(comparison.equal)} properties are equal" in folded


def test_ratios_are_to_the_first_run():
    assert "x 0.50" in compare_view.cell("latency_ms", 5.0, 0.5)
    assert "at-good" in compare_view.cell("latency_ms", 5.0, 0.5)
    assert "at-bad" in compare_view.cell("latency_ms", 20.0, 2.0)
    assert compare_view.cell("latency_ms", 10.0) == "10 ms"
    assert compare_view.cell("peak_memory_bytes", 3_000_000) == "3.0 MB"
    assert compare_view.cell("reason", "<b>") == "&lt;b&gt;"
    assert compare_view.cell("x", None) == "—"


def test_notes_on_validity_are_shown(traced):
    notice, view, *_ = compare.page_values(traced.store, compare.chosen_runs(traced.run_ids, None, None))
    assert "Approximate swap" in notice
    assert json.loads(view)["runs"] == traced.run_ids


def test_two_runs_give_charts_a_table_and_downloads(traced):
    values = compare.page_values(traced.store, compare.chosen_runs(traced.run_ids, None, None))
    _, _, charts, latency, attention, memory, table, exports = values
    assert charts["visible"] is True
    assert all(len(figure.data) >= 2 for figure in (latency, attention, memory))
    assert "What differs" in table
    assert f"runs={traced.run_ids[0]},{traced.run_ids[1]}" in exports


def test_an_empty_page_offers_the_latest_pair(traced, sqlite_store):
    text, *rest = compare.page_values(traced.store, Asked())
    assert f"/compare?runs={traced.run_ids[0]},{traced.run_ids[1]}" in text
    assert rest[0] == ""


def test_one_run_alone_can_be_opened_by_itself(traced, sqlite_store):
    run = traced.run_ids[0]
    text = compare.page_values(traced.store, compare.chosen_runs([run], None, None))[0]
    assert f'href="/experiment?id={traced.experiment_id}&amp;run={run}"' in text
    assert f"Open #{run} alone" in text
    assert f"Run #{run} is chosen. Choose another beside it" in text


def test_an_empty_store_says_what_to_do_first(sqlite_store):
    text = compare.page_values(sqlite_store, Asked())[0]
    assert "Queue an experiment with two mechanisms first" in text
    assert 'href="/"' in text


def test_the_picker_offers_succeeded_runs_and_keeps_the_chosen_ones(sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])
    a, b, failed = made.run_ids
    runs, first, _, swap = compare.picker_values(
        sqlite_store, compare.chosen_runs([a, b, failed], None, None)
    )
    assert {value for _, value in runs["choices"]} == {a, b, failed}
    assert runs["value"] == [a, b, failed]
    assert first["visible"] is True
    assert swap["visible"] is True
    pair = compare.picker_values(sqlite_store, compare.chosen_runs([a, b], None, None))
    assert {value for _, value in pair[0]["choices"]} == {a, b}
    assert pair[1]["visible"] is False


def test_a_name_in_the_picker_is_short_and_unique(traced):
    rows = results.runs_of(traced.store, experiment_id=traced.experiment_id)
    names = [compare_view.choice(row) for row in rows]
    assert names[1] == f"#{rows[1].id} sliding_window(window_size=16) · made-up · 77 tokens · made up <b>&"
    assert len(set(names)) == 2
    other = replace(rows[0], implementation="sdpa_math", dtype="float16")
    assert compare_view.choice(other).split(" · ")[1:5] == ["sdpa_math", "made-up", "77 tokens", "float16"]
