"""The reference: form the map, then read it. O(n^2) memory, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.map_pooling.results import MapStatistics, PooledMap
from attnlab_kernels.operations.softmax import lower


def log_map(q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask, scale: float, bias: Tensor | None) -> Tensor:
    """``log P`` ``[B, Hq, Sq, Sk]``: scores minus log-sum-exp, minus infinity where nothing is attended."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = lower.hide_padding(k, mask).to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(wide) @ keys.transpose(-1, -2) * scale
    scores = scores if bias is None else scores + bias
    size = {"num_queries": q.shape[2], "num_keys": k.shape[2], "batch_size": q.shape[0]}
    allowed = lower.dense_batch(mask, device=q.device, **size)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    dead = torch.isneginf(lse)[..., None]
    return (scores - lse.to(wide)[..., None].masked_fill(dead, 0)).masked_fill(dead, -torch.inf)


def statistics(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask, scale: float, bias: Tensor | None = None, sinks: int = 1
) -> MapStatistics:
    """``map_statistics`` from the whole map."""
    logs = log_map(q, k, lse, mask=mask, scale=scale, bias=bias)
    weights = torch.exp(logs)
    columns = torch.arange(k.shape[2], device=q.device)
    positions = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    first = [mask.band().key_interval(k.shape[2], index)[0] for index in _elements(mask, q.shape[0])]
    past_first = columns - torch.tensor(first, device=q.device)[:, None, None, None]
    return MapStatistics(
        row_sum=weights.sum(-1),
        entropy=-(weights * logs.masked_fill(weights == 0, 0)).sum(-1),
        row_max=weights.amax(-1),
        square_sum=weights.square().sum(-1),
        distance=(weights * (positions - columns).abs()).sum(-1),
        sink_mass=(weights * ((past_first >= 0) & (past_first < sinks))).sum(-1),
        previous=(weights * (columns == positions - 1)).sum(-1),
        column_sum=weights.sum(-2),
        column_max=weights.amax(-2),
    )


def pool(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    cell: tuple[int, int],
) -> PooledMap:
    """``pooled_map`` from the whole map."""
    weights = torch.exp(log_map(q, k, lse, mask=mask, scale=scale, bias=bias))
    rows, columns = cell
    ragged = functional.pad(weights, (0, -weights.shape[3] % columns, 0, -weights.shape[2] % rows))
    cells = ragged.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    sums = cells.sum(dim=(3, 5))
    return PooledMap(cells.amax(dim=(3, 5)), sums / cell_areas(q.shape[2], k.shape[2], cell).to(sums))


def cell_areas(num_queries: int, num_keys: int, cell: tuple[int, int]) -> Tensor:
    """Pairs under each cell, ``[ceil(Sq / rows), ceil(Sk / columns)]``."""
    heights, widths = (
        torch.tensor([min(side, size - start) for start in range(0, size, side)])
        for size, side in zip((num_queries, num_keys), cell, strict=True)
    )
    return heights[:, None] * widths[None]


def _elements(mask: Mask, batch: int) -> range:
    ranges = mask.band().ranges
    return range(batch if ranges is not None and len(ranges) > 1 else 1)
