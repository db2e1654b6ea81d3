"""The FlashAttention-3 kernel of its authors (module ``flash_attn_interface``), which runs on Hopper only."""

from __future__ import annotations

import inspect
from importlib import import_module

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import external
from attnlab_kernels.operations.softmax.support import Support

KERNEL_MODULE = "flash_attn_interface"
HOPPER = (9, 0)
LARGEST_HEAD = 256


def available() -> Support:
    """Whether the current CUDA device is Hopper, compute capability 9.0 and no other, and the kernel imports."""
    if not torch.cuda.is_available():
        return Support(False, "there is no CUDA device")
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        return Support(
            False, f"the kernel needs compute capability 9.0; the device has {'.'.join(map(str, capability))}"
        )
    try:
        import_module(KERNEL_MODULE)
    except Exception as error:  # of a package that was built for another torch it may be anything
        return Support(False, f"the module {KERNEL_MODULE} does not import: {error}")
    return Support(True)


def supports(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, bias: Tensor | None, dropout: float) -> Support:
    """Whether ``run`` would give the reference's answer for this call."""
    ready = available()
    if not ready:
        return ready
    band = mask.band()
    head = q.shape[-1]
    num_queries, num_keys = q.shape[2], k.shape[2]
    refusals = {
        "the tensors are not on the CUDA device": external.card(q) is None,
        f"it takes float16 and bfloat16; got {q.dtype}": q.dtype not in (torch.float16, torch.bfloat16),
        f"it takes one head size, a multiple of 8 up to {LARGEST_HEAD}; got {head} and {v.shape[-1]}": (
            head % 8 != 0 or head > LARGEST_HEAD or v.shape[-1] != head
        ),
        "it takes no bias": bias is not None,
        f"it drops no probabilities; got dropout {dropout}": bool(dropout),
        "it takes no padding mask": band.ranges is not None,
        "it is not called on nothing": 0 in (q.shape[0], num_queries, num_keys),
    }
    reasons = [reason for reason, refused in refusals.items() if refused]
    if not reasons and mask.dead_rows(num_queries, num_keys).any():
        reasons = ["some queries may attend to no key"]
    return Support(not reasons, "; ".join(reasons))


def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with the kernel: output ``[B, Hq, Sq, Dv]`` and its natural log-sum-exp ``[B, Hq, Sq]``.

    Masks are bands, aligned bottom-right as ours are. Some releases always return the log-sum-exp, others when asked.
    """
    kernel = import_module(KERNEL_MODULE).flash_attn_func
    band = mask.band()
    window = tuple(-1 if side is None else side for side in (band.left, band.right))
    causal = window == (-1, 0)
    asked = "return_attn_probs" in inspect.signature(kernel).parameters
    result = kernel(
        *external.tokens_first(q, k, v),
        softmax_scale=scale,
        causal=causal,
        **({} if causal else {"window_size": window}),
        **({"return_attn_probs": True} if asked else {}),
    )
    output, lse = result[:2]
    return output.transpose(1, 2), lse
