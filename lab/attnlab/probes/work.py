"""What one attention has to do, whatever computes it: operations on its mask's own pairs, bytes counted once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.patterns import Pattern, pattern_from_json

from ..hook import LayerCall

SOFTMAX_KINDS = frozenset(
    {"softmax", "latent", "experts", "paged", "ring", "chunked", "slots", "reduced", "difference"}
)
COUNTED = {"sparse": "pattern", "neighborhood": "neighbourhood"}
SAME_AS_SOFTMAX = frozenset({"softmax", "paged", "ring", "chunked"})
"""softmax attention of its own queries and keys, only stored or ordered in another way"""
BACKWARD_FACTOR = 2.5
"""a backward has five matrix products where the forward has two (Dao 2023, arXiv 2307.08691, section 4.1)"""


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one attention.

    Attributes:
        flops: floating-point operations, a multiplication and an addition counted as two.
        bytes: of every tensor that has to be read or written, each once.
        pairs: (query, key) pairs that mask or pattern allow, all batch elements together, of one head (the mean of the
            heads where these differ).
        factor: 1 for a forward, 1 + ``BACKWARD_FACTOR`` with its backward.
        counted: how, in words.
    """

    flops: int
    bytes: int
    pairs: int
    factor: float
    counted: str

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes


def work_of(call: LayerCall, backward: bool) -> Work | None:
    """Return what an attention has to do; None where nothing says its pairs (pixels that are hidden from everyone)."""
    kind = "softmax" if call.attention is None else call.attention.kind
    batch, heads, queries, dim = call.query.shape
    keys, values = call.key.shape[2], call.value.shape[3]
    pairs = _sparse_pairs(call) if kind in COUNTED else count_pairs(call.mask, batch, queries, keys)
    if pairs is None:
        return None
    if kind == "linear":
        # the state takes each key once and gives each query once; no pair is formed
        forward = 2 * batch * heads * (keys + queries) * dim * (values + 1)
        counted = "2 H (n + m) d (dv + 1), linear attention"
    elif kind in SOFTMAX_KINDS:
        forward = 2 * pairs * heads * (dim + values)
        counted = "2 H (d + dv) x the mask's pairs"
    elif kind in COUNTED:
        forward = round(2 * pairs * heads * (dim + values))
        counted = f"2 H (d + dv) x the {COUNTED[kind]}'s pairs"
    else:
        return None
    factor = 1 + BACKWARD_FACTOR if backward else 1.0
    inputs = _size(call.query) + _size(call.key) + _size(call.value)
    made = _size(call.output) + _size(call.lse)
    moved = inputs + made
    if backward:
        # reads its inputs, its output with the gradient of it, and the log-sum-exp; writes three gradients
        moved += inputs + made + _size(call.output) + inputs
    return Work(round(forward * factor), moved, round(pairs), factor, counted)


def _sparse_pairs(call: LayerCall) -> float | None:
    """Pairs of a pattern or a neighbourhood in all elements of the batch, the mean over heads."""
    told = call.attention
    assert told is not None
    if told.kind == "neighborhood":
        hidden = bool(told.unmapped)
        return None if hidden else float(call.query.shape[0] * Neighborhood(**_tuples(told.detail)).count())
    pattern = pattern_from_json(dict(told.detail["pattern"]))
    batch, heads, queries, _ = call.query.shape
    return pattern_pairs(pattern, call.mask, batch, heads, queries, call.key.shape[2])


def _tuples(detail: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(detail[name]) for name in ("space", "kernel_size", "dilation", "stride", "causal")}


def pattern_pairs(pattern: Pattern, mask: Mask, batch: int, heads: int, queries: int, keys: int) -> float:
    """Return how many pairs of a pattern a mask allows in all elements of a batch, the mean over heads.

    Costs what the pattern's tiles hold.
    """
    past, elements = keys - queries, range(batch if mask.form().batch_size > 1 else 1)
    total = 0
    for tiles in pattern.passes(past, keys, keys, heads):
        for tile in tiles:
            for columns, keep in zip(tile.keys, tile.keep, strict=True):
                for element in elements:
                    inside = mask.allowed(
                        tile.queries - past, columns, num_queries=queries, num_keys=keys, batch=element
                    )
                    total += int((keep & inside).sum()) * (heads // len(tile.keep))
    return total * (batch // len(elements)) / heads


def count_pairs(mask: Mask, batch: int, queries: int, keys: int) -> int:
    """Return how many (query, key) pairs a mask allows in all elements of a batch, of one head."""
    if mask.form().batch_size == 1:
        return batch * mask.count(queries, keys)
    return sum(mask.count(queries, keys, element) for element in range(batch))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
