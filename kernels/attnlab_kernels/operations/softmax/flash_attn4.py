"""FlashAttention-4 of its authors (package flash-attn-4, module ``flash_attn.cute``). Not run on a GPU here.

See ``external``. https://arxiv.org/abs/2603.05451, written in CuTe DSL and compiled on first use. The soft cap is
its own; its own sinks are bfloat16 alone, so ours join afterwards.
"""

from __future__ import annotations

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import external
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support

MODULE, SYMBOL = "flash_attn.cute.interface", "flash_attn_func"


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
    """Attend with ``flash_attn_func`` of version 4; None means no end of a window there."""
    causal, sides = external.window(mask, None)
    output, lse = external.found(MODULE, SYMBOL)(
        *external.tokens_first(q, k, v),
        softmax_scale=scale,
        causal=causal,
        window_size=(None, None) if causal else sides,
        softcap=modifiers.softcap or 0.0,
        return_lse=True,
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
    """Hopper and Blackwell, half types, a multiple of 8 to 128 (to 256 on Hopper); no bias, ALiBi or padding."""
    name = "flash-attn 4"
    largest = 256 if external.card(q) == (9, 0) else 128
    _, missing = external.find(MODULE, SYMBOL)
    reasons = [
        missing,
        external.shape_refusal(q, v, name=name, oldest=(9, 0), dims=range(8, largest + 1, 8)),
        external.call_refusal(
            name=name, mask=mask, bias=bias, modifiers=modifiers, need_grad=need_grad, softcap=True
        ),
        f"{name} is not asked to train with a soft cap" if need_grad and modifiers.softcap else "",
    ]
    return external.verdict(reasons, f"{external.version('flash-attn-4')}; compiles on first use")
