"""What one attention has to do, whatever computes it: operations on its mask's own pairs, bytes counted once."""

from dataclasses import dataclass

from torch import Tensor

from attnlab_kernels.masks import Mask

from ..hook import LayerCall

SOFTMAX_KINDS = frozenset(
    {"softmax", "latent", "experts", "paged", "ring", "chunked", "slots", "reduced", "difference"}
)
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
        pairs: (query, key) pairs that the mask allows, all batch elements together, of one head.
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
    """Return what an attention has to do; None where its pairs follow from no mask (patterns, neighbourhoods)."""
    kind = "softmax" if call.attention is None else call.attention.kind
    batch, heads, queries, dim = call.query.shape
    keys, values = call.key.shape[2], call.value.shape[3]
    pairs = count_pairs(call.mask, batch, queries, keys)
    if kind == "linear":
        # the state takes each key once and gives each query once; no pair is formed
        forward = 2 * batch * heads * (keys + queries) * dim * (values + 1)
        counted = "2 H (n + m) d (dv + 1), linear attention"
    elif kind in SOFTMAX_KINDS:
        forward = 2 * pairs * heads * (dim + values)
        counted = "2 H (d + dv) x the mask's pairs"
    else:
        return None
    factor = 1 + BACKWARD_FACTOR if backward else 1.0
    inputs = _size(call.query) + _size(call.key) + _size(call.value)
    made = _size(call.output) + _size(call.lse)
    moved = inputs + made
    if backward:
        # reads its inputs, its output with the gradient of it, and the log-sum-exp; writes three gradients
        moved += inputs + made + _size(call.output) + inputs
    return Work(round(forward * factor), moved, pairs, factor, counted)


def count_pairs(mask: Mask, batch: int, queries: int, keys: int) -> int:
    """Return how many (query, key) pairs a mask allows in all elements of a batch, of one head."""
    if mask.form().batch_size == 1:
        return batch * mask.count(queries, keys)
    return sum(mask.count(queries, keys, element) for element in range(batch))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
