"""Charts with chosen axes: what is grouped, where lines end, how they grow, and that nothing is lost on the way."""

from typing import Any

import numpy as np
import pytest

from attnlab.describe import run_document
from attnlab.intervals import median_interval
from attnlab.views import figures
from attnlab.views.chart import BARS, PRESETS, Axes, ChartInfo, best_axes, chart_info
from attnlab.views.chart_figure import chart_figure
from attnlab.views.chart_style import color, dash, log_axis, symbol
from attnlab.views.chart_table import FIELDS, MEASURES, TEXTS, chart_rows
from attnlab.views.errors import ViewError
from attnlab.views.samples import ecdf, samples_figure, samples_info
from attnlab.views.scaling_fit import fit_power


def document(run: int, tokens: int, median: float | None, **changed: Any) -> dict[str, Any]:
    samples = [median * share for share in (0.9, 1.0, 1.1)] if median else []
    timing = {"median": median, "p10": 0, "p90": 0, "samples": samples, "detail": {}} if median else None
    made = {
        "id": run, "mechanism": "multi_head", "parameters": {}, "implementation": "auto", "chosen": "sdpa_flash",
        "model": "m", "sequence_length": tokens, "batch_size": 2, "dtype": "float32", "phase": "prefill",
        "state": "succeeded" if median else "out_of_memory", "reason": None if median else "asked for 64 bytes <b>",
        "latency_ms": timing, "attention_latency_ms": timing, "accuracy": {"kl": 0.5},
        "peak_memory_bytes": tokens * 10,
    }  # fmt: skip
    return made | changed


SCALING = PRESETS["scaling"][1]
GRID = [
    *(document(n, tokens, 1e-6 * tokens**2) for n, tokens in enumerate((64, 128, 256, 512), 1)),
    document(5, 1024, None),
    *(document(n, tokens, 1e-3 * tokens, mechanism="linear") for n, tokens in enumerate((64, 128, 256), 6)),
]


def test_a_power_law_is_found_with_an_interval_that_holds_the_truth() -> None:
    x = np.geomspace(64, 4096, 9)
    exact = fit_power(x.tolist(), (3 * x**1.7).tolist())
    assert exact is not None
    assert (exact.exponent, exact.factor) == (pytest.approx(1.7), pytest.approx(3))
    assert exact.half_width < 1e-9
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        fit = fit_power(x.tolist(), (3 * x**1.7 * np.exp(0.2 * random.standard_normal(9))).tolist())
        assert fit is not None
        held += abs(fit.exponent - 1.7) <= fit.half_width
    assert 0.92 < held / 400 < 0.98
    assert fit_power([1, 2, 2], [1, 2, 3]) is None
    for bad in (([1, 2, 3], [1, 2]), ([1, 2, 0], [1, 2, 3])):
        with pytest.raises(ValueError, match="equally long and above 0"):
            fit_power(*bad)


def test_a_line_ends_where_a_run_gave_no_number_and_says_why() -> None:
    info = chart_info(GRID, SCALING)
    plain, linear = info.lines
    assert [point.x for point in plain.points] == [64, 128, 256, 512]
    assert [(end.x, end.run, end.outcome) for end in plain.ends] == [(1024, 5, "out_of_memory")]
    assert plain.fit is not None
    assert plain.fit.words() == "n^2.00 ± 0.00"
    assert linear.fit is not None
    assert linear.fit.exponent == pytest.approx(1)
    assert linear.ends == []
    traces = chart_figure(info).to_plotly_json()["data"]
    (cross,) = [trace for trace in traces if (trace.get("marker") or {}).get("symbol") == "x"]
    assert list(cross["x"]) == [1024]
    assert list(cross["text"]) == ["out of memory"]
    assert list(cross["customdata"]) == ["#5 out of memory: asked for 64 bytes &lt;b&gt;"]
    assert "multi_head · n^2.00 ± 0.00" in [trace["name"] for trace in traces]


def drawn(info: ChartInfo) -> list[dict[str, Any]]:
    return list(chart_figure(info).to_plotly_json()["data"])


