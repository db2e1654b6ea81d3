"""xFormers' memory-efficient attention (package xformers). Not run on a GPU here, see ``external``.

Lefaudeux et al., https://github.com/facebookresearch/xformers. The function that also returns the log-sum-exp has no
autograd. Grouped heads are a fifth dimension, in which keys are repeated with stride 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import external
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support

MODULE, SYMBOL = "xformers.ops.fmha", "memory_efficient_attention_forward_requires_grad"
BIASES = "xformers.ops.fmha.attn_bias"


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
    """Attend with ``memory_efficient_attention_forward_requires_grad``; it may pad the log-sum-exp's rows."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    query, key, value = external.tokens_first(q, k, v)
    if group > 1:
        query = query.unflatten(2, (kv_heads, group))
        key, value = (part[:, :, :, None].expand(-1, -1, -1, group, -1) for part in (key, value))
    output, lse = external.found(MODULE, SYMBOL)(
        query, key, value, attn_bias=_attention_bias(mask), scale=scale
    )
    if group > 1:
        output, lse = output.flatten(2, 3), lse.flatten(1, 2)
    return external.settle(output.transpose(1, 2), lse[..., : q.shape[2]], mask, k.shape[2], modifiers.sinks)


def _attention_bias(mask: Mask) -> Any:
    """Their description of the mask, aligned bottom-right as ours; None where everything is allowed."""
    band = mask.band()
    if band.left is None and band.right is None:
        return None
    if band.left is None:
        return external.found(BIASES, "LowerTriangularFromBottomRightMask")()
    local = external.found(BIASES, "LocalAttentionFromBottomRightMask")
    return local(window_left=band.left, window_right=band.right)


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
    """Ampere or newer, half types, a multiple of 8 to 256, forward; windows closed on both sides."""
    name = "xformers"
    _, missing = external.find(MODULE, SYMBOL)
    band = mask.band()
    reasons = [
        missing,
        external.shape_refusal(q, v, name=name, oldest=(8, 0), dims=range(8, 257, 8)),
        external.call_refusal(
            name=name, mask=mask, bias=bias, modifiers=modifiers, need_grad=need_grad, trains=False
        ),
        f"{name} has no window open to one side" if band.left is not None and band.right is None else "",
    ]
    return external.verdict(reasons, external.version("xformers"))
