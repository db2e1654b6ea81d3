"""One token of a map: what it attends to, and who attends to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.viewport import find_trace, head_map
from attnlab_storage.database import Store


@dataclass(frozen=True)
class TokenWeights:
    """The weights of one row and of the column of the same token.

    Attributes:
        sent: float32 [keys]: what query ``row`` gives to each key.
        received: float32 [queries]: what each query gives to the key at the same position; empty where there is none.
        row, col: the query, and the key at its position (None where the map has none).
    """

    sent: np.ndarray
    received: np.ndarray
    row: int
    col: int | None

    def top(self, count: int = 10) -> list[tuple[int, float]]:
        """The keys that get most, as (position, weight)."""
        return _top(self.sent, count)

    def top_received(self, count: int = 10) -> list[tuple[int, float]]:
        """The queries that give most."""
        return _top(self.received, count)


def token_weights(store: Store, run_id: int, layer: int, row: int, head: int | None = None) -> TokenWeights:
    """The weights of query ``row`` in one head, or the mean of all heads of the layer: O(n) numbers each way.

    A query sits at the key ``keys - queries + row``: the last query is the newest token.

    Raises ViewError for a layer, head or row that is not there.
    """
    run, trace = find_trace(store, run_id, layer)
    if not 0 <= row < trace.num_queries:
        raise ViewError(f"row must be in 0..{trace.num_queries - 1} for run {run_id}; got {row}")
    maps = [head_map(store, run, trace, one) for one in (range(trace.heads) if head is None else [head])]
    sent = _mean([one.tile(slice(row, row + 1), slice(None))[0] for one in maps])
    queries, keys = maps[0].shape
    col = keys - queries + row
    if not 0 <= col < keys:
        return TokenWeights(sent, np.empty(0, np.float32), row, None)
    received = _mean([one.tile(slice(None), slice(col, col + 1))[:, 0] for one in maps])
    return TokenWeights(sent, received, row, col)


def _mean(weights: list[np.ndarray]) -> np.ndarray:
    return np.stack(weights).mean(axis=0, dtype=np.float64).astype(np.float32)


def _top(weights: np.ndarray, count: int) -> list[tuple[int, float]]:
    order = np.argsort(-weights, kind="stable")[:count]
    return [(int(place), float(weights[place])) for place in order if weights[place] > 0]
