"""Sparse patterns on the CPU at the cost of their pairs: block lists over the fused kernel, many tiles in one call.

Tiles with as many blocks of keys run as one batch; their keys are gathered once and their pairs become an added mask.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.block_lists import BlockLists, query_lists
from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.operations.softmax.lower import hide_padding, merge
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.sparse.reference import Result, check
from attnlab_kernels.patterns import Pattern

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
TILE = (64, 64)
# tiles of one call: what they gather stays in the caches
BATCH = 16


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    start: int | None = None,
    scale: float | None = None,
    mask: Mask | None = None,
) -> Result:
    """Attend along the pattern; arguments as in ``reference.run``, no gradient."""
    start = k.shape[2] - q.shape[2] if start is None else start
    check(q, k, v, start)
    mask = mask or Full()
    k, v = hide_padding(k, mask), hide_padding(v, mask)
    heads, factor = q.shape[1], q.shape[-1] ** -0.5 if scale is None else float(scale)
    parts = []
    for lists in query_lists(pattern, start, start + q.shape[2], k.shape[2], heads, TILE):
        output = q.new_empty(q.shape)
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        shared = len(lists.rows) == 1
        for number in range(len(lists.rows)):
            some = slice(0, heads) if shared else slice(number, number + 1)
            _run_heads(q, k, v, output, lse, some, lists, number, start, factor, mask)
        parts.append((output, lse))
    output, lse = merge(parts)
    return Result(output.to(q.dtype), lse)


def _run_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    heads: slice,
    lists: BlockLists,
    number: int,
    start: int,
    scale: float,
    mask: Mask,
) -> None:
    group = q.shape[1] // k.shape[1]
    key_heads = torch.arange(heads.start, heads.stop) // group
    spans = lists.spans[number]
    blocks = spans[:, 2] - spans[:, 0]
    for count in np.unique(blocks):
        members = np.flatnonzero(blocks == count)
        for tiles in np.split(members, range(BATCH, len(members), BATCH)):
            rows = lists.rows[number, tiles].astype(np.int64)  # [t, M]
            if not count:
                live = torch.from_numpy(rows[rows >= 0])
                output[:, heads, live], lse[:, heads, live] = 0, -torch.inf
                continue
            listed = spans[tiles, 0][:, None] + np.arange(count)
            columns = lists.columns[listed].reshape(len(tiles), -1).astype(np.int64)
            added, dead = _added(lists, listed, rows, columns, start, mask, q)
            at, keys = torch.from_numpy(rows.clip(0)), torch.from_numpy(columns.clip(0))
            # [B, H, t, rows, D] -> [B t, H, rows, D]
            queries = q[:, heads][:, :, at].transpose(1, 2).flatten(0, 1)
            given = [part[:, key_heads][:, :, keys].transpose(1, 2).flatten(0, 1) for part in (k, v)]
            out, sums = flash(queries, *given, attn_mask=added.flatten(0, 1)[:, None], scale=scale)
            out, sums = (part.unflatten(0, (len(q), -1)).transpose(1, 2) for part in (out, sums))
            # [B, 1, t, M]
            out, sums = out.masked_fill(dead[..., None], 0), sums.masked_fill(dead, -torch.inf)
            real = torch.from_numpy(rows >= 0)
            output[:, heads, at[real]], lse[:, heads, at[real]] = (
                out[:, :, real],
                sums[:, :, real].to(lse.dtype),
            )


def _added(
    lists: BlockLists,
    listed: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    start: int,
    mask: Mask,
    q: Tensor,
) -> tuple[Tensor, Tensor]:
    """What is added to the scores ``[B, t, M, c N]``, and the dead rows ``[B, 1, t, M]``, which see all for safety."""
    which = lists.masks[listed]  # [t, c]
    keep = np.ones((*which.shape, *TILE), bool)
    keep[which >= 0] = lists.keep[which[which >= 0]] > 0
    keep = keep.transpose(0, 2, 1, 3).reshape(len(rows), TILE[0], -1)
    band = mask.band()
    distance = columns[:, None] - (rows + start)[..., None]
    if band.left is not None:
        keep = keep & (distance >= -band.left)
    if band.right is not None:
        keep = keep & (distance <= band.right)
    every = torch.from_numpy(keep)[None].expand(len(q), *keep.shape)
    if band.ranges is not None:
        limits = torch.tensor(band.ranges).expand(len(q), 2)[:, :, None, None, None]
        names = torch.from_numpy(columns)[None, :, None]
        every = every & (names >= limits[:, 0]) & (names < limits[:, 1])
    dead = ~every.any(dim=-1)
    allowed = every | dead[..., None]
    added = torch.zeros(allowed.shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return added.masked_fill_(~allowed, -torch.inf), dead[:, None]


def supports(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, dropout: float) -> Support:
    """A CPU, Dv equal to D, forward only, no bias and no dropout."""
    if q.device.type != "cpu":
        return Support(False, f"fused tiles are for the CPU; got {q.device.type}; use triton")
    if v.shape[-1] != q.shape[-1]:
        return Support(
            False, f"the flash tile needs Dv equal to D; got D = {q.shape[-1]} and Dv = {v.shape[-1]}"
        )
    if bias is not None or dropout:
        return Support(False, "fused tiles take no bias and drop no probabilities; use tiled")
    if torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v)):
        return Support(False, "fused tiles have no gradient; use tiled")
    if 0 in q.shape[:2]:
        return Support(False, "there is nothing to attend to")
    return Support(True, "many tiles in one call of the fused kernel")
