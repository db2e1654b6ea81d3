"""The dispatcher's rounds, with threads in the place of Ray: what is claimed, kept, settled and shown."""

import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from traced_fixtures import POINT

from attnlab_storage import queue, results
from attnlab_storage.database import Store
from attnlab_storage.errors import StoreUnreachable
from attnlab_storage.listing import RunRow, get_run
from attnlab_workers.capacity import Node, Share
from attnlab_workers.dispatcher import Dispatcher
from attnlab_workers.executor import Ended, LocalExecutor

JOB = "fake_jobs:perform"


class NoExecutor:
    """Starts nothing: shows what the dispatcher asked for, and ends what the test says has ended."""

    def __init__(self, *nodes: Node) -> None:
        self.there = list(nodes) or [Node("a", "a", 1, 0)]
        self.started: list[str] = []
        self.killed: list[str] = []
        self.ended: list[Ended] = []

    def nodes(self) -> list[Node]:
        return self.there

    def start(self, key: str, work: str, document: dict[str, Any], share: Share) -> None:
        self.started.append(key)

    def wait(self, seconds: float) -> list[Ended]:
        ended, self.ended = self.ended, []
        return ended

    def kill(self, key: str) -> None:
        self.killed.append(key)
        self.ended.append(Ended(key, error="TaskCancelledError: killed"))

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "jobs"))
    monkeypatch.setenv("ATTNLAB_LEASE_SECONDS", "3")
    monkeypatch.setattr(queue, "BACKOFF_FIRST", 0.1)


@pytest.fixture
def submit(sqlite_store: Store) -> Callable[..., list[int]]:
    def submit(*jobs: dict[str, Any], gpus: int = 0, kind: str = "inspect", **how: Any) -> list[int]:
        points = [POINT | {"parameters": job, "gpus": gpus, "kind": kind} for job in jobs]
        return queue.submit(sqlite_store, name="fake", spec={}, spec_hash="0", points=points, **how).run_ids

    return submit


@pytest.fixture
def dispatcher(sqlite_store: Store) -> Iterator[Dispatcher]:
    executor = LocalExecutor(slots=1)
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey=None)
    yield dispatcher
    queue.cancel(sqlite_store, [held.claim.run_id for held in dispatcher.held.values()])
    executor.close()


def run_of(store: Store, run_id: int) -> RunRow:
    run = get_run(store, run_id)
    assert run is not None
    return run


