"""What each head does, in numbers, streamed from Q, K and log-sum-exp: no n x n matrix is formed.

`attnlab.views.statistics.STATISTICS` has the formula and the source of each.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_storage.results import MeasurementRow

from ..hook import LayerCall
from ..views.statistics import COVERED, CURVE_POINTS, LOCAL_BAND, STATISTICS, TOP_KEYS
from ..views.trace_map import SOFTMAX_KINDS
from .head_sums import Block, HeadSums
from .map_checks import exact_maps
from .maps import BLOCK_CELLS, first_element, grouped_scores, kind_of, score_rules, trace_of
from .score_rules import ScoreRules
from .token_facts import TokenFacts

CONSTANTS: dict[str, dict[str, Any]] = {
    "local_mass": {"band": LOCAL_BAND},
    "top_mass": {"keys": TOP_KEYS},
    "coverage_keys": {"mass": COVERED},
}


class HeadStatistics(NamedTuple):
    """Rows for the store, and curves float32 [Hq, points] by name."""

    rows: list[MeasurementRow]
    curves: dict[str, np.ndarray]


class AnyMap(Protocol):
    """One head's map, of whatever kind."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def mask(self) -> Mask: ...

    def tile(self, rows: slice, cols: slice) -> np.ndarray: ...


def head_statistics(call: LayerCall, tokens: TokenFacts | None = None) -> HeadStatistics:
    """Return every statistic of each head of batch element 0, mean over the rows that may attend to anything.

    What no row has (a copy of its token, a needle) is left out.
    """
    one = first_element(call)
    norms = torch.linalg.vector_norm(one.value[0].double(), dim=-1)
    heads, num_queries = one.query.shape[1:3]
    shape = (heads, num_queries, one.key.shape[2])
    sums = HeadSums(
        shape,
        first_key(one.mask, shape[2]),
        tokens,
        norms.repeat_interleave(heads // len(norms), 0),
        one.query.device,
    )
    rules = score_rules(one)
    for span in _spans(one.mask, shape):
        sums.add(_softmax_block(one, rules, *span))
    return _finished(sums, call.layer)


def statistics_of(call: LayerCall, tokens: TokenFacts | None = None) -> HeadStatistics:
    """Return the statistics of a call whatever its map is."""
    if kind_of(call) in SOFTMAX_KINDS:
        return head_statistics(call, tokens)
    one = first_element(call)
    return map_statistics(exact_maps(one, trace_of(one)), call.layer, tokens)


def map_statistics(maps: Sequence[AnyMap], layer: int, tokens: TokenFacts | None = None) -> HeadStatistics:
    """`head_statistics` of maps of any kind, one a head; of a signed map each row's absolute weights, summing to 1."""
    mask = maps[0].mask
    shape = (len(maps), *maps[0].shape)
    sums = HeadSums(shape, first_key(mask, shape[2]), tokens, None, torch.device("cpu"))
    size = {"num_queries": shape[1], "num_keys": shape[2]}
    for start, stop, low, high in _spans(mask, shape):
        tiles = np.stack([one.tile(slice(start, stop), slice(low, high)) for one in maps])
        allowed = mask.allowed(np.arange(start, stop), np.arange(low, high), **size)
        sums.add(Block(torch.from_numpy(np.abs(tiles)), allowed, start, low))
    return _finished(sums, layer)


def first_key(mask: Mask, num_keys: int) -> int:
    """Return the first key that exists (of a padded batch element, where its sequence begins)."""
    return min(mask.band().key_interval(num_keys)[0], num_keys - 1)


def _finished(sums: HeadSums, layer: int) -> HeadStatistics:
    rows = []
    for name, values in sums.means().items():
        for head, value in enumerate(values.tolist()):
            detail = CONSTANTS.get(name)
            if name == "heavy_hitter_mass":
                columns, mass = sums.heavy_columns(head)
                detail = {"columns": columns, "mass": mass}
            elif name in ("duplicate_token", "induction", "needle_mass"):
                detail = {"queries": sums.rows[name]}
            rows.append(MeasurementRow(name, value, STATISTICS[name].unit, layer, head, detail=detail))
    if not rows:
        return HeadStatistics([], {})
    live = np.where(sums.live, 1.0, 0.0)
    entropy = _pooled(sums.row_entropy.cpu().numpy(), live)
    mass = _pooled(sums.column_mass.cpu().numpy(), np.ones(sums.keys))
    return HeadStatistics(rows, {"row_entropy": entropy, "column_mass": mass})


def _pooled(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float32 [heads, <= CURVE_POINTS]: weighted means of neighbours, NaN where no row is alive."""
    length = values.shape[1]
    starts = np.arange(min(CURVE_POINTS, length)) * length // min(CURVE_POINTS, length)
    with np.errstate(invalid="ignore"):
        pooled = np.add.reduceat(values * weight, starts, axis=1) / np.add.reduceat(weight, starts)
    return pooled.astype(np.float32)


def _spans(mask: Mask, shape: tuple[int, int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, last row + 1, first key, last key + 1): the keys that the mask allows those rows."""
    heads, num_queries, num_keys = shape
    visited = mask.count(num_queries, num_keys) // max(1, num_queries)
    cells = BLOCK_CELLS // heads
    # a block of s rows touches about visited + s keys, never more than there are
    step = max(1, int((math.sqrt(visited**2 + 4 * cells) - visited) / 2), cells // num_keys)
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        low, high = mask.key_range(start, stop, num_queries=num_queries, num_keys=num_keys)
        if low < high:
            yield start, stop, low, high


def _softmax_block(call: LayerCall, rules: ScoreRules, start: int, stop: int, low: int, high: int) -> Block:
    """Return the weights of some rows, rebuilt from Q, K and the kernel's log-sum-exp."""
    wide = torch.promote_types(call.query.dtype, torch.float32)
    size = {"num_queries": call.query.shape[2], "num_keys": call.key.shape[2]}
    query, key = call.query[0][:, start:stop].to(wide), call.key[0][:, low:high].to(wide)
    places = (torch.arange(*span, device=query.device) for span in ((start, stop), (low, high)))
    scores = rules.apply(grouped_scores(query, key).mul_(call.scale), *places)
    allowed = call.mask.allowed(np.arange(start, stop), np.arange(low, high), **size)
    scores -= call.lse[0][:, start:stop].to(wide)[..., None].nan_to_num(neginf=0.0)
    weights: Tensor = scores.exp_()
    if not allowed.all():
        weights.masked_fill_(torch.as_tensor(~allowed, device=weights.device), 0)
    return Block(weights, allowed, start, low)
