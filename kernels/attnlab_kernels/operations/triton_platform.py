"""What our Triton kernels share: whether they can run here, and the loading of a kernel's module on first use.

On a CPU they run only under ``TRITON_INTERPRET=1``, as a simulation that says whether a kernel is right and nothing
about its speed. The interpreter multiplies bfloat16 bit patterns as whole numbers, so that type is refused there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.operations.softmax.support import Support

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIMULATED = "simulated by Triton's interpreter: right, and far too slow to time"
# programs along each axis of a launch; NVIDIA, "CUDA C++ Programming Guide", compute capabilities
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)


def triton_support(
    tensor: Tensor, *, oldest: tuple[int, int] = (8, 0), dtypes: tuple[torch.dtype, ...] = DTYPES
) -> Support:
    """Whether a Triton kernel can run on this tensor's device and dtype, with the reason.

    Args:
        oldest: the first compute capability that has what the kernel uses.
    """
    refusal = _refusal(tensor, oldest)
    if refusal:
        return Support(False, refusal)
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return Support(False, f"the Triton kernel needs {names}; got {tensor.dtype}")
    return Support(True, "" if tensor.device.type == "cuda" else SIMULATED)


def grid_refusal(tensor: Tensor) -> str:
    """Why one launch cannot have a program for every head of ``[B, H, ...]``, its second axis or its third."""
    batch, heads = tensor.shape[:2]
    if batch * heads <= GRID_LIMITS[1]:
        return ""
    return f"a Triton kernel starts at most {GRID_LIMITS[1]:,} heads of a batch; got {batch} x {heads}: cut the batch"


Launch = dict[str, Any]
_noting: list[list[Launch]] = []
"""the blocks that note, the innermost last; of the process, as a backward on CUDA runs in a thread of autograd's own"""


@contextmanager
def noting_launches() -> Iterator[list[Launch]]:
    """Keep the configuration of every Triton kernel that is launched in the block, each once.

    A launch is ``kernel``, ``num_warps``, ``num_stages`` and the kernel's own constants (tile sizes, features) by
    their names in lower case. Launches of every thread are kept.
    """
    found: list[Launch] = []
    _noting.append(found)
    try:
        yield found
    finally:
        _noting[:] = [other for other in _noting if other is not found]


@dataclass(frozen=True)
class _Launcher:
    """A module of kernels, or one of them, which starts on the card of its first tensor."""

    loaded: Any
    name: str = ""

    def __getattr__(self, name: str) -> Any:
        part = getattr(self.loaded, name)
        return _Launcher(part, name) if hasattr(part, "__getitem__") and callable(part) else part

    def __getitem__(self, grid: Sequence[int]) -> Any:
        def launch(*given: Any, **constants: Any) -> Any:
            if any(size > most for size, most in zip(grid, GRID_LIMITS, strict=False)):
                raise ValueError(
                    f"{self.name} starts at most {GRID_LIMITS} programs along its axes; got {tuple(grid)}"
                )
            _note(self.name, constants)
            with _card_of(given):
                return self.loaded[grid](*given, **constants)

        return launch


def _note(kernel: str, constants: dict[str, Any]) -> None:
    numbers = {name.lower(): value for name, value in constants.items() if isinstance(value, int)}
    if _noting and (one := {"kernel": kernel, **numbers}) not in _noting[-1]:
        _noting[-1].append(one)


def _card_of(given: Sequence[Any]) -> AbstractContextManager[Any]:
    """Triton starts a kernel on the current card, whatever card its tensors are on."""
    first = given[0] if given else None
    return torch.cuda.device(first.device) if isinstance(first, Tensor) and first.is_cuda else nullcontext()


def load_kernels(module: str) -> Any:
    """Import a module of Triton kernels that has INTERPRETED; triton decides at import which way a kernel runs.

    Raises:
        RuntimeError: TRITON_INTERPRET was changed after the import.
    """
    loaded = import_module(module)
    if (os.environ.get("TRITON_INTERPRET") == "1") != loaded.INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET was changed after the kernel was loaded; set it before the process starts"
        )
    return _Launcher(loaded)


def padded(size: int, least: int = 16) -> int:
    """A dimension as a kernel sees it: a power of two, at least 16 for the tensor cores."""
    return max(least, 1 << (size - 1).bit_length())


def _refusal(tensor: Tensor, oldest: tuple[int, int]) -> str | None:
    try:
        from triton import knobs
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with: pip install triton"
    if tensor.device.type == "cuda":
        if torch.cuda.get_device_capability(tensor.device) < oldest:
            return f"the Triton kernel needs an NVIDIA GPU from sm{oldest[0]}{oldest[1]}"
        return None
    if tensor.device.type != "cpu":
        return f"the Triton kernel needs an NVIDIA GPU; got {tensor.device.type}"
    if not knobs.runtime.interpret:
        return (
            "Triton needs an NVIDIA GPU; on a CPU it is only simulated, in a process with TRITON_INTERPRET=1"
        )
    if tensor.dtype == torch.bfloat16:
        return "Triton's interpreter is silently wrong in bfloat16; use float32 or float16 there"
    return None
