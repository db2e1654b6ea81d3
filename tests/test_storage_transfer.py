"""An experiment that leaves a store and enters another is the same experiment; a damaged one enters not at all."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnlab_storage import queue, results, tensors
from attnlab_storage.database import Store, open_store
from attnlab_storage.transfer import Part, TransferError, dump_experiment, load_experiment


@pytest.fixture
def dumped(sqlite_template: Path, tmp_path: Path, make_traced: Callable[..., Any]) -> list[Part]:
    path = tmp_path / "source.db"
    path.write_bytes(sqlite_template.read_bytes())
    with open_store(f"sqlite:///{path}") as source:
        return list(dump_experiment(source, make_traced(source).experiment_id))


def part_of(parts: list[Part], kind: str) -> Part:
    return next(part for part in parts if part.kind == kind)


def everything(store: Store, run_id: int) -> dict[str, Any]:
    """All that readers see of a run, without the ids that differ between stores."""
    run = results.get_run(store, run_id)
    assert run is not None
    return {
        "run": repr(replace(run, id=0, experiment_id=0, environment_id=0)),
        "measurements": repr(results.measurements(store, run_id)),
        "traces": repr(results.traces(store, run_id)),
        "input": results.run_input(store, run_id),
        "environment": results.environment(store, run_id),
        "log": results.log_tail(store, run_id),
        "attempts": results.attempts(store, run_id),
        "events": results.events(store, run_id),
        "tensors": [replace(info, id=0) for info in tensors.tensor_info(store, run_id)],
        "values": [
            tensors.read_tensor(store, run_id, info.name, info.layer, head).tobytes()
            for info in tensors.tensor_info(store, run_id)
            for head in range(info.heads)
        ],
    }


@pytest.mark.parametrize("rows_a_part", [500, 3])
def test_an_experiment_survives_the_way_through_json_into_another_store(
    store: Store, sqlite_template, tmp_path, make_traced: Callable[..., Any], monkeypatch, rows_a_part: int
):
    monkeypatch.setattr("attnlab_storage.transfer.ROWS", rows_a_part)
    traced = make_traced(store, outcomes=["failed", "out_of_memory"])
    results.change_experiment(store, traced.experiment_id, note="why", tags=["a", "ü"], pinned=True)
    parts = [
        Part(part.kind, json.loads(json.dumps(part.rows, allow_nan=False)), part.data)
        for part in dump_experiment(store, traced.experiment_id)
    ]
    path = tmp_path / "other.db"
    path.write_bytes(sqlite_template.read_bytes())
    with open_store(f"sqlite:///{path}") as other:
        make_traced(other)  # so that the ids differ
        loaded = load_experiment(other, parts)
        assert sorted(loaded.run_ids) == traced.run_ids
        for old, new in loaded.run_ids.items():
            assert new != old
            before, after = everything(store, old), everything(other, new)
            assert after["events"].pop().kind == "imported"
            assert after == before
        old_row = results.get_experiment(store, traced.experiment_id)
        new_row = results.get_experiment(other, loaded.experiment_id)
        assert old_row is not None
        assert new_row == replace(old_row, id=loaded.experiment_id)


def test_nan_and_every_character_survive(store: Store, point):
    spec = {"text": "a\0b \ud800 Ġ"}
    submitted = queue.submit(store, name="odd", spec=spec, spec_hash="h", points=[point()])
    claim = queue.claim(store, "me")
    assert claim is not None
    with results.recording(store, claim) as session:
        row = results.MeasurementRow("kl", math.nan, "nats", samples=[math.nan, -math.inf, -0.0, 1e-310])
        results.record_measurements(session, claim, [row])
        results.record_input(session, claim, results.InputRow("\0\ud800", ["\0"], ["\udfff", "é"]))
    queue.finish(store, claim, "succeeded", summary={"defect": math.nan})
    loaded = load_experiment(store, list(dump_experiment(store, submitted.experiment_id)))
    (run_id,) = loaded.run_ids.values()
    assert repr(results.measurements(store, run_id)) == repr([row])
    assert results.run_input(store, run_id) == results.InputRow("\0\ud800", ["\0"], ["\udfff", "é"])
    experiment = results.get_experiment(store, loaded.experiment_id)
    assert experiment is not None
    assert experiment.spec == spec
    run = results.get_run(store, run_id)
    assert run is not None
    assert run.summary == {"defect": "nan"}


def test_a_run_that_had_not_ended_is_never_queued_by_an_import(store: Store, point):
    submitted = queue.submit(store, name="n", spec={}, spec_hash="h", points=[point(), point()])
    queue.claim(store, "me")
    loaded = load_experiment(store, list(dump_experiment(store, submitted.experiment_id)))
    rows = results.runs_of(store, experiment_id=loaded.experiment_id)
    assert [row.state for row in rows] == ["cancelled", "cancelled"]
    assert [row.reason for row in rows] == ["running when it was exported", "queued when it was exported"]


def test_results_of_a_losing_attempt_do_not_travel(store: Store, point):
    submitted = queue.submit(store, name="n", spec={}, spec_hash="h", points=[point()])
    first = queue.claim(store, "me")
    assert first is not None
    queue.append_log(store, first, "first\n")
    queue.give_back(store, first, error_kind="crashed", reason="signal 11", backoff_seconds=0)
    second = queue.claim(store, "me")
    assert second is not None
    with results.recording(store, second) as session:
        results.record_measurements(session, second, [results.MeasurementRow("latency", 2.0, "ms")])
    queue.finish(store, second, "succeeded")
    loaded = load_experiment(store, list(dump_experiment(store, submitted.experiment_id)))
    (run_id,) = loaded.run_ids.values()
    assert [row.value for row in results.measurements(store, run_id)] == [2.0]
    assert [row.outcome for row in results.attempts(store, run_id)] == ["requeued", "succeeded"]
    assert results.log_tail(store, run_id, attempt=1) == "first\n"


def break_kind(parts: list[Part]) -> None:
    parts.append(Part("secret", [{}]))


def break_order(parts: list[Part]) -> None:
    parts.insert(0, parts.pop(parts.index(part_of(parts, "run"))))


def break_twice(parts: list[Part]) -> None:
    parts.insert(1, parts[0])


def break_column(parts: list[Part]) -> None:
    part_of(parts, "run").rows[0]["owner"] = "me"


def break_missing(parts: list[Part]) -> None:
    del part_of(parts, "trace").rows[0]["scale"]


def break_type(parts: list[Part]) -> None:
    part_of(parts, "measurement").rows[0]["value"] = "1; DROP TABLE run"


def break_bool(parts: list[Part]) -> None:
    part_of(parts, "run").rows[0]["gpus"] = True


def break_size(parts: list[Part]) -> None:
    part_of(parts, "run").rows[0]["sequence_length"] = 2**40


def break_huge(parts: list[Part]) -> None:
    part_of(parts, "measurement").rows[0]["value"] = 10**400


def break_list(parts: list[Part]) -> None:
    part_of(parts, "input").rows[0]["key_tokens"] = ["a", 3]


def break_rule(parts: list[Part]) -> None:
    part_of(parts, "run").rows[0]["kind"] = "mine bitcoin"


def break_run(parts: list[Part]) -> None:
    part_of(parts, "trace").rows[0]["run_id"] = 4711


def break_environment(parts: list[Part]) -> None:
    part_of(parts, "run").rows[0]["environment_id"] = 4711


def break_tensor(parts: list[Part]) -> None:
    part_of(parts, "tensor").rows[0]["tokens"] = 10**9


def break_bytes(parts: list[Part]) -> None:
    index = parts.index(part_of(parts, "chunk"))
    parts[index] = parts[index]._replace(data=(parts[index].data or b"")[:-1])


def break_chunk(parts: list[Part]) -> None:
    parts.remove(part_of(parts, "chunk"))


def break_repeat(parts: list[Part]) -> None:
    parts.append(part_of(parts, "chunk"))


def break_place(parts: list[Part]) -> None:
    part_of(parts, "chunk").rows[0]["head"] = [1]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_kind, "known kind, got 'secret'; choices: experiment, environment, run"),
        (break_order, "first part, and no other, must be the experiment"),
        (break_twice, "first part, and no other, must be the experiment"),
        (break_column, "exactly the columns .* missing or unknown: .*owner"),
        (break_missing, "row of trace has exactly the columns .* missing or unknown: .*scale"),
        (break_type, "measurement.value must be a number, got '1; DROP TABLE run'"),
        (break_bool, "run.gpus must be a whole number"),
        (break_size, "run.sequence_length must be a whole number of 32 bits"),
        (break_huge, "measurement.value must be a number"),
        (break_list, "input.key_tokens must be a list of texts"),
        (break_rule, "breaks a rule of the store: .*(ck_run_kind|bitcoin)"),
        (break_run, "run_id must be a run that came before, got 4711"),
        (break_environment, "environment that came before, got 4711"),
        (break_tensor, "as many bytes as its sizes say"),
        (break_bytes, "must have 1024 bytes, got 1023"),
        (break_chunk, "tensor .* must be whole, head 0 block 0 is missing"),
        (break_repeat, "must belong once to a tensor that came before"),
        (break_place, "must belong once to a tensor that came before"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_experiment_leaves_nothing_in_the_store(
    sqlite_store: Store, dumped: list[Part], damage: Callable[[list[Part]], None], says: str
):
    check_damage(sqlite_store, dumped, damage, says)


@pytest.mark.postgres
@pytest.mark.parametrize("damage", [break_rule, break_chunk])
def test_postgres_rolls_a_damaged_experiment_back(
    postgres_url: str, dumped: list[Part], damage: Callable[[list[Part]], None]
):
    with open_store(postgres_url) as store:
        check_damage(store, dumped, damage, "breaks a rule|must be whole")


def check_damage(store: Store, dumped: list[Part], damage: Callable[[list[Part]], None], says: str) -> None:
    parts = copy.deepcopy(dumped)
    damage(parts)
    with pytest.raises(TransferError, match=says):
        load_experiment(store, parts)
    assert results.list_experiments(store).rows == []
    assert sum(results.counts_by_state(store).values()) == 0
    load_experiment(store, dumped)  # and the store still works


def test_a_source_that_breaks_in_the_middle_leaves_nothing(store: Store, dumped: list[Part]):
    def broken():
        yield from dumped[:-1]
        raise OSError("bad zip")

    with pytest.raises(OSError, match="bad zip"):
        load_experiment(store, broken())
    assert results.list_experiments(store).rows == []


def test_an_unknown_experiment_is_an_error(store: Store):
    with pytest.raises(TransferError, match="id of an experiment in the store"):
        list(dump_experiment(store, 1))


def test_an_export_is_one_snapshot(store: Store, make_traced: Callable[..., Any]):
    traced = make_traced(store)
    parts = dump_experiment(store, traced.experiment_id)
    first = next(parts)
    results.delete_runs(store, traced.run_ids)
    rest = list(parts)
    assert len(part_of(rest, "run").rows) == 2
    assert first.kind == "experiment"
    assert np.frombuffer(part_of(rest, "chunk").data or b"", "<f4").size == 32 * 8
