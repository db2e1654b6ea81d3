"""What the panel says beside a time."""

import re
from dataclasses import replace

import pytest

from attnlab.describe import run_document
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab_kernels.operations.softmax import flashinfer
from attnlab_kernels.operations.softmax.registry import IMPLEMENTATIONS
from attnlab_storage import results
from attnlab_webui.experiment_view import STRIP_WIDTH, provenance_facts, run_facts, sample_strip
from attnlab_webui.timing_view import layout_words, ratio_words, timing_spread, timing_trouble

DETAIL = {
    "timer": "perf_counter",
    "warm_up": 5,
    "first_ms": 80.0,
    "threads": 2,
    "affinity": [0, 1],
    "cache": "warm",
    "interval": [9.5, 10.5],
    "steady": True,
    "conditions": {"disturbed": []},
}


def timing_with(**changed):
    return {"median": 10.0, "p10": 9.0, "p90": 12.0, "samples": [9.0, 10.0, 12.0], "detail": DETAIL | changed}


def test_the_interval_of_the_median_stands_beside_the_spread_of_the_samples():
    text = timing_spread(timing_with())
    assert "95 % interval 9.5 ms – 10.5 ms" in text
    assert "samples 9 ms – 12 ms" in text
    assert "5 calls to warm up, the first 80 ms" in text
    assert "2 threads on cores 0, 1" in text


def test_a_disturbed_figure_says_by_what_and_a_quiet_one_says_nothing():
    assert timing_trouble(timing_with()) == ""
    text = timing_trouble(timing_with(conditions={"disturbed": ["others <busy>"]}, steady=False))
    assert "disturbed: others &lt;busy&gt;; not steady" in text


def test_a_graph_a_cool_down_and_the_class_of_inputs_are_named_where_the_time_is():
    captured = {"class": "captured", "what": "queries of <m>"}
    first = {"conditions": {"throttled": ["power cap"]}, "waited_s": 2.5}
    found = {"graph": {"calls": 96}, "before_cool_down": first, "inputs": captured, "launch_gap_ms": 0.04}
    text = timing_spread(timing_with(**found))
    assert "0.04 ms without a kernel; 96 calls a graph" in text
    assert "taken again after 2.5 s, as it had slowed down before (power cap)" in text
    assert "captured inputs: queries of &lt;m&gt;" in text
    assert "no graph: it waits" in timing_spread(timing_with(graph={"not_captured": "it waits"}))


def test_a_run_of_an_older_version_is_shown_without_what_it_did_not_keep():
    timing = timing_with() | {"detail": {}}
    assert "interval" not in timing_spread(timing)
    assert timing_trouble(timing) == ""


def test_the_ratio_to_the_reference_has_its_interval_and_pairs():
    ratio = {
        "median": 0.82,
        "samples": [0.8, 0.82, 0.9],
        "detail": {"interval": [0.8, 0.9], "proof": "a > b"},
    }
    text = ratio_words(ratio, "its time")
    assert "<b>0.820 x</b>" in text
    assert "95 % interval 0.800 – 0.900, 3 pairs in turn" in text
    assert "a &gt; b" in text


def test_the_copies_into_a_kernels_layout_are_a_figure_of_their_own_where_it_has_one(
    sqlite_store, monkeypatch
):
    spec = {
        "name": "layout",
        "module": {"dim": 32, "num_heads": 2},
        "vary": {"mechanism": ["multi_head"], "implementation": ["eager"], "sequence_length": [24]},
        "record": ["timing"],
        "repeats": 3,
    }

    def shown() -> tuple[dict, str]:
        (run,) = results.runs_of(sqlite_store, experiment_id=run_here(sqlite_store, parse_spec(spec)))
        document = run_document(sqlite_store, run.id)
        return document, run_facts(document, run)

    document, page = shown()
    assert document["layout_latency_ms"] is None
    assert "the layout" not in page
    copying = replace(IMPLEMENTATIONS["eager"], arrange=flashinfer.arrange_all)
    monkeypatch.setitem(IMPLEMENTATIONS, "eager", copying)
    document, page = shown()
    assert len(document["layout_latency_ms"]["samples"]) == 3
    assert layout_words(document["layout_latency_ms"]) in page
    assert "copied" in page


def test_the_page_shows_what_was_launched_and_which_build_it_is():
    launch = {"kernel": "softmax_forward_kernel", "block_m": 128, "has_bias": False, "num_warps": 8}
    package = {"version": "flash-attn 2.8 <b>", "revision": "abc", "files": {"cuda.so": "0123456789abcdef99"}}
    rows = dict(provenance_facts({"launches": [launch], "package": package}))
    launched, built = str(rows["launched"]), str(rows["kernel's package"])
    assert "block_m 128, has_bias False, num_warps 8" in launched
    assert "flash-attn 2.8 &lt;b&gt; revision abc" in built
    assert "cuda.so 0123456789abcdef<" in built
    nothing = {"launches": [], "package": None, "inductor": None}
    assert provenance_facts({}) == provenance_facts(nothing) == []


def test_the_page_shows_what_torch_compile_chose():
    kernel = {"kernel": "triton_tem_<0>", "block_m": 64, "num_warps": 4}
    inductor = {"settings": {"max_autotune": False}, "kernels": [kernel]}
    rows = dict(provenance_facts({"inductor": inductor}))
    assert "triton_tem_&lt;0&gt;" in str(rows["compiled by inductor"])
    assert "block_m 64, num_warps 4" in str(rows["compiled by inductor"])
    assert rows["inductor's settings"] == "max_autotune False"


def test_a_layout_of_views_costs_nothing_and_says_so():
    text = layout_words({"median": 0.0, "samples": [0.0], "detail": {"copied_bytes": 0}})
    assert "views suffice" in text


def test_the_strip_shows_the_medians_interval_on_the_scale_of_the_samples():
    text = sample_strip([1.0, 2.0, 3.0, 4.0, 5.0], "forward", (2.0, 4.0))
    (band,) = re.findall(r'<rect x="([0-9.]+)" width="([0-9.]+)"', text)
    places = [float(x) for x in re.findall(r'<circle cx="([0-9.]+)"', text)]
    left, width = map(float, band)
    assert left == pytest.approx(places[1], abs=0.1)
    assert left + width == pytest.approx(places[3], abs=0.1)
    assert "median within 2 to 4 ms (95 %)" in text
    two = sample_strip([1.0, 2.0], "forward")
    assert "<rect" not in two
    assert f'<line x1="{STRIP_WIDTH / 2:.1f}"' in two
    assert "<text" not in two, "in a narrow column the picture shrinks, and words must not"
    assert "<span>1</span><span>2 ms</span>" in two
