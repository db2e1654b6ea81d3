"""How long a step is called before its times count. Torch-free, so that an estimate may count it."""

import math
import time
from collections.abc import Callable
from typing import Any

STEADY = 3
"""warm-up goes on until this many calls in a row, after the first, are within TOLERANCE of their least"""
TOLERANCE = 0.05
MOST_WARM_UP = 20
WARM_UP_SECONDS = 0.5


def warm_up(sample: Callable[[], float], clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Call until the time is steady: three calls in a row after the first within 5 % of their least.

    Ends unsteady after 20 calls, or half a second after the first call. ``first_ms`` is apart, as compilation, tuning
    and lazy allocation are in it.
    """
    times = [sample()]
    began = clock()
    while not (steady := _is_steady(times)):
        if len(times) >= MOST_WARM_UP or clock() - began >= WARM_UP_SECONDS:
            break
        times.append(sample())
    return {"warm_up": len(times), "warm_up_ms": sum(times), "first_ms": times[0], "steady": steady}


def _is_steady(times: list[float]) -> bool:
    last = times[1:][-STEADY:]
    return len(last) == STEADY and max(last) <= (1 + TOLERANCE) * min(last)


def expected_calls(seconds: float) -> int:
    """Calls to warm up a step that takes so long and is steady at once."""
    most = 1 + math.ceil(WARM_UP_SECONDS / seconds) if seconds > 0 else MOST_WARM_UP
    return min(STEADY + 1, most)
