"""A short call as a CUDA graph: its time is then the card's, without the gaps in which the host launches it.

Below 50 us a host needs about as long to launch a kernel as the card to run it, so events around one call time the
host. A graph holds the call many times over and is launched once.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .timers import Step, Timer

SHORT_MS = 0.05
"""of the device: below it a call is timed as a graph"""
GRAPH_MS = 1.0
"""of the device that one replay takes at least"""
MOST_CALLS = 1024
WARM_CALLS = 3
LEAST_SHARE = 0.25
"""of the profiled time that a replayed call takes at least: below it the graph does not hold the call's work"""


class NotCaptured(Exception):
    """A call that no graph can hold; the text says why."""


class Copies(Protocol):
    """A call that can run on copies of its operands."""

    @property
    def operand_bytes(self) -> int:
        """Bytes of its operands; 0 where it takes none that could be copied."""
        ...

    def copies(self, count: int) -> list[Step]:
        """Return the call on so many sets of operands, the first its own."""
        ...


@dataclass(frozen=True)
class Replay:
    """A graph of one call, ready to be launched.

    Attributes:
        run: launches it once.
        calls: how often the graph holds the call.
        cache: cold or warm, and why, in words.
    """

    run: Step
    calls: int
    cache: str


def plan(spent_ms: float, operand_bytes: int, l2_bytes: int) -> tuple[int, int]:
    """Return calls in a graph and sets of operands: between two uses of a set, others fill twice the cache.

    Args:
        spent_ms: of the device, by one call.
        operand_bytes: of one set; 0: there is one set only.
        l2_bytes: the card's own second-level cache.
    """
    sets = 1 if not operand_bytes else min(1 + math.ceil(2 * l2_bytes / operand_bytes), MOST_CALLS)
    calls = min(max(1, math.ceil(GRAPH_MS / max(spent_ms, 1e-3))), MOST_CALLS)
    rounds = max(1, min(math.ceil(calls / sets), MOST_CALLS // sets))
    return rounds * sets, sets


def capture(
    step: Step, spent_ms: float, device: torch.device, *, copies: Copies | None = None, cuda: Any = torch.cuda
) -> Replay:
    """Return a graph of a call, captured on a stream of its own after warming up there.

    Args:
        copies: runs the call on sets of operands in turn, so that it meets a cold cache; None: a warm one.
        cuda: ``torch.cuda``, or what stands for it in a test.

    Raises:
        NotCaptured: the call waits for the device, works on another stream, or does else what a graph cannot hold.
    """
    l2_bytes = cuda.get_device_properties(device).L2_cache_size
    operand_bytes = 0 if copies is None else copies.operand_bytes
    calls, sets = plan(spent_ms, operand_bytes, l2_bytes)
    steps = [step] if copies is None or sets == 1 else copies.copies(sets)
    graph = _graph_of(steps, calls, device, cuda)
    others = (sets - 1) * operand_bytes
    cache = "warm" if others < 2 * l2_bytes else f"cold: {sets} sets of operands in turn"
    if cache == "warm" and others:
        cache = f"warm in part: {sets} sets of operands in turn hold less than twice the L2"
    return Replay(graph.replay, calls, cache)


def _graph_of(steps: Sequence[Step], calls: int, device: torch.device, cuda: Any) -> Any:
    stream, present = cuda.Stream(device), cuda.current_stream(device)
    stream.wait_stream(present)
    with cuda.stream(stream):
        for _ in range(WARM_CALLS):
            steps[0]()
        for other in steps[1:]:
            other()
    present.wait_stream(stream)
    graph = cuda.CUDAGraph()
    try:
        # a capture that fails leaves its own stream current: the outer block puts the present one back
        with (
            cuda.stream(present),
            cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            for place in range(calls):
                steps[place % len(steps)]()
    except Exception as error:  # whatever it is: the same call ran a moment ago without a capture
        first = _first(error)
        cuda.synchronize(device)
        said = str(first).splitlines() or [""]
        raise NotCaptured(f"{type(first).__name__}: {said[0]}") from None
    return graph


def _first(error: BaseException) -> BaseException:
    """What began it: the end of a capture that was broken raises too, and says less."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def replayed(replay: Replay, timer: Timer, repeats: int) -> list[float]:
    """Return the milliseconds of one call in so many replays, after one that is not counted."""
    timer.sample(replay.run)
    return [timer.sample(replay.run) / replay.calls for _ in range(repeats)]


def check_whole(samples: Sequence[float], spent_ms: float) -> None:
    """Raises NotCaptured where a replayed call takes so little that the graph cannot hold all of it."""
    found = statistics.median(samples)
    if found < LEAST_SHARE * spent_ms:
        raise NotCaptured(
            f"its replay takes {found:.3g} ms where the profiler saw {spent_ms:.3g} ms of kernels"
        )
