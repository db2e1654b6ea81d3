"""How a child ended, as a small document: the only thing that goes back through Ray."""

import dataclasses
import signal
from dataclasses import dataclass
from typing import Any, Literal

from attnlab_workers.order import JOB_RAISED, LOST_LEASE, OUT_OF_MEMORY

End = Literal["ended", "crashed", "out_of_memory", "timed_out", "cancelled", "lost"]

# a killed process with this much of the memory was killed for it, also where no counter can be read
NEAR_THE_LIMIT = 0.85
# what the C++ runtime prints before it aborts on a failed allocation
ALLOCATION_FAILED = ("std::bad_alloc", "Cannot allocate memory", "DefaultCPUAllocator: can't allocate memory")


@dataclass(frozen=True)
class Exit:
    """The end of one child."""

    end: End
    """"ended": the job has written its outcome to the store. "lost": the run is no longer this attempt's."""
    reason: str
    """One sentence for people."""
    code: int | None = None
    """Exit status; minus the number of the signal that ended it."""
    peak_memory: int = 0
    """Peak resident bytes of the child."""
    tail: str = ""
    """The last lines it printed."""

    def to_dict(self) -> dict[str, Any]:
        """A plain document, for Ray."""
        return dataclasses.asdict(self)


def exit_from_dict(document: dict[str, Any]) -> Exit:
    """Read `Exit.to_dict` back."""
    return Exit(**document)


def signal_name(code: int) -> str:
    """`SIGSEGV` for -11."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def classify(code: int, *, peak_memory: int, memory: int, memory_kills: int, tail: str) -> Exit:
    """Say what an exit status means that the supervisor did not cause.

    Args:
        code: exit status, negative for a signal.
        peak_memory: peak resident bytes of the child.
        memory: bytes it could have had.
        memory_kills: how many processes the kernel killed for memory while it ran.
        tail: the last lines it printed.
    """

    def exit_as(end: End, reason: str) -> Exit:
        return Exit(end, reason, code=code, peak_memory=peak_memory, tail=tail)

    used = f"it had used {peak_memory / 2**20:,.0f} MB of {memory / 2**20:,.0f} MB"
    if code == 0:
        return exit_as("ended", "the child ended")
    if code == LOST_LEASE:
        return exit_as("lost", "the run was taken over by another attempt")
    if code == OUT_OF_MEMORY:
        return exit_as("out_of_memory", f"an allocation failed in main memory; {used}")
    if code == -signal.SIGKILL and (memory_kills > 0 or peak_memory >= NEAR_THE_LIMIT * memory):
        return exit_as("out_of_memory", f"the system killed the child because main memory ran out; {used}")
    if code < 0 and any(text in tail for text in ALLOCATION_FAILED):
        return exit_as("out_of_memory", f"an allocation failed in main memory; {used}")
    if code < 0:
        return exit_as("crashed", f"the child died of {signal_name(code)}")
    if code == JOB_RAISED:
        return exit_as("crashed", f"the child raised {last_line(tail)}")
    return exit_as("crashed", f"the child ended with exit status {code}")


def last_line(text: str) -> str:
    """The last line that is not empty, shortened."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "an error without a text"
