"""What our Triton kernels share: whether they can run here, and the loading of a kernel's module on first use.

On a CPU they run only under ``TRITON_INTERPRET=1``, as a simulation that says whether a kernel is right and nothing
about its speed. The interpreter multiplies bfloat16 bit patterns as whole numbers, so that type is refused there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.operations.softmax.support import Support

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIMULATED = "simulated by Triton's interpreter: right, and far too slow to time"


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
class _Noted:
    """A module of kernels, or one of them, whose launches are kept."""

    loaded: Any
    found: list[Launch]
    name: str = ""

    def __getattr__(self, name: str) -> Any:
        part = getattr(self.loaded, name)
        return _Noted(part, self.found, name) if hasattr(part, "__getitem__") and callable(part) else part

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **constants: Any) -> Any:
            numbers = {name.lower(): value for name, value in constants.items() if isinstance(value, int)}
            if (one := {"kernel": self.name, **numbers}) not in self.found:
                self.found.append(one)
            return self.loaded[grid](*given, **constants)

        return launch


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
    return _Noted(loaded, _noting[-1]) if _noting else loaded


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
