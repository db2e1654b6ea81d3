"""Softmax attention of sequences of different lengths laid end to end, with no padding between them.

The layout of flash-attn's varlen functions (``cu_seqlens``): sequence s owns rows ``starts[s]..starts[s + 1]``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.operations.softmax import eager, flash_varlen, triton_forward
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.support import Modifiers, Support
from attnlab_kernels.output import AttentionOutput

IMPLEMENTATIONS = ("eager", "triton", *flash_varlen.MODULES)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    implementation: str = "auto",
) -> AttentionOutput:
    """As ``attend``, each sequence on its own.

    Args:
        q: ``[T, Hq, D]``; k ``[Tk, Hkv, D]``; v ``[Tk, Hkv, Dv]``, Hq a multiple of Hkv.
        query_starts: whole numbers ``[S + 1]``, from 0 to T; key_starts the same, to Tk.
        mask: of every sequence, aligned to its newest token; no padding.
        implementation: "eager", "triton", "flash_attn_2" or "flash_attn_3" (their varlen functions), or "auto"
            (Triton on CUDA).

    Returns:
        output ``[T, Hq, Dv]``; lse ``[Hq, T]`` natural log; aux as ``attend``'s.

    Raises:
        ValueError: shapes or starts that do not fit; Unsupported: the implementation cannot run this call.
    """
    mask = Full() if mask is None else mask
    modifiers = Modifiers(softcap, alibi, sinks)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    cuts = [_cuts(name, starts, rows) for name, starts, rows in _named(q, k, query_starts, key_starts)]
    _check(q, k, v, mask, cuts)
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise Unsupported(
            f"implementation must be one of auto, {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
        )
    name, reason = implementation, "asked for"
    if implementation == "auto":
        support = triton_supports(q, k, v, modifiers, factor)
        name = "triton" if support and q.device.type == "cuda" else "eager"
        reason = f"auto: Triton on CUDA, else eager ({support.reason})"
    elif not (support := _supports(name, q, k, v, cuts, mask, factor, modifiers)):
        raise Unsupported(f"implementation {name!r} cannot run this call: {support.reason}")
    if name in flash_varlen.MODULES:
        output, lse = flash_varlen.run(name, q, k, v, cuts, mask=mask, scale=factor, modifiers=modifiers)
    else:
        run = _run_each if name == "eager" else _run_triton
        output, lse = run(q, k, v, cuts, mask, factor, modifiers)
    return AttentionOutput(output, lse=lse.detach(), aux={"implementation": name, "reason": reason})


def _supports(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cuts: list[list[int]],
    mask: Mask,
    scale: float,
    modifiers: Modifiers,
) -> Support:
    if name == "eager":
        return Support(True)
    if name == "triton":
        return triton_supports(q, k, v, modifiers, scale)
    need_grad = _needs_grad(q, k, v, modifiers)
    return flash_varlen.supports(
        name, q, k, v, cuts, mask=mask, scale=scale, modifiers=modifiers, need_grad=need_grad
    )


def _needs_grad(q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers) -> bool:
    return torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v, *modifiers.tensors))


def triton_supports(q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers, scale: float) -> Support:
    """Whether our kernel runs packed tensors ``[T, H, D]``: forward only."""
    if _needs_grad(q, k, v, modifiers):
        return Support(False, "packed sequences have no Triton backward; use eager")
    if not scale > 0:
        return Support(False, f"triton folds the scale into its exponent and needs it above 0; got {scale}")
    return triton_forward.supports(
        *(part.transpose(0, 1)[None] for part in (q, k, v)),
        mask=Full(),
        bias=None,
        modifiers=modifiers,
        need_grad=False,
    )


def _run_each(
    q: Tensor, k: Tensor, v: Tensor, cuts: list[list[int]], mask: Mask, scale: float, modifiers: Modifiers
) -> tuple[Tensor, Tensor]:
    outputs, sums = [], []
    spans = [pairwise(cut) for cut in cuts]
    for (first, last), (start, stop) in zip(*spans, strict=True):
        parts = (q[first:last], k[start:stop], v[start:stop])
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        output, lse = eager.run(query, key, value, mask=mask, scale=scale, modifiers=modifiers)
        outputs.append(output[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outputs), torch.cat(sums, dim=-1)


def _run_triton(
    q: Tensor, k: Tensor, v: Tensor, cuts: list[list[int]], mask: Mask, scale: float, modifiers: Modifiers
) -> tuple[Tensor, Tensor]:
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    longest = [max(b - a for a, b in pairwise(cut)) for cut in cuts]
    starts = tuple(torch.tensor(cut, dtype=torch.int32, device=q.device) for cut in cuts)
    output = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.shape[0] == 0:
        return output, lse.T
    modified = modifiers.softcap is not None or modifiers.alibi is not None
    size = triton_forward.Size(len(cuts[0]) - 1, longest[0], longest[1], k.shape[1])
    cut = triton_forward.plan(q, size, v.shape[-1], modified)
    strides = tuple((0, part.stride(1), part.stride(0), 0) for part in (k, v))
    triton_forward.launch(
        *(q, k, v, output, lse, cut, size),
        mask=mask,
        scale=scale,
        modifiers=modifiers,
        key_strides=(strides[0], strides[1]),
        starts=(starts[0], starts[1]),
    )
    return output, lse.T


def _named(q: Tensor, k: Tensor, query_starts: Tensor, key_starts: Tensor) -> list[tuple[str, Tensor, int]]:
    return [("query_starts", query_starts, q.shape[0]), ("key_starts", key_starts, k.shape[0])]


def _cuts(name: str, starts: Tensor, rows: int) -> list[int]:
    cuts = [int(start) for start in starts.tolist()]
    ordered = all(a <= b for a, b in pairwise(cuts))
    if len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != rows or not ordered:
        raise ValueError(f"{name} must rise from 0 to the {rows} tokens there are; got {cuts}")
    return cuts


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask, cuts: list[list[int]]) -> None:
    if any(part.dim() != 3 for part in (q, k, v)) or q.shape[2] != k.shape[2] or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            "shapes must be q [T, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv]; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads; got {q.shape[1]} and {k.shape[1]}")
    if len(cuts[0]) != len(cuts[1]):
        raise ValueError(
            f"query_starts and key_starts must cut as many sequences; got {len(cuts[0]) - 1} and {len(cuts[1]) - 1}"
        )
    if mask.band().ranges is not None:
        raise ValueError(f"packed sequences have no padding to mask; got {mask.describe()}")
