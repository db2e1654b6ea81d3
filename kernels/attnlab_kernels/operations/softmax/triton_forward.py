"""Our own flash-attention forward in Triton: the launcher. ``triton_kernel`` is loaded on first use.

On a CPU it runs only under ``TRITON_INTERPRET=1``, as a simulation that says whether the kernel is right and nothing
about its speed. The interpreter multiplies bfloat16 bit patterns as whole numbers, so that type is refused there.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Config:
    """Tile and launch numbers of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


FLOAT32 = {
    16: Config(32, 32, 4, 2),
    32: Config(32, 32, 4, 2),
    64: Config(32, 16, 4, 2),
    128: Config(32, 16, 8, 2),
    256: Config(16, 16, 4, 1),
}
FLOAT32_FEW_ROWS = {dim: Config(16, 16, 4, 1 if dim == 256 else 2) for dim in FLOAT32}
_SMALL = (16, 32, 64)
# padded head dimension -> tile, for many rows, up to 64 and up to 16
HALF: dict[int, tuple[dict[int, Config], ...]] = {
    80: (
        {dim: Config(128, 64, 4, 3) for dim in _SMALL}
        | {128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
        {dim: Config(64, 64, 4, 2 if dim == 32 else 3) for dim in (*_SMALL, 128)}
        | {256: Config(64, 32, 8, 2)},
        {dim: Config(16, 64, 4, 3) for dim in (*_SMALL, 128)} | {256: Config(16, 32, 4, 2)},
    ),
    90: (
        {dim: Config(128, 128, 8, 2) for dim in (*_SMALL, 128)} | {256: Config(128, 32, 8, 2)},
        {dim: Config(64, 128, 4, 2) for dim in _SMALL}
        | {128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 2)},
        {dim: Config(16, 128, 4, 2) for dim in _SMALL}
        | {128: Config(16, 64, 4, 3), 256: Config(16, 64, 4, 2)},
    ),
    100: (
        {dim: Config(128, 128, 8, 2) for dim in _SMALL}
        | {128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
        {dim: Config(64, 128, 4, 2) for dim in _SMALL}
        | {128: Config(64, 64, 4, 3), 256: Config(64, 32, 4, 2)},
        {dim: Config(16, 128, 4, 2) for dim in _SMALL}
        | {128: Config(16, 64, 4, 3), 256: Config(16, 64, 4, 2)},
    ),
}


def choose_config(block_d: int, element_size: int, num_queries: int, capability: int) -> Config:
    """Tile for a padded head dimension, bytes of a number, query rows and compute capability (80, 90, 100).

    The widest tiles that were seen to keep everything in registers; a test compiles every one for every target.
    """
    if element_size == 4:
        # float32 products run on the plain cores, where small tiles lose nothing
        return FLOAT32[block_d] if num_queries > 16 else FLOAT32_FEW_ROWS[block_d]
    generation = min(100, max(80, capability // 10 * 10))
    wide, medium, few = HALF[generation]
    return (few if num_queries <= 16 else medium if num_queries <= 64 else wide)[block_d]


def padded(dim: int) -> int:
    """Head dimension as the kernel sees it: a power of two, at least 16 for the tensor cores."""
    return max(16, 1 << (dim - 1).bit_length())


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    modifiers: Modifiers = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Attend with our kernel; the last dimension of q, k and v is made contiguous if it is not."""
    assert bias is None
    kernel = _kernel()
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    batch, heads, num_queries, dim = q.shape
    value_dim = v.shape[-1]
    band = mask.band()
    out = torch.empty(batch, heads, num_queries, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    ranges = _ranges(mask, batch, k.shape[2], q.device)
    capability = _capability(q) if q.device.type == "cuda" else 80
    config = choose_config(max(padded(dim), padded(value_dim)), q.element_size(), num_queries, capability)
    if kernel.INTERPRETED:
        config = Config(min(config.block_m, 32), min(config.block_n, 32), 1, 1)
    kernel.forward_kernel[(-(-num_queries // config.block_m), batch * heads)](
        q,
        k,
        v,
        out,
        lse,
        ranges,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        heads,
        heads // k.shape[1],
        num_queries,
        k.shape[2],
        band.left or 0,
        band.right or 0,
        scale * math.log2(math.e),
        D=dim,
        DV=value_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=padded(dim),
        BLOCK_DV=padded(value_dim),
        HAS_LEFT=band.left is not None,
        HAS_RIGHT=band.right is not None,
        HAS_RANGES=band.ranges is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return lower.add_sinks(out, lse, modifiers.sinks)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Tensor | None,
    modifiers: Modifiers,
    need_grad: bool,
) -> Support:
    """Full, causal, windowed and padded masks, any head dimension to 256, forward only."""
    refusal = _platform_refusal(q)
    if refusal:
        return Support(False, refusal)
    if q.dtype not in DTYPES:
        return Support(False, f"the Triton kernel needs float32, float16 or bfloat16; got {q.dtype}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return Support(False, f"the Triton kernel holds head dimensions to {MAX_HEAD_DIM}; got {q.shape[-1]}")
    if bias is not None:
        return Support(False, "the Triton kernel takes no bias")
    if modifiers.softcap is not None or modifiers.alibi is not None:
        return Support(False, "the Triton kernel has no soft cap and no ALiBi yet")
    if need_grad:
        return Support(False, "the Triton kernel has no backward yet")
    if q.device.type != "cuda":
        return Support(True, "simulated by Triton's interpreter: right, and far too slow to time")
    return Support(True, "skips tiles outside the mask")


def _platform_refusal(q: Tensor) -> str | None:
    try:
        from triton import knobs
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with: pip install triton"
    if q.device.type == "cuda":
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            return "the Triton kernel needs an Ampere GPU (sm80) or newer"
        return None
    if q.device.type != "cpu":
        return f"the Triton kernel needs an NVIDIA GPU; got {q.device.type}"
    if not knobs.runtime.interpret:
        return (
            "Triton needs an NVIDIA GPU; on a CPU it is only simulated, in a process with TRITON_INTERPRET=1"
        )
    if q.dtype == torch.bfloat16:
        return "Triton's interpreter is silently wrong in bfloat16; use float32 or float16 there"
    return None


def _capability(q: Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(q.device)
    return 10 * major + minor


def _kernel() -> ModuleType:
    module = import_module("attnlab_kernels.operations.softmax.triton_kernel")
    # triton decides at import whether a kernel is compiled or interpreted
    wanted = os.environ.get("TRITON_INTERPRET") == "1"
    if wanted != module.INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET was changed after the kernel was loaded; set it before the process starts"
        )
    return module


def _ranges(mask: Mask, batch: int, num_keys: int, device: torch.device) -> Tensor | None:
    band = mask.band()
    if band.ranges is None:
        return None
    rows = [band.key_interval(num_keys, index) for index in range(batch)]
    return torch.tensor(rows, dtype=torch.int32, device=device)
