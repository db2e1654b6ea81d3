"""One child through one run: whatever it does, the supervisor says how it ended and nothing of it is left."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from traced_fixtures import POINT

from attnlab_storage import queue, results
from attnlab_storage.database import Store
from attnlab_storage.listing import get_run
from attnlab_storage.queue import Claim
from attnlab_workers import processes, supervisor
from attnlab_workers.child_process import Spare
from attnlab_workers.exits import Exit
from attnlab_workers.order import Order
from attnlab_workers.supervisor import supervise

JOB = "fake_jobs:perform"


@pytest.fixture(autouse=True)
def fake_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "jobs"))


@pytest.fixture
def claimed(sqlite_store: Store) -> Callable[..., Claim]:
    def claim(timeout_seconds: float = 60.0, **parameters: object) -> Claim:
        submitted = queue.submit(
            sqlite_store,
            name="fake",
            spec={},
            spec_hash="0",
            points=[POINT | {"parameters": parameters}],
            timeout_seconds=timeout_seconds,
        )
        (run_id,) = submitted.run_ids
        taken = queue.claim(sqlite_store, "me", run_id=run_id)
        assert taken is not None
        return taken

    return claim


def ended(store: Store, claim: Claim, spare: Spare, **more: object) -> Exit:
    order = dataclasses.replace(Order(claim, store.url, "cpu", job=JOB), **more)
    return supervise(order, spare)


def wait_for_phase(store: Store, run_id: int, phase: str) -> float | None:
    """Wait until the run says so; returns its progress."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        run = get_run(store, run_id)
        if run is not None and run.phase_name == phase:
            return run.progress_done
        time.sleep(0.02)
    raise AssertionError(f"run {run_id} never came to {phase!r}")


def test_a_run_that_ends_has_its_outcome_and_its_log_in_the_store(sqlite_store, claimed, spare):
    claim = claimed()
    end = ended(sqlite_store, claim, spare)
    assert (end.end, end.code) == ("ended", 0)
    assert end.peak_memory > 2**20
    run = get_run(sqlite_store, claim.run_id)
    assert run is not None
    assert run.state == "succeeded"
    assert results.log_tail(sqlite_store, claim.run_id) == "hello from attempt 1\n"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT", "SIGBUS"])
def test_a_death_by_signal_is_a_crash_with_the_signals_name(sqlite_store, claimed, spare, name):
    number = getattr(signal, name)
    end = ended(sqlite_store, claimed(do="signal", number=number), spare)
    assert (end.end, end.code) == ("crashed", -number)
    assert name in end.reason


def test_a_crash_leaves_its_traceback_in_the_log(sqlite_store, claimed, spare):
    claim = claimed(do="signal", number=signal.SIGSEGV)
    end = ended(sqlite_store, claim, spare)
    assert "Segmentation fault" in end.tail
    assert "do_signal" in results.log_tail(sqlite_store, claim.run_id)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"do": "exit", "code": 7}, "the child ended with exit status 7"),
        ({"do": "raise"}, "the child raised RuntimeError: a fake job failed"),
    ],
    ids=["exit", "raise"],
)
def test_an_exit_with_an_error_is_a_crash(sqlite_store, claimed, spare, parameters, reason):
    end = ended(sqlite_store, claimed(**parameters), spare)
    assert (end.end, end.reason) == ("crashed", reason)


def test_a_child_that_allocates_beyond_its_limit_is_out_of_memory(sqlite_store, claimed, spare):
    end = ended(sqlite_store, claimed(do="allocate"), spare, memory_limit=300 * 2**20)
    assert end.end == "out_of_memory"
    assert end.peak_memory < 400 * 2**20


def test_the_next_run_works_after_one_that_died(sqlite_store, claimed, spare):
    assert ended(sqlite_store, claimed(do="signal", number=signal.SIGKILL), spare).end == "crashed"
    assert ended(sqlite_store, claimed(), spare).end == "ended"


