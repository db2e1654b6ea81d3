"""FlashInfer's prefill kernel (package flashinfer-python). Not run on a GPU here, see ``external``.

Ye et al., https://arxiv.org/abs/2501.01005. Its log-sum-exp is of base 2 and is converted. One call takes one sequence,
``[tokens, heads, dim]`` and contiguous, so tensors are copied into that layout; ``arrange_all`` makes the copies alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import external
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support

MODULE, SYMBOL = "flashinfer.prefill", "single_prefill_with_kv_cache"


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
    """Attend sequence by sequence with ``single_prefill_with_kv_cache``; causal is bottom-right."""
    prefill = external.found(MODULE, SYMBOL)
    band = mask.band()
    outputs, sums = [], []
    for query, key, value in zip(*arrange(q, k, v), strict=True):
        output, lse = prefill(
            query,
            key,
            value,
            causal=band.right == 0,
            sm_scale=scale,
            window_left=-1 if band.left is None else band.left,
            logits_soft_cap=modifiers.softcap,
            return_lse=True,
        )
        outputs.append(output)
        sums.append(lse)
    output = torch.stack(outputs).transpose(1, 2)  # a copy
    lse = torch.stack(sums).transpose(1, 2) * math.log(2)
    return external.settle(output, lse, mask, k.shape[2], modifiers.sinks)


def arrange(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, tokens, heads, dim]``, contiguous: what the kernel wants."""
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in (q, k, v))
    return query, key, value


def arrange_all(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """``arrange``, and the sequences' outputs (of the queries' size) put together as ``run`` does."""
    given = arrange(q, k, v)
    return *given, torch.stack(given[0].unbind())


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
    """Ampere or newer, half types, D of 64, 128 or 256, forward; full, causal and causal windows."""
    name = "flashinfer"
    _, missing = external.find(MODULE, SYMBOL)
    band = mask.band()
    sided = band.right not in (0, None) or (band.left is not None and band.right is None)
    reasons = [
        missing,
        external.shape_refusal(q, v, name=name, oldest=(8, 0), dims=(64, 128, 256)),
        external.call_refusal(
            name=name,
            mask=mask,
            bias=bias,
            modifiers=modifiers,
            need_grad=need_grad,
            softcap=True,
            trains=False,
        ),
        f"{name} has no window that looks ahead; the mask is {mask.describe()}" if sided else "",
    ]
    return external.verdict(reasons, f"{external.version('flashinfer-python')}; one call a sequence, copied")
