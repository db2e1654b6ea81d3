"""Exact attention whose keys and values travel round a ring of ranks, forward and backward.

Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context",
https://arxiv.org/abs/2310.01889. Each rank keeps its queries. Who may attend to whom is read from absolute positions,
which travel with the keys, so any layout of tokens over ranks gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab_kernels.operations.ring.layout import RingError, RingTile
from attnlab_kernels.operations.ring.link import GRADIENTS, KEYS, Payload, Program, Ring
from attnlab_kernels.operations.ring.tile import Rule, attend_tile, hide, merge, tile_gradients


@dataclass(frozen=True, eq=False)
class RingResult:
    """The hosted ranks' output ``[R, B, Hq, S, Dv]``, log-sum-exp ``[R, B, Hq, S]`` (detached) and steps."""

    output: Tensor
    lse: Tensor
    tiles: tuple[RingTile, ...]


def ring_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    ring: Ring,
    scale: float,
    causal: bool = True,
    overlap: bool = True,
    block_size: int | None = None,
) -> RingResult:
    """Softmax attention of the hosted ranks' queries to the keys of the whole ring.

    With a process group this is collective: every rank must call it with the same shapes, and if one rank runs the
    backward pass, all must. Each of the ``P`` steps sends a rank's keys, values and positions to the next rank
    (after the last step there is no need to); backward the gradients of keys and values travel with them, ``P``
    times, which brings them home.

    Args:
        q: ``[R, B, Hq, S, D]``, R ranks in this process; k ``[R, B, Hkv, T, D]``; v ``[R, B, Hkv, T, Dv]``; Hq a
            multiple of Hkv.
        query_positions: int64 absolute positions ``[R, S]`` or ``[R, B, S]``, -1 where a slot has no token; its
            row is dead. key_positions likewise ``[R, T]`` or ``[R, B, T]``: nobody attends to a -1.
        causal: hide keys of later positions.
        overlap: send keys on while computing with them, not after.
        block_size: keys of a block that meet the queries at a time; None for the whole block.

    Raises:
        RingError: shapes that do not fit.
    """
    _check(q, k, v, ring)
    query_positions, key_positions = (
        positions[:, None] if positions.dim() == 2 else positions
        for positions in (query_positions, key_positions)
    )
    rule = Rule(scale, causal, block_size)
    output, lse, visited = _RingAttention.apply(q, k, v, query_positions, key_positions, ring, rule, overlap)
    tiles = tuple(
        RingTile(rank, (rank - step) % ring.size, step, not met)
        for rank, row in zip(ring.hosted, visited.tolist(), strict=True)
        for step, met in enumerate(row)
    )
    return RingResult(output, lse, tiles)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        ring: Ring,
        rule: Rule,
        overlap: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        results = ring.run(
            [
                _forward(ring, q[rank], query_positions[rank], block, rule, overlap)
                for rank, block in enumerate(zip(k, v, key_positions, strict=True))
            ]
        )
        output = torch.stack([result[0] for result in results])
        lse = torch.stack([result[1] for result in results])
        visited = torch.tensor([result[2] for result in results])
        ctx.save_for_backward(q, k, v, query_positions, key_positions, output, lse)
        ctx.ring, ctx.rule, ctx.overlap = ring, rule, overlap
        ctx.mark_non_differentiable(lse, visited)
        return output, lse, visited

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, query_positions, key_positions, output, lse = ctx.saved_tensors
        results = ctx.ring.run(
            [
                _backward(
                    ctx.ring,
                    (q[rank], query_positions[rank], output[rank], lse[rank], grad[rank]),
                    block,
                    ctx.rule,
                    ctx.overlap,
                )
                for rank, block in enumerate(zip(k, v, key_positions, strict=True))
            ]
        )
        query_grad, key_grad, value_grad = (
            torch.stack([result[index] for result in results]).to(part.dtype)
            for index, part in enumerate((q, k, v))
        )
        return query_grad, key_grad, value_grad, None, None, None, None, None


def _forward(
    ring: Ring, query: Tensor, positions: Tensor, block: Payload, rule: Rule, overlap: bool
) -> Program[tuple[Tensor, Tensor, list[bool]]]:
    """One rank's part: ``block`` is (key, value, positions), at first its own."""
    grouped = _grouped(query, block[0].shape[1])
    output = grouped.new_zeros(*grouped.shape[:-1], block[1].shape[-1])
    lse = grouped.new_full(grouped.shape[:-1], -torch.inf)
    visited = []
    for step in range(ring.size):
        last = step == ring.size - 1
        ahead = ring.start(block, KEYS) if overlap and not last else None
        key, value, key_positions = block
        part = attend_tile(grouped, key, value, positions, key_positions, rule)
        visited.append(part is not None)
        if part is not None:
            output, lse = merge(output, lse, *part)
        if not last:
            block = yield ahead if ahead is not None else ring.start(block, KEYS)
    return output.flatten(1, 2).to(query.dtype), lse.flatten(1, 2), visited


def _backward(
    ring: Ring,
    mine: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    block: Payload,
    rule: Rule,
    overlap: bool,
) -> Program[tuple[Tensor, Tensor, Tensor]]:
    """One rank's part: ``mine`` is (query, positions, output, lse, gradient of the output).

    The gradients of a block follow it one step behind: they are waited for only when this rank has its own share.
    """
    query, positions, output, lse, grad = mine
    heads = block[0].shape[1]
    grouped, slope = (_grouped(hide(part, positions), heads) for part in (query, grad))
    delta = (slope * _grouped(output, heads)).sum(dim=-1)
    lse = lse.unflatten(1, (heads, -1))
    query_grad = torch.zeros_like(grouped)
    travelling = None
    for step in range(ring.size):
        last = step == ring.size - 1
        ahead = ring.start(block, KEYS) if overlap and not last else None
        key, value, key_positions = block
        shares = tile_gradients(
            grouped, key, value, positions, key_positions, rule, lse=lse, grad=slope, delta=delta
        )
        if travelling is None:
            carried = tuple(torch.zeros_like(part, dtype=grouped.dtype) for part in (key, value))
        else:
            carried = yield travelling
        if shares is not None:
            query_grad += shares[0]
            carried = tuple(sum_ + share for sum_, share in zip(carried, shares[1:], strict=True))
        travelling = ring.start(carried, GRADIENTS)
        if not last:
            block = yield ahead if ahead is not None else ring.start(block, KEYS)
    assert travelling is not None
    key_grad, value_grad = yield travelling
    return query_grad.flatten(1, 2), key_grad, value_grad


def _grouped(tensor: Tensor, key_heads: int) -> Tensor:
    """``[B, Hq, S, D]`` as ``[B, Hkv, G, S, D]`` in the accumulator's type."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(wide).unflatten(1, (key_heads, -1))


def _check(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> None:
    if any(part.dim() != 5 or part.shape[0] != len(ring.hosted) for part in (q, k, v)):
        raise RingError(
            f"q, k and v must be [{len(ring.hosted)} ranks, batch, heads, slots, dim]; got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[1] != q.shape[1] or k.shape[-1] != q.shape[-1] or v.shape[:4] != k.shape[:4]:
        raise RingError(
            f"q, k and v must share batch, and k its dim with q and its tokens with v; got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise RingError(f"query heads must be a multiple of key heads; got {q.shape[2]} and {k.shape[2]}")
