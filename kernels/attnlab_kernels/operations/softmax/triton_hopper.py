"""Our Triton forward for Hopper, with tensor descriptors and split-off producer warps: the launcher.

Compiled and read for sm_90, right under the interpreter, and not yet run on a GPU: ``auto`` does not choose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support
from attnlab_kernels.operations.softmax.triton_config import Config
from attnlab_kernels.operations.triton_platform import grid_refusal, load_kernels, triton_support

HEAD_DIMS = (64, 128)
HALF = (torch.float16, torch.bfloat16)
# four warps, or the compiler splits off no producer; it adds eight
CONFIG = Config(128, 64, 4, 2)
LOG2E = 1.4426950408889634
KERNELS = "attnlab_kernels.operations.softmax.triton_hopper_kernel"


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
    """Attend with the kernel; rows of q, k and v must start at multiples of 16 bytes."""
    kernels = load_kernels(KERNELS)
    if q.is_cuda:
        from triton import set_allocator

        # descriptors are made on the device, in memory of ours
        set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    batch, heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    config = Config(32, 32, 1, 1) if kernels.INTERPRETED else CONFIG
    causal = mask.band().right == 0
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    kernels.softmax_hopper_kernel[(-(-num_queries // config.block_m), batch * heads)](
        *(q, k, v, out, lse),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        heads // k.shape[1],
        num_queries,
        num_keys,
        scale * LOG2E,
        D=dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        CAUSAL=causal,
        MASKED=causal or num_keys % config.block_n != 0,
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
    """Hopper, half types, D of 64 or 128, full or causal, forward; sinks join afterwards."""
    able = triton_support(q, oldest=(9, 0), dtypes=HALF)
    if not able:
        return able
    band = mask.band()
    aligned = all(t.stride(-1) == 1 and not any(s * 2 % 16 for s in t.stride()[:3]) for t in (q, k, v))
    refusals = {
        "the Hopper kernel needs compute capability 9.0": q.is_cuda
        and torch.cuda.get_device_capability(q.device) != (9, 0),
        f"the Hopper kernel takes one head dimension of 64 or 128; got {q.shape[-1]} and {v.shape[-1]}": (
            q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]
        ),
        f"the Hopper kernel is full or causal; the mask is {mask.describe()}": (
            band.left is not None or band.right not in (None, 0) or band.ranges is not None
        ),
        "the Hopper kernel has no bias, soft cap or ALiBi": (
            bias is not None or modifiers.softcap is not None or modifiers.alibi is not None
        ),
        "the Hopper kernel has no backward": need_grad,
        "the Hopper kernel needs rows that start at multiples of 16 bytes": not aligned,
    }
    reason = next((words for words, refused in refusals.items() if refused), "") or grid_refusal(q)
    return Support(not reason, reason or able.reason)
