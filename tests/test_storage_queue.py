"""The laws of the queue that a random walk rarely meets: boundaries, races between processes, and its words."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update

from attnlab_storage import fencing, queue, results
from attnlab_storage.database import Store, open_store, revision
from attnlab_storage.tables import Attempt, Measurement, Run

Point = Callable[..., dict[str, Any]]


@pytest.fixture
def submit(store: Store, point: Point) -> Callable[..., queue.Submitted]:
    def call(count: int = 1, **options: Any) -> queue.Submitted:
        points = [point() for _ in range(count)]
        return queue.submit(store, name="n", spec={"a": 1}, spec_hash="h", points=points, **options)

    return call


@pytest.fixture
def claim(store: Store, submit: Callable[..., queue.Submitted]) -> queue.Claim:
    submit()
    claimed = queue.claim(store, "me")
    assert claimed is not None
    return claimed


def row_of(store: Store, run_id: int) -> results.RunRow:
    row = results.get_run(store, run_id)
    assert row is not None
    return row


def pass_time(store: Store, seconds: float) -> None:
    with store.write() as session:
        moved = {"lease_until": Run.lease_until - seconds, "run_after": Run.run_after - seconds}
        session.execute(update(Run).values(moved), execution_options={"synchronize_session": False})


def test_a_claim_travels_as_json(claim: queue.Claim):
    assert queue.Claim(**json.loads(json.dumps(asdict(claim)))) == claim
    assert claim.point["mechanism"] == "multi_head"
    assert claim.spec == {"a": 1}


def test_only_the_owner_of_the_attempt_gets_through_the_fence(store: Store, claim: queue.Claim):
    for zombie in (replace(claim, owner="you"), replace(claim, attempt=2), replace(claim, run_id=4711)):
        assert not queue.finish(store, zombie, "succeeded")
        with pytest.raises(queue.LostLease, match=f"run {zombie.run_id} is no longer held by {zombie.owner}"):
            queue.progress(store, zombie, "measuring")
        with pytest.raises(queue.LostLease), results.recording(store, zombie):
            pass
    assert queue.finish(store, claim, "succeeded")
    with pytest.raises(queue.LostLease):
        queue.progress(store, claim, "measuring")


def test_an_unknown_outcome_is_refused_with_the_choices(store: Store, claim: queue.Claim):
    with pytest.raises(ValueError, match="got 'done'; choices: succeeded, failed, out_of_memory"):
        queue.finish(store, claim, "done")


def test_the_lease_lasts_as_long_as_it_says(
    store: Store, submit: Callable[..., queue.Submitted], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ATTNLAB_LEASE_SECONDS", "100")
    submit()
    assert queue.claim(store, "me") is not None
    pass_time(store, 95)
    assert queue.reap(store) == []
    assert queue.beat(store, "me") != []
    pass_time(store, 95)
    assert queue.reap(store) == []
    pass_time(store, 6)
    assert queue.reap(store) == [1]
    row = row_of(store, 1)
    assert (row.state, row.error_kind) == ("queued", "lease_lost")
    assert row.reason == "the lease of me ran out in attempt 1"


def test_the_backoff_doubles_up_to_a_minute(store: Store, submit: Callable[..., queue.Submitted]):
    submit(max_attempts=8)
    waits = []
    for _ in range(7):
        claimed = queue.claim(store, "me")
        assert claimed is not None
        before = time.time()
        assert queue.give_back(store, claimed, error_kind="crashed", reason="signal 11") == "queued"
        waits.append(round(row_of(store, 1).run_after - before))
        assert queue.claim(store, "me") is None
        pass_time(store, 61)
    assert waits == [2, 4, 8, 16, 32, 60, 60]


def test_finish_drops_what_another_attempt_left(store: Store, claim: queue.Claim):
    """Also if it came there against the rules, as a restored backup may do it."""
    row = {"run_id": 1, "attempt": 7, "name": "latency", "value": 3.0, "unit": "ms"}
    with store.write() as session:
        session.execute(insert(Measurement), [row])
    assert results.measurements(store, 1) == []
    queue.finish(store, claim, "succeeded")
    with store.read() as session:
        assert session.scalars(select(Measurement.id)).all() == []


def test_finish_fills_the_columns_that_lists_sort_by(store: Store, claim: queue.Claim):
    queue.finish(store, claim, "succeeded", summary={"latency_ms": 1.5, "peak_memory_bytes": 2**40})
    row = row_of(store, 1)
    assert (row.latency_ms, row.peak_memory_bytes) == (1.5, 2**40)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "fast"])
def test_a_latency_that_is_no_number_ends_a_run_all_the_same(sqlite_store: Store, point: Point, value: Any):
    queue.submit(sqlite_store, name="n", spec={}, spec_hash="h", points=[point()])
    claimed = queue.claim(sqlite_store, "me")
    assert claimed is not None
    assert queue.finish(sqlite_store, claimed, "succeeded", summary={"latency_ms": value})
    assert row_of(sqlite_store, 1).latency_ms is None


def test_an_error_text_may_hold_any_character(store: Store, claim: queue.Claim):
    queue.append_log(store, claim, "a\0b\udcff\n")
    queue.finish(store, claim, "failed", reason="\0", error_detail="Traceback \ud800 <script>")
    row = row_of(store, 1)
    assert (row.reason, row.error_detail) == ("\ufffd", "Traceback \ufffd\ufffd\ufffd <script>")
    assert results.log_tail(store, 1) == "a\ufffdb\ufffd\ufffd\ufffd\n"


def test_runs_kept_back_are_claimed_by_id_only(store: Store, submit: Callable[..., queue.Submitted]):
    submit(delay_seconds=60)
    queue.pause(store)
    assert queue.claim(store, "dispatcher") is None
    assert queue.claim(store, "here", run_id=1) is not None
    assert queue.claim(store, "here", run_id=1) is None


def test_the_first_in_grid_order_starts_first(store: Store, submit: Callable[..., queue.Submitted]):
    submit(3)
    submit(2, priority=5)
    order = [claimed.run_id for _ in range(5) if (claimed := queue.claim(store, "me"))]
    assert order == [4, 5, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"points": []}, "points must hold at least one run"),
        ({"points": [{"mechanism": "flash"}]}, "missing or unknown: .*'implementation'"),
        ({"max_attempts": 0}, "max_attempts must be at least 1, got 0"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds must be a positive number, got inf"),
    ],
)
def test_a_wrong_submission_queues_nothing(
    sqlite_store: Store, point: Point, change: dict[str, Any], says: str
):
    wanted: dict[str, Any] = {"name": "n", "spec": {}, "spec_hash": "h", "points": [point()]}
    with pytest.raises(ValueError, match=says):
        queue.submit(sqlite_store, **wanted | change)
    assert results.list_experiments(sqlite_store).rows == []


def test_a_grid_is_queued_whole_or_not_at_all(store: Store, point: Point):
    points = [point(), point(kind="no such kind")]
    with pytest.raises(Exception, match=r"(?i)check"):
        queue.submit(store, name="n", spec={}, spec_hash="h", points=points)
    assert results.list_experiments(store).rows == []


def test_the_log_stays_open_for_a_moment_but_not_for_another_attempt(store: Store, claim: queue.Claim):
    queue.append_log(store, claim, "working\n")
    queue.finish(store, claim, "failed", reason="it broke")
    queue.append_log(store, claim, "Traceback\n")
    assert results.log_tail(store, 1) == "working\nTraceback\n"
    queue.retry(store, [1])
    with pytest.raises(queue.LostLease):
        queue.append_log(store, claim, "late\n")
    second = queue.claim(store, "me")
    assert second is not None
    queue.append_log(store, second, "again\n")
    assert results.log_tail(store, 1) == "again\n"
    assert results.log_tail(store, 1, attempt=1) == "working\nTraceback\n"


def test_a_flood_in_the_log_loses_its_middle_and_says_so(store: Store, claim: queue.Claim):
    queue.append_log(store, claim, "a" * 100_000 + "\nend\n")
    tail = results.log_tail(store, 1, 10)
    assert len(tail) < queue.MAX_LOG_CHARS + 100
    assert "characters left out" in tail
    assert tail.endswith("end\n")


def test_many_runs_change_in_batches(store: Store, submit: Callable[..., queue.Submitted], monkeypatch):
    monkeypatch.setattr(fencing, "BATCH", 7)
    ids = submit(40).run_ids
    assert queue.cancel(store, ids) == 40
    assert queue.retry(store, ids) == ids
    assert results.delete_runs(store, ids) == ids
    assert results.restore_runs(store, ids) == ids
    assert results.counts_by_state(store)["cancelled"] == 40


def test_a_batch_fits_the_bind_variables_of_a_statement(store: Store, submit: Callable[..., queue.Submitted]):
    submit(2)
    everything = range(1, 70_000)
    assert queue.cancel(store, everything) == 2
    assert queue.retry(store, everything) == [1, 2]
    assert results.delete_experiments(store, everything) == [1]


def test_every_change_of_a_run_moves_the_revision(store: Store, submit: Callable[..., queue.Submitted]):
    seen = [revision(store)]

    def moved(_: Any) -> bool:
        seen.append(revision(store))
        return seen[-1] > seen[-2]

    assert moved(submit(2))
    claimed = queue.claim(store, "me")
    assert claimed is not None
    assert moved(claimed)
    assert moved(queue.progress(store, claimed, "measuring", 1, 2))
    assert moved(queue.append_log(store, claimed, "x"))
    assert moved(queue.cancel(store, [1]))
    assert moved(queue.move_to_front(store, 2))
    assert moved(queue.give_back(store, claimed, error_kind="crashed", reason="r"))
    assert moved(queue.retry(store, [1]))
    assert moved(queue.pause(store))
    assert moved(results.change_experiment(store, 1, name="other"))
    assert moved(results.delete_runs(store, [2]))
    assert not moved(queue.beat(store, "me"))
    assert not moved(queue.claim(store, "me"))
    assert not moved(queue.reap(store))
    assert moved(queue.dispatcher_beat(store, "d", {"gpus": 0}))
    assert not moved(queue.dispatcher_beat(store, "d", {"gpus": 0}))
    assert moved(queue.dispatcher_beat(store, "d", {"gpus": 1}))


def test_dispatchers_are_known_by_their_heartbeat(store: Store):
    queue.dispatcher_beat(store, "old", {"gpus": 2})
    queue.dispatcher_beat(store, "new", {"gpus": 0})
    queue.dispatcher_beat(store, "old", {"gpus": 3})
    rows = queue.dispatchers(store)
    assert [(row.owner, row.cluster) for row in rows] == [("old", {"gpus": 3}), ("new", {"gpus": 0})]
    assert 0 <= rows[0].silent_seconds < 30
    queue.forget_dispatcher(store, "old")
    assert [row.owner for row in queue.dispatchers(store)] == ["new"]


def test_the_audit_trail_tells_the_whole_story(store: Store, claim: queue.Claim):
    queue.give_back(store, claim, error_kind="crashed", reason="signal 11", backoff_seconds=0)
    second = queue.claim(store, "you")
    assert second is not None
    queue.finish(store, second, "succeeded")
    kinds = [(event.kind, event.attempt) for event in results.events(store, 1)]
    assert kinds == [("submitted", None), ("claimed", 1), ("requeued", 1), ("claimed", 2), ("finished", 2)]
    assert results.events(store, 1)[2].detail == {"reason": "signal 11", "error_kind": "crashed"}
    outcomes = [(row.owner, row.outcome, row.error_kind) for row in results.attempts(store, 1)]
    assert outcomes == [("me", "requeued", "crashed"), ("you", "succeeded", None)]


WORKER = """
import sys
from attnlab_storage import queue, results
from attnlab_storage.database import open_store
url, owner = sys.argv[1:]
with open_store(url) as store:
    while claim := queue.claim(store, owner):
        with results.recording(store, claim) as session:
            row = results.MeasurementRow("latency", float(claim.run_id), "ms")
            results.record_measurements(session, claim, [row])
        assert queue.beat(store, owner)
        assert queue.finish(store, claim, "succeeded", summary={"owner": owner})
        print(claim.run_id)