def work(dispatcher: Dispatcher, until: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "the dispatcher did not get there"
        dispatcher.tick(0.05)


def ended(store: Store, run_id: int) -> bool:
    return run_of(store, run_id).state not in ("queued", "running")


def test_runs_are_done_one_after_the_other_in_their_order(sqlite_store, dispatcher, submit):
    first, second = submit({}, {"do": "sleep", "seconds": 0.2})
    (urgent,) = submit({}, priority=5)
    work(dispatcher, lambda: all(ended(sqlite_store, run_id) for run_id in (first, second, urgent)))
    runs = [run_of(sqlite_store, run_id) for run_id in (urgent, first, second)]
    assert [run.state for run in runs] == ["succeeded"] * 3
    for before, after in itertools.pairwise(runs):
        assert (before.finished_at or 0) <= (after.started_at or 0)


def test_a_crash_is_tried_again_once_in_a_fresh_process(sqlite_store, dispatcher, submit):
    (run_id,) = submit({"do": "signal", "number": signal.SIGSEGV, "attempts": 1})
    work(dispatcher, lambda: ended(sqlite_store, run_id))
    run = run_of(sqlite_store, run_id)
    assert (run.state, run.attempt) == ("succeeded", 2)
    first, second = results.attempts(sqlite_store, run_id)
    assert (first.outcome, first.error_kind) == ("requeued", "crashed")
    assert "SIGSEGV" in (first.reason or "")
    assert second.outcome == "succeeded"
    rows = results.measurements(sqlite_store, run_id)
    assert [(row.name, row.value) for row in rows] == [("begun", 2.0), ("latency", 2.0)]


def test_a_second_crash_is_a_failure_that_names_the_signal(sqlite_store, dispatcher, submit):
    crashing, after = submit({"do": "signal", "number": signal.SIGBUS}, {})
    work(dispatcher, lambda: ended(sqlite_store, crashing) and ended(sqlite_store, after))
    run = run_of(sqlite_store, crashing)
    assert (run.state, run.error_kind, run.attempt) == ("failed", "crashed", 2)
    assert run.reason == "the child died of SIGBUS, twice"
    assert "Bus error" in (run.error_detail or "")
    assert run_of(sqlite_store, after).state == "succeeded"


def test_a_job_that_says_nothing_of_its_outcome_has_crashed(sqlite_store, dispatcher, submit):
    (run_id,) = submit({"do": "nothing"}, max_attempts=1)
    work(dispatcher, lambda: ended(sqlite_store, run_id))
    run = run_of(sqlite_store, run_id)
    assert (run.state, run.reason) == ("failed", "the child ended without an outcome")


def test_running_out_of_memory_is_a_result_and_not_tried_again(sqlite_store, dispatcher, submit, monkeypatch):
    monkeypatch.setenv("ATTNLAB_RUN_MEMORY_BYTES", str(300 * 2**20))
    greedy, after = submit({"do": "allocate"}, {})
    work(dispatcher, lambda: ended(sqlite_store, greedy) and ended(sqlite_store, after))
    run = run_of(sqlite_store, greedy)
    assert (run.state, run.attempt, run.error_kind) == ("out_of_memory", 1, "host_oom")
    assert run_of(sqlite_store, after).state == "succeeded"


def test_a_run_beyond_its_time_is_timed_out(sqlite_store, dispatcher, submit):
    (run_id,) = submit({"do": "sleep", "seconds": 60}, timeout_seconds=1.0)
    work(dispatcher, lambda: ended(sqlite_store, run_id))
    assert run_of(sqlite_store, run_id).state == "timed_out"


def test_a_cancelled_run_frees_its_place_for_the_next(sqlite_store, dispatcher, submit):
    sleeping, after = submit({"do": "ignore_sigterm"}, {})
    work(dispatcher, lambda: run_of(sqlite_store, sleeping).phase_name == "ignoring")
    queue.cancel(sqlite_store, [sleeping])
    started = time.monotonic()
    work(dispatcher, lambda: ended(sqlite_store, sleeping))
    assert time.monotonic() - started < 5.0
    assert run_of(sqlite_store, sleeping).state == "cancelled"
    work(dispatcher, lambda: ended(sqlite_store, after))
    assert run_of(sqlite_store, after).state == "succeeded"


def test_a_lease_is_kept_for_as_long_as_the_run_takes(sqlite_store, dispatcher, submit, monkeypatch):
    monkeypatch.setenv("ATTNLAB_LEASE_SECONDS", "1")
    (run_id,) = submit({"do": "sleep", "seconds": 2.5})
    work(dispatcher, lambda: ended(sqlite_store, run_id))
    assert run_of(sqlite_store, run_id).attempt == 1


def test_the_run_of_a_dispatcher_that_is_gone_is_taken_up_again(
    sqlite_store, dispatcher, submit, monkeypatch
):
    (run_id,) = submit({})
    monkeypatch.setenv("ATTNLAB_LEASE_SECONDS", "0.2")
    assert queue.claim(sqlite_store, "a dead dispatcher", run_id=run_id) is not None
    monkeypatch.setenv("ATTNLAB_LEASE_SECONDS", "3")
    work(dispatcher, lambda: ended(sqlite_store, run_id))
    run = run_of(sqlite_store, run_id)
    assert (run.state, run.attempt) == ("succeeded", 2)


def test_nothing_is_claimed_that_does_not_fit_now(sqlite_store, submit):
    executor = NoExecutor(Node("a", "a", 1, 0))
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey=None)
    first, second = submit({}, {})
    dispatcher.tick(0)
    assert executor.started == [f"run-{first}:1"]
    assert run_of(sqlite_store, second).state == "queued"


def test_a_run_that_can_never_fit_says_so_and_holds_nobody_back(sqlite_store, submit):
    executor = NoExecutor(Node("a", "a", 1, 0))
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey=None)
    (greedy,) = submit({}, gpus=2)
    (modest,) = submit({})
    dispatcher.tick(0)
    dispatcher.tick(0)
    assert executor.started == [f"run-{modest}:1"]
    (row,) = queue.dispatchers(sqlite_store)
    assert row.cluster["waiting_for"] == {str(greedy): "waiting for 2 GPUs: this machine has 0"}
    assert row.cluster["running"] == [modest]
    assert (row.cluster["slots"], row.cluster["free_slots"]) == (1, 0)


def test_a_paused_queue_starts_nothing(sqlite_store, submit):
    executor = NoExecutor()
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey=None)
    queue.pause(sqlite_store)
    submit({})
    dispatcher.tick(0)
    assert executor.started == []
    queue.resume(sqlite_store)
    dispatcher.tick(0)
    assert len(executor.started) == 1


def test_a_lost_worker_gives_the_run_back(sqlite_store, submit):
    executor = NoExecutor()
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey=None)
    (run_id,) = submit({})
    dispatcher.tick(0)
    executor.ended = [Ended(f"run-{run_id}:1", error="WorkerCrashedError: gone")]
    dispatcher.tick(0)
    run = run_of(sqlite_store, run_id)
    assert (run.state, run.error_kind) == ("queued", "worker_lost")
    assert "WorkerCrashedError" in (run.reason or "")


