"""What a served experiment shows, in numbers, charts and on its page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attnlab.describe import run_document
from attnlab.lab import Lab
from attnlab.serving.timeline import Served, Step, Timeline
from attnlab.serving.workload import Request
from attnlab.views.errors import NothingRecorded
from attnlab.views.serving import (
    cache_figure,
    cache_info,
    load_timeline,
    rate_figure,
    rate_info,
    request_figure,
    request_info,
    wait_figure,
    wait_info,
)
from attnlab_storage.database import Store, open_store
from attnlab_storage.results import runs_of
from attnlab_webui import serving_view

SPEC = {
    "name": "served",
    "module": {"dim": 16, "num_heads": 4},
    "vary": {"mechanism": ["multi_head"], "cache": ["contiguous", "paged"]},
    "phase": "serving",
    "serving": {
        "workload": {"requests": 5, "prompt_tokens": 6, "output_tokens": 4},
        "num_blocks": 7,
        "block_size": 3,
    },
    "repeats": 1,
}


@pytest.fixture
def served(sqlite_store: Store) -> Lab:
    lab = Lab(sqlite_store)
    assert [run.outcome for run in lab.run(SPEC).runs] == ["succeeded"] * 2
    return lab


def timeline() -> Timeline:
    first = Served(Request(0, 0.0, 4, 2), 0.5, [1.0, 3.0], computed=5)
    second = Served(Request(1, 1.0, 3, 1), 2.0, [3.0], 1, 0, 3)
    steps = [Step(0.5, 1.0, 4, 0, 1, 1, 4, 6, 6, 0), Step(2.0, 3.0, 3, 1, 2, 0, 8, 10, 0, 1)]
    return Timeline(12, [first, second], steps)


def bars_of(figure: Any) -> Any:
    return figure.data


def layout_of(figure: Any) -> Any:
    return figure.layout


def test_charts_hold_the_numbers_of_the_timeline():
    cache = cache_info(timeline())
    assert (cache.used, cache.reserved, cache.total) == ([4, 8], [6, 10], 12)
    assert (cache.running, cache.waiting, cache.preempted) == ([1, 2], [1, 0], [3.0])
    lines = request_info(timeline()).lines
    assert [tuple(line) for line in lines] == [(0, 0.0, 0.5, 1.0, 3.0, 0), (1, 1.0, 2.0, 3.0, 3.0, 1)]
    waits = wait_info({"a": timeline()}, "time_to_first_token")
    assert waits.lines[0].seconds == [1.0, 2.0]
    assert wait_info({"a": timeline()}, "inter_token_latency").lines[0].seconds == [2.0]
    bars = bars_of(request_figure(request_info(timeline())))
    assert [bar.name for bar in bars] == ["waits", "prompt", "answer", "was preempted"]
    assert list(bars[1].base) == [0.5, 2.0]
    assert list(bars[1].x) == [0.5, 1.0]
    assert [trace.name for trace in bars_of(cache_figure(cache))] == [
        "set aside",
        "used",
        "running",
        "waiting",
        "preempted",
    ]
    assert len(bars_of(wait_figure(waits))) == 1


def test_a_run_without_a_rate_keeps_its_place_with_its_outcome():
    run = {"id": 3, "mechanism": "multi_head", "parameters": {"cache": "paged"}, "state": "unsupported"}
    rate = {"value": 5.0, "samples": [4.0, 5.0, 7.0]}
    served = run | {"id": 4, "state": "succeeded", "serving": {"output_tokens_per_second": rate}}
    figure = rate_figure(rate_info([run, served]))
    bar = bars_of(figure)[0]
    assert (list(bar.x), bar.error_x.array, bar.error_x.arrayminus) == ([5.0], (2.0,), (1.0,))
    assert [note.text for note in layout_of(figure).annotations] == ["✕ unsupported"]
    assert bar.name == "#4 multi_head(cache=paged)"


def test_a_stored_run_is_drawn_and_one_that_served_nothing_says_so(
    served: Lab, make_traced: Callable[..., Any]
):
    runs = runs_of(served.store)
    assert all(figure is not None for figure in serving_view.compare_figures(served.store, runs))
    assert all(figure is not None for figure in serving_view.run_figures(served.store, runs[0].id))
    read = load_timeline(served.store, runs[1].id)
    assert read.total_tokens == 21
    assert [one.request for one in read.requests] == [Request(i, 0.0, 6, 4) for i in range(5)]
    words = dict(serving_view.facts(run_document(served.store, runs[1].id)))
    assert {"tokens written", "time to first token", "cache used", "preemptions"} <= set(words)
    other = make_traced(served.store).run_ids[0]
    with pytest.raises(NothingRecorded, match=f"run {other} served nothing"):
        load_timeline(served.store, other)
    assert serving_view.run_figures(served.store, other) == (None, None)


def test_the_page_of_a_served_experiment_opens_on_its_charts(
    served: Lab, serve: Callable[[Store], str], browse: Callable[..., Any]
):
    with open_store(served.store.url) as store:
        page = browse(f"{serve(store)}/experiment?id=1")
        for name in ("rate", "first", "between", "cache", "requests"):
            page.locator(f"#experiment-{name} .main-svg").first.wait_for(state="visible")
        table = page.get_by_role("table", name="Runs")
        assert table.get_by_role("columnheader", name="tokens/s").count() == 1
        facts = page.locator("#experiment-facts")
        facts.get_by_text("time to first token").wait_for()
        page.locator('[data-open="2"]').click()
        page.locator("#experiment-cache").get_by_text("The cache of run #2 over time").wait_for()


def test_the_comparison_of_served_runs_has_their_rates_and_waits(
    served: Lab, serve: Callable[[Store], str], browse: Callable[..., Any]
):
    with open_store(served.store.url) as store:
        page = browse(f"{serve(store)}/compare?runs=1,2")
        for name in ("rate", "first", "between"):
            page.locator(f"#compare-{name} .main-svg").first.wait_for(state="visible")
        page.get_by_role("table", name="What differs").get_by_text("time to first token").wait_for()
        assert not page.locator("#compare-latency").is_visible()


def test_a_timeline_is_downloaded_as_it_was(served: Lab):
    from starlette.testclient import TestClient

    from attnlab_webui.app import build_app

    with TestClient(build_app(served.store), base_url="http://127.0.0.1") as client:
        document = client.get("/api/v1/runs/2/serving/timeline").json()
        read = load_timeline(served.store, 2)
        assert document["total_tokens"] == 21
        assert [row["tokens_at"] for row in document["requests"]] == [one.tokens_at for one in read.requests]
        steps = client.get("/api/v1/runs/2/serving/steps").text.splitlines()
        assert steps[0].startswith("start,end,prompt_tokens,decode_tokens,running,waiting,used,reserved")
        assert len(steps) == 1 + len(read.steps)
        requests = client.get("/api/v1/runs/2/serving/requests").text.splitlines()
        assert requests[0].endswith("first_token,last_token")
        assert len(requests) == 6
        assert client.get("/api/v1/runs/2/serving/maps").status_code == 400
        assert client.get("/api/v1/runs/99/serving/steps").status_code == 404
