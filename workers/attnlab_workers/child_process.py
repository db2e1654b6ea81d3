"""A child from outside: started, given its order, watched, ended. And the spare, which waits for an order."""

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import sys
import time

from attnlab_workers.order import Order
from attnlab_workers.processes import peak_memory, signal_group

READ_BYTES = 65_536


class ChildProcess:
    """One child and the ends of its pipes: order in, `ready` out, and everything that it prints.

    Not shared between threads. The kernel kills the child when the thread that made this object ends.
    """

    def __init__(self, job: str, *, ask: bool = False) -> None:
        status_read, status_write = os.pipe()
        self.job = job
        self.code: int | None = None
        """Exit status once it has ended; minus the number of the signal that ended it."""
        self.ready = False
        self.peak_memory = 0
        self.answer = b""
        self._status = status_read
        # between fork and exec the child wears our memory, and its ru_maxrss never forgets that
        self._worn = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        arguments = ["--job", job, "--status-fd", str(status_write), "--parent", str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-u",
                    "-m",
                    "attnlab_workers.child",
                    *arguments,
                    *(["--ask"] if ask else []),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[status_write],
                start_new_session=True,
                env=_environment(),
            )
        except BaseException:
            os.close(status_read)
            raise
        finally:
            os.close(status_write)
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self._log = self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        for fd in (self._log, self._status):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ)

    def give(self, order: Order) -> None:
        """Hand over the order. Only once it is `ready`: before that it does not read."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order.to_line())
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died just now, and its exit status says of what

    def wait(self, seconds: float) -> bytes:
        """Wait until it prints, says `ready` or ends, at most `seconds`; returns what it printed."""
        if not self._selector.get_map():  # it closed its pipes and has not ended yet
            time.sleep(min(seconds, 0.02))
        printed = b""
        for key, _ in self._selector.select(seconds) if self._selector.get_map() else ():
            data = self._read(key.fd)
            if key.fd == self._log:
                printed += data
            else:
                self.answer += data
                self.ready = self.answer.startswith(b"ready\n")
        self._look()
        return printed

    def drain(self) -> bytes:
        """What it had printed before it ended."""
        printed = b""
        while self._log in self._selector.get_map() and (data := self._read(self._log)):
            printed += data
        return printed

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        if self.code is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and everything it started (SIGKILL), and wait until it is gone."""
        signal_group(self.pid, signal.SIGKILL)
        if self.code is None:
            self._reap(0)

    def close(self) -> None:
        """Kill what is left and close the pipes."""
        self.kill()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):  # an order it never read
                    pipe.close()
        os.close(self._status)

    def _look(self) -> None:
        if self.code is None:
            self.peak_memory = max(self.peak_memory, peak_memory(self.pid))
            self._reap(os.WNOHANG)

    def _reap(self, flags: int) -> None:
        # not Popen.wait: only wait4 tells the peak memory of a process that has ended
        pid, status, usage = os.wait4(self.pid, flags)
        if pid:
            self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
            if usage.ru_maxrss > self._worn:
                self.peak_memory = max(self.peak_memory, usage.ru_maxrss * 1024)

    def _read(self, fd: int) -> bytes:
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            self._selector.unregister(fd)
        return data


def _environment() -> dict[str, str]:
    """This process's environment, without the one thread that Ray gives to a task; the child sets its own."""
    return {
        **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        # a run must not wait for a network that may not be there, nor run code that came with weights
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        # torch's profiler announces each start and stop; that is no part of a run's log
        "KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "6"),
    }


class Spare:
    """The next child, started early: it imports while nothing else is to be done."""

    def __init__(self) -> None:
        self._child: ChildProcess | None = None

    def prepare(self, job: str) -> None:
        """Start a child for the next order, unless one waits already."""
        if self._child is None:
            self._child = ChildProcess(job)

    def take(self, job: str) -> ChildProcess:
        """The waiting child, or a new one when there is none, it died, or it imported for another job."""
        child, self._child = self._child, None
        if child is not None:
            child.wait(0)
            if child.code is None and child.job == job:
                return child
            child.close()
        return ChildProcess(job)

    def close(self) -> None:
        """End the waiting child."""
        child, self._child = self._child, None
        if child is not None:
            child.close()
