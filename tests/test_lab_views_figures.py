"""Laws of run documents and the charts that are made of them."""

import json
import math
from typing import Any

import pytest

from attnlab import describe
from attnlab.views import figures
from attnlab.views.errors import NotFound, ViewError
from attnlab_storage import queue, results


def drawn(figure) -> dict[str, Any]:
    """The figure as the browser gets it."""
    return json.loads(figure.to_json())


@pytest.fixture
def made(sqlite_store, make_traced):
    return make_traced(sqlite_store, outcomes=["out_of_memory", "unsupported"])


@pytest.fixture
def documents(made):
    return [describe.run_document(made.store, run_id) for run_id in made.run_ids]


def test_a_run_document_says_all_that_the_contract_names(made, documents):
    document = documents[1]
    samples = document["latency_ms"]["samples"]
    assert document["outcome"] == "succeeded"
    assert document["kernels"] == ["aten::bmm"]
    assert document["chosen"] == "banded"
    assert document["implementation"] == "auto"
    assert len(samples) == 5
    assert min(samples) <= document["latency_ms"]["p10"] <= document["latency_ms"]["median"]
    assert document["latency_ms"]["median"] == sorted(samples)[2]
    assert document["latency_ms"]["median"] <= document["latency_ms"]["p90"] <= max(samples)
    assert document["peak_memory_bytes"] == 3_000_000
    assert document["accuracy"] == {"logit_error": 1e-5, "kl": 0.01}
    assert document["map_check"] == {"row_sum_defect": 2e-7, "output_defect": 4e-7, "lse_defect": None}
    assert document["swap"] == {"kind": "approximate", "loss": {"kl": 0.01, "logit_error": 1e-5}}
    assert (document["layers"], document["heads"]) == (2, 4)
    assert document["environment"]["device"] == "cpu"
    assert document["stored_bytes"] == 2 * 77 * 4 * (4 * 8 + 2 * 8 + 4)
    assert document["times"]["seconds"] >= 0
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_run_that_failed_keeps_its_reason_and_has_no_numbers(documents):
    document = documents[2]
    assert document["outcome"] == "out_of_memory"
    assert document["reason"] == "made to be out_of_memory"
    assert document["latency_ms"] is None
    assert document["peak_memory_bytes"] is None
    assert document["accuracy"] == {}
    assert document["map_check"] == {"row_sum_defect": None, "output_defect": None, "lse_defect": None}


def test_a_queued_run_has_no_outcome_yet(sqlite_store, make_traced):
    made = make_traced(sqlite_store)
    point = {key: getattr(results.get_run(sqlite_store, made.run_ids[0]), key) for key in queue.POINT_KEYS}
    queued = queue.submit(sqlite_store, name="n", spec={}, spec_hash="1", points=[point])
    document = describe.run_document(sqlite_store, queued.run_ids[0])
    assert document["outcome"] is None
    assert document["state"] == "queued"
    assert describe.experiment_document(sqlite_store, queued.experiment_id)["runs"] == [document]


def test_numbers_that_are_not_finite_never_reach_the_document(sqlite_store, make_traced):
    made = make_traced(sqlite_store)
    point = {key: getattr(results.get_run(sqlite_store, made.run_ids[0]), key) for key in queue.POINT_KEYS}
    run_id = queue.submit(sqlite_store, name="n", spec={}, spec_hash="1", points=[point]).run_ids[0]
    claim = queue.claim(sqlite_store, "tests", run_id=run_id)
    assert claim is not None
    with results.recording(sqlite_store, claim) as session:
        rows = [
            results.MeasurementRow("latency", math.nan, "ms", samples=[math.nan, math.inf]),
            results.MeasurementRow("kl", math.nan, "nats"),
        ]
        results.record_measurements(session, claim, rows)
    document = describe.run_document(sqlite_store, run_id)
    json.dumps(document, allow_nan=False)
    assert document["latency_ms"] is None
    assert document["accuracy"] == {"kl": None}


def test_unknown_ids_are_not_found(sqlite_store):
    with pytest.raises(NotFound, match="run must be the id of a run in this store; got 5"):
        describe.run_document(sqlite_store, 5)
    with pytest.raises(NotFound, match="experiment must be the id of one in this store; got 5"):
        describe.experiment_document(sqlite_store, 5)


