"""Watches one child through one run, the same with Ray and without.

The child writes results and its outcome to the store. The supervisor stores what the child prints, ends the
child when the run is cancelled, taken over or too slow, and says how it ended.
"""

import sys
import time
from dataclasses import dataclass

from attnlab_storage import queue
from attnlab_storage.database import Store, open_store
from attnlab_storage.errors import LostLease, StoreError
from attnlab_workers import backlog, processes
from attnlab_workers.child_process import ChildProcess, Spare
from attnlab_workers.exits import Exit, classify
from attnlab_workers.log_relay import LogRelay
from attnlab_workers.order import Order

TICK_SECONDS = 0.1
ASK_SECONDS = 0.3
"""how often the store is asked whether the run goes on"""
TERMINATE_SECONDS = 1.0
"""between SIGTERM and SIGKILL"""
LINGER_SECONDS = 5.0
"""how long a child may live on after it has written its outcome"""
START_SECONDS = 300.0
"""how long a child may take to import"""


@dataclass(frozen=True)
class Stop:
    """Why the supervisor ends its child."""

    end: str
    reason: str
    gently: bool = True


def supervise(order: Order, spare: Spare) -> Exit:
    """Run one order in one child, from its start to its end; nothing of it is left afterwards.

    A spare for the next order is started when the child has ended, never beside it: importing would disturb a
    run that is being timed.
    """
    with open_store(order.database_url) as store:
        child = spare.take(order.job)
        try:
            return _Watch(store, order, child).run()
        finally:
            child.close()
            spare.prepare(order.job)


class _Watch:
    def __init__(self, store: Store, order: Order, child: ChildProcess) -> None:
        self.store = store
        self.order = order
        self.child = child
        self.log = LogRelay()
        self.started = time.monotonic()
        self.next_question = self.started
        self.over_since: float | None = None
        self.told = False
        self.kills_before = processes.out_of_memory_kills()

    def run(self) -> Exit:
        stop = self._start() or self._watch()
        if stop is None:
            return self._ended()
        self._end_child(stop)
        self._store_log(last=True)
        return Exit(
            stop.end,  # type: ignore[arg-type]
            stop.reason,
            code=self.child.code,
            peak_memory=self.child.peak_memory,
            tail=self.log.tail(),
        )

    def _start(self) -> Stop | None:
        if not self.child.ready:
            try:
                queue.progress(self.store, self.order.claim, "starting")
            except LostLease as lost:
                return Stop("lost", str(lost), gently=False)
            except StoreError as error:
                _warn(error)
        return None

    def _watch(self) -> Stop | None:
        """Watch until the child has ended by itself (None) or must be ended."""
        while self.child.code is None:
            self.log.feed(self.child.wait(TICK_SECONDS))
            if self.child.ready and not self.told:
                self.told = True
                self.child.give(self.order)
            self._store_log()
            stop = self._must_stop(time.monotonic())
            if stop is not None:
                return stop
        return None

    def _must_stop(self, now: float) -> Stop | None:
        limit = self.order.claim.timeout_seconds
        if now - self.started > limit:
            return Stop("timed_out", f"the run took longer than its limit of {limit:g} s")
        if not self.told and now - self.started > START_SECONDS:
            return Stop("crashed", f"the child was not ready after {START_SECONDS:g} s")
        if now < self.next_question:
            return None
        self.next_question = now + ASK_SECONDS
        try:
            standing = backlog.standing(self.store, self.order.claim)
        except StoreError as error:  # the database is away: the lease decides when it is back
            _warn(error)
            return None
        match standing:
            case "cancel_requested":
                return Stop("cancelled", "cancelled while it ran")
            case "lost":
                return Stop("lost", "the run was taken over by another attempt", gently=False)
            case "over":
                self.over_since = self.over_since or now
                if now - self.over_since > LINGER_SECONDS:
                    return Stop("ended", "the child lived on after its outcome was written", gently=False)
        return None

    def _end_child(self, stop: Stop) -> None:
        if stop.gently:
            self.child.terminate()
            deadline = time.monotonic() + TERMINATE_SECONDS
            while self.child.code is None and time.monotonic() < deadline:
                self.log.feed(self.child.wait(TICK_SECONDS))
        self.child.kill()

    def _ended(self) -> Exit:
        code = self.child.code
        assert code is not None
        self._store_log(last=True)
        total = processes.memory_total()
        return classify(
            code,
            peak_memory=self.child.peak_memory,
            memory=min(self.order.memory_limit or total, total),
            memory_kills=processes.out_of_memory_kills() - self.kills_before,
            tail=self.log.tail(),
        )

    def _store_log(self, *, last: bool = False) -> None:
        if last:
            self.log.feed(self.child.drain())
            self.log.finish()
        try:
            for text in self.log.remainder() if last else [self.log.due(time.monotonic())]:
                queue.append_log(self.store, self.order.claim, text)
        except LostLease:
            pass  # the run is another attempt's; the next question says so too
        except StoreError as error:
            _warn(error)


def _warn(error: StoreError) -> None:
    print(f"attnlab supervisor: {error}", file=sys.stderr, flush=True)
