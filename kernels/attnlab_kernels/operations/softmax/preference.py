"""What ``auto`` tries, best first, on each kind of device, and where the order comes from: the first that can run.

The order is of other people's measurements and is no promise for a shape: ``benchmarks/softmax_attention.py`` measures
them side by side on the card at hand.
"""

from __future__ import annotations

from attnlab_kernels.masks import Mask

# (names, where the order comes from)
Order = tuple[tuple[str, ...], str]

CPU: Order = (
    ("banded", "sdpa_flash", "sdpa_math", "eager"),
    "a CPU: tiles of the window, then the fused kernel",
)
# forward in bfloat16 at D 128: the FlashAttention-3 paper's tables, https://arxiv.org/abs/2407.08608
HOPPER: Order = (
    (
        "flash_attn_3",
        "sdpa_cudnn",
        "flash_attn_4",
        "flash_attn_2",
        "sdpa_flash",
        "flashinfer",
        "flash_attn_hub",
    ),
    "Hopper: FlashAttention-3 over cuDNN over FlashAttention-2 in the paper of the first",
)
# https://arxiv.org/abs/2603.05451 reports FlashAttention-4 at 1.3 times cuDNN 9.13
BLACKWELL: Order = (
    ("flash_attn_4", "sdpa_cudnn", "flash_attn_2", "sdpa_flash", "flashinfer", "flash_attn_hub"),
    "Blackwell: FlashAttention-4 over cuDNN in the paper of the first",
)
# huggingface/transformers#48163: cuDNN at 0.8 to 0.9 times SDPA's flash on A100 and A10G
AMPERE: Order = (
    ("flash_attn_2", "sdpa_flash", "flash_attn_hub", "sdpa_cudnn", "flashinfer"),
    "Ampere and Ada: FlashAttention-2 over cuDNN in huggingface/transformers#48163",
)
REST = ("sdpa_efficient", "triton", "xformers", "flex", "sdpa_math", "eager")
# where tiles outside the mask can be skipped, the kernels that skip them go first
WINDOWED: Order = (
    ("flash_attn_3", "flash_attn_4", "flash_attn_2", "flash_attn_hub", "triton", "flex", "flashinfer"),
    "a window: kernels that skip tiles outside of it",
)
WINDOWED_REST = ("sdpa_efficient", "sdpa_cudnn", "xformers", "sdpa_math", "eager")
# those that read document ids, by launches: SDPA is called once for each document, see ``lower.plan``
DOCUMENTS: Order = (
    ("triton", "flex", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math", "eager"),
    "packed documents: one launch that skips the tiles between them, then a launch for each",
)


def order(device: str, capability: tuple[int, int] | None, mask: Mask) -> Order:
    """Names to try and the reason for their order.

    Args:
        device: torch's type of device.
        capability: compute capability of a CUDA device.
    """
    if device == "cpu":
        return CPU
    if device != "cuda" or capability is None:
        return ("sdpa_math", "eager"), f"{device}: no fused kernel is known"
    band = mask.form()
    if band.documents is not None:
        return DOCUMENTS
    if band.left is not None:
        return (*WINDOWED[0], *WINDOWED_REST), WINDOWED[1]
    names, why = BLACKWELL if capability >= (10, 0) else HOPPER if capability == (9, 0) else AMPERE
    return (*names, *REST), why
