"""Two computations timed in turn, sample by sample, so that what the machine does meanwhile meets both alike."""

import statistics

import torch

from attnlab_storage.results import MeasurementRow

from ..intervals import median_interval
from .timers import EventTimer, Step, Timer, WallTimer, cache_flusher
from .timing import window_of
from .warming import warm_up


def interleaved(
    name: str, step: Step, other: Step, repeats: int, device: torch.device, timer: Timer | None = None
) -> MeasurementRow:
    """Time ``step`` and ``other`` in pairs whose order alternates (A B, B A); value is the median of step over other.

    The samples are the ratios of the pairs; both times of each pair, in milliseconds, and the 95 % interval of the
    median are in the detail. On CUDA the second-level cache is overwritten before each sample.
    """
    timer = timer or (EventTimer(device) if device.type == "cuda" else WallTimer())
    flush = cache_flusher(device)

    def sample(one: Step) -> float:
        if flush is not None:
            flush()
        return timer.sample(one)

    warmed = [warm_up(lambda one=one: sample(one)) for one in (step, other)]
    times: list[tuple[float, float]] = []
    window = window_of(device)
    with window:
        for turn in range(repeats):
            if turn % 2:
                second, first = sample(other), sample(step)
            else:
                first, second = sample(step), sample(other)
            times.append((first, second))
    ratios = [first / second for first, second in times]
    detail = {
        "interval": median_interval(ratios),
        "times_ms": [[first for first, _ in times], [second for _, second in times]],
        "steady": all(one["steady"] for one in warmed),
        "timer": timer.name,
        "conditions": window.found,
    }
    return MeasurementRow(name, statistics.median(ratios), "ratio", samples=ratios, detail=detail)
