"""Sliding windows on the CPU at the cost of the window: flash tiles, keys as overlapping views.

Each block of queries visits only the mask's key range. All blocks away from the edges see the same
band, so they run as one batch of one fused call; the keys that they share are overlapping strided views, never copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support, fused_refusal

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# rows of a block at an edge, a call of its own: more of them compute more pairs, fewer make more calls
EDGE_ROWS = 128


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
    """Attend inside a window; exact, with O(Sq * (window + block)) scores."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    offset = num_keys - num_queries
    band = mask.band()
    assert bias is None
    assert band.left is not None
    assert band.right is not None
    step = block_rows(band.left + band.right + 1)
    # token after token, as the fused kernel writes
    out = q.new_zeros(q.shape[0], num_queries, q.shape[1], v.shape[-1]).transpose(1, 2)
    lse = q.new_full(
        q.shape[:3], -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    tile = _inner_tile(q, step, mask, modifiers.alibi)
    for batch, start, stop in lower.key_groups(mask, num_keys, q.shape[0]):
        # lo..hi are the live rows; blocks of inner..tail have their whole window inside the keys
        lo = min(max(start - band.right - offset, 0), num_queries)
        hi = min(max(stop + band.left - offset, lo), num_queries) if start < stop else lo
        inner = min(max(start + band.left - offset, lo), hi)
        count = max(0, min(stop - band.right - offset, hi) - inner) // step
        tail = inner + count * step
        if count:
            keys = slice(offset + inner - band.left, offset + tail + band.right)
            for index in range(batch.start, batch.stop):
                place = (index, slice(None), slice(inner, tail))
                out[place], lse[place] = _inner_blocks(
                    q[place], k[index, :, keys], v[index, :, keys], step, tile, scale
                )
        for rows in (*_spans(lo, inner, max(step, EDGE_ROWS)), *_spans(tail, hi, max(step, EDGE_ROWS))):
            place = (batch, slice(None), rows)
            out[place], lse[place] = _edge_block(q, k, v, batch, rows, mask, scale, modifiers.alibi)
    return lower.add_sinks(out, lse, modifiers.sinks)


def block_rows(width: int) -> int:
    """Query rows of a block for a window of ``width`` keys: a block visits ``width + rows - 1`` keys."""
    return 32 if width <= 512 else 64 if width <= 1024 else 128


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
    """A window on the CPU, Dv equal to D, no bias and no soft cap."""
    if q.device.type != "cpu":
        return Support(
            False, f"banded tiles are for the CPU; on {q.device.type} triton and flex skip tiles themselves"
        )
    if mask.band().left is None:
        return Support(False, f"banded needs a window shorter than the keys; the mask is {mask.describe()}")
    if bias is not None:
        return Support(False, "banded takes no bias")
    refusal = fused_refusal(modifiers, need_grad)
    if refusal:
        return Support(False, refusal)
    if v.shape[-1] != q.shape[-1]:
        return Support(
            False, f"the flash tile needs Dv equal to D; got D = {q.shape[-1]} and Dv = {v.shape[-1]}"
        )
    return Support(True, "visits only the keys inside the window")


def _inner_blocks(
    q: Tensor, k: Tensor, v: Tensor, step: int, tile: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Rows ``[Hq, blocks * step, D]`` over keys ``[Hkv, blocks * step + reach, D]``, block by block."""
    heads, rows, dim = q.shape
    reach = tile.shape[-1] - step
    queries = q.unflatten(1, (rows // step, step)).transpose(0, 1)  # [blocks, Hq, step, D]
    keys, values = (t.unfold(1, step + reach, step).permute(1, 0, 3, 2) for t in (k, v))
    out, lse = flash(queries, keys, values, attn_mask=tile, scale=scale)
    return out.transpose(0, 1).reshape(heads, rows, dim), lse.transpose(0, 1).reshape(heads, rows)


def _inner_tile(q: Tensor, step: int, mask: Mask, slopes: Tensor | None) -> Tensor:
    """What is added to the scores of a block: ``step`` rows over the ``step + left + right`` keys of their windows."""
    band = mask.band()
    assert band.left is not None
    assert band.right is not None
    # row r of a block stands over column r + left
    rows, keys = slice(band.left, band.left + step), slice(0, step + band.left + band.right)
    tile = lower.band_tile(mask, rows, keys, 0, lower.tile_dtype(q), q.device)
    return tile if slopes is None else tile + lower.alibi_tile(slopes.detach(), rows, keys, 1, 1).to(tile)


def _edge_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: slice,
    rows: slice,
    mask: Mask,
    scale: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    size = {"num_queries": q.shape[2], "num_keys": k.shape[2], "batch": batch.start}
    keys = slice(*mask.key_range(rows.start, rows.stop, **size))
    offset = k.shape[2] - q.shape[2]
    tile = lower.band_tile(mask, rows, keys, offset, lower.tile_dtype(q), q.device)
    if slopes is not None:
        tile = tile + lower.alibi_tile(slopes.detach(), rows, keys, q.shape[2], k.shape[2]).to(tile)
    return flash(q[batch, :, rows], k[batch, :, keys], v[batch, :, keys], attn_mask=tile, scale=scale)


def _spans(start: int, stop: int, step: int) -> list[slice]:
    return [slice(row, min(row + step, stop)) for row in range(start, stop, step)]
