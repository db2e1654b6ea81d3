"""Samples taken while the machine is watched, and taken once more where its clock fell meanwhile."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from .card import CardWindow, nvml_reader
from .conditions import ProcessorWindow, UnknownWindow
from .cooling import cool_down

T = TypeVar("T")


class Window(Protocol):
    """Around a timing; then ``found`` says what the device did meanwhile, ``throttled`` among it."""

    found: dict[str, Any]

    def __enter__(self) -> Any: ...

    def __exit__(self, *raised: object) -> None: ...

    def is_cool(self) -> bool:
        """Whether the device is as it was before."""
        ...


def window_of(device: torch.device) -> Window:
    """Return what watches the machine while something is timed on the device."""
    if device.type == "cpu":
        return ProcessorWindow()
    try:
        read = nvml_reader(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        read()
    except (OSError, AttributeError) as error:  # no driver, a part of a card, or a driver without the call
        return UnknownWindow(str(error))
    return CardWindow(read)


def watched(
    take: Callable[[], T],
    device: torch.device,
    *,
    watch: Callable[[torch.device], Window] = window_of,
    cool: Callable[[Callable[[], bool]], Mapping[str, Any]] = cool_down,
) -> tuple[T, dict[str, Any]]:
    """Take samples in a window; where the clock fell in it, wait until the device is cool and take them once more.

    Returns:
        The samples that count, and ``conditions`` of their window. Where there were two windows, ``before_cool_down``
        has the samples and conditions of the first and how long was waited: nothing is left out.
    """
    with watch(device) as window:
        samples = take()
    if not window.found.get("throttled"):
        return samples, {"conditions": window.found}
    first = {"samples": samples, "conditions": window.found, **cool(window.is_cool)}
    with watch(device) as again:
        samples = take()
    return samples, {"conditions": again.found, "before_cool_down": first}


def clock_of(conditions: Mapping[str, Any]) -> float | None:
    """The clock in MHz that a window saw: a card's median, a processor's at its end; None where nobody said it."""
    if (card := conditions.get("sm_mhz")) is not None:
        return float(card[1])
    processor = conditions.get("mhz")
    return None if processor is None or processor[1] is None else float(processor[1])
