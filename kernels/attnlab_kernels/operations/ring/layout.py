"""Which rank of a ring owns which token, when two tokens meet, and what that costs each rank. No torch.

Contiguous: Liu et al., "Ring Attention with Blockwise Transformers", https://arxiv.org/abs/2310.01889; striped:
Brandon et al., "Striped Attention", https://arxiv.org/abs/2311.09431; zigzag: rank r owns chunks r and 2P - 1 - r.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LAYOUTS = ("contiguous", "striped", "zigzag")


class RingError(ValueError):
    """A ring that cannot be; the text names the argument, the rule and the value."""


class RingTile(NamedTuple):
    """One step of one rank: its queries met the keys that ``source`` owns, or skipped them as all forbidden."""

    rank: int
    source: int
    step: int
    skipped: bool


def checked_layout(layout: str) -> str:
    """The layout, or RingError with the choices."""
    if layout not in LAYOUTS:
        raise RingError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    return layout


def shard_positions(layout: str, length: int, size: int) -> NDArray[np.int64]:
    """Absolute position of every slot of every rank: ``[size, slots]``, -1 where a slot has no token.

    All ranks have as many slots; a zigzag rank has two chunks, so an even number of them.
    """
    checked_layout(layout)
    if size < 1 or length < 0:
        raise RingError(f"size must be at least 1 rank and length at least 0; got {size} and {length}")
    chunks = 2 * size if layout == "zigzag" else size
    width = -(-length // chunks)
    tokens = np.arange(chunks * width, dtype=np.int64)
    tokens[length:] = -1
    if layout == "striped":
        return tokens.reshape(width, size).T.copy()
    parts = tokens.reshape(chunks, width)
    if layout == "contiguous":
        return parts
    return np.concatenate((parts[:size], parts[size:][::-1]), axis=1)


def owners(layout: str, length: int, size: int) -> NDArray[np.int64]:
    """Rank that owns each token: ``[length]``."""
    positions = shard_positions(layout, length, size)
    return places(layout, length, size) // max(1, positions.shape[1])


def places(layout: str, length: int, size: int) -> NDArray[np.int64]:
    """Where each token lies when the ranks' slots stand one after the other: ``[length]``."""
    flat = shard_positions(layout, length, size).ravel()
    slots = np.flatnonzero(flat >= 0)
    found = np.empty(length, np.int64)
    found[flat[slots]] = slots
    return found


def meeting_step(
    query_owner: NDArray[np.integer[Any]] | int, key_owner: NDArray[np.integer[Any]] | int, size: int
) -> Any:
    """Step in which a rank's queries meet the keys of another: keys move to the next rank after each step."""
    return (query_owner - key_owner) % size


def work(
    layout: str, num_queries: int, num_keys: int, size: int, *, causal: bool = True
) -> NDArray[np.int64]:
    """Allowed (query, key) pairs of each rank in each step: ``[size, size]``.

    Query i sits at position ``num_keys - num_queries + i``.
    """
    query_owner, key_owner = owners(layout, num_queries, size), owners(layout, num_keys, size)
    before = np.zeros((num_keys + 1, size), np.int64)
    np.cumsum(key_owner[:, None] == np.arange(size), axis=0, out=before[1:])
    seen = np.arange(num_queries) + (num_keys - num_queries + 1)
    met = before[np.clip(seen, 0, num_keys)] if causal else np.repeat(before[-1:], num_queries, axis=0)
    by_owner = np.zeros((size, size), np.int64)
    np.add.at(by_owner, query_owner, met)
    ranks = np.arange(size)
    return by_owner[ranks[:, None], (ranks[:, None] - ranks) % size]


def imbalance(pairs: NDArray[np.integer[Any]]) -> float:
    """Work of the busiest rank over the mean, of what ``work`` gives; 1 is perfect, and the answer for no work."""
    total = pairs.sum(axis=1)
    return float(total.max() / total.mean()) if total.any() else 1.0
