"""A map seen at the positions of another run's tokens, so that maps over different texts have a difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnlab.views.alignment import Alignment, align_inputs
from attnlab.views.errors import ViewError
from attnlab.views.trace_map import AttentionMap
from attnlab_storage import results
from attnlab_storage.database import Store


class AlignedMap:
    """``inner`` with row i and column j moved to the tokens of another run; NaN where this map has no such token."""

    def __init__(self, inner: AttentionMap, queries: Alignment, keys: Alignment) -> None:
        self.inner = inner
        self.rows, self.cols = places(queries), places(keys)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.cols)

    def tile(self, rows: slice, cols: slice) -> np.ndarray:
        """float32 [rows, cols] in positions of the other run."""
        at, over = self.rows[rows], self.cols[cols]
        out = np.full((len(at), len(over)), np.nan, np.float32)
        down, across = at >= 0, over >= 0
        if down.any() and across.any():
            top, left = at[down][0], over[across][0]
            part = self.inner.tile(slice(top, at[down][-1] + 1), slice(left, over[across][-1] + 1))
            out[np.ix_(down, across)] = part[np.ix_(at[down] - top, over[across] - left)]
        return out


def places(alignment: Alignment) -> np.ndarray:
    """int64 [tokens of the first run]: where each stands in the second, -1 where it does not."""
    found = np.full(alignment.size_a, -1)
    found[alignment.a] = alignment.b
    return found


def needed_alignment(
    store: Store, run_a: int, run_b: int, shape_a: tuple[int, int], shape_b: tuple[int, int]
) -> tuple[Alignment, Alignment] | None:
    """How the tokens of two runs belong together, of two models by what they say; None where they are the same.

    Raises ViewError where the maps differ in size and their tokens cannot be matched.
    """
    inputs = [results.run_input(store, run_id) for run_id in (run_a, run_b)]
    sizes = [None if one is None else (len(one.query_tokens), len(one.key_tokens)) for one in inputs]
    if sizes != [shape_a, shape_b]:
        if shape_a == shape_b:
            return None
        text = f"run {run_a} has {shape_a[0]} x {shape_a[1]}, run {run_b} {shape_b[0]} x {shape_b[1]}"
        raise ViewError(f"a difference needs maps of the same size, or tokens to align them by; {text}")
    first, second = inputs
    assert first is not None
    assert second is not None
    models = {run.model for run_id in (run_a, run_b) if (run := results.get_run(store, run_id))}
    found = align_inputs(first, second, by_words=len(models) > 1)
    return None if all(one.identical for one in found) else found


def span_of_tokens(
    store: Store,
    run_a: int,
    run_b: int,
    shapes: Sequence[tuple[int, int]],
    rows: tuple[int, int],
    cols: tuple[int, int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and columns of run B's map that hold the tokens of a region of run A's; those of the region itself
    where both have the same tokens or none are known. ``shapes``: (queries, keys) of both maps.

    Raises ViewError where the tokens cannot be matched, and where B has none of them.
    """
    if run_a == run_b or any(results.run_input(store, run_id) is None for run_id in (run_a, run_b)):
        return rows, cols
    found = needed_alignment(store, run_a, run_b, shapes[0], shapes[1])
    if found is None:
        return rows, cols
    spans = found[0].span(*rows), found[1].span(*cols)
    if spans[0] is None or spans[1] is None:
        text = f"rows {rows[0]}:{rows[1]} and columns {cols[0]}:{cols[1]} of run {run_a}"
        raise ViewError(f"run {run_b} has none of the tokens of {text}")
    return spans[0], spans[1]


def alignment_document(store: Store, run_a: int, run_b: int, shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """``query`` and ``key``: where each token of the first run stands in the second, -1: nowhere; None if all agree."""
    found = needed_alignment(store, run_a, run_b, shapes[0], shapes[1])
    if found is None:
        return {"query": None, "key": None, "share": 1.0}
    queries, keys = (places(one).tolist() for one in found)
    return {"query": queries, "key": keys, "share": found[1].share}
