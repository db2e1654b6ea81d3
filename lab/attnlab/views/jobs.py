"""Work that takes longer than an answer may: done once in the background, asked for again until it is there."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Result = TypeVar("Result")
Work = Callable[[Callable[[float], None]], Result]


class Answer(NamedTuple, Generic[Result]):
    """The result, or None and the share of the work that is done."""

    result: Result | None
    done: float


@dataclass(eq=False)
class _Job(Generic[Result]):
    """One piece of work: how far it is, and whether it shall stop where it next says so."""

    done: float = 0.0
    cancelled: bool = False
    future: Future[Result] = field(init=False)

    def tell(self, done: float) -> None:
        if self.cancelled:
            raise CancelledError
        self.done = done


class Jobs(Generic[Result]):
    """One worker thread, and the newest results by key.

    A job that nobody waits for any more is still finished, unless it is cancelled.
    """

    def __init__(self, keep: int = 32) -> None:
        self.keep = keep
        self._lock = threading.Lock()
        self._jobs: OrderedDict[Hashable, _Job[Result]] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="attnlab-job")

    def ask(self, key: Hashable, work: Work[Result], patience: float = 0.3) -> Answer[Result]:
        """The result of ``work(progress)`` under ``key`` if it is there within ``patience`` seconds.

        Raises what the work raised, once: asked again, it is tried again.
        """
        with self._lock:
            job = self._job(key, work)
        try:
            return Answer(job.future.result(patience), 1.0)
        except CancelledError:  # by somebody else: whoever still wants it asks again
            return Answer(None, 0.0)
        except NotYet:
            if job.future.done():
                raise  # the work's own
            return Answer(None, min(job.done, 0.99))
        finally:
            if _failed(job.future):
                self._forget(key, job)

    def wait(self, key: Hashable, work: Work[Result]) -> Result:
        """The result of ``work(progress)`` under ``key``, waited for; CancelledError where it is cancelled."""
        with self._lock:
            job = self._job(key, work)
        try:
            return job.future.result()
        finally:
            if _failed(job.future):
                self._forget(key, job)

    def cancel(self, key: Hashable) -> bool:
        """Stop the work under ``key``, at once or where it next says how far it is; False where none is going on."""
        with self._lock:
            job = self._jobs.get(key)
            if job is None or job.future.done():
                return False
            job.cancelled = True
            job.future.cancel()
            del self._jobs[key]
        return True

    def _job(self, key: Hashable, work: Work[Result]) -> _Job[Result]:
        """The job under this key, which is started where there is none; to be called under the lock."""
        if key not in self._jobs:
            made = self._jobs[key] = _Job()
            made.future = self._worker.submit(work, made.tell)
            self._drop_old()
        self._jobs.move_to_end(key)
        return self._jobs[key]

    def _forget(self, key: Hashable, job: _Job[Result]) -> None:
        with self._lock:
            if self._jobs.get(key) is job:
                del self._jobs[key]

    def _drop_old(self) -> None:
        ended = [key for key, job in self._jobs.items() if job.future.done()]
        for key in ended[: max(0, len(self._jobs) - self.keep)]:
            del self._jobs[key]


def _failed(future: Future[Result]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
