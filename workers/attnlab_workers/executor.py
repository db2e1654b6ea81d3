"""What the dispatcher needs of whatever runs its work: Ray, or threads of its own process."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from attnlab_workers.capacity import Node, Share
from attnlab_workers.child_process import Spare
from attnlab_workers.work import WORK


@dataclass(frozen=True)
class Ended:
    """One piece of work is over: with an answer, or with the error of what ran it."""

    key: str
    answer: dict[str, Any] | None = None
    error: str | None = None


class Executor(Protocol):
    """Runs pieces of work (`work.WORK`) on nodes. Used from one thread."""

    def nodes(self) -> list[Node]:
        """The machines there are now."""
        ...

    def start(self, key: str, work: str, document: dict[str, Any], share: Share) -> None:
        """Start work that fits now; `key` comes back in `Ended`."""
        ...

    def wait(self, seconds: float) -> list[Ended]:
        """What has ended; returns at once if something has, else after `seconds`."""
        ...

    def kill(self, key: str) -> None:
        """End the work by force; it comes back as `Ended` with an error."""
        ...

    def close(self) -> None:
        """End everything."""
        ...


class LocalExecutor:
    """Runs work in threads of this process, one a slot; each thread's supervisor ends its child itself."""

    def __init__(self, slots: int = 1) -> None:
        self.node = Node("local", "localhost", slots, 0)
        self._inbox: queue.SimpleQueue[tuple[str, str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        # not a pool: a child dies with the thread that started it, and a spare outlives its run
        self._threads = [threading.Thread(target=self._serve, name=f"slot-{slot}") for slot in range(slots)]
        for thread in self._threads:
            thread.start()

    def nodes(self) -> list[Node]:
        """This machine."""
        return [self.node]

    def start(self, key: str, work: str, document: dict[str, Any], share: Share) -> None:
        """Hand the work to a free thread."""
        self._inbox.put((key, work, document))

    def wait(self, seconds: float) -> list[Ended]:
        """What has ended within `seconds`."""
        try:
            ended = [self._outbox.get(timeout=seconds)]
        except queue.Empty:
            return []
        while not self._outbox.empty():
            ended.append(self._outbox.get())
        return ended

    def kill(self, key: str) -> None:
        """Nothing to do: the supervisor sees that the run was cancelled or lost, and ends its child."""

    def close(self) -> None:
        """End the threads when their runs have ended."""
        for _ in self._threads:
            self._inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        spare = Spare()
        try:
            while (item := self._inbox.get()) is not None:
                key, name, document = item
                self._outbox.put(_done(key, WORK[name], document, spare))
        finally:
            spare.close()


def _done(
    key: str, work: Callable[[dict[str, Any], Spare], dict[str, Any]], document: Any, spare: Spare
) -> Ended:
    try:
        return Ended(key, answer=work(document, spare))
    except Exception as error:  # whatever it is, it is the dispatcher that says what becomes of the run
        return Ended(key, error=f"{type(error).__name__}: {error}")
