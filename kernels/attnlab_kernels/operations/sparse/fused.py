"""Sparse patterns on the CPU at the cost of their pairs: tiles of one shape are one batch of one fused call.

``tilings`` says which. Keys that follow a rule are overlapping views of the tensor; others are copied a few tiles at a
time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.operations.softmax.lower import hide_padding, merge
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.sparse.reference import Result, check
from attnlab_kernels.operations.sparse.tilings import Group, Run, Tiling, choose_tiling
from attnlab_kernels.patterns import Pattern

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# bytes of the keys that one call copies: they stay in the caches, and the allocator keeps their place
COPIED = 2**20


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
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    parts = []
    for groups in tiling_of(q, k, pattern, start=start, mask=mask):
        output = q.new_empty(q.shape)
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        if sum(group.rows.numel() for group in groups) < q.shape[2]:
            output.zero_()
            lse.fill_(-torch.inf)
        for group in groups:
            for some in _portions(group, k):
                _run_group(q, k, v, output, lse, some, factor, mask.band().ranges)
        parts.append((output, lse))
    output, lse = merge(parts)
    return Result(output.to(q.dtype), lse)


def tiling_of(
    q: Tensor, k: Tensor, pattern: Pattern, *, start: int | None = None, mask: Mask | None = None
) -> Tiling:
    """The tiles that ``run`` computes; a single one with a dense mask where that is cheapest."""
    first = k.shape[2] - q.shape[2] if start is None else start
    band = (mask or Full()).band()
    return choose_tiling(
        pattern, first, first + q.shape[2], k.shape[2], q.shape[1], left=band.left, right=band.right
    )


def _portions(group: Group, k: Tensor) -> list[Group]:
    """The group, in as many parts as keep the copied keys small."""
    if group.key_run is not None and k.shape[0] == 1:
        return [group]
    tile = k.shape[0] * max(k.shape[1], len(group.keys)) * group.keys.shape[2] * k.shape[3] * k.element_size()
    count = max(1, COPIED // tile)
    return [_portion(group, first, first + count) for first in range(0, len(group.rows), count)]


def _portion(group: Group, first: int, stop: int) -> Group:
    runs = [
        run and run._replace(first=run.first + first * run.across) for run in (group.row_run, group.key_run)
    ]
    keep = group.keep if group.keep is None or len(group.keep) == 1 else group.keep[first:stop]
    return group._replace(
        rows=group.rows[first:stop],
        keys=group.keys[:, first:stop],
        keep=keep,
        row_run=runs[0],
        key_run=runs[1],
    )


def _run_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    group: Group,
    scale: float,
    ranges: tuple[tuple[int, int], ...] | None,
) -> None:
    shape = tuple(group.rows.shape)
    queries = _tiles(q, group.rows[None], group.row_run)
    keys, values = (_tiles(part, group.keys, group.key_run) for part in (k, v))
    if group.causal and ranges is None:
        out, sums = flash(queries, keys, values, is_causal=True, scale=scale)
        dead = None
    else:
        added, dead = _added(group, ranges, q)
        out, sums = flash(queries, keys, values, attn_mask=added, scale=scale)
    if dead is not None:
        out, sums = out.masked_fill(dead[..., None], 0), sums.masked_fill(dead, -torch.inf)
    # [B t, H, M, D] -> [B, H, t, M, D]
    out, sums = (part.unflatten(0, (len(q), -1)).transpose(1, 2) for part in (out, sums))
    if group.row_run is None:
        numbers = group.rows.flatten()
        output.index_copy_(2, numbers, out.flatten(2, 3))
        lse.index_copy_(2, numbers, sums.flatten(2, 3).to(lse.dtype))
        return
    _view(output, group.row_run, shape).copy_(out)
    _view(lse[..., None], group.row_run, shape)[..., 0].copy_(sums)


def _tiles(part: Tensor, numbers: Tensor, run: Run | None) -> Tensor:
    """``[B, H, m, D]`` at ``[1 | H, t, P]`` to ``[B t, H, P, D]``, as a view where a rule makes the numbers."""
    batch, heads, tokens, width = part.shape
    if run is not None:
        return _view(part, run, tuple(numbers.shape[1:])).transpose(1, 2).flatten(0, 1)
    lists = len(numbers)
    owner = torch.arange(lists) // (lists // heads) if lists > 1 else torch.arange(heads)
    place = torch.arange(batch)[:, None, None, None] * heads + owner[:, None, None]
    # [B, H, t, P] rows of [B H m, D]
    flat = (place * tokens + numbers).transpose(1, 2)
    taken = part.reshape(-1, width).index_select(0, flat.flatten())
    return taken.unflatten(0, flat.shape).flatten(0, 1)


def _view(part: Tensor, run: Run, shape: tuple[int, ...]) -> Tensor:
    """``[B, H, t, P, D]`` of ``[B, H, m, D]``; tiles may overlap."""
    batch, head, token, width = part.stride()
    return part.as_strided(
        (*part.shape[:2], *shape, part.shape[3]),
        (batch, head, run.across * token, run.along * token, width),
        part.storage_offset() + run.first * token,
    )


def _added(
    group: Group, ranges: tuple[tuple[int, int], ...] | None, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, ``[1 | B t, 1 | H, M, K]``, and the dead rows, which see all for safety."""
    keep, wide = group.keep, torch.promote_types(q.dtype, torch.float32)
    if ranges is None and group.added is not None:
        return group.added.to(wide).expand(len(q) * len(group.rows), -1, -1, -1), None
    if ranges is not None:
        limits = torch.tensor(ranges).expand(len(q), 2)[:, :, None, None, None]
        names = group.keys.transpose(0, 1)  # [t, 1 | H, K]
        visible = ((names >= limits[:, 0]) & (names < limits[:, 1]))[..., None, :]
        keep = (visible if keep is None else visible & keep).flatten(0, 1)
    if keep is None:
        return None, None
    dead = ~keep.any(dim=-1)
    some = bool(dead.any())
    allowed = keep | dead[..., None] if some else keep
    added = torch.zeros(allowed.shape, dtype=wide)
    added.masked_fill_(~allowed, -torch.inf)
    if len(added) == 1:
        return added.expand(len(q) * len(group.rows), *added.shape[1:]), dead if some else None
    if len(added) != len(q) * len(group.rows):
        # of each tile, the same for every sequence
        added = added.repeat(len(q), 1, 1, 1)
        dead = dead.repeat(len(q), 1, 1)
    return added, dead if some else None


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
    return Support(True, "tiles of one shape in one call of the fused kernel")
