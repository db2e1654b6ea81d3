"""Softmax attention over a sparse pattern, tile by tile: the scores that exist are those of one tile.

Each tile gathers the keys that its queries visit, so cost and memory follow the pattern. A pattern in several passes
(the two halves of a strided one) is joined by log-sum-exp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.masks import Band, Full, Mask
from attnlab_kernels.patterns import Pattern, PatternError, Tile


class Result(NamedTuple):
    """Output ``[B, H, n, Dv]`` and natural log-sum-exp ``[B, H, n]``, minus infinity for a dead row."""

    output: Tensor
    lse: Tensor


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    start: int | None = None,
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Result:
    """Attend along the pattern; scores and softmax in float32 or wider, with autograd.

    Args:
        q: ``[B, H, n, D]``; k ``[B, Hkv, m, D]``, H a multiple of Hkv; v ``[B, Hkv, m, Dv]``.
        start: position of the first query; default: the last query is the last key.
        scale: default ``D ** -0.5``.
        mask: forbids more pairs; by default none.
        bias: added to the scores, broadcasts to ``[B, H, n, m]``.
        dropout: share of probabilities dropped after the softmax.

    Raises:
        PatternError: shapes that do not fit.
    """
    start = k.shape[2] - q.shape[2] if start is None else start
    check(q, k, v, start)
    band = (mask or Full()).band()
    visible = _visible(band, k)
    if visible is not None:
        k, v = (tensor.masked_fill(~visible[:, None, :, None], 0) for tensor in (k, v))
    parts = []
    for tiles in pattern.passes(start, start + q.shape[2], k.shape[2], q.shape[1]):
        rows, outputs, lses = [], [], []
        for tile in tiles:
            scores, place = _scores(q, k, tile, start, scale, band, visible, bias)
            lse = torch.logsumexp(scores, dim=-1)
            dead = torch.isneginf(lse)
            weights = torch.softmax(scores.masked_fill(dead[..., None], 0), dim=-1)
            weights = weights.masked_fill(dead[..., None], 0)
            weights = functional.dropout(weights, dropout) if dropout else weights
            outputs.append(weights @ v[:, place.kv_heads, place.keys].to(weights.dtype))
            lses.append(lse)
            rows.append(place.rows)
        back = torch.argsort(torch.cat(rows))
        parts.append((torch.cat(outputs, 2)[:, :, back], torch.cat(lses, 2)[:, :, back]))
    output, lse = _join(parts)
    return Result(output.to(q.dtype), lse.detach())


def full_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    pattern: Pattern,
    *,
    start: int | None = None,
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """All weights ``[B, H, n, m]``, 0 outside the pattern, from the log-sum-exp of ``run`` with the same arguments."""
    start = k.shape[2] - q.shape[2] if start is None else start
    band = (mask or Full()).band()
    visible = _visible(band, k)
    if visible is not None:
        k = k.masked_fill(~visible[:, None, :, None], 0)
    weights = lse.new_zeros(*q.shape[:3], k.shape[2])
    for tiles in pattern.passes(start, start + q.shape[2], k.shape[2], q.shape[1]):
        for tile in tiles:
            scores, place = _scores(q, k, tile, start, scale, band, visible, bias)
            rows = lse[:, :, place.rows, None]
            tile_weights = torch.exp(scores - torch.where(torch.isneginf(rows), 0, rows))
            # a pair that another pass has adds zero here
            weights[:, place.heads[..., None], place.rows[:, None], place.keys[:, None]] += tile_weights
    return weights


class _Place(NamedTuple):
    """Where a tile lies in the tensors: ``[H, 1]`` heads and their key heads, ``[Q]`` rows, ``[1 | H, K]`` keys."""

    heads: Tensor
    kv_heads: Tensor
    rows: Tensor
    keys: Tensor


def _scores(
    q: Tensor,
    k: Tensor,
    tile: Tile,
    start: int,
    scale: float | None,
    band: Band,
    visible: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, _Place]:
    """Scores ``[B, H, Q, K]`` of a tile, minus infinity where a pair does not count."""
    queries, keys, keep = (torch.from_numpy(part).to(q.device) for part in tile)
    heads = torch.arange(q.shape[1], device=q.device)[:, None]
    place = _Place(heads, heads // (q.shape[1] // k.shape[1]), queries - start, keys)
    wide = torch.promote_types(q.dtype, torch.float32)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    gathered = k[:, place.kv_heads, keys].to(wide)
    scores = q[:, :, place.rows].to(wide) @ gathered.transpose(-1, -2) * factor
    if bias is not None:
        whole = bias.expand(*q.shape[:3], k.shape[2])
        scores = scores + whole[:, heads[..., None], place.rows[:, None], keys[:, None]].to(wide)
    distance = keys[:, None] - queries[:, None]
    if band.left is not None:
        keep = keep & (distance >= -band.left)
    if band.right is not None:
        keep = keep & (distance <= band.right)
    keep = keep[None]
    if visible is not None:
        keep = keep & visible[:, keys][:, :, None]
    return scores.masked_fill(~keep, -torch.inf), place


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, dim=0)
    shares = torch.exp(lses - torch.where(torch.isneginf(lse), 0, lse))
    outputs = torch.stack([output for output, _ in parts])
    return (outputs * shares[..., None]).sum(dim=0), lse


def _visible(band: Band, k: Tensor) -> Tensor | None:
    """Which keys exist, bool ``[B, m]``, or None for all."""
    if band.ranges is None:
        return None
    if len(band.ranges) not in (1, k.shape[0]):
        raise PatternError(
            f"mask must describe 1 or {k.shape[0]} sequences, as q has; got {len(band.ranges)}"
        )
    limits = torch.tensor(band.ranges, device=k.device).expand(k.shape[0], 2)
    slots = torch.arange(k.shape[2], device=k.device)
    return (slots >= limits[:, :1]) & (slots < limits[:, 1:])


def check(q: Tensor, k: Tensor, v: Tensor, start: int) -> None:
    """PatternError for shapes that do not fit, with arguments as in ``run``."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.shape[:3] != k.shape[:3] or k.shape[::3] != q.shape[::3]:
        raise PatternError(f"shapes must be q [B, H, n, D], k [B, Hkv, m, D], v [B, Hkv, m, Dv]; {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise PatternError(f"query heads must be a multiple of key heads; {shapes}")
    if start < 0 or q.shape[2] == 0 or start + q.shape[2] > k.shape[2]:
        raise PatternError(f"every query must be one of the keys' positions; got start {start}, {shapes}")
