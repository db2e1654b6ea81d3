"""One process that must be there: started, logged to a file, started again if it ends, ended with all it began."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from attnlab_workers import tether
from attnlab_workers.processes import signal_group

BACKOFF_FIRST, BACKOFF_MOST = 1.0, 30.0
STEADY_SECONDS = 60.0
"""a service that ran this long starts its backoff anew"""
LOG_BYTES = 5 * 2**20


class Service:
    """A command in a session of its own, so that a Ctrl-C in the terminal reaches only who started it.

    Args:
        say: told each time that the service ended by itself.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self, name: str, command: list[str], log: Path, *, say: Callable[[str], None], grace: float
    ) -> None:
        self.name = name
        self.log = log
        self.restarts = 0
        self._command = command
        self._say = say
        self._grace = grace
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._next_start = 0.0
        self._backoff = BACKOFF_FIRST

    def start(self) -> None:
        """Start the process; what it prints is added to the log."""
        with _opened(self.log) as log:
            self._process = subprocess.Popen(
                tether.command(*self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started = time.monotonic()

    @property
    def pid(self) -> int | None:
        """The running process."""
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def keep_up(self) -> None:
        """Start it again if it has ended and its pause is over; each failure doubles the pause."""
        now = time.monotonic()
        if self.alive:
            if now - self._started > STEADY_SECONDS:
                self._backoff = BACKOFF_FIRST
        elif self._process is not None:
            self._ended(self._process, now)
        elif now >= self._next_start:
            self.restarts += 1
            self.start()

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Wait until it has ended, for its grace at most; then kill it and what it started."""
        if self._process is None:
            return
        try:
            self._process.wait(self._grace)
        except subprocess.TimeoutExpired:
            self._say(f"{self.name} does not end by itself and is killed")
        self.kill()

    def kill(self) -> None:
        """Kill it and its process group at once."""
        if self._process is not None:
            signal_group(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_lines(self, count: int = 5) -> str:
        """The end of its log."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 4000))
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
        return "\n".join(lines[-count:])

    def _ended(self, process: subprocess.Popen[bytes], now: float) -> None:
        signal_group(process.pid, signal.SIGKILL)  # what it left behind
        self._process = None
        self._next_start = now + self._backoff
        self._say(
            f"{self.name} ended with status {process.returncode} and starts again in {self._backoff:g} s "
            f"(log: {self.log}): {self.last_lines(1)}"
        )
        self._backoff = min(BACKOFF_MOST, self._backoff * 2)


def _opened(log: Path) -> IO[bytes]:
    """The log to add to; a long one is put aside first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        os.replace(log, log.with_suffix(".old.log"))
    return log.open("ab")
