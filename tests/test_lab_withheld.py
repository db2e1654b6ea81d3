"""A run that is not accurate shows no speed, anywhere, and says why."""

import pytest

from attnlab.compare import validity_notes
from attnlab.describe import run_document
from attnlab.export.table import measurement_rows
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views import figures
from attnlab.views.chart_table import chart_rows
from attnlab_storage import results
from attnlab_webui.experiment_view import run_facts

SPEC = {
    "name": "withheld",
    "module": {"dim": 32, "num_heads": 2},
    "vary": {"mechanism": ["multi_head"], "sequence_length": [24]},
    "record": ["timing", "accuracy"],
    "reference": "sdpa",
    "repeats": 3,
}


def run_of(store) -> results.RunRow:
    (run,) = results.runs_of(store, experiment_id=run_here(store, parse_spec(SPEC)))
    return run


def test_a_run_beyond_its_error_budget_shows_no_speed_and_why(sqlite_store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("attnlab.probes.accuracy.ROUNDINGS", -1e9)  # a budget that nothing keeps
    run = run_of(sqlite_store)
    document = run_document(sqlite_store, run.id)
    reason = document["speed_withheld"]
    assert reason.startswith("incorrect: the attention of layer 0, head 0 is off by")
    assert (run.state, run.latency_ms) == ("succeeded", None)
    for name in ("latency_ms", "attention_latency_ms", "roofline", "reference_ratio"):
        assert document[name] is None
    (row,) = chart_rows([document])
    assert (row["outcome"], row["reason"]) == ("incorrect", reason)
    assert figures.latency_info([document]).series[0].outcome == "incorrect"
    assert any(reason in note for note in validity_notes([document], [None]))
    assert "incorrect: the attention of layer 0" in run_facts(document, run)


def test_a_run_that_fails_after_it_was_timed_shows_no_speed(sqlite_store, monkeypatch: pytest.MonkeyPatch):
    def fail(procedure, subject):
        raise RuntimeError("weighed too heavy")

    monkeypatch.setattr("attnlab.procedure.Procedure._weigh", fail)
    spec = parse_spec(SPEC | {"record": ["timing", "memory"]})
    (run,) = results.runs_of(sqlite_store, experiment_id=run_here(sqlite_store, spec))
    document = run_document(sqlite_store, run.id)
    assert {"latency", "attention_latency"} <= {
        row.name for row in results.measurements(sqlite_store, run.id)
    }
    assert (document["outcome"], document["speed_discarded"]) == ("failed", True)
    for name in ("latency_ms", "attention_latency_ms", "roofline", "reference_ratio"):
        assert document[name] is None
    assert "latency" not in {row["name"] for row in measurement_rows(sqlite_store, [run.id])}
    assert chart_rows([document])[0]["outcome"] == "failed"
    assert "It was timed before, and its speed is not shown" in run_facts(document, run)


def test_an_accurate_run_shows_its_speed(sqlite_store):
    document = run_document(sqlite_store, run_of(sqlite_store).id)
    assert document["speed_withheld"] is None
    assert document["latency_ms"]["median"] > 0
    (row,) = chart_rows([document])
    assert (row["outcome"], row["reason"]) == ("succeeded", None)
