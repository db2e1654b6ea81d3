"""What is recorded is what is read; what is deleted can be brought back until it is purged."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select

from attnlab_storage import queue, results, tensors
from attnlab_storage.database import Store
from attnlab_storage.tables import Base, Environment, Run

TRACE = results.TraceRow(
    layer=0,
    name="layers.0",
    kind="softmax",
    scale=0.125,
    mask={"kind": "causal"},
    heads=4,
    kv_heads=2,
    num_queries=7,
    num_keys=9,
    head_dim=64,
    dtype="float32",
    row_sum_defect=1e-7,
    output_defect=math.inf,
)


@pytest.fixture
def claim(store: Store, point: Callable[..., dict[str, Any]]) -> queue.Claim:
    queue.submit(store, name="n", spec={}, spec_hash="h", points=[point()])
    claimed = queue.claim(store, "me")
    assert claimed is not None
    return claimed


def test_measurements_come_back_exactly_and_in_order(store: Store, claim: queue.Claim):
    rows = [
        results.MeasurementRow(
            "latency", 1 / 3, "ms", samples=[0.1, 1e-310, -0.0, math.inf], detail={"n": [1]}
        ),
        results.MeasurementRow("entropy", -math.inf, "nats", layer=1, head=0),
        results.MeasurementRow("entropy", 2.0, "nats", layer=0, head=3),
    ]
    with results.recording(store, claim) as session:
        results.record_measurements(session, claim, rows)
        results.record_measurements(session, claim, [])
    assert results.measurements(store, 1) == rows
    assert results.measurements(store, 1, name="entropy") == rows[1:]
    assert results.measurements(store, 1, layer=0) == rows[2:]
    assert results.measurements(store, 1, name="latency", layer=0) == []


def test_a_measured_nan_stays_nan(store: Store, claim: queue.Claim):
    with results.recording(store, claim) as session:
        row = results.MeasurementRow("kl", math.nan, "nats", samples=[math.nan])
        results.record_measurements(session, claim, [row])
    (found,) = results.measurements(store, 1)
    assert math.isnan(found.value)
    assert found.samples is not None
    assert math.isnan(found.samples[0])


def test_traces_input_and_environment_come_back(store: Store, claim: queue.Claim):
    given = results.InputRow("Ġ\0é\ud83d", ["<script>", "\0"], ["\udc80", "日本"], {"ids": [1, 2]})
    machine = {"device": "cpu", "flags": ["a"], "torch": "2.13.0"}
    assert results.run_input(store, 1) is None
    assert results.environment(store, 1) is None
    with results.recording(store, claim) as session:
        results.record_trace(session, claim, TRACE)
        results.record_input(session, claim, given)
        key = results.record_environment(session, claim, machine)
    assert results.traces(store, 1) == [TRACE]
    assert results.run_input(store, 1) == given
    assert results.environment(store, 1) == machine
    run = results.get_run(store, 1)
    assert run is not None
    assert run.environment_id == key


def test_equal_environments_are_one_row(store: Store, point: Callable[..., dict[str, Any]]):
    queue.submit(store, name="n", spec={}, spec_hash="h", points=[point(), point(), point()])
    keys = []
    for document in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
        claim = queue.claim(store, "me")
        assert claim is not None
        with results.recording(store, claim) as session:
            keys.append(results.record_environment(session, claim, document))
    assert keys[0] == keys[1] != keys[2]


def test_numpy_values_are_stored_as_plain_numbers(store: Store, claim: queue.Claim):
    import numpy as np

    summary = {
        "latency_ms": np.float32(1.5),
        "heads": np.int64(9),
        "row": np.arange(2),
        "bad": np.float64("nan"),
    }
    queue.finish(store, claim, "succeeded", summary=summary)
    run = results.get_run(store, 1)
    assert run is not None
    assert run.summary == {"latency_ms": 1.5, "heads": 9, "row": [0, 1], "bad": "nan"}
    assert run.latency_ms == 1.5


def test_nothing_is_seen_before_a_recording_ends_and_nothing_stays_if_it_fails(
    store: Store, claim: queue.Claim
):
    row = results.MeasurementRow("latency", 1.0, "ms")

    def fail() -> None:
        with results.recording(store, claim) as session:
            results.record_measurements(session, claim, [row])
            assert results.measurements(store, 1) == []
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert results.measurements(store, 1) == []


def test_the_log_tail_is_the_last_lines(store: Store, claim: queue.Claim):
    assert results.log_tail(store, 1) == ""
    for number in range(50):
        queue.append_log(store, claim, f"line {number}\npart of ")
    assert results.log_tail(store, 1, 3) == "part of line 48\npart of line 49\npart of "
    assert results.log_tail(store, 1, 0) == ""
    assert results.log_tail(store, 1, 1000).startswith("line 0\npart of line 1\n")


def test_unknown_runs_have_nothing(store: Store):
    for key in (4711, 0, -1, 2**31, 2**70):
        assert results.get_run(store, key) is None
        assert results.get_experiment(store, key) is None
        assert queue.cancel(store, [key]) == 0
    assert results.measurements(store, 4711) == []
    assert results.traces(store, 4711) == []
    assert results.log_tail(store, 4711) == ""
    assert results.events(store, 4711) == []


def test_what_is_deleted_is_hidden_and_comes_back(store: Store, make_traced: Callable[..., Any]):
    traced = make_traced(store)
    first, second = traced.run_ids
    assert results.delete_runs(store, [first, 4711]) == [first]
    assert [run.id for run in results.list_runs(store).rows] == [second]
    assert [run.id for run in results.list_runs(store, deleted=True).rows] == [first]
    assert results.counts_by_state(store)["succeeded"] == 1
    assert results.delete_experiments(store, [traced.experiment_id]) == [traced.experiment_id]
    assert results.list_experiments(store).rows == []
    assert results.list_runs(store).rows == []
    # the run that was deleted before stays deleted
    assert results.restore_experiments(store, [traced.experiment_id]) == [traced.experiment_id]
    assert [run.id for run in results.list_runs(store).rows] == [second]
    results.delete_experiments(store, [traced.experiment_id])
    assert results.restore_runs(store, [first]) == [first]
    assert [row.id for row in results.list_experiments(store).rows] == [traced.experiment_id]
    assert tensors.stored_bytes(store, first) > 0


def test_a_deleted_run_of_the_queue_never_starts(store: Store, point: Callable[..., dict[str, Any]]):
    queue.submit(store, name="n", spec={}, spec_hash="h", points=[point()])
    results.delete_runs(store, [1])
    assert queue.claim(store, "me") is None
    assert queue.claim(store, "me", run_id=1) is None
    results.restore_runs(store, [1])
    run = results.get_run(store, 1)
    assert run is not None
    assert (run.state, run.reason) == ("cancelled", "deleted before it started")


def test_running_and_pinned_ones_cannot_be_deleted(store: Store, point: Callable[..., dict[str, Any]]):
    for _ in range(2):
        queue.submit(store, name="n", spec={}, spec_hash="h", points=[point(), point()])
    queue.claim(store, "me")
    results.change_experiment(store, 2, pinned=True)
    assert results.delete_experiments(store, [1, 2]) == []
    assert results.delete_runs(store, [1, 2, 3, 4]) == [2]
    results.change_experiment(store, 2, pinned=False)
    assert results.delete_experiments(store, [1, 2]) == [2]


def test_purging_removes_what_was_deleted_and_everything_that_hangs_on_it(
    store: Store, make_traced: Callable[..., Any]
):
    gone, stays = make_traced(store), make_traced(store, tokens=13)
    results.delete_experiments(store, [gone.experiment_id])
    assert results.purge(store, older_than_seconds=60) == 0
    with store.read() as session:
        expected = {table.name: count_of(session, table, stays.run_ids) for table in OF_RUNS}
    assert results.purge(store, older_than_seconds=0) == 2
    with store.read() as session:
        left = {table.name: count_of(session, table) for table in OF_RUNS}
        kept = session.scalars(select(Run.experiment_id).distinct()).all()
        environments = session.scalar(select(func.count()).select_from(Environment))
    assert list(kept) == [stays.experiment_id]
    assert environments == 1  # both used it
    assert results.get_experiment(store, gone.experiment_id) is None
    assert left == expected
    assert left["tensor"] > 0
    assert results.purge(store, older_than_seconds=0) == 0


OF_RUNS = [table for table in Base.metadata.sorted_tables if "run_id" in table.columns]


def count_of(session: Any, table: Any, run_ids: list[int] | None = None) -> int:
    query = select(func.count()).select_from(table)
    return session.scalar(query if run_ids is None else query.where(table.c.run_id.in_(run_ids)))


def test_an_experiment_can_be_renamed_tagged_and_noted(store: Store, make_traced: Callable[..., Any]):
    traced = make_traced(store)
    tags = ["b", " a ", "b", "", "naïve"]
    assert results.change_experiment(store, traced.experiment_id, name="new", note="why\0", tags=tags)
    row = results.get_experiment(store, traced.experiment_id)
    assert row is not None
    assert (row.name, row.note, row.tags, row.pinned) == ("new", "why\ufffd", ["b", "a", "naïve"], False)
    assert not results.change_experiment(store, 4711, name="x")
    with pytest.raises(ValueError, match="needs one of name, note, tags, pinned"):
        results.change_experiment(store, traced.experiment_id)


def test_times_are_the_clock_of_the_database(store: Store, claim: queue.Claim):
    run = results.get_run(store, 1)
    assert run is not None
    assert abs(run.created_at - time.time()) < 60
    assert run.started_at is not None
    assert run.created_at <= run.started_at + 0.01