def test_a_run_that_never_came_to_choose_ends_the_line_of_those_asked_alike() -> None:
    documents = [
        *GRID,
        document(9, 2048, None, chosen=None),
        document(10, 512, None, chosen=None, mechanism="linear"),
    ]
    info = chart_info(documents, SCALING)
    assert {line.label: [end.run for end in line.ends] for line in info.lines} == {
        "multi_head": [5, 9], "linear": [10],
    }  # fmt: skip
    assert len({trace["marker"]["color"] for trace in drawn(info)}) == 2
    # where those asked alike chose differently, nobody knows what it would have been
    unclear = [*GRID, document(11, 32, 1.0, chosen="banded"), document(9, 2048, None, chosen=None)]
    assert "multi_head · auto" in [line.label for line in chart_info(unclear, SCALING).lines]


def test_words_at_the_right_edge_stand_to_the_left_of_their_mark() -> None:
    documents = [*GRID, document(9, 512, None, mechanism="linear")]
    ends = [trace for trace in drawn(chart_info(documents, SCALING)) if trace["marker"]["symbol"] == "x"]
    assert [list(zip(trace["x"], trace["textposition"], strict=True)) for trace in ends] == [
        [(1024, "middle left")],
        [(512, "middle right")],
    ]


@pytest.mark.parametrize("name", [*PRESETS])
def test_every_outcome_stays_in_every_chart(name: str) -> None:
    outcomes = ("out_of_memory", "unsupported", "timed_out", "failed", "cancelled")
    lost = [
        document(n, 64, None, state=state, peak_memory_bytes=None) for n, state in enumerate(outcomes, 20)
    ]
    info = chart_info([*GRID, *lost], PRESETS[name][1])
    found = {end.run for line in info.lines for end in line.ends}
    assert {20, 21, 22, 23, 24} <= found
    live = chart_info([*GRID, document(30, 64, None, state="running")], PRESETS[name][1])
    assert 30 not in {end.run for line in live.lines for end in line.ends}


def test_repeats_become_one_point_with_the_interval_of_all_samples() -> None:
    again = [document(1, 64, 1.0), document(2, 64, 2.0), document(3, 64, 2.0, dtype="float16")]
    info = chart_info(again, SCALING)
    assert [line.label for line in info.lines] == ["multi_head · float32", "multi_head · float16"]
    (point,) = info.lines[0].points
    samples = [0.9, 1.0, 1.1, 1.8, 2.0, 2.2]
    assert (point.runs, point.samples, point.y) == ((1, 2), 6, pytest.approx(np.median(samples)))
    assert point.percentiles == pytest.approx(tuple(np.percentile(samples, [10, 90])))
    assert point.interval == median_interval(samples)
    for bars in BARS:
        info = chart_info(again, SCALING._replace(bars=bars))
        error = chart_figure(info).to_plotly_json()["data"][0]["error_y"]
        low, high = median_interval(samples) if bars == "interval" else np.percentile(samples, [10, 90])  # type: ignore[misc]
        assert point.y + error["array"][0] == pytest.approx(high)
        assert point.y - error["arrayminus"][0] == pytest.approx(low)


def test_a_run_with_two_samples_has_no_interval_and_no_bar() -> None:
    timing = {"median": 1.5, "p10": 1.1, "p90": 1.9, "samples": [1.0, 2.0], "detail": {}}
    (line,) = chart_info([document(1, 64, 1.5, attention_latency_ms=timing)], SCALING).lines
    assert line.points[0].interval is None
    assert line.points[0].ends("interval") == (1.5, 1.5)
    assert line.points[0].ends("percentiles") == pytest.approx((1.1, 1.9))


def timed_under(run: int, **conditions: Any) -> dict[str, Any]:
    one = document(run, 64 * run, 1.0 * run)
    timing = one["latency_ms"] | {"detail": {"conditions": {"disturbed": [], **conditions}}}
    return one | {"latency_ms": timing, "attention_latency_ms": timing}


