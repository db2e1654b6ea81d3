"""Serving as an experiment: what is stored is what happened, and it adds up."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.lab import Lab
from attnlab.serving.metrics import measure, middle_pass, read_series, series
from attnlab.serving.timeline import Served, Step, Timeline
from attnlab.serving.workload import Request
from attnlab_storage import results, tensors
from attnlab_storage.database import Store

SPEC = {
    "name": "serving",
    "module": {"dim": 16, "num_heads": 4},
    "vary": {
        "mechanism": [
            "multi_head",
            {"grouped_query": {"num_kv_heads": 1}},
            {
                "multi_head_latent": {
                    "kv_lora_rank": 4,
                    "qk_rope_head_dim": 2,
                    "qk_nope_head_dim": 4,
                    "v_head_dim": 4,
                }
            },
        ],
        "cache": ["contiguous", "paged"],
    },
    "phase": "serving",
    "serving": {
        "workload": {
            "requests": 6,
            "prompt_tokens": {"distribution": "uniform", "low": 2, "high": 9},
            "output_tokens": 3,
        },
        "cache_bytes": 4096,
        "max_length": 12,
        "block_size": 4,
    },
    "repeats": 2,
}


def test_a_served_experiment_is_stored_with_all_that_happened(sqlite_store: Store):
    lab = Lab(sqlite_store)
    runs = lab.run(SPEC).runs
    assert [run.outcome for run in runs] == ["succeeded"] * 6
    for run in runs:
        document = run.document()
        served = document["serving"]
        # fused where keys and values are cached, a plain product where latents are
        assert {"aten::_scaled_dot_product_flash_attention_for_cpu", "aten::bmm"} & set(document["kernels"])
        assert document["provenance"] == {"launches": [], "package": None, "inductor": None}
        log = results.log_tail(sqlite_store, run.id)
        assert "kernels that ran, prompt: " in log
        assert "kernels that ran, decode: " in log
        assert document["accuracy"]["check_error"] < 1e-5
        assert len(served["output_tokens_per_second"]["samples"]) == 2
        assert served["inter_token_latency"]["count"] == 6 * 2
        assert served["cache_bytes"]["value"] <= 4096
        assert 0 < served["cache_used"]["value"] <= served["cache_reserved"]["value"] <= 1
        steps = tensors.read_tensor(sqlite_store, run.id, "serving_steps", 0, 0)
        requests = tensors.read_tensor(sqlite_store, run.id, "serving_requests", 0, 0)
        assert len(tensors.read_tensor(sqlite_store, run.id, "serving_tokens", 0, 0)) == 18
        assert len(requests) == 6
        assert len(steps) == served["running_sequences"]["steps"]
    # the same memory holds more tokens of fewer numbers each, and pages more sequences
    held = [run.document()["serving"]["cache_used"]["total_tokens"] for run in runs]
    assert held[1::2] == [32, 128, 168]
    assert held[::2] == [24, 120, 168]
    given = results.run_input(sqlite_store, runs[0].id)
    assert given is not None
    assert given.detail is not None
    assert given.detail["requests"] == 6


def test_a_cache_too_small_for_one_request_is_a_result(sqlite_store: Store):
    spec = SPEC | {"serving": SPEC["serving"] | {"cache_bytes": 512}, "repeats": 1}
    runs = Lab(sqlite_store).run(spec).runs
    assert [run.outcome for run in runs] == ["unsupported"] * 2 + ["succeeded"] * 4
    assert "serving.cache_bytes: must hold the longest sequence" in (runs[0].row.reason or "")


def made(*seconds: float) -> list[Timeline]:
    """Two requests, three steps, on clocks of different speed."""
    passes = []
    for unit in seconds:
        first = Served(Request(0, 0.0, 4, 2), 0.0, [unit, 2 * unit], computed=5)
        second = Served(Request(1, unit, 3, 2), 1 * unit, [2 * unit, 3 * unit], 1, 0, 7)
        steps = [
            Step(0.0, unit, 4, 0, 1, 1, 4, 4, 6, 0),
            Step(unit, 2 * unit, 3, 1, 2, 0, 8, 10, 0, 1),
            Step(2 * unit, 3 * unit, 0, 1, 1, 0, 5, 10, 0, 0),
        ]
        passes.append(Timeline(10, [first, second], steps))
    return passes


def test_measurements_are_those_of_the_definitions():
    rows = {row.name: row for row in measure(made(1.0, 3.0, 2.0))}
    assert rows["output_tokens_per_second"].samples == pytest.approx([4 / 3, 4 / 9, 4 / 6])
    assert rows["output_tokens_per_second"].value == pytest.approx(4 / 6)
    assert rows["prompt_tokens_per_second"].value == pytest.approx(7 / 6)
    # of the pass of median duration, whose steps take two seconds
    assert rows["time_to_first_token"].value == pytest.approx(2000)
    assert rows["inter_token_latency"].value == pytest.approx(2000)
    assert rows["queueing_time"].value == 0
    assert rows["cache_used"].value == pytest.approx((4 + 8 + 5) / 30)
    assert rows["cache_reserved"].value == pytest.approx(0.8)
    assert rows["internal_fragmentation"].value == pytest.approx((0 + 0.2 + 0.5) / 3)
    assert rows["external_fragmentation"].value == pytest.approx(0.2)
    assert rows["running_sequences"].value == pytest.approx(4 / 3)
    assert rows["preemptions"].value == 1
    assert rows["preemptions"].detail == {"computed_again": 3}


def test_series_hold_every_number_of_a_timeline():
    timeline = middle_pass(made(1.0, 5.0, 2.0))
    arrays = series(timeline)
    read = (arrays[name][0] for name in ("serving_steps", "serving_requests", "serving_tokens"))
    steps, requests, tokens = read
    assert read_series(10, steps, requests, tokens[:, 0]) == timeline
    assert timeline.seconds == 6
    assert np.array_equal(arrays["serving_steps"][0], np.array(timeline.steps))
    assert arrays["serving_requests"][0].tolist() == [[0, 0, 4, 2, 0, 0, 0, 5], [1, 2, 3, 2, 2, 1, 0, 7]]
    assert arrays["serving_tokens"][0, :, 0].tolist() == [2, 4, 4, 6]
