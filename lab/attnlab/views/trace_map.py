"""From a trace to its map, whatever the mechanism: one protocol over every kind of map. Torch-free.

A trace's ``kind`` and the facts under ``map`` in its detail say how the stored tensors become weights. The softmax
kinds share one rule, ``exp(scale q k - lse)``; they differ in what is drawn over it, see ``overlays``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np

from attnlab.views.errors import ViewError
from attnlab_kernels.difference_map import DifferenceMap
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.linear_map import LinearMap
from attnlab_kernels.masks import Mask, mask_from_json
from attnlab_kernels.neighborhood import Neighborhood, NeighborhoodMap
from attnlab_kernels.patterns import pattern_from_json
from attnlab_kernels.score_bias import DenseBias, RelativeBias
from attnlab_kernels.sparse_map import SparseMap
from attnlab_storage.results import TraceRow

SOFTMAX_KINDS = frozenset({"softmax", "latent", "experts", "paged", "ring", "chunked", "slots", "reduced"})
"""maps of queries and keys under a mask; a slot or a cell of ``slots`` and ``reduced`` stands where a key does"""
BY_KEY_HEAD = frozenset({"key", "second_key", "global_key"})
"""tensors that have a head for each key head; the others have one for each query head"""

SCORE_BIAS = "score_bias"
"""the tensor [heads, ..] of what is added to the scores: by distance, or whole"""

Read: TypeAlias = Callable[[str, int], np.ndarray]
"""a stored tensor by its name and head"""


class AttentionMap(Protocol):
    """One head's map: any region of it, exact."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of keys (or slots, or cells)."""
        ...

    @property
    def mask(self) -> Mask:
        """Holds every pair that may have a weight; a pattern may leave out more."""
        ...

    def tile(self, rows: slice, cols: slice) -> np.ndarray:
        """float32 weights [rows, cols]; 0 where forbidden."""
        ...

    def pool(self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max") -> np.ndarray:
        """At most height x width pixels, each the maximum (of a signed map the largest size) or the mean."""
        ...

    def row_sums(self) -> np.ndarray:
        """float64 sum of each row."""
        ...


def map_facts(trace: TraceRow) -> Mapping[str, Any]:
    """What a trace says of its map beyond queries, keys and mask."""
    return (trace.detail or {}).get("map", {})


def score_facts(trace: TraceRow) -> Mapping[str, Any]:
    """What happened to its scaled scores besides the mask: soft cap, slopes, sinks, which form of bias."""
    return (trace.detail or {}).get("score", {})


def is_signed(trace: TraceRow) -> bool:
    """Whether weights may be below 0."""
    return trace.kind == "difference" or map_facts(trace).get("features") == "identity"


def column_word(trace: TraceRow) -> str:
    """What a column stands for: "key", or the "slot" or "cell" that is a mixture of keys and no token."""
    return {"slots": "slot", "reduced": "cell"}.get(trace.kind, "key")


def make_map(trace: TraceRow, head: int, read: Read) -> AttentionMap:
    """The map of one head from what ``read`` gives; ViewError for a kind that this version does not know."""

    def tensor(name: str) -> np.ndarray:
        return read(name, head * trace.kv_heads // trace.heads if name in BY_KEY_HEAD else head)

    mask, facts = mask_from_json(trace.mask), map_facts(trace)
    if trace.kind in SOFTMAX_KINDS:
        plain = (tensor("query"), tensor("key"), tensor("lse"), trace.scale, mask)
        return SoftmaxMap(*plain, **_score_rules(trace, head, tensor))
    if trace.kind == "linear":
        return LinearMap(tensor("query"), tensor("key"), tensor("denominator"), mask)
    if trace.kind == "difference":
        return DifferenceMap(
            SoftmaxMap(tensor("query"), tensor("key"), tensor("lse"), trace.scale, mask),
            SoftmaxMap(tensor("second_query"), tensor("second_key"), tensor("second_lse"), trace.scale, mask),
            tensor("lambda"),
        )
    if trace.kind == "sparse":
        own = [tensor(name) for name in ("global_query", "global_key") if name in facts["tensors"]]
        pattern = pattern_from_json(facts["pattern"])
        plain = (tensor("query"), tensor("key"), tensor("lse"), trace.scale)
        return SparseMap(*plain, pattern, head, mask, 0, *own)
    if trace.kind == "neighborhood":
        near = neighborhood_of(facts)
        bias = None
        if "position_table" in facts["tensors"]:
            bias = tensor("position_table").reshape([2 * size - 1 for size in near.kernel_size])
        return NeighborhoodMap(tensor("query"), tensor("key"), tensor("lse"), trace.scale, near, bias)
    known = ", ".join(sorted(SOFTMAX_KINDS | {"linear", "difference", "sparse", "neighborhood"}))
    raise ViewError(f"the map's kind must be one of {known}; got {trace.kind!r}")


def _score_rules(trace: TraceRow, head: int, tensor: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """What `SoftmaxMap` takes besides queries, keys, log-sum-exp, scale and mask."""
    told = score_facts(trace)
    rules: dict[str, Any] = {"softcap": told.get("softcap")}
    for name, field in (("alibi", "alibi"), ("sinks", "sink")):
        if name in told:
            rules[field] = told[name][head]
    if told.get("bias") == "by_distance":
        rules["bias"] = RelativeBias(tensor(SCORE_BIAS), 1 - trace.num_keys)
    elif told.get("bias") == "dense":
        rules["bias"] = DenseBias(tensor(SCORE_BIAS))
    return rules


def neighborhood_of(facts: Mapping[str, Any]) -> Neighborhood:
    """The windows that a neighborhood trace describes."""
    names = ("space", "kernel_size", "dilation", "stride", "causal")
    return Neighborhood(*(tuple(facts[name]) for name in names))
