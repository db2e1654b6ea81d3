"""The varlen functions of flash-attn 2 and FlashAttention-3, for sequences laid end to end. Not run on a GPU here.

Both take ``[T, H, D]`` and int32 ``cu_seqlens``, the layout of ``packed``: nothing is copied. See ``external``.
"""

from __future__ import annotations

import inspect
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.operations.softmax import external, flash_attn2, hopper
from attnlab_kernels.operations.softmax.support import Modifiers, Support

SYMBOL = "flash_attn_varlen_func"
MODULES = {"flash_attn_2": flash_attn2.MODULE, "flash_attn_3": hopper.KERNEL_MODULE}


def run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cuts: list[list[int]],
    *,
    mask: Mask,
    scale: float,
    modifiers: Modifiers,
) -> tuple[Tensor, Tensor]:
    """Attend with ``flash_attn_varlen_func``: output ``[T, Hq, Dv]``, natural log-sum-exp ``[Hq, T]``."""
    kernel = external.found(MODULES[name], SYMBOL)
    causal, sides = external.window(mask, -1)
    starts = (torch.tensor(cut, dtype=torch.int32, device=q.device) for cut in cuts)
    longest = (max(stop - start for start, stop in pairwise(cut)) for cut in cuts)
    given = {"softmax_scale": scale, "causal": causal, "window_size": (-1, -1) if causal else sides}
    if name == "flash_attn_2":
        slopes = modifiers.alibi
        given["softcap"] = modifiers.softcap or 0.0
        given["alibi_slopes"] = None if slopes is None else slopes.float().contiguous()
    if (
        "return_attn_probs" in inspect.signature(kernel).parameters
    ):  # some releases of 3 always tell the log-sum-exp
        given["return_attn_probs"] = True
    output, lse = kernel(q, k, v, *starts, *longest, **given)[:2]
    output, lse = external.settle_rows(
        output.transpose(0, 1)[None], lse[None], dead_rows(mask, cuts), modifiers.sinks
    )
    return output[0].transpose(0, 1), lse[0]


def supports(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cuts: list[list[int]],
    *,
    mask: Mask,
    scale: float,
    modifiers: Modifiers,
    need_grad: bool,
) -> Support:
    """What the same package takes of padded tensors; version 3 no row that sees no key."""
    label, second = ("flash-attn 2", True) if name == "flash_attn_2" else ("FlashAttention-3", False)
    _, missing = external.find(MODULES[name], SYMBOL)
    call = {"mask": mask, "bias": None, "modifiers": modifiers, "need_grad": need_grad}
    reasons = [
        missing,
        "" if scale > 0 else f"{label} folds the scale into its exponent and needs it above 0; got {scale}",
        f"{label} is not called on nothing" if 0 in (len(q), len(k)) else "",
        external.call_refusal(name=label, softcap=second, alibi=second, **call),
    ]
    if second:
        reasons.append(external.shape_refusal(q, v, name=label, oldest=(8, 0), dims=range(8, 257, 8)))
        return external.verdict(reasons, external.version("flash-attn"))
    if dead_rows(mask, cuts).any():
        reasons.append("some queries may attend to no key")
    padded = (part.transpose(0, 1)[None] for part in (q, k, v))
    if not any(reasons):
        return hopper.supports(*padded, mask=Full(), bias=None, dropout=0.0)
    return external.verdict(reasons, "")


def dead_rows(mask: Mask, cuts: list[list[int]]) -> np.ndarray:
    """True for the rows ``[T]`` that see no key of their own sequence."""
    spans = zip(*(pairwise(cut) for cut in cuts), strict=True)
    return np.concatenate(
        [mask.dead_rows(last - first, stop - start) for (first, last), (start, stop) in spans]
    )
