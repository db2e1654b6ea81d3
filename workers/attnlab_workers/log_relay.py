"""What a child prints, on its way to the store: whole lines, at a bounded rate, up to a bounded size."""

from collections import deque
from collections.abc import Iterator

FLUSH_SECONDS = 0.5
CHUNK_CHARACTERS = 16_384
TOTAL_CHARACTERS = 1_000_000
TAIL_LINES = 40


class LogRelay:
    """Collects bytes and hands them on as text.

    A progress bar's line that was overwritten (`\\r`) counts once, as it last looked. Beyond
    `TOTAL_CHARACTERS` only the last `TAIL_LINES` lines are kept, for `tail()`: that is where a crash says its
    name.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._waiting: deque[str] = deque()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._room = TOTAL_CHARACTERS
        self._next_flush = 0.0

    def feed(self, data: bytes) -> None:
        """Take what was read from the child's pipe."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._add(line)
        if len(self._rest) > CHUNK_CHARACTERS:  # a "line" without an end
            self._add(self._rest)
            self._rest = b""

    def finish(self) -> None:
        """Take the last line although it has no end."""
        if self._rest:
            self._add(self._rest)
            self._rest = b""

    def due(self, now: float) -> str:
        """The text to store now, about `CHUNK_CHARACTERS` each `FLUSH_SECONDS`; empty when there is none."""
        if not self._waiting or now < self._next_flush:
            return ""
        self._next_flush = now + FLUSH_SECONDS
        return self._take(CHUNK_CHARACTERS)

    def remainder(self) -> Iterator[str]:
        """Yield all the text that was not stored yet, in pieces."""
        while text := self._take(CHUNK_CHARACTERS):
            yield text

    def tail(self) -> str:
        """The last lines, whether they were stored or not."""
        return "\n".join(self._tail)

    def _add(self, raw: bytes) -> None:
        shown = raw.rstrip(b"\r").rpartition(b"\r")[2]
        # no database column holds a NUL
        line = shown.decode("utf-8", "replace").replace("\0", "\ufffd")
        self._tail.append(line)
        if self._room <= 0:
            return
        self._room -= len(line) + 1
        if self._room <= 0:
            line = f"{line[:200]}\n[more than {TOTAL_CHARACTERS:,} characters printed, the rest is not kept]"
        self._waiting.append(line)

    def _take(self, most: int) -> str:
        taken: list[str] = []
        size = 0
        while self._waiting and size < most:
            taken.append(self._waiting.popleft())
            size += len(taken[-1]) + 1
        return "".join(f"{line}\n" for line in taken)
