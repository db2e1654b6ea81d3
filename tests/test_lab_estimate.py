"""Laws of the estimate: counted bytes are what is stored, costs grow with the work, refusals name the disk."""

import shutil
from collections import namedtuple

import pytest

from attnlab import estimate as cost
from attnlab.probes.warming import expected_calls, warm_up
from attnlab.spec import parse_spec
from attnlab_kernels.masks import Causal
from attnlab_storage import queue, tensors


def spec_of(**changes):
    vary = {"mechanism": ["multi_head"], "sequence_length": [77]} | changes.pop("vary", {})
    base = {
        "name": "n",
        "module": {"dim": 32, "num_heads": 4},
        "input": {"synthetic": "random"},
        "record": ["maps"],
    }
    return parse_spec(base | {"vary": vary} | changes)


def test_the_grid_is_counted():
    spec = spec_of(vary={"mechanism": ["multi_head", "flash"], "sequence_length": [9, 17, 33]})
    assert cost.estimate(spec).runs == 6


@pytest.mark.parametrize(
    ("model", "length", "dtype", "limit"),
    [("smollm2-135m", 2048, "float32", 200e6), ("smollm2-135m", 2048, "bfloat16", 100e6)],
)
def test_what_a_model_stores_is_the_size_of_its_q_k_and_lse(model, length, dtype, limit):
    spec = parse_spec(
        {
            "name": "n",
            "model": model,
            "input": {"text": "some words", "repeat": True},
            "vary": {"mechanism": ["multi_head"], "sequence_length": [length], "dtype": [dtype]},
            "record": ["maps"],
        }
    )
    size = 4 if dtype == "float32" else 2
    expected = 30 * length * ((9 + 3) * 64 * size + 9 * 8 + 3 * 4)
    assert cost.estimate(spec).stored_bytes == expected
    assert expected < limit


def test_the_count_of_a_recorded_run_is_what_its_tensors_take(traced):
    spec = spec_of(
        module={"dim": 32, "num_heads": 4, "num_kv_heads": 2}, vary={"mechanism": ["grouped_query"]}
    )
    shape = cost.shape_of(spec)
    assert shape is not None
    counted = cost.stored_bytes(spec, spec.points()[0], shape)
    stored = tensors.stored_bytes(traced.store, traced.run_ids[0])
    left_out = 2 * 77 * 4 + 4 * 77 * 4  # value norms, and half of a float64 log-sum-exp
    assert counted == stored // 2 + left_out


@pytest.mark.parametrize("record", [["maps"], ["timing"], ["maps", "statistics"]])
def test_only_maps_and_statistics_take_room(record):
    stored = cost.estimate(spec_of(record=record)).stored_bytes
    assert (stored > 0) == ("maps" in record)


def test_time_follows_the_mask_and_memory_the_implementation():
    full, window = (
        cost.forward_flops(spec_of(vary={"mechanism": [m], "sequence_length": [4096]}).points()[0], shape())
        for m in ("multi_head", {"sliding_window": {"window_size": 16}})
    )
    assert full > 5 * window
    fused, eager = (
        cost.estimate(spec_of(vary={"implementation": [i], "sequence_length": [4096]})).peak_bytes
        for i in ("sdpa_flash", "eager")
    )
    assert eager - fused == 2 * 4 * 4096**2 * 4


def shape():
    found = cost.shape_of(spec_of())
    assert found is not None
    return found


def test_costs_grow_with_the_sequence():
    specs = [spec_of(vary={"sequence_length": [n]}, record=["timing"]) for n in (64, 4096, 65536)]
    found = [cost.estimate(spec) for spec in specs]
    for numbers in ([one.seconds or 0 for one in found], [one.peak_bytes for one in found]):
        assert 0 < numbers[0] < numbers[1] < numbers[2]


