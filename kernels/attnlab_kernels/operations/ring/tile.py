"""The queries of one rank against the keys of another: forward with its log-sum-exp, gradients, and the merge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What all tiles share: the factor on the scores, whether later keys are hidden, keys at a time (None: all)."""

    scale: float
    causal: bool
    block_size: int | None = None


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys as one; a row that neither set serves stays zero, -inf.

    Args:
        output: ``[.., S, Dv]``; lse ``[.., S]`` natural log, minus infinity where no key was allowed; other likewise.
    """
    joined = torch.logaddexp(lse, other_lse)
    # -inf - -inf is NaN
    safe = torch.where(torch.isneginf(joined), 0, joined)
    mine, theirs = torch.exp(lse - safe)[..., None], torch.exp(other_lse - safe)[..., None]
    return output * mine + other * theirs, joined


def attend_tile(
    query: Tensor, key: Tensor, value: Tensor, query_positions: Tensor, key_positions: Tensor, rule: Rule
) -> tuple[Tensor, Tensor] | None:
    """Attend to the keys in hand, or None where every pair is forbidden.

    Args:
        query: ``[B, Hkv, G, S, D]``, G query heads to a key head; key ``[B, Hkv, T, D]``; value ``[B, Hkv, T, Dv]``.
        query_positions: absolute, ``[1 or B, S]``, -1 where there is no token; key_positions ``[1 or B, T]``.

    Returns:
        output ``[B, Hkv, G, S, Dv]`` and lse ``[B, Hkv, G, S]``, float32 (float64 for float64).
    """
    result = None
    for columns, allowed in _blocks(query_positions, key_positions, rule):
        keys, values = _read(key, value, key_positions, columns, query.dtype)
        scores = _scores(query, keys, allowed, rule.scale)
        top = scores.amax(dim=-1, keepdim=True)
        weights = torch.exp(scores - torch.where(torch.isneginf(top), 0, top))
        total = weights.sum(dim=-1)
        dead = total == 0
        alive = total.masked_fill(dead, 1)
        part = (weights @ values[:, :, None]) / alive[..., None]
        lse = torch.where(dead, -torch.inf, top.squeeze(-1) + alive.log())
        result = (part, lse) if result is None else merge(*result, part, lse)
    return result


def tile_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    rule: Rule,
    *,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What this tile adds to the gradients of query, key and value, or None where every pair is forbidden.

    Args:
        lse: log-sum-exp of the row over the keys of all ranks.
        grad: gradient of the output, ``[B, Hkv, G, S, Dv]``.
        delta: sum of gradient times output of each row, ``[B, Hkv, G, S]``.
    """
    query_grad = key_grad = value_grad = None
    safe = torch.where(torch.isneginf(lse), 0, lse)
    for columns, allowed in _blocks(query_positions, key_positions, rule):
        if query_grad is None or key_grad is None or value_grad is None:
            query_grad = torch.zeros_like(query)
            key_grad, value_grad = (torch.zeros_like(part, dtype=query.dtype) for part in (key, value))
        keys, values = _read(key, value, key_positions, columns, query.dtype)
        weights = torch.exp(_scores(query, keys, allowed, rule.scale) - safe[..., None])
        slopes = grad @ values[:, :, None].transpose(-1, -2) - delta[..., None]
        slopes = slopes * weights * rule.scale
        query_grad += slopes @ keys[:, :, None]
        key_grad[:, :, columns] = (slopes.transpose(-1, -2) @ query).sum(dim=2)
        value_grad[:, :, columns] = (weights.transpose(-1, -2) @ grad).sum(dim=2)
    if query_grad is None or key_grad is None or value_grad is None:
        return None
    return query_grad, key_grad, value_grad


def hide(tensor: Tensor, positions: Tensor) -> Tensor:
    """``[B, H, S, D]`` with zeros in slots without a token, whatever lay there (0 * NaN would be NaN)."""
    return torch.where((positions >= 0)[:, None, :, None], tensor, tensor.new_zeros(()))


def _blocks(
    query_positions: Tensor, key_positions: Tensor, rule: Rule
) -> Iterator[tuple[slice, Tensor | None]]:
    """Runs of keys that some query may attend to, with a bool ``[1 or B, S, T]``, or None if all pairs are allowed."""
    count = key_positions.shape[1]
    step = max(1, count if rule.block_size is None else rule.block_size)
    for start in range(0, count, step):
        columns = slice(start, min(start + step, count))
        rows, keys = query_positions[:, :, None], key_positions[:, None, columns]
        if _is_empty(query_positions, key_positions[:, columns], rule.causal):
            continue
        allowed = (rows >= 0) & (keys >= 0)
        allowed = allowed & (keys <= rows) if rule.causal else allowed
        yield columns, None if bool(allowed.all()) else allowed


def _is_empty(query_positions: Tensor, key_positions: Tensor, causal: bool) -> bool:
    """Whether no pair is allowed, from the ends alone."""
    if query_positions.shape[1] == 0:
        return True
    far = torch.iinfo(key_positions.dtype).max
    last = query_positions.amax(dim=1)
    first = torch.where(key_positions < 0, far, key_positions).amin(dim=1)
    nothing = (last < 0) | (first == far)
    return bool((nothing | (first > last) if causal else nothing).all())


def _read(
    key: Tensor, value: Tensor, positions: Tensor, columns: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    keys, values = (hide(part[:, :, columns], positions[:, columns]).to(dtype) for part in (key, value))
    return keys, values


def _scores(query: Tensor, keys: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    scores = query @ keys[:, :, None].transpose(-1, -2) * scale
    return scores if allowed is None else scores.masked_fill(~allowed[:, None, None], -torch.inf)