def test_nothing_starts_on_another_machine_that_lost_a_run_until_it_is_missed(sqlite_store, submit):
    executor = NoExecutor(Node("a", "elsewhere", 1, 0))
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey=None)
    (lost,) = submit({})
    dispatcher.tick(0)
    (other,) = submit({})
    executor.ended = [Ended(f"run-{lost}:1", error="WorkerCrashedError: gone")]
    dispatcher.tick(0)
    dispatcher.tick(0)
    assert executor.started == [f"run-{lost}:1"]
    assert not dispatcher.capacity.has_room()
    executor.there.append(Node("b", "beside", 1, 0))
    dispatcher.capacity.replace_nodes(executor.there)
    dispatcher.tick(0)
    assert dispatcher.held[f"run-{other}:1"].share.node.id == "b"
    assert not dispatcher.capacity.has_room()
    dispatcher.capacity.doubt(executor.there[0], 0.0)
    assert dispatcher.capacity.has_room()


def test_the_own_machine_that_lost_a_run_takes_the_next_at_once(sqlite_store, submit, monkeypatch):
    monkeypatch.setattr(queue, "BACKOFF_FIRST", 60.0)
    executor = NoExecutor(Node("a", socket.gethostname(), 1, 0))
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey=None)
    (lost,) = submit({})
    dispatcher.tick(0)
    (other,) = submit({})
    executor.ended = [Ended(f"run-{lost}:1", error="WorkerCrashedError: gone")]
    dispatcher.tick(0)
    dispatcher.tick(0)
    assert executor.started == [f"run-{lost}:1", f"run-{other}:1"]


def test_a_worker_that_does_not_answer_a_cancel_is_ended_by_force(sqlite_store, submit, monkeypatch):
    monkeypatch.setattr("attnlab_workers.dispatcher.FORCE_SECONDS", 0.1)
    executor = NoExecutor()
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey=None)
    (run_id,) = submit({})
    dispatcher.tick(0)
    queue.cancel(sqlite_store, [run_id])
    deadline = time.monotonic() + 5
    while not executor.killed and time.monotonic() < deadline:
        dispatcher.tick(0)
        time.sleep(0.02)
    assert executor.killed == [f"run-{run_id}:1"]
    dispatcher.tick(0)
    assert run_of(sqlite_store, run_id).state == "cancelled"


def test_stopping_gives_running_runs_back_and_costs_them_no_attempt(sqlite_store, submit):
    executor = NoExecutor()
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey=None)
    (run_id,) = submit({}, max_attempts=1)
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=[stop])
    thread.start()
    deadline = time.monotonic() + 5
    while not executor.started and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.set()
    thread.join()
    run = run_of(sqlite_store, run_id)
    assert (run.state, run.attempt) == ("queued", 1)
    assert queue.dispatchers(sqlite_store) == []
    assert queue.claim(sqlite_store, "the next") is not None


def test_the_machine_is_surveyed_before_the_first_run(sqlite_store, submit):
    executor = LocalExecutor(slots=1)
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey="fake_jobs:answer")
    (run_id,) = submit({})
    try:
        work(dispatcher, lambda: ended(sqlite_store, run_id))
        dispatcher.tick(0)
    finally:
        executor.close()
    (row,) = queue.dispatchers(sqlite_store)
    (node,) = row.cluster["nodes"]
    assert node["environment"] == {"device": "fake", "implementations": []}
    assert node["survey_error"] is None


def test_a_survey_that_fails_says_why_and_stops_nothing(sqlite_store, submit):
    executor = LocalExecutor(slots=1)
    dispatcher = Dispatcher(sqlite_store, executor, job=JOB, survey="no_such_module:answer")
    (run_id,) = submit({})
    try:
        work(dispatcher, lambda: ended(sqlite_store, run_id))
        dispatcher.tick(0)
    finally:
        executor.close()
    (node,) = queue.dispatchers(sqlite_store)[0].cluster["nodes"]
    assert node["environment"] is None
    assert "no_such_module" in node["survey_error"]


def test_the_database_may_go_away_for_a_while(sqlite_store, dispatcher, submit, monkeypatch):
    (run_id,) = submit({})
    stop = threading.Event()
    real, calls = queue.reap, []

    def broken(store: Store) -> list[int]:
        calls.append(store)
        if len(calls) == 1:
            raise StoreUnreachable("the database is away")
        return real(store)

    monkeypatch.setattr(queue, "reap", broken)
    thread = threading.Thread(target=dispatcher.run, args=[stop])
    thread.start()
    deadline = time.monotonic() + 20
    while not ended(sqlite_store, run_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    thread.join()
    assert run_of(sqlite_store, run_id).state == "succeeded"


def test_an_owner_is_never_used_twice(sqlite_store):
    owners = {Dispatcher(sqlite_store, NoExecutor()).owner for _ in range(20)}
    assert len(owners) == 20
    assert all(f":{os.getpid()}:" in owner for owner in owners)
