"""Two computations timed in turn, sample by sample, so that what the machine does meanwhile meets both alike."""

import statistics
from typing import Any

import torch

from attnlab_storage.results import MeasurementRow

from ..intervals import median_interval
from .graphs import SHORT_MS, Copies, NotCaptured, Replay, capture
from .timers import EventTimer, Step, Timer, WallTimer, cache_flusher
from .timing import device_time
from .warming import warm_up
from .windows import watched


def interleaved(
    name: str,
    step: Step,
    other: Step,
    repeats: int,
    device: torch.device,
    timer: Timer | None = None,
    *,
    copies: tuple[Copies, Copies] | None = None,
) -> MeasurementRow:
    """Time ``step`` and ``other`` in pairs whose order alternates (A B, B A); value is the median of step over other.

    The samples are the ratios of the pairs; both times of each pair, in milliseconds, and the 95 % interval of the
    median are in the detail. On CUDA the second-level cache is overwritten before each sample; two short steps are
    timed as graphs, both of them or neither.

    Args:
        copies: both steps on operands of their own, which their graphs take in turn.
    """
    timer = timer or (EventTimer(device) if device.type == "cuda" else WallTimer())
    graphs, said = _graphs((step, other), copies, device) if device.type == "cuda" else (None, {})
    if graphs is not None:
        step, other = (one.run for one in graphs)
    calls = (1, 1) if graphs is None else (graphs[0].calls, graphs[1].calls)
    flush = cache_flusher(device) if graphs is None else None

    def sample(place: int) -> float:
        if flush is not None:
            flush()
        return timer.sample((step, other)[place]) / calls[place]

    def take() -> list[tuple[float, float]]:
        times: list[tuple[float, float]] = []
        for turn in range(repeats):
            if turn % 2:
                second, first = sample(1), sample(0)
            else:
                first, second = sample(0), sample(1)
            times.append((first, second))
        return times

    warmed = [warm_up(lambda place=place: sample(place)) for place in (0, 1)]
    times, seen = watched(take, device)
    ratios = [first / second for first, second in times]
    detail = {
        "interval": median_interval(ratios),
        "times_ms": [[first for first, _ in times], [second for _, second in times]],
        "steady": all(one["steady"] for one in warmed),
        "timer": timer.name,
        **seen,
        **said,
    }
    return MeasurementRow(name, statistics.median(ratios), "ratio", samples=ratios, detail=detail)


def _graphs(
    steps: tuple[Step, Step], copies: tuple[Copies, Copies] | None, device: torch.device
) -> tuple[tuple[Replay, Replay] | None, dict[str, Any]]:
    """Two short steps as graphs, and what is said of them; None where one is long or cannot be captured."""
    spent = [device_time(step, device) for step in steps]
    if max(spent) >= SHORT_MS:
        return None, {}
    sets = copies or (None, None)
    try:
        first, second = (
            capture(step, one, device, copies=copy)
            for step, one, copy in zip(steps, spent, sets, strict=True)
        )
    except NotCaptured as reason:
        return None, {"graph": {"not_captured": str(reason)}}
    said = {"timer": "CUDA graph", "cache": f"{first.cache}; {second.cache}"}
    return (first, second), said | {"graph": {"calls": [first.calls, second.calls]}}
