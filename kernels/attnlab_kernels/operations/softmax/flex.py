"""FlexAttention with a BlockMask: fused by torch.compile on CUDA, unfused on a CPU.

Dong et al., "Flex Attention", https://arxiv.org/abs/2412.05496. The block lists come from the mask's key
ranges, never from an Sq x Sk mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support

BLOCK = 128
LEAST_HEAD = 16
"""of its kernel on CUDA: the least side of a matrix product there"""
FORMS = 4096
"""shapes, dtypes and masks of one process; past its limit of 8 dynamo would run the operator unfused, without a word"""


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
    """Attend through flex_attention with its own log-sum-exp."""
    k, v = lower.hide_padding(k, mask), lower.hide_padding(v, mask)
    arguments: dict[str, Any] = {
        "score_mod": _score_mod(bias, modifiers, (*q.shape[:3], k.shape[2])),
        "block_mask": block_mask(mask, q.shape[0], q.shape[2], k.shape[2], q.device),
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
        "return_aux": torch_flex.AuxRequest(lse=True),
    }
    if q.device.type == "cpu":
        with _unfused():
            out, aux = torch_flex.flex_attention(q, k, v, **arguments)
    else:
        out, aux = _compiled()(q, k, v, **arguments)
    return lower.add_sinks(out, aux.lse, modifiers.sinks)


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
    """Any mask, bias, soft cap, ALiBi and sinks; no gradient on a CPU."""
    if q.device.type == "cpu":
        if need_grad:
            return Support(False, "FlexAttention has no backward on a CPU")
        return Support(
            True,
            "unfused on a CPU: torch's compiled CPU kernel returns no log-sum-exp; keeps every score in memory",
        )
    if q.device.type != "cuda":
        return Support(False, f"FlexAttention is wired for cpu and cuda; got {q.device.type}")
    if q.dtype == torch.float64:
        return Support(False, "FlexAttention on CUDA needs float32, float16 or bfloat16; got float64")
    if min(q.shape[-1], v.shape[-1]) < LEAST_HEAD:
        return Support(
            False,
            f"FlexAttention's kernel needs head dimensions from {LEAST_HEAD}; "
            f"got {q.shape[-1]} and {v.shape[-1]}",
        )
    if need_grad and any(part is not None and part.requires_grad for part in (bias, modifiers.alibi)):
        return Support(
            False, "a bias or slopes that need a gradient are not wired through FlexAttention; use eager"
        )
    if need_grad and modifiers.sinks is not None:
        return Support(False, "sinks join after FlexAttention, without a gradient; use eager or triton")
    return Support(True, "compiled; skips blocks outside the mask")


def block_mask(
    mask: Mask, batch_size: int, num_queries: int, num_keys: int, device: torch.device
) -> torch_flex.BlockMask | None:
    """Lists of the 128 x 128 blocks that the mask touches in part and in whole; None for a full mask."""
    band = mask.form()
    if band.unbounded:
        return None
    count = batch_size if band.batch_size > 1 else 1
    touched = [_touched_blocks(mask, num_queries, num_keys, index) for index in range(count)]
    partial, full = (np.stack(blocks)[:, None] for blocks in zip(*touched, strict=True))
    lists = [torch.from_numpy(part).to(device) for blocks in (partial, full) for part in _listed(blocks)]
    return torch_flex.BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(mask, count, num_queries, num_keys, device),
        seq_lengths=(num_queries, num_keys),
    )


def _touched_blocks(
    mask: Mask, num_queries: int, num_keys: int, batch: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Bool ``[query blocks, key blocks]``: touched in part, and allowed as a whole."""
    first, last = mask.form().row_limits(
        np.arange(num_queries), num_queries=num_queries, num_keys=num_keys, batch=batch
    )
    starts = np.arange(0, num_queries, BLOCK)
    columns = np.arange(-(-num_keys // BLOCK)) * BLOCK
    # a dead row (first >= last) touches nothing and makes no block whole
    lo = np.minimum.reduceat(np.where(first < last, first, num_keys), starts)[:, None]
    hi = np.maximum.reduceat(np.where(first < last, last, 0), starts)[:, None]
    inner_lo = np.maximum.reduceat(first, starts)[:, None]
    inner_hi = np.minimum.reduceat(last, starts)[:, None]
    touched = (columns < hi) & (columns + BLOCK > lo)
    full = (columns >= inner_lo) & (columns + BLOCK <= inner_hi)
    return touched & ~full, touched & full


def _listed(blocks: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    indices = np.argsort(~blocks, axis=-1, kind="stable")
    return blocks.sum(axis=-1).astype(np.int32), indices.astype(np.int32)


def _mask_mod(
    mask: Mask, count: int, num_queries: int, num_keys: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    # limits are tensors, not numbers: another window or padding then needs no new compilation
    limits = [
        mask.form().row_limits(
            np.arange(num_queries), num_queries=num_queries, num_keys=num_keys, batch=index
        )
        for index in range(count)
    ]
    first, last = (
        torch.from_numpy(np.stack(side)).to(device, torch.int32) for side in zip(*limits, strict=True)
    )

    def single(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (col >= first[0, row]) & (col < last[0, row])

    def each(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (col >= first[b, row]) & (col < last[b, row])

    return single if count == 1 else each


def _score_mod(
    bias: Tensor | None, modifiers: Modifiers, shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """Soft cap, then ALiBi, then the bias; ``shape`` is ``[B, Hq, Sq, Sk]``."""
    softcap, slopes = modifiers.softcap, modifiers.alibi
    if bias is None and softcap is None and slopes is None:
        return None
    full = None if bias is None else bias.expand(shape)
    offset = shape[3] - shape[2]

    def change(score: Tensor, b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        if slopes is not None:
            score = score - slopes[h] * (row + offset - col).abs()
        return score if full is None else score + full[b, h, row, col]

    return change


@cache
def _compiled() -> Callable[..., Any]:
    fused: Callable[..., Any] = torch.compile(torch_flex.flex_attention, fullgraph=True)
    limits = {"recompile_limit": FORMS, "accumulated_recompile_limit": FORMS}

    def attend(*given: Tensor, **arguments: Any) -> Any:
        with torch._dynamo.config.patch(limits):
            return fused(*given, **arguments)

    return attend


@contextmanager
def _unfused() -> Iterator[None]:
    # torch's own switch for running the operator itself; without it each call is traced anew
    before = torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before