"""


def test_many_processes_take_every_run_once(
    store: Store, store_url: str, submit: Callable[..., queue.Submitted]
):
    ids = submit(60).run_ids
    command = [sys.executable, "-W", "error", "-c", WORKER, store_url]
    workers = [
        subprocess.Popen([*command, f"worker-{index}"], stdout=subprocess.PIPE, text=True)
        for index in range(3)
    ]
    taken = [[int(line) for line in worker.communicate(timeout=120)[0].split()] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3
    assert sorted(run_id for some in taken for run_id in some) == ids
    assert sum(bool(some) for some in taken) > 1
    rows = results.runs_of(store, run_ids=ids)
    assert {row.state for row in rows} == {"succeeded"}
    assert {row.attempt for row in rows} == {1}
    assert all(len(results.measurements(store, run_id)) == 1 for run_id in ids)


def test_threads_share_a_store(store: Store, submit: Callable[..., queue.Submitted]):
    ids = submit(40).run_ids
    taken: list[int] = []

    def work(owner: str) -> None:
        while claimed := queue.claim(store, owner):
            queue.progress(store, claimed, "measuring")
            queue.finish(store, claimed, "succeeded")
            taken.append(claimed.run_id)

    threads = [threading.Thread(target=work, args=(f"thread-{index}",)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ids


def test_crossing_bulk_changes_do_not_deadlock(store: Store, submit: Callable[..., queue.Submitted]):
    ids = submit(30).run_ids
    for _ in ids:
        queue.claim(store, "me")
    problems: list[BaseException] = []

    def repeat(action: Callable[[], Any]) -> None:
        try:
            for _ in range(15):
                action()
        except BaseException as error:
            problems.append(error)

    actions = [
        lambda: queue.beat(store, "me"),
        lambda: queue.cancel(store, reversed(ids)),
        lambda: queue.cancel(store, ids),
        lambda: queue.reap(store),
    ]
    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert all(beat.cancel_requested for beat in queue.beat(store, "me"))


def test_a_store_works_after_a_fork(store: Store, submit: Callable[..., queue.Submitted]):
    submit(2)
    assert queue.claim(store, "parent") is not None  # connections are open now
    child = os.fork()
    if child == 0:
        claimed = queue.claim(store, "child")
        os._exit(0 if claimed and queue.finish(store, claimed, "succeeded") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert queue.beat(store, "parent") == [queue.Beat(1, 1, False)]
    assert row_of(store, 2).state == "succeeded"


def test_a_transaction_of_a_killed_process_leaves_nothing(store: Store, store_url: str, claim: queue.Claim):
    code = f"""
