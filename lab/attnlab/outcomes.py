"""How a run ended: what an exception means, in one line that a person can act on."""

import re
import traceback
from dataclasses import dataclass

import torch

from attnlab_kernels.operations.softmax.api import Unsupported

_ASKED = re.compile(
    r"(?:tried|unable) to allocate (?P<amount>[\d.]+) ?(?P<unit>bytes|[KMGT]i?B|B)", re.IGNORECASE
)
# how the host's allocator, CUDA itself, its libraries and Triton say it; torch's own allocator has a class for it
_EXHAUSTED = re.compile(
    r"can't allocate memory|not enough memory: you tried to allocate|CUDA error: out of memory"
    r"|CU[A-Z]+_STATUS_ALLOC_FAILED|\[CUDA\]: out of memory"
)
_SIZES = {"B": 1, "BYTES": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
REASON_CHARS = 500


class CheckFailed(RuntimeError):
    """The model computes something else through our kernels than by itself: no map of it may be stored."""


@dataclass(frozen=True)
class Ending:
    """The outcome of a run that did not succeed, and why."""

    outcome: str
    reason: str
    error_kind: str
    error_detail: str | None = None


def ending_of(error: BaseException) -> Ending:
    """Return what an exception means for the run that raised it."""
    if isinstance(error, Unsupported):
        return Ending("unsupported", _short(str(error)), "unsupported")
    text = str(error)
    if is_out_of_memory(error):
        return Ending("out_of_memory", _asked(text), "out_of_memory", _trace(error))
    kind = "check_failed" if isinstance(error, CheckFailed) else type(error).__name__
    expected = isinstance(error, ValueError | CheckFailed)
    reason = text if expected and text else f"{type(error).__name__}: {text}"
    return Ending("failed", _short(reason), kind, _trace(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether device or host had no more memory to give (some report it by RuntimeError)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _EXHAUSTED.search(str(error)) is not None


def _asked(text: str) -> str:
    found = _ASKED.search(text)
    if found is None:
        return "out of memory"
    unit = found["unit"].upper()
    asked = int(float(found["amount"]) * _SIZES[unit if unit in _SIZES else f"{unit[0]}IB"])
    return f"out of memory: asked for {asked / (1 << 30):.2f} GiB ({asked} bytes) at once"


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= REASON_CHARS else f"{text[: REASON_CHARS - 1]}…"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
