"""Laws of the experiment page: what it shows of every kind of run, and what its buttons do."""

from typing import Any

import pytest

from attnlab.describe import run_document
from attnlab.views.chart import Axes
from attnlab.views.labels import run_label
from attnlab_storage import queue, results
from attnlab_webui import experiment_view
from attnlab_webui.chart_view import CHART_CHOICES, Chosen, panel, picked, read_choice
from attnlab_webui.pages import experiment
from attnlab_webui.pages.experiment import Seen


@pytest.fixture
def outcomes(sqlite_store, make_traced):
    return make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed", "unsupported"])


def run_of(store, run_id: int) -> results.RunRow:
    run = results.get_run(store, run_id)
    assert run is not None
    return run


def experiment_of(store, experiment_id: int) -> results.ExperimentRow:
    found = results.get_experiment(store, experiment_id)
    assert found is not None
    return found


def seen_of(traced, run: int | None = None) -> Seen:
    return Seen(traced.experiment_id, run)


def test_the_header_says_what_all_runs_share_and_escapes_the_name(outcomes):
    row = experiment_of(outcomes.store, outcomes.experiment_id)
    runs = results.runs_of(outcomes.store, experiment_id=outcomes.experiment_id)
    text = experiment_view.header(row, runs)
    assert "made up &lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    assert "made-up · 30 tokens · float32 · batch 1 · prefill" in text
    for form in ("csv", "parquet", "json", "html", "zip"):
        assert f"/api/v1/experiments/{row.id}/export/{form}" in text


def test_every_run_has_a_row_with_its_outcome_and_only_varying_columns(outcomes):
    runs = results.runs_of(outcomes.store, experiment_id=outcomes.experiment_id)
    text = experiment_view.runs_table(runs, runs[1].id)
    for run in runs:
        assert f'data-run="{run.id}"' in text
        assert f"/experiment?id={run.experiment_id}&amp;run={run.id}" in text
    assert text.count('aria-current="true"') == 1
    assert f'data-run="{runs[1].id}" aria-current="true"' in text
    assert "sliding_window(window_size=16)" in text
    assert 'title="made to be unsupported"' in text
    assert ">tokens</th>" not in text


def test_a_running_run_shows_its_phase_and_how_far_it_is(sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=30, layers=1)
    queue.retry(sqlite_store, made.run_ids)
    submitted = queue.submit(
        sqlite_store, name="x", spec={}, spec_hash="1", points=[_point(sqlite_store, made.run_ids[0])]
    )
    claim = queue.claim(sqlite_store, "tests", run_id=submitted.run_ids[0])
    assert claim is not None
    queue.progress(sqlite_store, claim, "capture", 3, 12)
    text = experiment_view.state(run_of(sqlite_store, claim.run_id))
    assert "capture 3/12" in text
    assert 'aria-valuenow="25"' in text
    queue.cancel(sqlite_store, [claim.run_id])
    assert "ending, as asked" in experiment_view.state(run_of(sqlite_store, claim.run_id))


def _point(store, run_id):
    run = run_of(store, run_id)
    names = ("mechanism", "parameters", "implementation", "sequence_length", "dtype", "batch_size", "phase")
    return {name: getattr(run, name) for name in (*names, "model", "kind", "gpus")}


def test_the_facts_show_checks_samples_memory_and_accuracy(traced):
    run = run_of(traced.store, traced.run_ids[0])
    text = experiment_view.run_facts(run_document(traced.store, run.id), run)
    assert "2.0e-07" in text  # the larger row sum defect of the two layers
    assert "4.0e-07" in text
    assert text.count("✓") == 2
    assert "5 samples of the forward pass" in text
    assert "3.0 MB" in text
    assert "sdpa_flash" in text
    assert "2 x 4" in text


def test_a_defect_above_its_budget_is_marked():
    assert "✗" in experiment_view._judged(1e-3, experiment_view.ROW_SUM_LIMIT).html
    assert "✓" in experiment_view._judged(1e-7, experiment_view.ROW_SUM_LIMIT).html


def test_a_failed_run_shows_reason_and_escaped_detail(outcomes):
    run = run_of(outcomes.store, outcomes.run_ids[2])
    document = run_document(outcomes.store, run.id) | {"error_detail": "Traceback <script>alert(1)</script>"}
    text = experiment_view.run_facts(document, run)
    assert "made to be failed (made)" in text
    assert "&lt;script&gt;" in text
    assert "<script>" not in text