def test_a_throttled_time_is_marked_where_it_stands_and_in_the_legend_and_the_table() -> None:
    slow = timed_under(3, throttled=["power cap"], disturbed=["slowed down: power cap"])
    busy = timed_under(2, disturbed=["load average 9 <b>"])
    info = chart_info([timed_under(1), busy, slow], SCALING)
    assert [point.conditions for point in info.lines[0].points] == [
        (), ("#2 disturbed: load average 9 <b>",), ("#3 throttled: power cap",),
    ]  # fmt: skip
    marks = {trace["name"]: trace for trace in chart_figure(info).to_plotly_json()["data"]}
    assert (list(marks["throttled"]["x"]), list(marks["throttled"]["text"])) == ([192], ["throttled"])
    assert (list(marks["disturbed"]["x"]), marks["disturbed"]["showlegend"]) == ([128], True)
    assert list(marks["disturbed"]["customdata"]) == ["#2 disturbed: load average 9 &lt;b&gt;"]
    rows = chart_rows([timed_under(1), busy, slow])
    assert [row["outcome"] for row in rows] == ["succeeded", "succeeded", "throttled"]
    assert [row["conditions"] for row in rows] == [
        "",
        "disturbed: load average 9 <b>",
        "throttled: power cap",
    ]
    columns = figures.latency_figure(figures.latency_info([slow])).to_plotly_json()["layout"]["annotations"]
    assert [note["text"] for note in columns] == ["✕ throttled"]
    memory = chart_info([slow], PRESETS["memory"][1])
    assert memory.lines[0].points[0].conditions == ()  # bytes do not change with the clock


def test_an_ecdf_is_the_share_of_samples_up_to_each() -> None:
    times, shares = ecdf([3.0, 1.0, 2.0, 2.0])
    assert times.tolist() == [1, 2, 2, 3]
    assert shares.tolist() == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(("apart", "kind"), [(3.0, None), (300.0, "log")])
def test_samples_that_are_far_apart_have_their_shares_on_a_logarithmic_axis(apart: float, kind: str) -> None:
    figure = samples_figure(samples_info([document(1, 64, 1.0), document(2, 64, apart)]))
    assert figure.layout.xaxis2.type == kind
    assert figure.layout.xaxis.type is None


def test_samples_stand_as_histogram_and_ecdf_beside_each_other() -> None:
    info = samples_info([document(1, 64, 1.0), document(2, 64, 2.0), document(3, 64, None)])
    assert [row.title for row in info.rows] == [
        "time of the forward pass", "time of the attention kernel alone",
    ]  # fmt: skip
    assert info.missing == ["#3 multi_head sdpa_flash: out of memory"]
    traces = samples_figure(info).to_plotly_json()["data"]
    assert [trace["type"] for trace in traces] == ["histogram", "scatter"] * 4
    assert sum(trace["showlegend"] for trace in traces) == 2
    assert list(traces[1]["x"]) == [0.9, 0.9, 1.0, 1.1]
    assert traces[0]["xbins"]["size"] == traces[2]["xbins"]["size"]


def test_facets_share_one_scale_and_one_legend() -> None:
    runs = [document(n, 64 * n, n, dtype=dtype) for dtype in ("float32", "float16") for n in (1, 2)]
    info = chart_info(runs, SCALING._replace(facet="dtype"))
    assert info.facets == ["float32", "float16"]
    figure = chart_figure(info).to_plotly_json()
    assert [trace["showlegend"] for trace in figure["data"]] == [True, False]
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["dtype float32", "dtype float16"]
    assert figure["layout"]["yaxis2"]["matches"] == "y"


def test_columns_that_are_far_apart_are_points_on_a_logarithmic_axis_and_never_bars() -> None:
    for apart, bars, kind in ((3.0, True, None), (300.0, False, "log")):
        runs = [document(1, 64, 1.0), document(2, 64, apart), document(3, 64, None)]
        figure = chart_figure(chart_info(runs, PRESETS["latency"][1])).to_plotly_json()
        kinds = {trace["type"] for trace in figure["data"]}
        assert (figure["layout"]["yaxis"].get("type"), "bar" in kinds) == (kind, bars)
        (cross,) = [trace for trace in figure["data"] if trace["marker"].get("symbol") == "x"]
        assert all(y < 0.9 for y in cross["y"])  # at the foot of the chart, below every sample


@pytest.mark.parametrize("decades", [0.01, 0.1, 0.3, 0.7, 1.0, 1.4, 2.0, 2.9, 3.1, 5.0, 9.0, 20.0])
@pytest.mark.parametrize("low", [1e-7, 0.03, 1.0, 47.0, 7e9])
def test_a_logarithmic_axis_has_a_few_ticks_however_far_it_goes(low: float, decades: float) -> None:
    high = low * 10**decades
    step = log_axis([low, high])["dtick"]
    if step == "D2":
        tens = [10.0**n for n in range(-10, 31)]
        ticks = [ten * times for ten in tens for times in (1, 2, 5) if low <= ten * times <= high]
        count = len(ticks)
    elif isinstance(step, str):
        count = int(high / float(step[1:])) - int(np.ceil(low / float(step[1:]))) + 1
    else:
        count = int((np.floor(np.log10(high)) - np.ceil(np.log10(low))) / step) + 1
    assert 2 <= count <= 10


