"""What holds for a map of any kind beyond plain softmax: its normaliser, its row sums, the output that it gives."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from attnlab_kernels.difference_map import DifferenceMap
from attnlab_kernels.linear_map import LinearMap
from attnlab_kernels.neighborhood import NeighborhoodMap
from attnlab_kernels.sparse_map import SparseMap
from attnlab_storage.results import TraceRow

from ..hook import LayerCall
from ..views.trace_map import AttentionMap, make_map, map_facts
from .score_rules import rules_of

Arrays = Mapping[str, np.ndarray]
"""[heads, S, D] or [heads, S] by name"""


def normaliser_names(kind: str) -> tuple[str, ...]:
    """What the stored normaliser of a kind is called."""
    return {"linear": ("denominator",), "difference": ("lse", "second_lse")}.get(kind, ("lse",))


def map_of(row: TraceRow, arrays: Arrays, head: int) -> AttentionMap:
    """The map of one head from arrays in memory."""
    return make_map(row, head, lambda name, at: arrays[name][at])


def exact_normalisers(row: TraceRow, arrays: Arrays) -> dict[str, np.ndarray]:
    """float64 [heads, S] by name, from the stored queries and keys."""
    blank = dict.fromkeys(normaliser_names(row.kind), np.zeros((row.heads, row.num_queries)))
    found: dict[str, list[np.ndarray]] = {name: [] for name in blank}
    for head in range(row.heads):
        drawn = map_of(row, {**arrays, **blank}, head)
        if isinstance(drawn, LinearMap):
            eps = map_facts(row)["eps"]
            ones = np.ones(row.num_queries)
            found["denominator"].append(ones if eps is None else drawn.exact_denominator(eps))
        else:
            assert isinstance(drawn, SparseMap | NeighborhoodMap)
            found["lse"].append(drawn.exact_lse())
    return {name: np.stack(values) for name, values in found.items()}


def expected_sums(row: TraceRow, drawn: AttentionMap) -> np.ndarray:
    """What each row must sum to, known without summing its weights."""
    if isinstance(drawn, LinearMap):
        below = drawn.denominator.astype(np.float64)
        return drawn.exact_denominator(0.0) / np.where(below == 0, 1, below)
    if isinstance(drawn, DifferenceMap):
        return np.isfinite(drawn.first.lse) - drawn.weight * np.isfinite(drawn.second.lse)
    assert isinstance(drawn, SparseMap | NeighborhoodMap)
    return np.isfinite(drawn.lse).astype(np.float64)


def row_defect(row: TraceRow, arrays: Arrays, rows: np.ndarray) -> float:
    """How far these rows of the map, as the viewer draws it, are from what they must sum to."""
    worst = 0.0
    for head in range(row.heads):
        drawn = map_of(row, arrays, head)
        wanted = expected_sums(row, drawn)
        for place in rows:
            total = drawn.tile(slice(place, place + 1), slice(None)).sum(dtype=np.float64)
            worst = max(worst, abs(total - wanted[place]) / max(1.0, abs(wanted[place])))
    return float(worst)


def mixed_values(drawn: AttentionMap, call: LayerCall, head: int, rows: np.ndarray) -> np.ndarray:
    """The map times the values of batch element 0, float64 [rows, Dv]."""
    attention = call.attention
    assert attention is not None
    kv_head = head * call.value.shape[1] // call.query.shape[1]
    value = wide(call.value[0, kv_head])
    special = wide(attention.row_values[0][0, kv_head]) if attention.row_values else None
    first = attention.extra["global_query"].shape[2] if special is not None else 0
    made = []
    for place in rows:
        weights = drawn.tile(slice(place, place + 1), slice(None))[0].astype(np.float64)
        own = special if special is not None and place < first else value
        made.append(weights[: len(own)] @ own)
    return np.stack(made)


def output_distance(row: TraceRow, arrays: Arrays, call: LayerCall, rows: np.ndarray) -> float:
    """The largest distance of the map times V from the mechanism's own output, on these rows."""
    worst = 0.0
    for head in range(row.heads):
        mixed = mixed_values(map_of(row, arrays, head), call, head, rows)
        worst = max(worst, float(np.abs(mixed - wide(call.output[0, head])[rows]).max()))
    return worst


def call_arrays(call: LayerCall) -> dict[str, np.ndarray]:
    """What the mechanism itself told, batch element 0, its own normaliser included."""
    kind, extra = ("softmax", {}) if call.attention is None else (call.attention.kind, call.attention.extra)
    named = {"query": call.query, "key": call.key, normaliser_names(kind)[0]: call.lse}
    arrays = {name: wide(tensor[0]) for name, tensor in {**named, **extra}.items()}
    rules = rules_of(call.extras, call.query.shape[1], call.query.shape[2], call.key.shape[2])
    return arrays | {name: wide(tensor) for name, tensor in rules.stored().items()}


def exact_maps(call: LayerCall, row: TraceRow) -> list[AttentionMap]:
    """Every head's map of batch element 0, its normaliser in float64 for the kinds that have one."""
    arrays = call_arrays(call)
    if row.kind in ("linear", "sparse", "neighborhood"):
        arrays |= exact_normalisers(row, arrays)
    return [map_of(row, arrays, head) for head in range(row.heads)]


def wide(tensor: torch.Tensor) -> np.ndarray:
    """As numpy, float64 kept and all else float32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(dtype).cpu().numpy()


def with_facts(row: TraceRow, **facts: Any) -> TraceRow:
    """The trace with more in its detail."""
    return replace(row, detail={**(row.detail or {}), **facts})
