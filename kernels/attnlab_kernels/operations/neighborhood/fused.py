"""Neighborhood attention on the CPU by fused tiles: tiles that see alike run as one batch of one flash call.

Hassani et al., https://arxiv.org/abs/2204.07143. The tiles are the reference's; away from the borders all of them have
one mask. Their keys are gathered with the halo, ``((side + k - 1) / side) ** axes`` times each, and no score is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.neighborhood import reference
from attnlab_kernels.operations.neighborhood.reference import Result
from attnlab_kernels.operations.softmax.support import Support

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, eq=False)
class _Group:
    """Tiles with one mask: pixel numbers ``[T, Q]`` and ``[T, K]``."""

    queries: Tensor
    keys: Tensor
    keep: Tensor
    """bool ``[Q, K]``"""
    tile: reference.Tile
    """one of them, for the relative positions that all share"""


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighborhood: Neighborhood,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> Result:
    """As ``reference.run``, where ``supports`` says yes."""
    groups, back = _plan(neighborhood)
    flat = [part.flatten(2, -2) for part in (q, k, v)]
    outputs, lses = [], []
    for group in groups:
        tile = torch.zeros(group.keep.shape, dtype=q.dtype).masked_fill_(~group.keep, -torch.inf)
        if bias is not None:
            tile = (tile + reference.bias_tile(bias.to(q.dtype), group.tile, neighborhood))[None]
        places = (group.queries, group.keys, group.keys)
        output, lse = flash(
            *(_gather(part, place) for part, place in zip(flat, places, strict=True)),
            attn_mask=tile,
            scale=scale,
        )
        shape = (q.shape[0], len(group.queries))
        outputs.append(output.unflatten(0, shape).transpose(1, 2).flatten(2, 3))
        lses.append(lse.unflatten(0, shape).transpose(1, 2).flatten(2, 3))
    output, lse = (torch.cat(parts, dim=2).index_select(2, back) for parts in (outputs, lses))
    return Result(output.unflatten(2, neighborhood.space), lse.unflatten(2, neighborhood.space), None)


def supports(
    q: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    visible: Tensor | None,
    dropout: float,
    need_windows: bool,
) -> Support:
    """The CPU, all pixels visible, and nothing asked for but the output and its gradient by q, k and v."""
    if q.device.type != "cpu":
        return Support(False, f"fused tiles are for the CPU; got {q.device.type}")
    if v.shape[-1] != q.shape[-1]:
        return Support(
            False, f"the flash tile needs Dv equal to D; got D = {q.shape[-1]} and Dv = {v.shape[-1]}"
        )
    if q.shape[0] == 0:
        return Support(False, "there is no image")
    if torch.is_grad_enabled() and bias is not None and bias.requires_grad:
        return Support(False, "the flash tile gives no gradient for a bias")
    for name, asked in (("hides pixels", visible is not None), ("keeps windows", need_windows)):
        if asked:
            return Support(False, f"the flash tile never {name}")
    if dropout:
        return Support(False, f"the flash tile drops no probabilities; got dropout {dropout}")
    return Support(True, "tiles that see alike in one flash call")


def _gather(flat: Tensor, places: Tensor) -> Tensor:
    """``[B, H, N, D]`` at ``[T, P]`` to ``[B * T, H, P, D]``."""
    taken = flat.index_select(2, places.flatten()).unflatten(2, tuple(places.shape))
    return taken.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=8)
def _plan(neighborhood: Neighborhood) -> tuple[tuple[_Group, ...], Tensor]:
    """Groups of tiles, and where each pixel is in their outputs one after the other."""
    numbers = np.arange(neighborhood.size).reshape(neighborhood.space)
    alike: dict[tuple[object, ...], list[reference.Tile]] = {}
    for tile in reference.tiles(neighborhood):
        axes = zip(tile.queries, tile.keys, tile.first, tile.count, strict=True)
        seen = tuple(
            (
                keys.start - queries.start,
                len(range(keys.start, keys.stop, keys.step)),
                *map(bytes, (first, count)),
            )
            for queries, keys, first, count in axes
        )
        alike.setdefault(seen, []).append(tile)
    groups = []
    with torch.inference_mode(False):
        for tiles in alike.values():
            queries, keys = (
                torch.from_numpy(np.stack([numbers[part].ravel() for part in parts]))
                for parts in ([tile.queries for tile in tiles], [tile.keys for tile in tiles])
            )
            keep = reference.keep_tile(tiles[0], torch.device("cpu"))
            groups.append(_Group(queries, keys, keep, tiles[0]))
        order = torch.cat([group.queries.flatten() for group in groups])
        return tuple(groups), torch.argsort(order)
