"""Real dispatchers on real Ray clusters, and what happens when any of their processes is killed in the middle."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from traced_fixtures import POINT

from attnlab_storage import queue, results
from attnlab_storage.database import Store
from attnlab_storage.listing import RunRow, get_run
from attnlab_workers import processes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MARK = "ATTNLAB_TEST_RAY"
JOBS = Path(__file__).parent / "jobs"


class Cluster:
    """Dispatchers (and whatever else a test starts) of one store; everything is gone in the end."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.mark = uuid.uuid4().hex
        self.log = folder / "dispatchers.log"
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(JOBS),
            "ATTNLAB_DATABASE_URL": store.url,
            "ATTNLAB_LEASE_SECONDS": "2",
            MARK: self.mark,
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                env=self.environment | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def dispatch(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        module = ["-m", "attnlab_workers.dispatcher", "--job", "fake_jobs:perform"]
        return self.start(sys.executable, *module, *arguments, **environment)

    def submit(self, *jobs: dict[str, Any], **how: Any) -> list[int]:
        points = [POINT | {"parameters": job} for job in jobs]
        return queue.submit(self.store, name="x", spec={}, spec_hash="0", points=points, **how).run_ids

    def run(self, run_id: int) -> RunRow:
        run = get_run(self.store, run_id)
        assert run is not None
        return run

    def wait_for(self, condition: Callable[[], object], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait_for_phase(self, run_id: int, phase: str) -> int:
        self.wait_for(lambda: self.run(run_id).phase_name == phase)
        return int(self.run(run_id).progress_done or 0)

    def wait_for_end(self, run_id: int) -> RunRow:
        self.wait_for(lambda: self.run(run_id).state not in ("queued", "running"))
        return self.run(run_id)

    def close(self) -> None:
        deadline = time.monotonic() + 10
        while (left := list(processes.marked(MARK, self.mark))) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        assert not left
        for process in self.started:
            process.wait()


@pytest.fixture
def cluster(store: Store, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(store, tmp_path)
    yield cluster
    cluster.close()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("victim", ["child", "worker", "dispatcher"])
def test_whoever_is_killed_in_the_middle_the_run_ends_once_with_one_set_of_results(cluster, victim):
    dispatcher = cluster.dispatch()
    (run_id,) = cluster.submit({"do": "wait_once"})
    child = cluster.wait_for_phase(run_id, "waiting")
    os.kill(
        {"child": child, "worker": parent_of(child), "dispatcher": dispatcher.pid}[victim], signal.SIGKILL
    )
    if victim == "dispatcher":
        dispatcher.wait()
        cluster.dispatch()
    run = cluster.wait_for_end(run_id)
    assert (run.state, run.attempt) == ("succeeded", 2)
    rows = results.measurements(cluster.store, run_id)
    assert [(row.name, row.value) for row in rows] == [("begun", 2.0), ("latency", 2.0)]
    assert [attempt.outcome for attempt in results.attempts(cluster.store, run_id)] == [
        "requeued",
        "succeeded",
    ]
    finished = [event for event in results.events(cluster.store, run_id) if event.kind == "finished"]
    assert len(finished) == 1
    cluster.wait_for(lambda: not processes.is_alive(child), seconds=5)


def test_a_dispatcher_that_slept_past_its_lease_is_fenced_and_works_on(cluster):
    sleeper = cluster.dispatch()
    (run_id,) = cluster.submit({"do": "wait_once"})
    cluster.wait_for_phase(run_id, "waiting")
    os.kill(sleeper.pid, signal.SIGSTOP)
    other = cluster.dispatch()
    run = cluster.wait_for_end(run_id)
    assert (run.state, run.attempt) == ("succeeded", 2)
    other.terminate()
    assert other.wait(60) == 0
    os.kill(sleeper.pid, signal.SIGCONT)
    (after,) = cluster.submit({})
    assert cluster.wait_for_end(after).state == "succeeded"
    assert cluster.run(run_id) == run
    assert [row.value for row in results.measurements(cluster.store, run_id)] == [2.0, 2.0]
    assert sleeper.poll() is None


def test_the_worker_is_free_again_whatever_a_run_does_to_it(cluster):
    cluster.dispatch(ATTNLAB_RUN_MEMORY_BYTES=str(300 * 2**20))
    holding, greedy, slow, last = cluster.submit(
        {"do": "hold_gil"}, {"do": "allocate"}, {"do": "ignore_sigterm"}, {}, timeout_seconds=5.0
    )
    cluster.wait_for_phase(holding, "holding")
    asked = time.monotonic()
    queue.cancel(cluster.store, [holding])
    assert cluster.wait_for_end(holding).state == "cancelled"
    assert time.monotonic() - asked < 5.0
    assert cluster.wait_for_end(greedy).state == "out_of_memory"
    assert cluster.wait_for_end(slow).state == "timed_out"
    assert cluster.wait_for_end(last).state == "succeeded"


def test_sigterm_gives_the_run_back_and_leaves_no_process(cluster):
    dispatcher = cluster.dispatch()
    (run_id,) = cluster.submit({"do": "wait_once"}, max_attempts=1)
    cluster.wait_for_phase(run_id, "waiting")
    dispatcher.terminate()
    assert dispatcher.wait(60) == 0
    run = cluster.run(run_id)
    assert (run.state, run.error_kind) == ("queued", "dispatcher_stopped")
    assert queue.dispatchers(cluster.store) == []
    cluster.wait_for(lambda: not list(processes.marked(MARK, cluster.mark)), seconds=5)


@pytest.fixture
def sqlite_cluster(sqlite_store: Store, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(sqlite_store, tmp_path)
    yield cluster
    cluster.close()


def test_a_dispatcher_joins_a_cluster_that_is_there(sqlite_cluster, tmp_path):
    cluster = sqlite_cluster
    port, token = "26379", secrets.token_hex(32)
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    secret["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    small = ["--num-cpus=1", "--include-dashboard=false", f"--object-store-memory={80 * 2**20}"]
    ray = str(Path(sys.executable).with_name("ray"))
    cluster.start(ray, "start", "--head", "--block", f"--port={port}", *small, **secret)
    (run_id,) = cluster.submit({})

    def join(**environment: str) -> subprocess.Popen[bytes]:
        return cluster.dispatch("--address", f"127.0.0.1:{port}", **environment)

    # the cluster takes some seconds to be there; until then joining says so
    while (dispatcher := join(**secret)) and not joined(cluster, dispatcher):
        assert dispatcher.returncode == 2
    assert cluster.wait_for_end(run_id).state == "succeeded"
    assert queue.dispatchers(cluster.store)[0].cluster["address"] == f"127.0.0.1:{port}"


def joined(cluster: Cluster, dispatcher: subprocess.Popen[bytes]) -> bool:
    cluster.wait_for(lambda: dispatcher.poll() is not None or queue.dispatchers(cluster.store))
    return dispatcher.poll() is None