def test_a_run_beyond_its_time_is_ended(sqlite_store, claimed, spare):
    claim = claimed(timeout_seconds=1.5, do="sleep", seconds=60)
    started = time.monotonic()
    end = ended(sqlite_store, claim, spare)
    assert end.end == "timed_out"
    assert "1.5 s" in end.reason
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("parameters", "phase"),
    [
        ({"do": "sleep", "seconds": 60}, "sleeping"),
        ({"do": "hold_gil"}, "holding"),
        ({"do": "ignore_sigterm"}, "ignoring"),
    ],
    ids=["sleeping", "holding the GIL", "ignoring SIGTERM"],
)
def test_cancelling_ends_any_child_within_seconds(sqlite_store, claimed, spare, parameters, phase):
    claim = claimed(**parameters)
    asked: list[float] = []

    def ask() -> None:
        wait_for_phase(sqlite_store, claim.run_id, phase)
        asked.append(time.monotonic())
        queue.cancel(sqlite_store, [claim.run_id])

    canceller = threading.Thread(target=ask)
    canceller.start()
    end = ended(sqlite_store, claim, spare)
    took = time.monotonic() - asked[0]
    canceller.join()
    assert end.end == "cancelled"
    assert took < 5.0  # 0.3 to 1.5 s on an idle machine, however long the child wants to live


def test_what_the_child_started_ends_with_it(sqlite_store, claimed, spare):
    claim = claimed(do="breed")
    found: list[int] = []

    def ask() -> None:
        found.append(int(wait_for_phase(sqlite_store, claim.run_id, "bred") or 0))
        queue.cancel(sqlite_store, [claim.run_id])

    canceller = threading.Thread(target=ask)
    canceller.start()
    ended(sqlite_store, claim, spare)
    canceller.join()
    (grandchild,) = found
    deadline = time.monotonic() + 2
    while processes.is_alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes.is_alive(grandchild)


def test_a_run_that_was_taken_over_ends_without_a_trace(sqlite_store, claimed, spare):
    claim = claimed(do="sleep", seconds=60)

    def take_over() -> None:
        wait_for_phase(sqlite_store, claim.run_id, "sleeping")
        queue.give_back(sqlite_store, claim, error_kind="test", reason="another is faster", backoff_seconds=0)
        assert queue.claim(sqlite_store, "another", run_id=claim.run_id) is not None

    other = threading.Thread(target=take_over)
    other.start()
    end = ended(sqlite_store, claim, spare)
    other.join()
    assert end.end == "lost"
    assert results.measurements(sqlite_store, claim.run_id) == []
    run = get_run(sqlite_store, claim.run_id)
    assert run is not None
    assert (run.state, run.owner) == ("running", "another")


def test_a_child_that_lives_on_after_its_outcome_is_ended(sqlite_store, claimed, spare, monkeypatch):
    monkeypatch.setattr(supervisor, "LINGER_SECONDS", 0.5)
    claim = claimed(do="linger")
    started = time.monotonic()
    assert ended(sqlite_store, claim, spare).end == "ended"
    assert time.monotonic() - started < 10
    run = get_run(sqlite_store, claim.run_id)
    assert run is not None
    assert run.state == "succeeded"


def test_what_a_child_prints_arrives_whole_and_can_be_stored_anywhere(sqlite_store, claimed, spare):
    claim = claimed(do="chatter", lines=3001)
    ended(sqlite_store, claim, spare)
    lines = results.log_tail(sqlite_store, claim.run_id, lines=10_000).splitlines()
    assert [line.split()[1] for line in lines[:3001]] == [str(number) for number in range(3001)]
    assert lines[3001:] == ["the last of a progress bar", "hello from attempt 1"]


def test_the_spare_is_another_process_that_has_imported_before_it_is_needed(sqlite_store, claimed, spare):
    first = claimed()
    ended(sqlite_store, first, spare)
    waiting = spare._child
    assert waiting is not None
    deadline = time.monotonic() + 20
    while not waiting.ready and time.monotonic() < deadline:
        waiting.wait(0.1)
    assert waiting.ready
    second = claimed()
    ended(sqlite_store, second, spare)
    runs = [get_run(sqlite_store, claim.run_id) for claim in (first, second)]
    pids = [run.summary["pid"] for run in runs if run is not None and run.summary is not None]
    assert pids[1] == waiting.pid != pids[0]


def test_a_spare_that_died_is_replaced(sqlite_store, claimed, spare):
    spare.prepare(JOB)
    assert spare._child is not None
    os.kill(spare._child.pid, signal.SIGKILL)
    assert ended(sqlite_store, claimed(), spare).end == "ended"


PARENT = """
from attnlab_workers.child_process import ChildProcess
child = ChildProcess("fake_jobs:perform")
while not child.ready:
    child.wait(0.1)
print(child.pid, flush=True)
child.wait(60)
"""


def test_a_child_dies_with_the_process_that_supervises_it():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert processes.is_alive(child)
        parent.kill()
    deadline = time.monotonic() + 3
    while processes.is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes.is_alive(child)
