"""A computation where nobody expects it: behind a stream that is still busy, on another thread; and what it hides.

CUDA events see one stream. What works on another one and returns at once looks free to them, so the device is waited
for as a whole (the "wrong stream" of KernelBench's adversarial tests, arXiv 2502.10517).
"""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .timers import Step

BUSY_CYCLES = 20_000_000
"""about 10 ms of a card"""
LEFT_SHARE, LEFT_MS = 0.1, 0.05
"""of the time between the events, and besides: work that may go on after them"""
LOOKS = 5

Made = tuple[Tensor, ...]


def poison(given: Sequence[Tensor]) -> None:
    """Leave NaN in the memory that the next output is likely to get; every thread and stream has memory of its own."""
    if given:
        query, value = given[0], given[-1]
        blocks = [torch.full((*query.shape[:-1], value.shape[-1]), torch.nan).to(value) for _ in range(4)]
        del blocks


def run_elsewhere(compute: Callable[..., Made], given: Sequence[Tensor], cuda: Any = torch.cuda) -> Made:
    """Return copies of what it computes in another place, and raise what it raises there.

    On CUDA a stream of its own, on which its inputs arrive late; on a CPU another thread.
    """
    device = given[0].device if given else None
    if device is None or (device.type != "cuda" and cuda is torch.cuda):
        return _on_a_thread(compute, given)
    return _behind_a_busy_stream(compute, given, device, cuda)


def _behind_a_busy_stream(
    compute: Callable[..., Made], given: Sequence[Tensor], device: torch.device, cuda: Any
) -> Made:
    late = [torch.full_like(one, torch.nan) if one.is_floating_point() else one for one in given]
    stream = cuda.Stream(device)
    stream.wait_stream(cuda.current_stream(device))
    with cuda.stream(stream):
        poison(given)
        cuda._sleep(BUSY_CYCLES)
        for target, source in zip(late, given, strict=True):
            target.copy_(source)
        made = tuple(tensor.clone() for tensor in compute(*late))
    cuda.synchronize(device)
    return made


def _on_a_thread(compute: Callable[..., Made], given: Sequence[Tensor]) -> Made:
    made: list[Made] = []
    raised: list[BaseException] = []
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run() -> None:
        try:
            with torch.inference_mode(modes[0]), torch.set_grad_enabled(modes[1]):
                poison(given)
                made.append(tuple(tensor.clone() for tensor in compute(*given)))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="attnlab-elsewhere")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return made[0]


def left_running(
    step: Step,
    device: torch.device,
    before: Sequence[Step] = (),
    cuda: Any = torch.cuda,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Return the milliseconds between the events around a step, and how long the device went on after them.

    Medians of five. ``before`` runs untimed before each of them.
    """
    spent: list[float] = []
    left: list[float] = []
    for _ in range(LOOKS):
        for ready in before:
            ready()
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda.synchronize(device)
        start.record()
        step()
        end.record()
        end.synchronize()
        began = clock()
        cuda.synchronize(device)
        left.append((clock() - began) * 1e3)
        spent.append(float(start.elapsed_time(end)))
    return statistics.median(spent), statistics.median(left)


def hides_work(spent: float, left: float) -> bool:
    """Whether a device worked on when the events said that it was done."""
    return left > LEFT_SHARE * spent + LEFT_MS
