"""How long it takes: every sample is kept, and the kernels that really ran are named."""

import os
import statistics
from collections.abc import Callable
from typing import Any

# the profiler's own notices would land in the run's log
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attnlab_storage.results import MeasurementRow

from ..intervals import median_interval
from ..outcomes import CheckFailed
from .elsewhere import hides_work, left_running
from .graphs import SHORT_MS, Copies, NotCaptured, capture, check_whole, replayed
from .timers import EventTimer, Step, Timer, WallTimer, cache_flusher
from .warming import warm_up
from .windows import watched

SHARE = 0.05
"""operators below this share of the time are not named, but for the telling ones"""
TELLING = ("attention", "bmm", "_softmax")
"""always named: on a busy machine one operator that waits for its threads has nearly all of the time"""


def latency(
    name: str,
    step: Step,
    repeats: int,
    device: torch.device,
    *,
    prepare: Step | None = None,
    progress: Callable[[int], None] | None = None,
    cold: bool = False,
    copies: Copies | None = None,
    timer: Timer | None = None,
) -> MeasurementRow:
    """Time a step ``repeats`` times after warming up; value is the median in milliseconds.

    On CUDA a step with less than 50 us of kernels is timed as a graph too, and that is then the value.

    Args:
        prepare: run untimed before every sample.
        progress: told how many samples are done.
        cold: overwrite the device's L2 cache before every sample (CUDA only).
        copies: with ``cold``, the step on operands of its own, which a graph takes in turn.
        timer: what times one call; None: CUDA events on a GPU, the host's clock on a CPU.

    Raises:
        CheckFailed: the step works on another stream than the events are on.
    """
    timer = timer or (EventTimer(device) if device.type == "cuda" else WallTimer())
    flush = cache_flusher(device) if cold else None
    before = [ready for ready in (prepare, flush) if ready is not None]

    def sample() -> float:
        for ready in before:
            ready()
        return timer.sample(step)

    warmed = warm_up(sample)
    if isinstance(timer, EventTimer):
        timer.launches.clear()

    def take() -> list[float]:
        taken: list[float] = []
        for done in range(repeats):
            taken.append(sample())
            if progress is not None:
                progress(done + 1)
        return taken

    samples, seen = watched(take, device)
    detail: dict[str, Any] = {"timer": timer.name, **warmed, **seen}
    detail["cache"] = "warm" if flush is None else "L2 overwritten before each sample"
    detail |= _threads() if device.type == "cpu" else _gaps(timer, step, before, samples, device)
    if isinstance(timer, EventTimer) and detail["device_ms"] < SHORT_MS:
        samples, more = in_graph(
            step, samples, detail, timer, device, alone=prepare is None, copies=copies if cold else None
        )
        detail |= more
    detail["interval"] = median_interval(samples)
    return MeasurementRow(name, statistics.median(samples), "ms", samples=samples, detail=detail)


def _threads() -> dict[str, Any]:
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {"threads": torch.get_num_threads(), "affinity": affinity}


def in_graph(
    step: Step,
    samples: list[float],
    detail: dict[str, Any],
    timer: Timer,
    device: torch.device,
    *,
    alone: bool,
    copies: Copies | None,
    cuda: Any = torch.cuda,
) -> tuple[list[float], dict[str, Any]]:
    """Return as many samples of a short step in a graph, with the events' beside; or these, and why there is no graph.

    Args:
        detail: of the events: ``device_ms`` by the profiler, ``cache`` and ``conditions``.
        alone: no call has to be prepared for.
    """
    spent = detail["device_ms"]
    try:
        if not alone:
            raise NotCaptured("something has to be prepared before each call")
        replay = capture(step, spent, device, copies=copies, cuda=cuda)
        made, seen = watched(lambda: replayed(replay, timer, len(samples)), device)
        check_whole(made, spent)
    except NotCaptured as reason:
        return samples, {"graph": {"not_captured": str(reason)}}
    events = {"samples": samples} | {name: detail[name] for name in ("cache", "conditions")}
    gap = statistics.median(samples) - statistics.median(made)
    found = {"timer": "CUDA graph", "cache": replay.cache, "graph": {"calls": replay.calls}}
    return made, {**seen, **found, "events": events, "launch_gap_ms": gap}


def _gaps(
    timer: Timer, step: Step, before: list[Step], samples: list[float], device: torch.device
) -> dict[str, Any]:
    """The profiler's device time beside the events, and how much of the events no kernel ran.

    Raises CheckFailed where the device works on after the events: then they timed another stream than the step's.
    """
    between, left = left_running(step, device, before)
    if hides_work(between, left):
        raise CheckFailed(
            f"the device worked on for {left:.3g} ms after its {between:.3g} ms: on another stream"
        )
    for ready in before:
        ready()
    spent = device_time(step, device)
    found: dict[str, Any] = {"device_ms": spent, "launch_gap_ms": statistics.median(samples) - spent}
    found["left_ms"] = left
    if isinstance(timer, EventTimer):
        found["host_launch_ms"] = statistics.median(timer.launches)
    return found


def device_time(step: Step, device: torch.device) -> float:
    """Return the milliseconds of kernels that the profiler sees in a step."""
    return sum(_profiled(step, device).values()) / 1e3


def kernels_that_ran(step: Step, device: torch.device) -> list[str]:
    """Return the names of what a step really executed, longest first.

    CUDA kernels on a GPU, aten operators on a CPU; those below five percent of the time are left out unless
    their names tell attention, a batched matrix product or a softmax.
    """
    times = _profiled(step, device)
    total = sum(times.values())
    named = [key for key, spent in times.items() if spent >= SHARE * total or _is_telling(key)]
    return sorted(named, key=lambda key: -times[key])


def _is_telling(name: str) -> bool:
    return any(part in name.lower() for part in TELLING)


def _profiled(step: Step, device: torch.device) -> dict[str, float]:
    """Microseconds that each kernel (CUDA) or operator (CPU) spent itself."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        on_device = event.device_type == DeviceType.CUDA
        if spent > 0 and on_device == cuda and not event.key.startswith(("[", "ProfilerStep")):
            times[event.key] = spent
    return times
