"""The charts of an experiment in a real browser: chosen by picker and by link, and following the runs."""

import json
import re

import pytest

from attnlab_storage import queue, results

# Gradio's own statistics of its events use what pandas has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PLOT = ".at-plot-of-runs .js-plotly-plot"


@pytest.fixture
def outcomes(sqlite_store, make_traced):
    return make_traced(sqlite_store, tokens=30, layers=1, outcomes=["out_of_memory", "unsupported"])


def titled(page, words: str) -> None:
    page.wait_for_function(
        "([plot, words]) => document.querySelector(plot)?.layout?.title?.text?.startsWith(words)",
        arg=[PLOT, words],
    )


def crosses(page) -> list[str]:
    drawn = page.evaluate(
        "(plot) => document.querySelector(plot).data.filter((t) => t.marker.symbol === 'x').map((t) => t.customdata)",
        PLOT,
    )
    return [text for texts in drawn for text in texts]


def test_a_picked_chart_is_drawn_and_goes_into_the_address(serve, browse, outcomes):
    page = browse(f"{serve(outcomes.store)}/experiment?id={outcomes.experiment_id}&tab=charts")
    titled(page, "Time of the forward pass")
    assert sorted(crosses(page)) == [
        f"#{outcomes.run_ids[2]} out of memory: made to be out_of_memory",
        f"#{outcomes.run_ids[3]} unsupported: made to be unsupported",
    ]
    page.get_by_label("Chart", exact=True).click()
    page.get_by_role("option", name="Memory", exact=True).click()
    titled(page, "Peak memory of the forward pass")
    page.wait_for_url(re.compile("chart=memory"))
    page.get_by_label("y", exact=True).click()
    page.get_by_role("option", name="KL of the logits").click()
    titled(page, "KL of the logits")
    page.wait_for_url(re.compile("chart=own.*y=kl"))
    again = browse(page.url)
    titled(again, "KL of the logits")
    table = again.get_by_role("table", name="The same numbers")
    table.get_by_text("0.01", exact=True).first.wait_for()


BOXES = """([plot, what]) => [...document.querySelectorAll(`${plot} ${what}`)].map((part) => {
  const { left, right, top, bottom } = part.getBoundingClientRect();
  return [left, right, top, bottom];
})"""


def overlap(one, other) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


@pytest.mark.parametrize("width", [1024, 1440])
def test_the_words_of_a_mark_lie_over_no_bar_and_no_other_words(
    serve, browse, sqlite_store, make_traced, width
):
    made = make_traced(
        sqlite_store, tokens=30, layers=1, outcomes=["unsupported", "out_of_memory", "timed_out"] * 6
    )
    page = browse(
        f"{serve(sqlite_store)}/experiment?id={made.experiment_id}&tab=charts&chart=latency", width=width
    )
    titled(page, "Time of the forward pass")
    page.wait_for_function("(plot) => document.querySelectorAll(`${plot} .annotation-text`).length", arg=PLOT)
    words = page.evaluate(BOXES, [PLOT, ".annotation-text"])
    bars = page.evaluate(BOXES, [PLOT, ".bars .point path"])
    assert (len(words), len(bars)) == (18, 2)
    for at, word in enumerate(words):
        assert not any(overlap(word, other) for other in [*bars, *words[:at]])


def test_the_words_of_compared_runs_lie_over_no_bar_and_no_other_words(
    serve, browse, sqlite_store, make_traced
):
    made = make_traced(sqlite_store, tokens=30, layers=1, outcomes=["unsupported", "out_of_memory"] * 2)
    runs = ",".join(map(str, made.run_ids))
    page = browse(f"{serve(sqlite_store)}/compare?runs={runs}", width=1024)
    page.wait_for_function("() => document.querySelectorAll('#compare-memory .annotation-text').length === 4")
    words = page.evaluate(BOXES, ["#compare-memory", ".annotation-text"])
    bars = page.evaluate(BOXES, ["#compare-memory", ".bars .point path"])
    assert len(bars) == 2
    for at, word in enumerate(words):
        assert not any(overlap(word, other) for other in [*bars, *words[:at]])


