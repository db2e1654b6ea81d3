"""`attnlab up` with a stand-in for the web page: what it starts, what it says, and that it leaves nothing behind."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from traced_fixtures import POINT

from attnlab_storage import queue
from attnlab_storage.database import Store, open_store
from attnlab_storage.listing import get_run, list_experiments, runs_of
from attnlab_workers import first_start, launch, processes
from attnlab_workers.service import Service

MARK = "ATTNLAB_TEST_LAUNCH"
JOBS = Path(__file__).parent / "jobs"


class Launched:
    """A running `attnlab up` and everything that descends from it."""

    def __init__(self, home: Path, behaviour: str = "") -> None:
        self.mark = uuid.uuid4().hex
        self.home = home
        self.out = home.with_name(f"{self.mark}.out")
        command = [sys.executable, "-m", "attnlab_workers.launch", "--port", "0", "--no-starter"]
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--job", "fake_jobs:perform", "--page", "fake_web"],
                env={**os.environ, "PYTHONPATH": str(JOBS), "FAKE_WEB": behaviour, MARK: self.mark},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.out.read_text()

    def wait_for(self, condition: Callable[[], object], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: "is ready" in self.said() or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()

    def left(self) -> list[int]:
        return list(processes.marked(MARK, self.mark))

    def dispatcher(self) -> int | None:
        """The process id of the dispatcher that says it is alive."""
        with open_store() as store:
            rows = queue.dispatchers(store)
        return rows[0].cluster["pid"] if rows else None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def up(home: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def up(behaviour: str = "") -> Launched:
        started.append(Launched(home, behaviour))
        return started[-1]

    yield up
    for launched in started:
        launched.kill()


def submit(parameters: dict[str, object]) -> int:
    with open_store() as store:
        points = [POINT | {"parameters": parameters}]
        return queue.submit(store, name="x", spec={}, spec_hash="0", points=points).run_ids[0]


def state(run_id: int) -> str:
    with open_store() as store:
        run = get_run(store, run_id)
    assert run is not None
    return run.state


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_stops_everything_and_gives_the_running_run_back(up):
    lab = up()
    lab.wait_until_ready()
    run_id = submit({"do": "sleep", "seconds": 60})
    lab.wait_for(lambda: state(run_id) == "running")
    assert len(lab.left()) > 5  # page, dispatcher, and the many of Ray
    lab.process.send_signal(signal.SIGINT)
    assert lab.process.wait(60) == 0
    assert lab.left() == []
    assert state(run_id) == "queued"
    assert "is killed" not in lab.said()


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_dispatcher_is_started_again_and_takes_its_run_up(up, monkeypatch):
    monkeypatch.setenv("ATTNLAB_LEASE_SECONDS", "2")
    lab = up()
    lab.wait_until_ready()
    run_id = submit({"do": "sleep_once", "seconds": 60})
    lab.wait_for(lambda: state(run_id) == "running")
    first = lab.dispatcher()
    assert first is not None
    os.kill(first, signal.SIGKILL)
    lab.wait_for(lambda: state(run_id) == "succeeded")
    assert "dispatcher ended with status -9 and starts again in 1 s" in lab.said()
    assert lab.dispatcher() != first


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_survives_a_killed_launcher(up):
    lab = up()
    lab.wait_until_ready()
    lab.wait_for(lab.dispatcher)
    lab.process.kill()
    lab.process.wait()
    lab.wait_for(lambda: lab.left() == [], seconds=20)


@pytest.mark.ray
def test_a_second_ctrl_c_does_not_wait(up):
    lab = up("stubborn")
    lab.wait_until_ready()
    started = time.monotonic()
    lab.process.send_signal(signal.SIGINT)
    lab.wait_for(lambda: "again kills at once" in lab.said())
    lab.process.send_signal(signal.SIGINT)
    assert lab.process.wait(60) == 0
    assert time.monotonic() - started < launch.WEB_GRACE
    assert lab.left() == []


def test_a_page_that_does_not_start_ends_the_lab_and_shows_why(up):
    lab = up("dies")
    assert lab.process.wait(30) == 1
    assert "the page has no roof" in lab.said()
    assert lab.left() == []


def test_a_port_that_is_taken_is_named(home, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launch.main(["--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "--port" in said


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_is_refused(port, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main(["--port", port])
    assert ended.value.code == 2
    assert re.search(rf"from 0 to 65535, got '{port}'", capsys.readouterr().err)


def test_two_labs_do_not_share_a_home(home, capsys):
    with launch._only_one("http://127.0.0.1:1234"):
        assert launch.main(["--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "already running" in said
    assert "http://127.0.0.1:1234" in said


def test_a_database_of_a_newer_program_is_refused(home, capsys, sqlite_store: Store, monkeypatch):
    with sqlite_store.write(announce=False) as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_store.url)
    assert launch.main(["--port", "0"]) == 2
    assert "9999" in capsys.readouterr().err


def test_a_new_store_gets_the_starter_experiment_once(sqlite_store, monkeypatch):
    monkeypatch.setattr(first_start, "is_fetched", lambda name: True)
    assert first_start.submit_starter(sqlite_store)
    assert not first_start.submit_starter(sqlite_store)
    (experiment,) = list_experiments(sqlite_store).rows
    mechanisms = [run.mechanism for run in runs_of(sqlite_store, experiment_id=experiment.id)]
    assert mechanisms == ["multi_head", "sliding_window"]


def test_without_its_model_the_starter_is_not_queued_and_that_is_said(sqlite_store, monkeypatch):
    monkeypatch.setattr(first_start, "is_fetched", lambda name: False)
    with pytest.raises(first_start.NoModel, match="attnlab models fetch smollm2-135m"):
        first_start.submit_starter(sqlite_store)
    assert list_experiments(sqlite_store).rows == []


def test_a_model_that_cannot_be_fetched_stops_no_other(monkeypatch, capsys):
    asked = []

    def fetch(name: str, progress: Callable[[str], object]) -> None:
        asked.append(name)
        if name == "smollm2-135m":
            raise first_start.FetchError("no network")

    monkeypatch.setattr(first_start, "fetch", fetch)
    assert first_start.fetch_models() == 1
    assert asked[0] == "smollm2-135m"
    assert sorted(asked) == sorted(first_start.BUNDLED.keys() - first_start.LATER)
    assert "warning: model smollm2-135m could not be fetched: no network" in capsys.readouterr().err


def test_a_service_that_keeps_ending_is_started_ever_more_slowly(tmp_path, monkeypatch):
    monkeypatch.setattr("attnlab_workers.service.BACKOFF_FIRST", 0.1)
    said: list[str] = []
    service = Service(
        "s", [sys.executable, "-c", "print('ouch')"], tmp_path / "s.log", say=said.append, grace=1.0
    )
    service.start()
    deadline = time.monotonic() + 10
    while len(said) < 3 and time.monotonic() < deadline:
        service.keep_up()
        time.sleep(0.01)
    assert re.findall(r"in ([\d.]+) s", " ".join(said)) == ["0.1", "0.2", "0.4"]
    assert all(text.endswith("ouch") for text in said)


def test_a_service_that_ignores_sigterm_is_killed_with_what_it_started(tmp_path):
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    said: list[str] = []
    service = Service("s", [sys.executable, "-c", code], tmp_path / "s.log", say=said.append, grace=0.3)
    service.start()
    deadline = time.monotonic() + 10
    while not service.last_lines() and time.monotonic() < deadline:
        time.sleep(0.02)
    grandchild = int(service.last_lines())
    service.ask_to_end()
    service.end()
    assert said == ["s does not end by itself and is killed"]
    deadline = time.monotonic() + 3
    while processes.is_alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes.is_alive(grandchild)
