"""Paged attention by gathering: sequences of one length go to an ordinary kernel together, as many as fit a cache.

The gathered keys and values of one call lie where those of the last lay, so that they stay in the processor's caches
and are never fresh pages of memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax.support import Modifiers

# of the keys that are gathered for one call: what a core's cache holds
GATHERED_BYTES = 2**20


def run(
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    tables: Tensor,
    counts: list[int],
    held: list[int],
    *,
    mask: Mask,
    scale: float,
    modifiers: Modifiers,
) -> tuple[Tensor, Tensor]:
    """Run ``attend``, an implementation of softmax attention, over each sequence's tokens; no gradient.

    Args:
        q: ``[T, Hq, D]``, pools and tables as in ``attend_paged``.
        counts: queries of each sequence.
        held: tokens of each sequence, those of its queries included.

    Returns:
        output ``[T, Hq, Dv]`` in q's dtype and natural log-sum-exp ``[Hq, T]``, float32 or wider.
    """
    parts = _portions(key_pool, counts, held)
    stops = list(itertools.accumulate(counts))
    rooms = _rooms((key_pool, value_pool), parts, held)
    output = sums = None
    for rows in parts:
        count, length = counts[rows[0]], held[rows[0]]
        blocks = tables[rows, : -(-length // key_pool.shape[1])]
        key, value = (
            _in_order(pool, blocks, room)[:, :length].transpose(1, 2)
            for pool, room in zip((key_pool, value_pool), rooms, strict=True)
        )
        places = _places([stops[row] - count for row in rows], count, q.device)
        queries = q[places].unflatten(0, (len(rows), count)).transpose(1, 2)
        found = attend(queries, key, value, mask=mask, scale=scale, modifiers=modifiers)
        # [S, Hq, n, ...] -> [S n, Hq, ...]
        out, lse = (part.transpose(1, 2).flatten(0, 1) for part in found)
        lse = lse.to(torch.promote_types(q.dtype, torch.float32))
        if len(out) == len(q):
            return out, lse.T
        if output is None or sums is None:
            output, sums = (part.new_empty(len(q), *part.shape[1:]) for part in (out, lse))
        output[places], sums[places] = out, lse
    if output is None or sums is None:
        nothing = q.new_empty(*q.shape[:2], value_pool.shape[-1])
        return nothing, nothing.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)).T
    return output, sums.T


def _portions(pool: Tensor, counts: list[int], held: list[int]) -> list[list[int]]:
    """Sequences with as many queries and as many tokens as each other, in the portions of one call each."""
    alike: dict[tuple[int, int], list[int]] = {}
    for row, shape in enumerate(zip(counts, held, strict=True)):
        if shape[0]:
            alike.setdefault(shape, []).append(row)
    parts = []
    for (_, length), rows in alike.items():
        size = length * pool[0, 0].numel() * pool.element_size()
        most = max(1, torch.get_num_threads() * GATHERED_BYTES // size)
        parts += [rows[first : first + most] for first in range(0, len(rows), most)]
    return parts


def _rooms(pools: tuple[Tensor, Tensor], parts: list[list[int]], held: list[int]) -> list[Tensor]:
    """Blocks for the portion that needs most of them, of keys and of values."""
    size = pools[0].shape[1]
    most = max((len(rows) * -(-held[rows[0]] // size) for rows in parts), default=0)
    return [pool.new_empty(most, *pool.shape[1:]) for pool in pools]


def _in_order(pool: Tensor, blocks: Tensor, room: Tensor) -> Tensor:
    """Blocks ``[S, b]`` as tokens ``[S, m, Hkv, D]``: of one sequence whose blocks follow each other, as they lie."""
    if len(blocks) == 1 and bool((blocks.diff() == 1).all()):
        first = int(blocks[0, 0])
        found = pool[first : first + blocks.shape[1]]
    else:
        found = torch.index_select(pool, 0, blocks.flatten(), out=room[: blocks.numel()])
    return found.unflatten(0, (len(blocks), -1)).flatten(1, 2)


def _places(starts: list[int], count: int, device: torch.device) -> slice | Tensor:
    """Where the tokens of sequences lie: one stretch where they follow each other, else their numbers."""
    if starts[-1] - starts[0] == (len(starts) - 1) * count:
        return slice(starts[0], starts[-1] + count)
    return (torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)).flatten()