def test_samples_and_error_bars_are_picked_and_go_into_the_address(serve, browse, outcomes):
    page = browse(f"{serve(outcomes.store)}/experiment?id={outcomes.experiment_id}&tab=charts&chart=samples")
    titled(page, "Every sample")
    kinds = page.evaluate("(plot) => document.querySelector(plot).data.map((t) => t.type)", PLOT)
    assert {"histogram", "scatter"} == set(kinds)
    page.get_by_label("Chart", exact=True).click()
    page.get_by_role("option", name="Time", exact=True).click()
    titled(page, "Time of the forward pass")
    page.get_by_label("Error bars", exact=True).click()
    page.get_by_role("option", name="10th to 90th percentile").click()
    page.wait_for_url(re.compile("chart=own.*bars=percentiles"))
    again = browse(page.url)
    titled(again, "Time of the forward pass")
    assert again.get_by_label("Error bars", exact=True).input_value() == "10th to 90th percentile"


def test_a_chart_follows_the_runs(serve, browse, sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])
    queue.retry(sqlite_store, made.run_ids)
    page = browse(f"{serve(sqlite_store)}/experiment?id={made.experiment_id}&tab=charts")
    titled(page, "Time of the forward pass")
    assert crosses(page) == []
    claim = queue.claim(sqlite_store, "tests", run_id=made.run_ids[2])
    assert claim is not None
    queue.finish(sqlite_store, claim, "out_of_memory", reason="needs 4.8 GB")
    page.wait_for_function(
        "(plot) => document.querySelector(plot).data.some((t) => t.marker.symbol === 'x')", arg=PLOT
    )
    assert crosses(page) == [f"#{made.run_ids[2]} out of memory: needs 4.8 GB"]


def test_what_was_chosen_stays_while_the_runs_end(serve, browse, sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])
    queue.retry(sqlite_store, made.run_ids)
    page = browse(f"{serve(sqlite_store)}/experiment?id={made.experiment_id}&tab=charts")
    titled(page, "Time of the forward pass")
    page.get_by_label("Error bars", exact=True).click()
    page.get_by_role("option", name="10th to 90th percentile").click()
    page.wait_for_url(re.compile("bars=percentiles"))
    claim = queue.claim(sqlite_store, "tests", run_id=made.run_ids[2])
    assert claim is not None
    queue.finish(sqlite_store, claim, "out_of_memory", reason="needs 4.8 GB")
    page.wait_for_function(
        "(plot) => document.querySelector(plot).data.some((t) => t.marker.symbol === 'x')", arg=PLOT
    )
    assert crosses(page) == [f"#{made.run_ids[2]} out of memory: needs 4.8 GB"]
    assert page.get_by_label("Error bars", exact=True).input_value() == "10th to 90th percentile"
    assert "bars=percentiles" in page.url


def test_compared_runs_have_the_same_charts(serve, browse, outcomes):
    runs = ",".join(str(run) for run in outcomes.run_ids[:2])
    page = browse(f"{serve(outcomes.store)}/compare?runs={runs}&chart=memory")
    titled(page, "Peak memory of the forward pass")
    page.get_by_label("Chart", exact=True).click()
    page.get_by_role("option", name="Throughput", exact=True).click()
    titled(page, "Throughput")
    page.wait_for_url(re.compile(f"runs={runs}.*chart=throughput"))


def test_the_same_numbers_are_files(serve, browse, outcomes):
    address = serve(outcomes.store)
    page = browse(f"{address}/queue")
    runs = ",".join(str(run) for run in outcomes.run_ids)
    rows = json.loads(page.request.get(f"{address}/api/v1/chart/json?runs={runs}").text())
    assert [row["id"] for row in rows] == outcomes.run_ids
    latency = results.measurements(outcomes.store, outcomes.run_ids[0], "latency")[0]
    assert rows[0]["latency_ms"] == latency.value
    assert (rows[2]["outcome"], rows[2]["latency_ms"]) == ("out_of_memory", None)
    table = page.request.get(f"{address}/api/v1/chart/csv?runs={runs}").text().splitlines()
    assert table[0].startswith('"id","run","mechanism"')
    assert len(table) == 1 + len(rows)
    assert page.request.get(f"{address}/api/v1/chart/parquet?runs={runs}").body()[:4] == b"PAR1"
    refused = page.request.get(f"{address}/api/v1/chart/xlsx?runs={runs}")
    assert (refused.status, "format must be one of csv" in refused.json()["error"]) == (400, True)
