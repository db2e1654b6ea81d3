"""Two maps against each other: their signed difference as pixels, and how far apart they are head by head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnlab.views.aligned_difference import (
    aligned_progress,
    aligned_viewport,
    furthest,
    known_mean,
    pixel_edges,
)
from attnlab.views.aligned_map import AlignedMap, needed_alignment
from attnlab.views.alignment import Alignment
from attnlab.views.errors import ViewError
from attnlab.views.overview import is_wide
from attnlab.views.trace_map import AttentionMap, is_signed
from attnlab.views.viewport import (
    Region,
    Viewport,
    allowed_in,
    check_size,
    find_trace,
    head_map,
    load_map,
    recorded,
    region_of,
)
from attnlab.views.wide_difference import Side, is_wide_pair, pair_progress, pair_viewport
from attnlab_storage.database import Store

REDUCTIONS = ("signed_max", "mean")
BLOCK_CELLS = 2**20
NO_DIVERGENCE = "no Jensen-Shannon divergence where weights may be negative: they are no distribution"
SAMPLE_BLOCK = 8  # neighbouring rows read at once when rows are sampled


def difference(
    store: Store,
    run_a: int,
    run_b: int,
    layer: int,
    head: int,
    rows: Region = None,
    cols: Region = None,
    height: int = 512,
    width: int = 512,
    reduce: str = "signed_max",
    *,
    layer_b: int | None = None,
    head_b: int | None = None,
) -> Viewport:
    """``A - B`` over a region, for one head of each run (``layer_b``, ``head_b``: where B's differ from A's).

    ``signed_max`` shows the difference of greatest size under each pixel with its sign, so that a single
    changed cell stays visible; ``mean`` is the mean of A - B. Draw it on -s..s, s = max(|minimum|, maximum).

    Where the inputs differ, the region is of A's tokens, and a pixel is NaN where B has none of them.

    A region of more cells than can be computed at once comes from blocks, as of one map (see `wide_difference`); what
    that takes is built on first look, and `difference_progress` says how far it is.

    Raises ViewError where a map lacks the layer, head or region, or the two maps differ in shape without tokens to
    align them by.
    """
    check_size(height, width)
    _check_reduction(reduce)
    side_a, side_b = _side(store, run_a, layer, head), _second(store, run_b, layer, head, layer_b, head_b)
    a, b = side_a.full_map, side_b.full_map
    region = region_of(a.shape, rows, cols)
    aligned = _alignment(store, side_a, side_b)
    if aligned is not None:
        moved = AlignedMap(b, *aligned)
        if is_wide(a.shape, a.mask, *region):
            return aligned_viewport(store, side_a, side_b, moved, *region, height, width, reduce)
        values = _streamed(a, moved, *region, height, width, reduce)
    elif is_wide_pair(a, b, *region, reduce):
        return pair_viewport(store, side_a, side_b, *region, height, width, reduce)
    else:
        values = difference_pixels(a, b, *region, height, width, reduce)
    return Viewport.of(values, *region, a.shape, reduce)


def difference_progress(
    store: Store,
    run_a: int,
    run_b: int,
    layer: int,
    head: int,
    rows: Region = None,
    cols: Region = None,
    reduce: str = "signed_max",
    *,
    layer_b: int | None = None,
    head_b: int | None = None,
) -> float:
    """1.0 where `difference` need not wait for blocks of this region; else the share built, which this call starts.

    Raises ViewError as `difference` does.
    """
    _check_reduction(reduce)
    a, b = _side(store, run_a, layer, head), _second(store, run_b, layer, head, layer_b, head_b)
    region = region_of(a.full_map.shape, rows, cols)
    if (aligned := _alignment(store, a, b)) is not None:
        if not is_wide(a.full_map.shape, a.full_map.mask, *region):
            return 1.0
        return aligned_progress(store, a, b, AlignedMap(b.full_map, *aligned))
    if not is_wide_pair(a.full_map, b.full_map, *region, reduce):
        return 1.0
    return pair_progress(store, a, b, reduce)


def difference_pixels(
    a: AttentionMap,
    b: AttentionMap,
    rows: tuple[int, int],
    cols: tuple[int, int],
    height: int,
    width: int,
    reduce: str = "signed_max",
) -> np.ndarray:
    """float32 [<= height, <= width] of A - B, streamed: no more than a block of rows is ever held."""
    if reduce == "mean":
        part = slice(*rows), slice(*cols)
        return a.pool(*part, height, width, "mean") - b.pool(*part, height, width, "mean")
    return _streamed(a, b, rows, cols, height, width, reduce)


def _streamed(
    a: AttentionMap,
    b: AttentionMap | AlignedMap,
    rows: tuple[int, int],
    cols: tuple[int, int],
    height: int,
    width: int,
    reduce: str,
) -> np.ndarray:
    fold = furthest if reduce == "signed_max" else known_mean
    row_edges, col_edges = pixel_edges(*rows, height), pixel_edges(*cols, width)
    out = np.empty((len(row_edges) - 1, len(col_edges) - 1), np.float32)
    per_block = max(1, BLOCK_CELLS // ((cols[1] - cols[0]) * int(np.diff(row_edges).max())))
    for top in range(0, len(out), per_block):
        edges = row_edges[top : top + per_block + 1]
        part = slice(int(edges[0]), int(edges[-1])), slice(*cols)
        gap = a.tile(*part) - b.tile(*part)
        out[top : top + len(edges) - 1] = fold(gap, edges - edges[0], col_edges - col_edges[0])
    return out


def allowed_difference(
    store: Store, view: Viewport, first: tuple[int, int, int], second: tuple[int, int, int]
) -> np.ndarray:
    """bool [height, width]: pixels of `difference` under which either map may have a weight, and B has the tokens.

    Args:
        first, second: (run, layer, head) of A and B.
    """
    maps = [load_map(store, *at) for at in (first, second)]
    runs, shapes = (first[0], second[0]), (maps[0].shape, maps[1].shape)
    allowed = allowed_in(view, maps[0])
    if runs[0] == runs[1] or needed_alignment(store, *runs, *shapes) is None:
        return allowed | allowed_in(view, maps[1])
    # B's cells stand elsewhere: what it gives where A may not is known by its weight
    return np.isfinite(view.values) & (allowed | (view.values != 0))


@dataclass(frozen=True)
class MapDistance:
    """How far the maps of two runs are apart, mean over query rows, for each layer and head.

    Attributes:
        layers: the layers that both runs recorded.
        total_variation: float64 [layers, heads], half the sum of |p - q|: 0 equal, 1 disjoint (of signed
            weights it may be larger).
        jensen_shannon: float64 [layers, heads], in bits: 0 equal, 1 disjoint (Lin 1991); NaN in layers where
            weights of a run may be negative, which are no distribution.
        rows_used, rows_total: query rows the means are over, and query rows there are.
        note: the sampling in words, and what has no Jensen-Shannon divergence.
    """

    layers: list[int]
    total_variation: np.ndarray
    jensen_shannon: np.ndarray
    rows_used: int
    rows_total: int
    note: str

    @property
    def sampled(self) -> bool:
        return self.rows_used < self.rows_total

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "total_variation": self.total_variation.tolist(),
            "jensen_shannon": [
                [None if np.isnan(x) else x for x in row] for row in self.jensen_shannon.tolist()
            ],
            "rows_used": self.rows_used,
            "rows_total": self.rows_total,
            "sampled": self.sampled,
            "note": self.note,
        }


def map_distance(
    store: Store, run_a: int, run_b: int, layers: Sequence[int] | None = None, max_rows: int = 128
) -> MapDistance:
    """Total variation and Jensen-Shannon divergence between two runs' maps, streamed by row blocks.

    Maps with more than ``max_rows`` queries are sampled: evenly spaced blocks of eight rows up to the last.

    Raises ViewError where the runs share no layer, or a layer differs in heads or shape.
    """
    if max_rows < 1:
        raise ViewError(f"max_rows must be at least 1; got {max_rows}")
    (row_a, found_a), (row_b, found_b) = recorded(store, run_a), recorded(store, run_b)
    traces_a = {trace.layer: trace for trace in found_a}
    traces_b = {trace.layer: trace for trace in found_b}
    common = sorted(traces_a.keys() & traces_b.keys())
    wanted = common if layers is None else list(layers)
    if not wanted or not set(wanted) <= set(common):
        raise ViewError(f"layers must be some of those that both runs recorded, {common}; got {list(wanted)}")
    for layer in wanted:
        one, other = traces_a[layer], traces_b[layer]
        if one.heads != other.heads:
            text = f"layer {layer} has {one.heads} heads in run {run_a} and {other.heads} in run {run_b}"
            raise ViewError(f"maps are compared head by head; {text}")
        _same_shape(run_a, run_b, (one.num_queries, one.num_keys), (other.num_queries, other.num_keys))
    total = max(traces_a[layer].num_queries for layer in wanted)
    signed = [layer for layer in wanted if is_signed(traces_a[layer]) or is_signed(traces_b[layer])]
    pairs = [
        [
            _distances(
                head_map(store, row_a, traces_a[layer], head),
                head_map(store, row_b, traces_b[layer], head),
                max_rows,
                signed=layer in signed,
            )
            for head in range(traces_a[layer].heads)
        ]
        for layer in wanted
    ]
    table = np.array(pairs, dtype=np.float64)
    used = sum(stop - start for start, stop in sample_rows(total, max_rows))
    note = f"mean over all {total} query rows"
    if used < total:
        note = f"mean over {used} of {total} query rows: evenly spaced blocks of {SAMPLE_BLOCK}"
    if signed:
        note = f"{note}; {NO_DIVERGENCE}"
    return MapDistance(wanted, table[..., 0], table[..., 1], used, total, note)


def sample_rows(total: int, most: int) -> list[tuple[int, int]]:
    """Disjoint row ranges that hold all rows, or about ``most`` of them evenly spread up to the last row."""
    if total <= most:
        return [(start, min(start + SAMPLE_BLOCK, total)) for start in range(0, total, SAMPLE_BLOCK)]
    size = min(SAMPLE_BLOCK, most)
    starts = np.linspace(0, total - size, max(1, most // size)).astype(int)
    if len(starts) == 1:
        starts = np.array([total - size])
    return [(int(start), int(start) + size) for start in starts]


def _distances(a: AttentionMap, b: AttentionMap, max_rows: int, *, signed: bool) -> tuple[float, float]:
    spans = sample_rows(a.shape[0], max_rows)
    count = sum(stop - start for start, stop in spans)
    variation = divergence = 0.0
    for p, q in _row_blocks(a, b, spans):
        variation += 0.5 * float(np.abs(p - q).sum())
        if signed:
            continue
        middle = _plogp(0.5 * (p + q))
        divergence += middle - 0.5 * (_plogp(p) + _plogp(q))
    return variation / count, np.nan if signed else max(0.0, divergence / count)


def _row_blocks(
    a: AttentionMap, b: AttentionMap, spans: list[tuple[int, int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of both maps in float64, over the keys that either mask allows there."""
    size = {"num_queries": a.shape[0], "num_keys": a.shape[1]}
    for start, stop in spans:
        ranges = [m.mask.key_range(start, stop, **size) for m in (a, b)]
        ranges = [(lo, hi) for lo, hi in ranges if lo < hi]
        if ranges:
            keys = slice(min(lo for lo, _ in ranges), max(hi for _, hi in ranges))
            part = slice(start, stop)
            yield a.tile(part, keys).astype(np.float64), b.tile(part, keys).astype(np.float64)