def test_the_page_chooses_the_run_asked_for_or_the_first_that_succeeded(outcomes):
    rows = results.runs_of(outcomes.store, experiment_id=outcomes.experiment_id)
    assert experiment.chosen_run(rows, outcomes.run_ids[2]) == rows[2]
    assert experiment.chosen_run(rows, 999) == rows[0]
    assert experiment.chosen_run(rows[2:], None) == rows[2]
    assert experiment.chosen_run([], None) is None


def test_a_page_with_maps_configures_the_map_and_one_without_says_why(outcomes):
    values = experiment.page_values(outcomes.store, seen_of(outcomes))
    assert f'"runs": [{outcomes.run_ids[0]}]' in values["view"]
    assert values["timer"] == {"active": False}
    failed = experiment.page_values(outcomes.store, seen_of(outcomes, outcomes.run_ids[2]))
    assert "this run failed" in failed["view"]


def test_the_timer_runs_only_while_something_runs(sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])
    queue.retry(sqlite_store, made.run_ids)
    assert experiment.page_values(sqlite_store, seen_of(made))["timer"] == {"active": True}


def test_an_unknown_id_is_answered_with_ways_out(traced):
    for asked in ("999", "x<script>", ""):
        now = Seen(int(asked) if asked.isdigit() else None)
        text = experiment.asked_for_nothing(traced.store, now, asked)
        assert f"/experiment?id={traced.experiment_id}" in text
        assert 'href="/queue"' in text
        assert "<script>" not in text
    assert experiment.asked_for_nothing(traced.store, seen_of(traced), "1") == ""
    assert experiment.page_values(traced.store, Seen(999))["result"] == {"visible": False}


def test_cancel_retry_delete_and_undo_do_what_they_say(sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])
    now = seen_of(made)
    assert "1 run queued again" in experiment.on_retry(sqlite_store, now)
    assert "1 run asked to end" in experiment.on_cancel(sqlite_store, now)
    assert "Nothing is left to cancel" in experiment.on_cancel(sqlite_store, now)
    assert "Undo brings it back" in experiment.on_delete(sqlite_store, now)
    values = experiment.page_values(sqlite_store, now)
    assert values["undo"] == {"visible": True}
    assert values["delete"] == {"visible": False}
    assert "Restored" in experiment.on_undo(sqlite_store, now)
    assert len(results.runs_of(sqlite_store, experiment_id=made.experiment_id)) == 3
    assert experiment.page_values(sqlite_store, now)["undo"] == {"visible": False}


def test_what_must_not_be_deleted_says_why(sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=30, layers=1)
    results.change_experiment(sqlite_store, made.experiment_id, pinned=True)
    assert "pinned experiment cannot be deleted" in experiment.on_delete(sqlite_store, seen_of(made))
    other = make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])
    queue.retry(sqlite_store, other.run_ids)
    assert queue.claim(sqlite_store, "tests") is not None
    assert "cancel it first" in experiment.on_delete(sqlite_store, seen_of(other))


def test_charts_hold_every_run(outcomes):
    documents = experiment.charted(outcomes.store, outcomes.experiment_id)
    shown = panel(documents, Chosen())
    assert shown.chosen == picked("latency")
    assert shown.figure is not None
    traces: Any = shown.figure.data
    drawn = {name for trace in traces for name in trace.x}
    assert drawn == {run_label(document) for document in documents}
    assert "made to be unsupported" in shown.table
    for name in CHART_CHOICES:
        made = panel(documents, picked(name[1]))
        assert made.figure is not None or "at-notice" in made.note
        assert made.table.count("<tr") == 1 + len(documents)
    assert panel([], Chosen()).figure is None


def test_a_link_says_which_chart_and_one_that_says_nonsense_gets_the_first():
    assert read_choice({"chart": "memory"}) == picked("memory")
    own = read_choice({"chart": "own", "x": "latency_ms", "y": "kl", "facet": "dtype"})
    assert own == Chosen("own", Axes("latency_ms", "kl", "", "dtype"))
    for query in ({}, {"chart": "<b>"}, {"chart": "own", "y": "run"}):
        assert read_choice(query) == Chosen()


def test_log_environment_and_spec_are_escaped(traced):
    assert "&lt;b&gt;" in experiment_view.log("<b>line</b>\n")
    assert "Nothing was printed" in experiment_view.log("  \n")
    assert "torch" in experiment_view.environment({"torch": "2.13.0", "gpu": {"name": "<x>"}})
    assert "&lt;x&gt;" in experiment_view.environment({"gpu": {"name": "<x>"}})
    row = experiment_of(traced.store, traced.experiment_id)
    assert "made up &lt;b&gt;&amp;" in experiment_view.spec(row)
