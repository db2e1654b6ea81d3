"""Waiting after a window in which the clock fell, until the device is as cool as it was before."""

import time
from collections.abc import Callable
from typing import Any

COOL_SECONDS = 20.0
"""longest wait"""
LOOK_SECONDS = 0.25


def cool_down(
    is_cool: Callable[[], bool],
    *,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Wait until the device says that it is cool, 20 seconds at most; returns ``cooled`` and ``waited_s``."""
    began = clock()
    while not (cooled := is_cool()) and clock() - began < COOL_SECONDS:
        wait(LOOK_SECONDS)
    return {"cooled": cooled, "waited_s": clock() - began}
