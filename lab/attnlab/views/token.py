"""One token of a map: what it attends to, and who attends to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.read_inputs import attention_role
from attnlab.views.trace_map import AttentionMap, column_word
from attnlab.views.viewport import allowed_pixels, find_trace, head_map
from attnlab_kernels.sparse_map import SparseMap
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow, TraceRow

STRIP = 512
"""blocks that a whole row or column is pooled to, at most"""
MOST_SHOWN = 4096
MOST_TOP = 100


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
        """The keys that get most, as (position, weight); of signed weights the largest in size."""
        return _top(self.sent, count)

    def top_received(self, count: int = 10) -> list[tuple[int, float]]:
        """The queries that give most, as `top`."""
        return _top(self.received, count)


def token_weights(store: Store, run_id: int, layer: int, row: int, head: int | None = None) -> TokenWeights:
    """The weights of query ``row`` in one head, or the mean of all heads of the layer: O(n) numbers each way.

    A query sits at the key ``keys - queries + row``: the last query is the newest token. Between two sequences, and
    where columns are no keys, it sits at none.

    Raises ViewError for a layer, head or row that is not there.
    """
    run, trace, maps = _maps(store, run_id, layer, row, head)
    sent = _mean([one.tile(slice(row, row + 1), slice(None))[0] for one in maps])
    col = _own_key(run, trace, row)
    if col is None:
        return TokenWeights(sent, np.empty(0, np.float32), row, None)
    received = _mean([one.tile(slice(None), slice(col, col + 1))[:, 0] for one in maps])
    return TokenWeights(sent, received, row, col)


def token_document(
    store: Store,
    run_id: int,
    layer: int,
    row: int,
    head: int | None = None,
    shown: tuple[int, int] | None = None,
    count: int = 12,
) -> dict[str, Any]:
    """`token_weights` as JSON values for a page: exact over ``shown`` positions, and both ways as a short strip.

    Of ``sent`` and ``received`` each (the latter None where the token has no key): ``start`` and ``weights`` of the
    shown positions, None where no pair is allowed; ``strip``, the largest in size of at most 512 blocks of positions;
    ``top``, the ``count`` largest in size as [position, weight]. A side that has fewer positions than the other has
    what there is of the shown ones.

    Raises ViewError for a layer, head, row or range that is not there, or more than 4,096 positions.
    """
    if not 1 <= count <= MOST_TOP:
        raise ViewError(f"count must be in 1..{MOST_TOP}; got {count}")
    found = token_weights(store, run_id, layer, row, head)
    _, trace, maps = _maps(store, run_id, layer, row, head)
    queries, keys = maps[0].shape
    document: dict[str, Any] = {
        "row": row,
        "col": found.col,
        "queries": queries,
        "keys": keys,
        "received": None,
    }
    check_shown(shown, max(queries, keys))
    line = (row, row + 1)
    document["sent"] = _side(found.sent, shown, count, lambda span: _allowed(maps, line, span))
    if found.col is not None:
        line = (found.col, found.col + 1)
        document["received"] = _side(found.received, shown, count, lambda span: _allowed(maps, span, line))
    return document | {"columns": column_word(trace)}


def check_shown(shown: tuple[int, int] | None, size: int) -> None:
    """ViewError unless the range is inside ``size`` positions and no longer than a page may ask for."""
    if shown is None:
        return
    start, stop = shown
    if not 0 <= start < stop <= size or stop - start > MOST_SHOWN:
        rule = f"must be a range of 1..{MOST_SHOWN} positions within 0:{size}"
        raise ViewError(f"shown {rule}; got {start}:{stop}")


def _maps(
    store: Store, run_id: int, layer: int, row: int, head: int | None
) -> tuple[RunRow, TraceRow, list[AttentionMap]]:
    run, trace = find_trace(store, run_id, layer)
    if not 0 <= row < trace.num_queries:
        raise ViewError(f"row must be in 0..{trace.num_queries - 1} for run {run_id}; got {row}")
    heads = range(trace.heads) if head is None else [head]
    return run, trace, [head_map(store, run, trace, one) for one in heads]


def _own_key(run: RunRow, trace: TraceRow, row: int) -> int | None:
    """The key at the position of a query; None between two sequences, and where columns are no keys."""
    if attention_role(run, trace) == "cross" or column_word(trace) != "key":
        return None
    col = trace.num_keys - trace.num_queries + row
    return col if 0 <= col < trace.num_keys else None


def _side(weights: np.ndarray, shown: tuple[int, int] | None, count: int, allowed: Any) -> dict[str, Any]:
    size = len(weights)
    start, stop = (0, size) if shown is None else (min(shown[0], size), min(shown[1], size))
    if stop - start > MOST_SHOWN:
        raise ViewError(
            f"shown must be given where there are more than {MOST_SHOWN} positions; there are {size}"
        )
    known = allowed((start, stop)) if stop > start else []
    part = [float(w) if ok else None for w, ok in zip(weights[start:stop], known, strict=True)]
    edges = np.arange(min(STRIP, size)) * size // min(STRIP, size)
    high, low = np.maximum.reduceat(weights, edges), np.minimum.reduceat(weights, edges)
    strip = np.where(-low > high, low, high)
    top = [[place, weight] for place, weight in _top(weights, count)]
    return {"start": start, "weights": part, "strip": strip.tolist(), "top": top, "sum": float(weights.sum())}


def _allowed(maps: Sequence[AttentionMap], rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
    """bool over the positions of a row or a column: whether any of the heads allows the pair."""
    size = rows[1] - rows[0], cols[1] - cols[0]
    if not isinstance(maps[0], SparseMap):
        maps = maps[:1]  # only patterns differ from head to head
    return np.any([allowed_pixels(one, rows, cols, *size) for one in maps], axis=0).ravel()


def _mean(weights: list[np.ndarray]) -> np.ndarray:
    return np.stack(weights).mean(axis=0, dtype=np.float64).astype(np.float32)


def _top(weights: np.ndarray, count: int) -> list[tuple[int, float]]:
    order = np.argsort(-np.abs(weights), kind="stable")[:count]
    return [(int(place), float(weights[place])) for place in order if weights[place] != 0]