def test_what_a_chart_draws_differs_in_colour_or_symbol() -> None:
    assert len({(color(place), symbol(place)) for place in range(64)}) == 64
    assert len({(dash(place), symbol(place)) for place in range(24)}) == 24, "without colours too"
    lines = [document(n, n % 2 + 64, 1.0, mechanism=name) for n, name in enumerate("aabbcc")]
    shapes = [
        trace["line"]["dash"]
        for trace in drawn(chart_info(lines, SCALING))
        if trace["mode"] == "lines+markers"
    ]
    assert shapes == ["solid", "dash", "dot"]


def test_a_measure_may_be_either_axis() -> None:
    info = chart_info(GRID, Axes("attention_latency_ms", "kl", "mechanism"))
    assert info.log_x
    assert info.log_y
    assert [end.x for end in info.lines[0].ends] == [] or info.lines[0].ends[0].x is None
    assert info.lines[0].fit is None
    assert {point.y for point in info.lines[0].points} == {0.5}


@pytest.mark.parametrize(
    "axes", [Axes("up", "kl"), Axes("run", "dtype"), Axes("run", "kl", "kl"), Axes("run", "kl", "", "x")]
)
def test_an_unknown_axis_is_refused_with_its_choices(axes: Axes) -> None:
    with pytest.raises(
        ViewError, match=r"(x|y|colour|facet) must be one of .*mechanism|y must be one of latency_ms"
    ):
        chart_info(GRID, axes)


def test_the_first_chart_is_the_one_that_says_most() -> None:
    assert best_axes(GRID) == "scaling"
    assert best_axes([document(1, 64, 1.0)]) == "latency"
    assert best_axes([document(1, 64, None)]) == "memory"
    assert best_axes([document(1, 64, None, frontier={"fits": 7})]) == "frontier"


def test_rows_hold_what_the_documents_of_real_runs_hold(traced: Any) -> None:
    documents = [run_document(traced.store, run) for run in traced.run_ids]
    rows = chart_rows(documents)
    assert set(rows[0]) == {"id", *TEXTS, *FIELDS, *MEASURES}
    for row, one in zip(rows, documents, strict=True):
        assert row["latency_ms"] == one["latency_ms"]["median"]
        assert row["tokens_per_s"] == pytest.approx(77 / one["latency_ms"]["median"] * 1e3)
        assert row["attention_peak_memory_bytes"] == 2_000_000
        assert row["kl"] == 0.01
    decoding = chart_rows([document(1, 64, 2.0, phase="decode")])[0]
    assert decoding["tokens_per_s"] == 2 / 2e-3


def test_columns_name_what_tells_their_runs_apart_and_nothing_else() -> None:
    runs = [document(1, 64, 1.0), document(2, 64, 2.0, batch_size=4), document(3, 128, None, batch_size=4)]
    info = chart_info(runs, Axes("run", "latency_ms"))
    assert info.labels == [
        "#1 multi_head sdpa_flash · 64 tokens · batch 2",
        "#2 multi_head sdpa_flash · 64 tokens · batch 4",
        "#3 multi_head sdpa_flash · 128 tokens · batch 4",
    ]
    ticks = chart_figure(info).layout.xaxis.ticktext
    assert ticks[2] == "#3 multi_head sdpa_flash<br>128 tokens · batch 4"
    assert chart_info(runs[:1], Axes("run", "latency_ms")).labels == ["#1 multi_head sdpa_flash"]
    lines = chart_info(runs[:2], Axes("sequence_length", "latency_ms")).lines
    assert [line.label for line in lines] == ["batch 2", "batch 4"]
    by_batch = chart_info(runs[:2], Axes("run", "latency_ms", "", "batch_size"))
    assert by_batch.labels == ["#1 multi_head sdpa_flash", "#2 multi_head sdpa_flash"]
