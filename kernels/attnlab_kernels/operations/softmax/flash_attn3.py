"""FlashAttention-3 of its authors (module ``flash_attn_interface``) behind the common call; ``hopper`` makes it.

Shah et al., https://arxiv.org/abs/2407.08608. Not run on a GPU here, see ``external``.
"""

from __future__ import annotations

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import external, hopper
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support


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
    """Attend with ``flash_attn_func`` of version 3."""
    output, lse = hopper.run(q, k, v, mask=mask, scale=scale)
    return external.settle(output, lse, mask, k.shape[2], modifiers.sinks)


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
    """What ``hopper.supports`` allows, without soft cap and ALiBi."""
    call = {"mask": mask, "bias": bias, "modifiers": modifiers, "need_grad": need_grad}
    reason = external.call_refusal(name="FlashAttention-3", **call)
    return Support(False, reason) if reason else hopper.supports(q, k, v, mask=mask, bias=bias, dropout=0.0)