import os, signal, sys
from attnlab_storage import queue, results
from attnlab_storage.database import open_store
store = open_store({store_url!r})
claim = queue.Claim(**{asdict(claim)!r})
with results.recording(store, claim) as session:
    results.record_measurements(session, claim, [results.MeasurementRow("latency", 1.0, "ms")])
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -9
    assert results.measurements(store, 1) == []
    assert queue.finish(store, claim, "succeeded")


@pytest.mark.postgres
def test_postgres_claims_without_waiting_for_a_locked_run(postgres_url: str, point: Point):
    with open_store(postgres_url) as store:
        queue.submit(store, name="n", spec={}, spec_hash="h", points=[point(), point()])
        with store.write() as session:
            session.execute(select(Run.id).where(Run.id == 1).with_for_update())
            claimed = queue.claim(store, "me")
        assert claimed is not None
        assert claimed.run_id == 2


def test_the_claim_reads_an_index(sqlite_store: Store):
    with sqlite_store.read() as session:
        plan = session.execute(
            text(
                "EXPLAIN QUERY PLAN SELECT id FROM run WHERE state = 'queued' "
                "AND cancel_requested_at IS NULL ORDER BY priority DESC, id LIMIT 1"
            )
        )
        details = [row.detail for row in plan]
    assert any("ix_run_queue" in detail for detail in details)
    assert not any("TEMP B-TREE" in detail for detail in details)


def test_an_attempt_row_is_written_with_the_claim(store: Store, claim: queue.Claim):
    with store.read() as session:
        rows = session.execute(select(Attempt.run_id, Attempt.attempt, Attempt.owner, Attempt.ended_at)).all()
    assert [tuple(row) for row in rows] == [(1, 1, "me", None)]
