"""Work that takes longer than an answer may: done once in the background, asked for again until it is there."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, NamedTuple, TypeVar

Result = TypeVar("Result")
Work = Callable[[Callable[[float], None]], Result]


class Answer(NamedTuple, Generic[Result]):
    """The result, or None and the share of the work that is done."""

    result: Result | None
    done: float


class Jobs(Generic[Result]):
    """One worker thread, and the newest results by key. A job that nobody waits for any more is still finished."""

    def __init__(self, keep: int = 32) -> None:
        self.keep = keep
        self._lock = threading.Lock()
        self._done: dict[Hashable, float] = {}
        self._jobs: OrderedDict[Hashable, Future[Result]] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="attnlab-job")

    def ask(self, key: Hashable, work: Work[Result], patience: float = 0.3) -> Answer[Result]:
        """The result of ``work(progress)`` under ``key`` if it is there within ``patience`` seconds.

        Raises what the work raised, once: asked again, it is tried again.
        """
        with self._lock:
            if key not in self._jobs:
                self._jobs[key] = self._worker.submit(work, lambda done: self._done.__setitem__(key, done))
                self._drop_old()
            self._jobs.move_to_end(key)
            job = self._jobs[key]
        try:
            return Answer(job.result(patience), 1.0)
        except NotYet:
            if job.done():
                raise  # the work's own
            return Answer(None, min(self._done.get(key, 0.0), 0.99))
        finally:
            if job.done() and job.exception() is not None:
                with self._lock:
                    self._jobs.pop(key, None)

    def _drop_old(self) -> None:
        ended = [key for key, job in self._jobs.items() if job.done()]
        for key in ended[: max(0, len(self._jobs) - self.keep)]:
            del self._jobs[key]
            self._done.pop(key, None)
