"""`attnlab up`: the whole lab on this machine, in one terminal. Ctrl-C ends all of it.

Database, models, dispatcher (which starts Ray) and web page; on the first start also one experiment on a real model.
Every process that this one starts carries a mark in its environment, so that none can be left behind.
"""

import argparse
import contextlib
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from attnlab.bundled import BUNDLED, is_fetched
from attnlab_storage import settings
from attnlab_storage.database import Store, migrate, open_store
from attnlab_storage.errors import StoreError
from attnlab_workers import first_start, processes, tether
from attnlab_workers.arguments import PORT, SLOTS
from attnlab_workers.order import EXECUTE
from attnlab_workers.service import Service

MARK = "ATTNLAB_LAUNCH"
PAGE = "attnlab_webui.cli"
TICK_SECONDS = 0.2
HEALTH_SECONDS = 120.0
SWEEP_SECONDS = 3.0
DISPATCHER_GRACE, WEB_GRACE = 10.0, 4.0


class CannotStart(RuntimeError):
    """The lab cannot start; the text says why and what to do."""


class Lab:
    """The processes of one lab and this terminal.

    Args:
        starter: whether an empty store gets the starter experiment.
        job: what a run does, `module:function`.
        page: the module whose command `web` serves the page.
    """

    def __init__(
        self,
        store: Store,
        host: str,
        port: int,
        slots: int | None = None,
        *,
        starter: bool = True,
        job: str = EXECUTE,
        page: str = PAGE,
    ) -> None:
        self.store = store
        self.address = f"http://{_shown(host)}:{port}"
        self.starter = starter
        self.stop = threading.Event()
        self.interrupts = 0
        self.mark = secrets.token_hex(8)
        os.environ[MARK] = self.mark
        logs = settings.home_folder() / "logs"
        dispatch = [sys.executable, "-m", "attnlab_workers.dispatcher", "--job", job]
        dispatch += ["--slots", str(slots)] if slots else []
        web = [sys.executable, "-m", page, "web", "--host", host, "--port", str(port)]
        self.dispatcher = Service(
            "dispatcher", dispatch, logs / "dispatcher.log", say=say, grace=DISPATCHER_GRACE
        )
        self.web = Service("web", web, logs / "web.log", say=say, grace=WEB_GRACE)
        self.fetching: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Start everything, keep it up until `stop`, then end everything. Returns the exit status."""
        # a shell starts background jobs with SIGINT ignored; whoever sends it all the same means it
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, self._interrupted)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(signal.SIGHUP, self._interrupted)
        try:
            self.web.start()
            self.dispatcher.start()
            self._fetch_models()
            if not self._wait_for_page():
                return 0 if self.stop.is_set() else 1
            say(f"attnlab is ready: {self.address}   (Ctrl-C ends it; logs: {self.web.log.parent})")
            while not self.stop.wait(TICK_SECONDS):
                self.web.keep_up()
                self.dispatcher.keep_up()
                self._first_start()
            return 0
        finally:
            self._end()

    def _fetch_models(self) -> None:
        missing = [name for name in BUNDLED if not is_fetched(name)]
        if missing:
            say(f"fetching models in the background: {', '.join(missing)}")
            command = [sys.executable, "-m", "attnlab_workers.first_start"]
            self.fetching = subprocess.Popen(tether.command(*command), start_new_session=True)

    def _wait_for_page(self) -> bool:
        deadline = time.monotonic() + HEALTH_SECONDS
        while not self.stop.wait(TICK_SECONDS):
            if not self.web.alive:
                say(f"the web page does not start (log: {self.web.log}):\n{self.web.last_lines()}")
                return False
            if _answers(f"{self.address}/api/v1/health") and _answers(f"{self.address}/"):
                return True
            if time.monotonic() > deadline:
                say(f"the web page does not answer at {self.address} (log: {self.web.log})")
                return False
        return False

    def _first_start(self) -> None:
        if not self.starter or (self.fetching is not None and self.fetching.poll() is None):
            return
        self.starter = False
        try:
            if first_start.submit_starter(self.store):
                say(
                    "the first experiment is queued: SmolLM2-135M, full attention against a window of 64 tokens"
                )
        except (first_start.NoModel, StoreError) as error:
            say(str(error))

    def _interrupted(self, signum: int, frame: FrameType | None) -> None:
        self.interrupts += 1
        self.stop.set()
        if self.interrupts > 1:
            self._kill_marked()

    def _end(self) -> None:
        say("ending (Ctrl-C again kills at once)")
        if self.fetching is not None:
            self.fetching.terminate()
        services = (self.web, self.dispatcher)
        for service in services:
            service.ask_to_end()
        for service in services:
            service.end()
        self._kill_marked()
        if self.fetching is not None:
            self.fetching.wait()

    def _kill_marked(self) -> None:
        """Kill whatever still carries our mark: Ray's daemons and workers, children, and what those started."""
        deadline = time.monotonic() + SWEEP_SECONDS
        while (left := list(processes.marked(MARK, self.mark))) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def main(arguments: list[str] | None = None) -> int:
    """Run the lab until Ctrl-C or SIGTERM. Exit status: 0 stopped, 1 it broke, 2 it could not start."""
    options = _parser().parse_args(arguments)
    try:
        port = free_port(options.host, options.port)
        with _only_one(f"http://{_shown(options.host)}:{port}"):
            migrate()
            with open_store() as store:
                how = {"starter": options.starter, "job": options.job, "page": options.page}
                return Lab(store, options.host, port, options.slots, **how).run()
    except (CannotStart, StoreError, ValueError) as error:
        say(f"attnlab up: {error}")
        return 2


def say(text: str) -> None:
    """Print to the terminal."""
    print(text, file=sys.stderr, flush=True)


def free_port(host: str, port: int) -> int:
    """Return `port`, or a free one for 0. Raises `CannotStart` when nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CannotStart(
                f"cannot listen on {host}:{port}: {error.strerror}. Choose another with --port (0 takes a free one)"
            ) from None
        return probe.getsockname()[1]


@contextlib.contextmanager
def _only_one(address: str) -> Iterator[None]:
    """Hold the lock of ATTNLAB_HOME: two labs in one folder would answer for each other."""
    path = settings.home_folder() / "up.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise CannotStart(
                f"attnlab is already running in {path.parent}, at {lock.read().strip()}. "
                "End it first, or set ATTNLAB_HOME to another folder"
            ) from None
        lock.truncate(0)
        lock.write(address)
        lock.flush()
        yield


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        return error.code < 500  # it is there and asks who we are
    except OSError:
        return False


def _shown(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnlab up", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default loopback only")
    parser.add_argument("--port", type=PORT, default=7860, help="port of the web page; 0 takes a free one")
    parser.add_argument("--slots", type=SLOTS, help="runs at once; default one for each GPU, or one")
    parser.add_argument(
        "--no-starter", dest="starter", action="store_false", help="no experiment on first start"
    )
    parser.add_argument("--job", default=EXECUTE, help=argparse.SUPPRESS)
    parser.add_argument("--page", default=PAGE, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
