"""How far two maps are apart, head by head: the grid that leads to the heads that changed most.

Of each row: total variation, half the sum of |p - q|; the Jensen-Shannon divergence in bits (Lin 1991; of attention
heads Clark et al. 2019, arXiv 1906.04341), which signed weights do not have; Spearman's rank correlation of the
weights (Spearman 1904). Means over rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from attnlab.views.aligned_map import needed_alignment
from attnlab.views.alignment import Alignment
from attnlab.views.difference import NO_DIVERGENCE, sample_rows
from attnlab.views.errors import ViewError
from attnlab.views.overview import PooledRegion
from attnlab.views.trace_map import is_signed
from attnlab.views.viewport import find_trace, head_map, recorded
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow, TraceRow

MEASURES = ("total_variation", "jensen_shannon", "spearman")


class Changed(NamedTuple):
    """A head of the first run against one of the second."""

    layer: int
    head: int
    layer_b: int
    head_b: int
    value: float


@dataclass(frozen=True)
class DistanceGrid:
    """Distances of many pairs of heads.

    Attributes:
        rows, cols: what the grid's rows and columns stand for, as (layer, head) of the first and second map:
            of two runs a row is a layer and a column a head; of one run's heads both are heads.
        pairs: int64 [rows, cols, 4]: layer and head of the first map, layer and head of the second.
        measures: float64 [rows, cols] by name of `MEASURES`; NaN where the second map has no such head, and the
            Jensen-Shannon divergence where weights of either map may be negative.
        rows_used, rows_total: query rows the means are over, and query rows that both maps have.
        matched: share of the tokens that both inputs have, in order; 1 where they are equal.
        note: the sampling and the alignment in words, and what has no Jensen-Shannon divergence.
    """

    pairs: np.ndarray
    measures: dict[str, np.ndarray]
    rows_used: int
    rows_total: int
    matched: float
    note: str

    def most_changed(self, measure: str = "total_variation", count: int = 10) -> list[Changed]:
        """The pairs furthest apart by a measure (of Spearman's correlation: those correlated least).

        Raises ViewError for an unknown measure, and for one that these maps do not have.
        """
        if measure not in MEASURES:
            raise ViewError(f"measure must be one of {', '.join(MEASURES)}; got {measure!r}")
        values = self.measures[measure].ravel()
        order = np.argsort(values if measure == "spearman" else -values, kind="stable")
        if np.isnan(values).all():
            raise ViewError(f"measure must be one that these maps have, got {measure!r}: {self.note}")
        flat = self.pairs.reshape(-1, 4)
        known = [place for place in order.tolist() if not np.isnan(values[place])]
        return [Changed._make((*flat[place].tolist(), float(values[place]))) for place in known[:count]]

    def to_json(self) -> dict[str, Any]:
        tables = {
            name: [[None if np.isnan(value) else float(value) for value in row] for row in table]
            for name, table in self.measures.items()
        }
        facts = {"rows_used": self.rows_used, "rows_total": self.rows_total, "matched": self.matched}
        return {"pairs": self.pairs.tolist(), "measures": tables, "note": self.note, **facts}


def run_distances(
    store: Store, run_a: int, run_b: int, layers: Sequence[int] | None = None, max_rows: int = 64
) -> DistanceGrid:
    """Every head of one run against the same head of another: a grid of layers x heads.

    Where the inputs differ, rows and columns are matched by their tokens, and a weight on a token that the other
    input lacks counts as lost. Rows are sampled evenly where there are more than ``max_rows``.

    Raises ViewError where the runs share no layer, or no token.
    """
    traces_a, traces_b = ({t.layer: t for t in recorded(store, run)[1]} for run in (run_a, run_b))
    common = sorted(traces_a.keys() & traces_b.keys())
    wanted = common if layers is None else list(layers)
    if not wanted or not set(wanted) <= set(common):
        raise ViewError(f"layers must be some of those that both runs recorded, {common}; got {list(wanted)}")
    heads = max(traces_a[layer].heads for layer in wanted)
    pairs = np.array([[(layer, head, layer, head) for head in range(heads)] for layer in wanted])
    return _grid(store, run_a, run_b, pairs, max_rows)


def head_distances(
    store: Store,
    run_id: int,
    layer: int,
    layer_b: int | None = None,
    max_rows: int = 64,
    *,
    head_b: int | None = None,
) -> DistanceGrid:
    """Every head of a layer against every head (or one) of the same or another layer of one run: heads x heads."""
    layer_b = layer if layer_b is None else layer_b
    heads, heads_b = (find_trace(store, run_id, one)[1].heads for one in (layer, layer_b))
    if head_b is not None and not 0 <= head_b < heads_b:
        raise ViewError(
            f"head_b must be in 0..{heads_b - 1} for layer {layer_b} of run {run_id}; got {head_b}"
        )
    others = range(heads_b) if head_b is None else [head_b]
    pairs = np.array([[(layer, head, layer_b, other) for other in others] for head in range(heads)])
    return _grid(store, run_id, run_id, pairs, max_rows)


def distances_from(store: Store, run_id: int, layer_b: int, head_b: int, max_rows: int = 64) -> DistanceGrid:
    """Every head of a run against one of its heads: layers x heads, of the layers whose maps have its size."""
    _, one = find_trace(store, run_id, layer_b)
    if not 0 <= head_b < one.heads:
        raise ViewError(
            f"head_b must be in 0..{one.heads - 1} for layer {layer_b} of run {run_id}; got {head_b}"
        )
    size = (one.num_queries, one.num_keys)
    alike = [t for t in recorded(store, run_id)[1] if (t.num_queries, t.num_keys) == size]
    heads = max(trace.heads for trace in alike)
    pairs = [[(trace.layer, head, layer_b, head_b) for head in range(heads)] for trace in alike]
    return _grid(store, run_id, run_id, np.array(pairs), max_rows)


def row_distances(
    p: np.ndarray, q: np.ndarray, only_p: np.ndarray | float = 0.0, only_q: np.ndarray | float = 0.0
) -> dict[str, np.ndarray]:
    """`MEASURES` of each row of two arrays [rows, keys] in float64.

    Args:
        only_p, only_q: [rows] size of the weights on keys that the other has not.

    The Jensen-Shannon divergence of a row with a negative weight is NaN.
    """
    signed = (p < 0).any(1) | (q < 0).any(1)
    middle = _plogp(0.5 * (p + q)).sum(1) + _plogp(0.5 * only_p) + _plogp(0.5 * only_q)
    parts = _plogp(p).sum(1) + _plogp(only_p) + _plogp(q).sum(1) + _plogp(only_q)
    return {
        "total_variation": 0.5 * (np.abs(p - q).sum(1) + only_p + only_q),
        "jensen_shannon": np.where(signed, np.nan, np.maximum(0.0, middle - 0.5 * parts)),
        "spearman": np.array([_spearman(*rows) for rows in zip(p, q, strict=True)]),
    }


def _grid(store: Store, run_a: int, run_b: int, pairs: np.ndarray, max_rows: int) -> DistanceGrid:
    if max_rows < 1:
        raise ViewError(f"max_rows must be at least 1; got {max_rows}")
    tables = {name: np.full(pairs.shape[:2], np.nan) for name in MEASURES}
    found_a, found_b = (dict(_by_layer(store, run_id)) for run_id in (run_a, run_b))
    used = total = 0
    matched = 1.0
    any_signed = False

    @cache
    def aligned(*shapes: tuple[int, int]) -> tuple[Alignment, Alignment] | None:
        return None if run_a == run_b else needed_alignment(store, run_a, run_b, *shapes)

    for place in np.ndindex(pairs.shape[:2]):
        layer, head, layer_b, head_b = pairs[place].tolist()
        sides = (found_a[layer], found_b[layer_b])
        if head >= sides[0][1].heads or head_b >= sides[1][1].heads:
            continue
        a, b = head_map(store, *sides[0], head), head_map(store, *sides[1], head_b)
        alignment = aligned(a.shape, b.shape)
        matched = matched if alignment is None else min(matched, alignment[1].share)
        rows = _matched_rows(a, b, alignment)
        spans = sample_rows(len(rows), max_rows)
        signed = is_signed(sides[0][1]) or is_signed(sides[1][1])
        any_signed = any_signed or signed
        used, total = sum(stop - start for start, stop in spans), len(rows)
        found = [row_distances(*parts) for parts in _row_pairs(a, b, rows, spans, alignment)]
        for name, table in tables.items():
            if signed and name == "jensen_shannon":
                continue
            values = np.concatenate([one[name] for one in found])
            table[place] = np.nanmean(values) if not np.isnan(values).all() else np.nan
    note = _note(used, total, matched) + (f"; {NO_DIVERGENCE}" if any_signed else "")
    return DistanceGrid(pairs, tables, used, total, matched, note)


def _by_layer(store: Store, run_id: int) -> Iterator[tuple[int, tuple[RunRow, TraceRow]]]:
    run, traces = recorded(store, run_id)
    for trace in traces:
        yield trace.layer, (run, trace)


def _note(used: int, total: int, matched: float) -> str:
    note = f"mean over all {total} query rows"
    if used < total:
        note = f"mean over {used} of {total} query rows, evenly spread,"
    return (
        note.removesuffix(",")
        if matched == 1
        else f"{note} of the tokens that both inputs have ({matched:.0%})"
    )


def _matched_rows(
    a: PooledRegion, b: PooledRegion, alignment: tuple[Alignment, Alignment] | None
) -> np.ndarray:
    """int64 [rows, 2]: rows of both maps that belong together."""
    if alignment is None:
        if a.shape != b.shape:
            raise ViewError(f"maps that are compared must have one size; got {a.shape} and {b.shape}")
        return np.arange(a.shape[0])[:, None].repeat(2, 1)
    rows = np.stack(alignment[0][:2], axis=1)
    if not len(rows):
        raise ViewError("runs to compare must share tokens; their inputs have none in common")
    return rows


def _row_pairs(
    a: Any,
    b: Any,
    rows: np.ndarray,
    spans: list[tuple[int, int]],
    alignment: tuple[Alignment, Alignment] | None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """(p, q) over shared keys, and the weights on keys that only one has, for each span of matched rows."""
    for start, stop in spans:
        both = []
        for one, column in ((a, 0), (b, 1)):
            tiles = [one.tile(slice(row, row + 1), slice(None)) for row in rows[start:stop, column].tolist()]
            both.append(np.concatenate(tiles).astype(np.float64))
        p, q = both
        if alignment is None:
            seen = (p != 0).any(0) | (q != 0).any(0)
            yield p[:, seen], q[:, seen], np.zeros(len(p)), np.zeros(len(p))
        else:
            keys = alignment[1]
            shared_p, shared_q = p[:, keys.a], q[:, keys.b]
            lost_p, lost_q = np.delete(p, keys.a, axis=1), np.delete(q, keys.b, axis=1)
            yield shared_p, shared_q, np.abs(lost_p).sum(1), np.abs(lost_q).sum(1)


def _plogp(p: np.ndarray | float) -> Any:
    """-p log2 p."""
    return -p * np.log2(np.maximum(p, np.finfo(np.float64).tiny))


def _spearman(p: np.ndarray, q: np.ndarray) -> float:
    """Pearson's correlation of the ranks over the keys that either row attends to; NaN where a row is constant."""
    seen = (p != 0) | (q != 0)
    x, y = _ranks(p[seen]), _ranks(q[seen])
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else np.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
