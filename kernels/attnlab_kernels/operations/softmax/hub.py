"""Kernels of the Hugging Face hub (package kernels): FlashAttention-2 as built there. Not run on a GPU here.

A kernel of the hub is code from the network, so it is only loaded offline (``HF_HUB_OFFLINE=1``), when somebody has
fetched it before on purpose: ``kernels download``. Its call is flash-attn's, see ``flash_attn2``.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import external
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support

REPOSITORY = "kernels-community/flash-attn2"


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
    """Attend with the hub's ``flash_attn_func``."""
    causal, sides = external.window(mask, -1)
    output, lse, _ = load().flash_attn_func(
        *external.tokens_first(q, k, v),
        softmax_scale=scale,
        causal=causal,
        window_size=(-1, -1) if causal else sides,
        softcap=modifiers.softcap or 0.0,
        alibi_slopes=None if modifiers.alibi is None else modifiers.alibi.float().contiguous(),
        return_attn_probs=True,
    )
    return external.settle(output.transpose(1, 2), lse, mask, k.shape[2], modifiers.sinks)


@cache
def load() -> ModuleType:
    """The kernel's module, from the local cache alone."""
    return external.found("kernels", "get_kernel")(REPOSITORY)


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
    """As flash-attn 2, where the package is installed, the hub is offline and the kernel is in the cache."""
    name = "the hub's flash-attn 2"
    call = {"mask": mask, "bias": bias, "modifiers": modifiers, "need_grad": need_grad}
    reasons = [
        _missing(),
        external.shape_refusal(q, v, name=name, oldest=(8, 0), dims=range(8, 257, 8)),
        external.call_refusal(name=name, softcap=True, alibi=True, **call),
    ]
    if not any(reasons):
        try:
            load()
        except Exception as error:
            reasons.append(f"{REPOSITORY} cannot be loaded offline: {error}")
    return external.verdict(reasons, f"{REPOSITORY} from the local cache")


def _missing() -> str:
    _, missing = external.find("kernels", "get_kernel")
    if missing:
        return missing
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return f"{REPOSITORY} is code from the network: fetch it on purpose, then set HF_HUB_OFFLINE=1"
    return ""
