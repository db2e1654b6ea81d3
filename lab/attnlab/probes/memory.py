"""Peak memory of a step over what was there before it: two methods on a CPU, the allocator on CUDA."""

import contextlib
import ctypes
import gc
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from attnlab_storage.results import MeasurementRow

from ..snapshot import pack_snapshot
from .allocations import Change, changes_of_snapshot, changes_of_tree, replay

Step = Callable[[], object]
STATUS = Path("/proc/self/status")
MACHINE = Path("/proc/meminfo")
CLEAR_REFS = Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""glibc's numbers; the first two end at 64 and 32 MiB by themselves once it has seen large blocks"""
MAPPED_BLOCKS = 65536
"""that glibc maps at most unless told otherwise"""
KEPT_BYTES = 2**31 - 1
HISTORY_ENTRIES = 200_000


class Weighed(NamedTuple):
    """What one step takes."""

    peak: MeasurementRow
    timeline: dict[str, Any]
    """see ``allocations.replay``"""
    snapshot: dict[str, Any] | None
    """CUDA's own history, packed (see ``snapshot``); None on a CPU"""


def peak_memory(
    name: str,
    step: Step,
    device: torch.device,
    *,
    floor: int,
    held: Mapping[str, int] | None = None,
    prepare: Step | None = None,
) -> Weighed:
    """Measure the most bytes a step holds at once beyond what was held before it, and its timeline.

    On a CPU the value is the peak of torch's own allocations, replayed from a profile; the detail has the growth
    of the process beside it (VmHWM, reset before). On CUDA it is max_memory_allocated, reset before; the timeline
    is replayed from the allocator's history in a step of its own.

    Args:
        floor: bytes that no implementation can do without, stored beside the value.
        held: bytes by owner that are there before the step (weights, a filled cache).
        prepare: run before every step, not counted; the step runs three times.
    """
    prepare = prepare or _nothing
    detail: dict[str, Any] = {"floor_bytes": floor}
    with _blocks_mapped():
        prepare()
        step()  # the first one also loads libraries and their workspaces
        prepare()
        if device.type == "cpu":
            detail |= _resident_peak(step)
            prepare()
    if device.type == "cuda":
        found, peak = _cuda_peak(step, device)
        detail |= {"method": "max_memory_allocated"} | found
        prepare()
        history = _cuda_history(step, device)
        timeline = replay(changes_of_snapshot(history, device.index or 0), held)
        snapshot = pack_snapshot(history)
    else:
        detail["method"] = "torch allocations, replayed"
        timeline = replay(_cpu_changes(step), held)
        peak, snapshot = timeline["peak"]["bytes"], None
    return Weighed(MeasurementRow(name, float(peak), "bytes", detail=detail), timeline, snapshot)


def _nothing() -> None:
    pass


def _cuda_peak(step: Step, device: torch.device) -> tuple[dict[str, Any], int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    found = {
        "allocated_before_bytes": before,
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(device),
        "process_bytes": resident("VmRSS"),
    }
    return found, found["allocated_peak_bytes"] - before


def _cuda_history(step: Step, device: torch.device) -> dict[str, Any]:
    """The allocator's own history of a step, as plain values: nothing is pickled."""
    history = torch.cuda.memory
    history._record_memory_history(max_entries=HISTORY_ENTRIES, stacks="python")
    try:
        step()
        torch.cuda.synchronize(device)
        return dict(history._snapshot(device))
    finally:
        history._record_memory_history(enabled=None)


def _cpu_changes(step: Step) -> list[Change]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, with_stack=True) as profiler:
        step()
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        raise RuntimeError("torch.profiler recorded no events")
    return changes_of_tree(results.experimental_event_tree())


def _resident_peak(step: Step) -> dict[str, Any]:
    give_back_free_heap()
    try:
        CLEAR_REFS.write_text("5")
    except OSError as error:
        return {"resident_peak": f"not measured: {error}"}
    before = resident("VmRSS")
    step()
    peak = resident("VmHWM")
    return {"resident_peak_bytes": peak - before, "process_before_bytes": before, "process_peak_bytes": peak}


@contextlib.contextmanager
def _blocks_mapped() -> Iterator[None]:
    """Have glibc map every block of 128 KiB or more by itself, so that a freed one leaves the process at once.

    It raises that limit as it sees large blocks freed; kept in the heap, they would count until the next trim.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(M_MMAP_THRESHOLD, 128 << 10)
    try:
        yield
    finally:
        set_option(M_MMAP_THRESHOLD, 32 << 20)
        set_option(M_TRIM_THRESHOLD, 64 << 20)


def give_back_free_heap() -> None:
    """Free what is garbage and return it: reused or freed within a step, it would hide what the step takes."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return freed memory to the system; kept, one step's adds up to 200 MB to the next one's peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def heap_kept() -> Iterator[None]:
    """Have glibc take every block from its heap and keep what is freed, until the end: then it is given back.

    A forward takes blocks of the same sizes at every layer. Those of 32 MiB and more glibc maps anew each time unless
    a hole happens to fit, and all their pages fault: up to 2.4 million times, 5 s of 30, at 8,192 tokens of a model of
    135 million parameters. What outlives its layer should be a ``mapped_copy``, or it splits the holes.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(M_MMAP_MAX, 0)
    set_option(M_TRIM_THRESHOLD, KEPT_BYTES)
    try:
        yield
    finally:
        set_option(M_MMAP_MAX, MAPPED_BLOCKS)
        set_option(M_MMAP_THRESHOLD, 32 << 20)
        set_option(M_TRIM_THRESHOLD, 64 << 20)
        trim_heap()


def mapped_copy(array: np.ndarray) -> np.ndarray:
    """Return a copy in pages of its own, beside the heap."""
    copy = np.frombuffer(mmap.mmap(-1, array.nbytes), array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class HeapBound:
    """Holds what the process keeps of freed memory to a budget, by a trim now and then.

    What outlives its layer, however small, leaves gaps in the heap that a later layer's blocks do not fit into.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._limit = resident("VmRSS") + budget if STATUS.exists() else None

    def hold(self) -> None:
        """Trim the heap if the process has grown by more than the budget, or by half of it if nothing else is free."""
        if self._limit is not None and resident("VmRSS") > self._limit:
            trim_heap()
            self._limit = max(self._limit, resident("VmRSS") + self._budget // 2)


def resident(field: str) -> int:
    """Return a memory field of this process in bytes: VmRSS is now, VmHWM the most since its last reset."""
    return _field(STATUS, field)


def available() -> int:
    """Return the bytes that this machine could give now without swapping."""
    return _field(MACHINE, "MemAvailable")


def _field(path: Path, field: str) -> int:
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"field: {path} has no {field}")
