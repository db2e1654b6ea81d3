"""FlashAttention-2 of its authors (package flash-attn, module ``flash_attn``). Not run on a GPU here, see ``external``.

Dao, https://arxiv.org/abs/2307.08691. Window, soft cap, ALiBi, training; causal is bottom-right from version 2.1.
"""

from __future__ import annotations

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import external
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support

MODULE, SYMBOL = "flash_attn.flash_attn_interface", "flash_attn_func"


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
    """Attend with ``flash_attn_func``; its log-sum-exp is natural and comes with the (unused) probabilities."""
    causal, sides = external.window(mask, -1)
    output, lse, _ = external.found(MODULE, SYMBOL)(
        *external.tokens_first(q, k, v),
        softmax_scale=scale,
        causal=causal,
        window_size=(-1, -1) if causal else sides,
        softcap=modifiers.softcap or 0.0,
        alibi_slopes=None if modifiers.alibi is None else modifiers.alibi.float().contiguous(),
        return_attn_probs=True,
    )
    return external.settle(output.transpose(1, 2), lse, mask, k.shape[2], modifiers.sinks)


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
    """Ampere or newer, half types, one head dimension, a multiple of 8 to 256; no bias, no padding."""
    name = "flash-attn 2"
    _, missing = external.find(MODULE, SYMBOL)
    reasons = [
        missing,
        external.shape_refusal(q, v, name=name, oldest=(8, 0), dims=range(8, 257, 8)),
        external.call_refusal(
            name=name,
            mask=mask,
            bias=bias,
            modifiers=modifiers,
            need_grad=need_grad,
            softcap=True,
            alibi=True,
        ),
    ]
    return external.verdict(reasons, external.version("flash-attn"))