def test_an_experiment_document_holds_its_runs_in_grid_order(made):
    document = describe.experiment_document(made.store, made.experiment_id)
    assert document["experiment"] == made.experiment_id
    assert [run["id"] for run in document["runs"]] == made.run_ids


def test_the_latency_chart_shows_every_sample_and_the_failed_runs(documents):
    info = figures.latency_info(documents)
    samples = [document["latency_ms"]["samples"] for document in documents[:2]]
    assert [series.samples for series in info.series[:2]] == samples
    assert [series.outcome for series in info.series] == [
        "succeeded",
        "succeeded",
        "out_of_memory",
        "unsupported",
    ]
    figure = drawn(figures.latency_figure(info))
    words = [note["text"] for note in figure["layout"]["annotations"]]
    assert words == ["✕ out of memory", "✕ unsupported"]
    assert figure["layout"]["xaxis"]["ticktext"][1] == "#2<br>sliding_window<br>(window_size=16)<br>banded"
    assert sum(len(trace["y"]) for trace in figure["data"] if trace["mode"] == "markers") == 10
    with pytest.raises(ViewError, match="latency_ms, attention_latency_ms"):
        figures.latency_info(documents, "speed")


def test_the_memory_chart_draws_the_floor_where_the_probe_stated_it(documents):
    whole = figures.memory_info(documents)
    assert whole.title == "Peak memory of the forward pass"
    assert figures.memory_figure(whole).layout.yaxis.title.text == "bytes above<br>weights and inputs"
    assert [bar.peak for bar in whole.bars] == [3_000_000, 3_000_000, None, None]
    assert [bar.floor for bar in whole.bars] == [None] * 4
    info = figures.memory_info(documents, "attention_peak_memory_bytes")
    assert [bar.peak for bar in info.bars] == [2_000_000, 2_000_000, None, None]
    assert [bar.floor for bar in info.bars] == [1_000_000, 1_000_000, None, None]
    figure = drawn(figures.memory_figure(info))
    lines = [trace for trace in figure["data"] if trace["type"] == "scatter"]
    assert lines[0]["y"] == [1_000_000, 1_000_000]


def test_the_statistic_grid_has_a_cell_for_every_head(made):
    rows = results.measurements(made.store, made.run_ids[0])
    info = figures.statistic_info(rows, "entropy")
    assert (info.layers, info.heads, info.unit) == ([0, 1], [0, 1, 2, 3], "nats")
    by_place = {(row.layer, row.head): row.value for row in rows if row.name == "entropy"}
    assert info.values[1][2] == by_place[1, 2]
    figure = drawn(figures.statistic_figure(info))
    assert figure["data"][0]["customdata"][1][2] == "L1H2"
    assert figures.statistic_info(rows, "nothing").values == []


def test_a_name_is_never_markup_in_a_chart(documents):
    evil = documents[0] | {"mechanism": "<img src=x onerror=alert(1)>"}
    text = str(figures.latency_figure(figures.latency_info([evil])).to_json())
    assert "<img" not in text
    assert "&lt;img" in text


@pytest.mark.parametrize("count", [1, 5, 6, 16])
def test_every_column_keeps_a_label(documents, count):
    runs = [documents[0] | {"id": i + 1} for i in range(count)]
    axis = drawn(figures.latency_figure(figures.latency_info(runs)))["layout"]["xaxis"]
    assert axis["tickvals"] == list(range(count))
    assert [text.partition("<br>")[0] for text in axis["ticktext"]] == [f"#{i + 1}" for i in range(count)]
    assert axis["ticklabeloverflow"] == "allow"


def test_the_medians_interval_is_drawn_around_the_median():
    samples = [9.0, 10.0, 10.0, 11.0, 30.0]
    series = figures.LatencySeries("a", samples, 10.0, "succeeded", (9.0, 11.5))
    figure = drawn(figures.latency_figure(figures.LatencyInfo("t", [series])))
    (bars,) = [trace["error_y"] for trace in figure["data"] if "error_y" in trace]
    assert (bars["array"], bars["arrayminus"]) == ([1.5], [1.0])
    without = figures.LatencySeries("a", [9.0], 9.0, "succeeded")
    figure = drawn(figures.latency_figure(figures.LatencyInfo("t", [without])))
    assert not any("error_y" in trace for trace in figure["data"])