def _plogp(p: np.ndarray) -> float:
    """Entropy in bits, summed over all rows."""
    return -float((p * np.log2(np.maximum(p, np.finfo(np.float64).tiny))).sum())


def _side(store: Store, run_id: int, layer: int, head: int) -> Side:
    run, trace = find_trace(store, run_id, layer)
    return Side(run, layer, head, head_map(store, run, trace, head))


def _second(
    store: Store, run_id: int, layer: int, head: int, layer_b: int | None, head_b: int | None
) -> Side:
    """B, of A's layer and head where it has none of its own."""
    return _side(store, run_id, layer if layer_b is None else layer_b, head if head_b is None else head_b)


def _alignment(store: Store, a: Side, b: Side) -> tuple[Alignment, Alignment] | None:
    """How the tokens of both belong together, None where they are the same; ViewError where they cannot be matched."""
    shapes = a.full_map.shape, b.full_map.shape
    found = None if a.run.id == b.run.id else needed_alignment(store, a.run.id, b.run.id, *shapes)
    if found is None:
        _same_shape(a.run.id, b.run.id, *shapes)
    return found


def _check_reduction(reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise ViewError(f"reduce of a difference must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")


def _same_shape(run_a: int, run_b: int, shape_a: tuple[int, int], shape_b: tuple[int, int]) -> None:
    if shape_a != shape_b:
        sizes = f"run {run_a} has {shape_a[0]} x {shape_a[1]}, run {run_b} {shape_b[0]} x {shape_b[1]}"
        raise ViewError(f"a difference needs maps of the same size; {sizes}")
