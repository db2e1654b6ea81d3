"""What times one call: a host clock, or events on a CUDA device."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Step = Callable[[], object]


class Timer(Protocol):
    name: str

    def sample(self, step: Step) -> float:
        """Run the step once; returns milliseconds."""
        ...


class WallTimer:
    """The host's clock around a step that returns when it is done.

    Args:
        clock: seconds, never going back.
    """

    name = "perf_counter"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def sample(self, step: Step) -> float:
        """Run the step once; returns milliseconds."""
        clock = self._clock
        began = clock()
        step()
        return (clock() - began) * 1e3


class EventTimer:
    """CUDA events before and after a step; what the host needed to launch it is kept beside.

    Args:
        cuda: ``torch.cuda``, or what stands for it in a test.
    """

    name = "CUDA events"

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self.launches: list[float] = []
        """milliseconds of the host for every sample, without waiting for the device"""

    def sample(self, step: Step) -> float:
        """Run the step once; returns milliseconds between the events."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda.synchronize(self._device)
        began = time.perf_counter()
        start.record()
        step()
        end.record()
        self.launches.append((time.perf_counter() - began) * 1e3)
        end.synchronize()
        return float(start.elapsed_time(end))


def cache_flusher(device: torch.device, cuda: Any = torch.cuda) -> Step | None:
    """Return what overwrites twice the card's own second-level cache; None on a CPU."""
    if device.type != "cuda":
        return None
    size = 2 * cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(size, dtype=torch.uint8, device=device if cuda is torch.cuda else "cpu")
    return scratch.zero_