def test_timing_costs_its_warm_up_and_the_pairs_with_the_reference():
    vary = {"implementation": ["sdpa_flash"], "sequence_length": [4096]}
    specs = [
        spec_of(vary=vary, repeats=5, **changes)
        for changes in (
            {"record": ["accuracy"]},
            {"record": ["accuracy", "timing"]},
            {"record": ["accuracy", "timing"], "reference": "sdpa"},
        )
    ]
    plain, timed, paired = (cost.estimate(spec).seconds or 0 for spec in specs)
    point = specs[0].points()[0]
    whole = cost.forward_flops(point, shape()) / cost.CPU_FLOPS
    attention = cost.attention_flops(point, shape(), Causal()) / cost.CPU_FLOPS
    # one call, then three that are as long as each other, then the repeats
    assert timed - plain == pytest.approx((4 + 5) * (whole + attention))
    assert paired - timed == pytest.approx(2 * (4 + 5) * attention)


def test_timing_a_model_costs_its_attention_on_random_inputs_beside():
    given = {"name": "n", "model": "smollm2-135m", "input": {"synthetic": "random"}, "repeats": 5}
    given |= {"vary": {"mechanism": ["multi_head"], "sequence_length": [512]}}
    plain, timed = (
        parse_spec(given | {"record": record}) for record in (["accuracy"], ["accuracy", "timing"])
    )
    facts, point = cost.shape_of(plain), plain.points()[0]
    assert facts is not None
    whole = cost.forward_flops(point, facts) / cost.CPU_FLOPS
    attention = cost.attention_flops(point, facts, Causal()) / cost.CPU_FLOPS
    calls = [(expected_calls(one) + 5) * one for one in (whole, attention, attention, attention)]
    seconds = [cost.estimate(spec).seconds or 0 for spec in (plain, timed)]
    assert seconds[1] - seconds[0] == pytest.approx(sum(calls))


def test_a_step_of_minutes_is_warmed_up_by_as_few_calls_as_the_rule_allows():
    for seconds in (1e-6, 0.01, 0.2, 0.3, 0.6, 100.0):
        times: list[float] = []

        def sample(times: list[float] = times, seconds: float = seconds) -> float:
            times.append(seconds)
            return seconds

        warm_up(sample, lambda times=times: sum(times))
        assert expected_calls(seconds) == len(times)


def test_without_a_history_the_time_is_labelled_rough():
    found = cost.estimate(spec_of())
    assert found.basis == "rough"
    assert any("rough" in note for note in found.notes)


def test_like_runs_of_the_past_say_how_long_it_takes(sqlite_store):
    spec = spec_of()
    points = [point.to_dict() for point in spec.points()]
    for _ in range(3):
        queued = queue.submit(
            sqlite_store, name="n", spec=spec.to_dict(), spec_hash=spec.hash(), points=points
        )
        claim = queue.claim(sqlite_store, "tests", run_id=queued.run_ids[0])
        assert claim is not None
        queue.finish(sqlite_store, claim, "succeeded")
    found = cost.estimate(spec, sqlite_store)
    assert found.basis == "history"
    assert found.seconds is not None
    assert found.seconds < 1
    assert not found.notes
    assert cost.estimate(spec_of(repeats=3), sqlite_store).basis == "rough"
    assert cost.estimate(spec_of(vary={"dtype": ["bfloat16"]}), sqlite_store).basis == "rough"


def test_a_model_that_nothing_is_known_of_has_runs_and_no_numbers():
    spec = parse_spec(
        {"name": "n", "model": "no/such", "input": {"text": "a"}, "vary": {"mechanism": ["multi_head"]}}
    )
    found = cost.estimate(spec)
    assert (found.runs, found.stored_bytes, found.seconds) == (1, 0, None)
    assert "nothing is known of no/such" in found.notes[0]


def test_results_that_do_not_fit_the_disk_are_refused(sqlite_store, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 1_000))
    refusals = cost.estimate(spec_of(), sqlite_store).refusals
    assert len(refusals) == 1
    assert "1.0 kB free" in refusals[0]
    assert cost.estimate(spec_of(record=["timing"]), sqlite_store).refusals == []
    assert cost.estimate(spec_of()).refusals == []
