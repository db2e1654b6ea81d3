"""How long it takes: every sample is kept, and the kernels that really ran are named."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# the profiler's own notices would land in the run's log
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attnlab_storage.results import MeasurementRow

Step = Callable[[], object]
WARM_UP = {"cpu": 1, "cuda": 3}
SHARE = 0.05
"""operators below this share of the time are not named"""


def latency(
    name: str,
    step: Step,
    repeats: int,
    device: torch.device,
    *,
    prepare: Step | None = None,
    progress: Callable[[int], None] | None = None,
    cold: bool = False,
) -> MeasurementRow:
    """Time a step ``repeats`` times after warming up; value is the median in milliseconds.

    Args:
        prepare: run untimed before every sample.
        progress: told how many samples are done.
        cold: overwrite the device's L2 cache before every sample (CUDA only).
    """
    warm_up = WARM_UP[device.type]
    for _ in range(warm_up):
        if prepare is not None:
            prepare()
        step()
    flush = _cache_flusher(device) if cold else None
    samples: list[float] = []
    for done in range(repeats):
        if prepare is not None:
            prepare()
        if flush is not None:
            flush()
        samples.append(_sample(step, device))
        if progress is not None:
            progress(done + 1)
    detail: dict[str, Any] = {
        "timer": "CUDA events" if device.type == "cuda" else "perf_counter",
        "warm_up": warm_up,
        "threads": torch.get_num_threads(),
    }
    if flush is not None:
        detail["cache"] = "L2 overwritten before each sample"
    return MeasurementRow(name, statistics.median(samples), "ms", samples=samples, detail=detail)


def _sample(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1e3


def _cache_flusher(device: torch.device) -> Step | None:
    if device.type != "cuda":
        return None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(size, dtype=torch.uint8, device=device)
    return scratch.zero_


def kernels_that_ran(step: Step, device: torch.device) -> list[str]:
    """Return the names of what a step really executed, longest first.

    CUDA kernels on a GPU, aten operators on a CPU; those below five percent of the time are left out unless
    they are attention operators.
    """
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
    total = sum(times.values())
    named = [key for key, spent in times.items() if spent >= SHARE * total or "attention" in key.lower()]
    return sorted(named, key=lambda key: -times[key])
