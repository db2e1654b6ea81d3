"""The most that a device does: copy and matrix product, measured by the lab itself and kept for a while."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnlab_storage import settings

from .windows import clock_of, window_of

KEPT_SECONDS = 7 * 86_400.0
COPIED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
LARGEST_SIDE = {"cpu": 1024, "cuda": 8192}
SAMPLES = 7
PATIENCE = 0.15
"""seconds that one matrix product may take"""

Ceilings = dict[str, Any]
_measured: dict[str, Ceilings] = {}
"""by this process: where the file cannot be written, a device is measured once all the same"""


def ceilings_of(device: torch.device, dtype: torch.dtype, *, again: bool = False) -> Ceilings:
    """Return what the device reached, from this machine's file if it is younger than a week, else measured now.

    Args:
        again: measure now, and keep the better of both (something was faster than its ceiling).

    Returns:
        ``copy_bytes_per_s`` (bytes read and bytes written both count), ``matmul_flops_per_s``, ``side`` of the
        square matrices, ``dtype``, ``device``, ``threads`` (None on CUDA), ``mhz`` of the product (None where nobody
        says it), ``measured_at`` in epoch seconds.
    """
    path = settings.home_folder() / "ceilings.json"
    known = _read(path)
    key = _key(device, dtype)
    before = known.get(key) or _measured.get(key)
    fresh = before is not None and 0 <= time.time() - before["measured_at"] < KEPT_SECONDS
    if before is not None and fresh and not again:
        return before
    found = measure(device, dtype)
    if before is not None and fresh:
        if before["matmul_flops_per_s"] > found["matmul_flops_per_s"]:
            found["mhz"] = before.get("mhz")
        for name in ("copy_bytes_per_s", "matmul_flops_per_s"):
            found[name] = max(found[name], before[name])
    _measured[key] = found
    _write(path, _read(path) | {key: found})
    return found


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copy a block larger than any cache, multiply two square matrices; the best of some samples each."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device)
    side = _side(device, dtype)
    factor = torch.ones(side, side, dtype=dtype, device=device)
    with window_of(device) as window:
        multiplied = _best(lambda: factor @ factor, device)
    return {
        "copy_bytes_per_s": 2 * source.numel() / copied,
        "matmul_flops_per_s": 2 * side**3 / multiplied,
        "side": side,
        "dtype": str(dtype).removeprefix("torch."),
        "device": _name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "mhz": clock_of(window.found),
        "measured_at": time.time(),
    }


def _side(device: torch.device, dtype: torch.dtype) -> int:
    """The largest side whose product does not take longer than ``PATIENCE``: half precision is slow on some CPUs."""
    side = 256
    while side < LARGEST_SIDE[device.type]:
        factor = torch.ones(side, side, dtype=dtype, device=device)
        _timed(lambda factor=factor: factor @ factor, device)
        if 8 * _timed(lambda factor=factor: factor @ factor, device) > PATIENCE:
            break
        side *= 2
    return side


def _best(step: Callable[[], object], device: torch.device) -> float:
    step()
    return min(_timed(step, device) for _ in range(SAMPLES))


def _timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _key(device: torch.device, dtype: torch.dtype) -> str:
    return f"{_name(device)} {str(dtype).removeprefix('torch.')} torch {torch.__version__}"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu of {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _read(path: Path) -> dict[str, Ceilings]:
    """What the file holds; nothing where there is none or another version wrote it."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {key: value for key, value in known.items() if "measured_at" in value}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(path: Path, known: dict[str, Ceilings]) -> None:
    """Replace the file at once; a folder that cannot be written only costs measuring again."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
        draft.replace(path)
