"""Peak memory of a step over what was there before it: two methods on a CPU, the allocator on CUDA."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from attnlab_storage.results import MeasurementRow

Step = Callable[[], object]
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_memory(
    name: str, step: Step, device: torch.device, *, floor: int, prepare: Step | None = None
) -> MeasurementRow:
    """Return the most bytes a step holds at once beyond what was held before it.

    On a CPU the value is the peak of torch's own allocations, replayed from a profile; the detail has the growth
    of the process beside it (VmHWM, reset before). On CUDA it is max_memory_allocated, reset before.

    Args:
        floor: bytes that no implementation can do without, stored beside the value.
        prepare: run before every step, not counted.
    """
    prepare = prepare or _nothing
    detail: dict[str, Any] = {"floor_bytes": floor}
    prepare()
    if device.type == "cuda":
        detail["method"] = "max_memory_allocated"
        return MeasurementRow(name, _cuda_peak(step, device), "bytes", detail=detail)
    detail["method"] = "torch allocations, replayed"
    detail |= _resident_peak(step)
    prepare()
    return MeasurementRow(name, float(_replayed_peak(step)), "bytes", detail=detail)


def _nothing() -> None:
    pass


def _cuda_peak(step: Step, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)


def _replayed_peak(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        raise RuntimeError("torch.profiler recorded no events")
    changes = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _resident_peak(step: Step) -> dict[str, Any]:
    give_back_free_heap()
    try:
        CLEAR_REFS.write_text("5")
    except OSError as error:
        return {"resident_peak": f"not measured: {error}"}
    before = resident("VmRSS")
    step()
    return {"resident_peak_bytes": resident("VmHWM") - before}


def give_back_free_heap() -> None:
    """Free what is garbage and return it: reused or freed within a step, it would hide what the step takes."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return freed memory to the system; kept, one step's adds up to 200 MB to the next one's peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(field: str) -> int:
    """Return a memory field of this process in bytes: VmRSS is now, VmHWM the most since its last reset."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"field: {STATUS} has no {field}")
