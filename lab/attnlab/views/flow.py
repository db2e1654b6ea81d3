"""Attention flow: how much can flow from a position down to each input token through all layers at once.

The layers are a network: from position i above layer l to position j below it an edge of capacity
``A~_l[i, j] = (1 - r) mean_h A_h[i, j] + r [i = j]``. The flow of a token is the maximum flow from the target at
the top to that token at the bottom (Abnar and Zuidema 2020, arXiv 2005.00928). Unlike the rollout, which multiplies,
it is limited by the narrowest cut between the two, so the flows of several tokens do not sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.rollout import self_attention
from attnlab.views.trace_map import is_signed
from attnlab.views.viewport import head_map
from attnlab_storage.database import Store

MOST_TOKENS = 96
SCALE = 2**30
"""a capacity of 1 as an integer: what leaves the target then still fits 32 bits"""


@dataclass(frozen=True)
class Flow:
    """What can flow from one position to the tokens of a range.

    Attributes:
        values: float64 [stop - start]: the maximum flow to each token.
        row: the target.
        start, stop: the range; positions outside are no part of the network.
        inside: float64 [layers]: the share of each layer's weights, from layer 0 up, that stays in the range (mean over
            its rows down from the target).
        error: a bound of the error of ``values``: capacities are rounded to multiples of 2^-30.
    """

    values: np.ndarray
    row: int
    start: int
    stop: int
    inside: np.ndarray
    error: float


def attention_flow(
    store: Store,
    run_id: int,
    row: int,
    span: tuple[int, int] | None = None,
    *,
    residual: float = 0.5,
    progress: Callable[[float], None] = lambda done: None,
) -> Flow:
    """The flow from position ``row`` to each token of ``span`` (None: the 96 up to the row).

    Args:
        residual: the share of each layer that passes by its attention, from 0 to 1.

    Raises ViewError for a row or range that is not there, more than 96 tokens, runs whose layers are not all kept or
    no self-attention, and maps with negative weights, which are no capacities.
    """
    run, traces = self_attention(store, run_id)
    start, stop = flow_span(traces[0].num_queries, row, span)
    if not 0 <= residual <= 1:
        raise ViewError(f"residual must be from 0 to 1; got {residual}")
    if any(is_signed(trace) for trace in traces):
        raise ViewError(f"a flow needs weights of at least 0; run {run_id} has signed maps")
    layers, inside = [], []
    for trace in traces:
        mixed = np.zeros((stop - start, stop - start))
        for head in range(trace.heads):
            full_map = head_map(store, run, trace, head)
            weights = full_map.tile(slice(start, stop), slice(None)).astype(np.float64)
            total = weights.sum(1, keepdims=True)
            mixed += (weights / np.where(total > 0, total, 1))[:, start:stop] / trace.heads
        inside.append(mixed[: row - start + 1].sum(1).mean())
        layers.append((1 - residual) * mixed + residual * np.eye(stop - start))
        progress(0.5 * len(layers) / len(traces))
    values, edges = max_flows(np.stack(layers), row - start, lambda done: progress(0.5 + 0.5 * done))
    return Flow(values, row, start, stop, np.array(inside), 0.5 * edges / SCALE)


def flow_span(size: int, row: int, span: tuple[int, int] | None) -> tuple[int, int]:
    """The tokens of a flow from ``row``, those of ``span`` or the 96 up to the row; ViewError where they cannot be."""
    if not 0 <= row < size:
        raise ViewError(f"row must be in 0..{size - 1}; got {row}")
    start, stop = span or (max(0, row + 1 - MOST_TOKENS), row + 1)
    if not 0 <= start <= row < stop <= size or stop - start > MOST_TOKENS:
        rule = f"must be at most {MOST_TOKENS} tokens start:stop of {size} that hold row {row}"
        raise ViewError(f"span {rule}; got {start}:{stop}")
    return start, stop


def max_flows(
    layers: np.ndarray, target: int, progress: Callable[[float], None] = lambda done: None
) -> tuple[np.ndarray, int]:
    """The maximum flow from ``target`` above the last layer to each token below the first, and the number of edges.

    Args:
        layers: float64 [layers, tokens, tokens]: capacities from a row above to a column below, from layer 0 up; each
            row sums to at most 1.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    depth, tokens, _ = layers.shape
    capacity = np.rint(layers * SCALE).astype(np.int32)
    capacity[-1, np.arange(tokens) != target] = 0  # nothing comes in there
    layer, above, below = np.nonzero(capacity)
    sources, sinks = (layer + 1) * tokens + above, layer * tokens + below
    nodes = (depth + 1) * tokens
    network: Any = csr_array((capacity[layer, above, below], (sources, sinks)), shape=(nodes, nodes))
    values = np.zeros(tokens)
    for token in range(tokens):
        found = maximum_flow(network, depth * tokens + target, token, method="dinic")
        values[token] = found.flow_value / SCALE
        progress((token + 1) / tokens)
    return values, len(layer)
