"""What a card did while something was timed on it: clocks, power, heat, why it slowed down, who else used it.

Read through the driver's own library (NVML), in a thread, every 20 ms.
"""

import ctypes
import statistics
import threading
from collections.abc import Callable, Mapping
from typing import Any

EVERY = 0.02
SLOWED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}
"""reasons of nvmlDeviceGetCurrentClocksThrottleReasons that make a figure the card's, not the kernel's"""
SM_CLOCK, MEMORY_CLOCK, ON_DIE = 1, 2, 0

Reading = Mapping[str, float]


class CardWindow:
    """Around a timing on a GPU: ``with CardWindow(read) as window: ...``, then ``window.found``.

    Args:
        read: the card's state now (``nvml_reader``): sm_mhz, memory_mhz, watts, celsius, reasons (bits), others.
        every: seconds between two readings.
    """

    def __init__(self, read: Callable[[], Reading], every: float = EVERY) -> None:
        self._read, self._every = read, every
        self._readings: list[Reading] = []
        self._failure = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="attnlab-card", daemon=True)
        self.found: dict[str, Any] = {}

    def __enter__(self) -> "CardWindow":
        self._readings.append(self._read())
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        self.found = _summary(self._readings) | ({"not_known": self._failure} if self._failure else {})

    def is_cool(self) -> bool:
        """Whether nothing slows the card down now, and it is no hotter than when the window began, or does not say."""
        try:
            now = self._read()
        except OSError:
            return True
        return not int(now["reasons"]) & sum(SLOWED) and now["celsius"] <= self._readings[0]["celsius"]

    def _sample(self) -> None:
        while not self._done.wait(self._every) and not self._failure:
            self._look()

    def _look(self) -> None:
        """What cannot be read costs the run its conditions, not its times."""
        try:
            self._readings.append(self._read())
        except OSError as error:
            self._failure = str(error)


def _summary(readings: list[Reading]) -> dict[str, Any]:
    found: dict[str, Any] = {"readings": len(readings)}
    for name in ("sm_mhz", "memory_mhz", "watts", "celsius"):
        values = [reading[name] for reading in readings]
        found[name] = [min(values), statistics.median(values), max(values)]
    bits = 0
    for reading in readings:
        bits |= int(reading["reasons"])
    throttled = [words for bit, words in SLOWED.items() if bits & bit]
    others = int(max(reading["others"] for reading in readings))
    disturbed = [f"slowed down: {words}" for words in throttled]
    if others:
        disturbed.append(f"{others} other processes on the card")
    return found | {"throttled": throttled, "other_processes": others, "disturbed": disturbed}


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def nvml_reader(uuid: str, library: Any = None) -> Callable[[], Reading]:
    """Return what reads the card with this uuid (``GPU-...``).

    Raises:
        OSError: there is no NVML here, or it does not know the card.
    """
    nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
    card = ctypes.c_void_p()
    _ask(nvml.nvmlInit_v2)
    _ask(nvml.nvmlDeviceGetHandleByUUID, uuid.encode(), ctypes.byref(card))

    def number(function: Any, *given: Any, kind: Any = ctypes.c_uint) -> float:
        value = kind()
        _ask(function, card, *given, ctypes.byref(value))
        return float(value.value)

    def others() -> int:
        found, count = (_Process * 64)(), ctypes.c_uint(64)
        _ask(nvml.nvmlDeviceGetComputeRunningProcesses_v3, card, ctypes.byref(count), found)
        # one is this process, which a container knows by another number than the driver
        return max(0, count.value - 1)

    return lambda: {
        "sm_mhz": number(nvml.nvmlDeviceGetClockInfo, SM_CLOCK),
        "memory_mhz": number(nvml.nvmlDeviceGetClockInfo, MEMORY_CLOCK),
        "watts": number(nvml.nvmlDeviceGetPowerUsage) / 1e3,
        "celsius": number(nvml.nvmlDeviceGetTemperature, ON_DIE),
        "reasons": number(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, kind=ctypes.c_ulonglong),
        "others": others(),
    }


def _ask(function: Any, *given: Any) -> None:
    if code := function(*given):
        raise OSError(f"NVML: {getattr(function, '__name__', function)} answered {code}")
