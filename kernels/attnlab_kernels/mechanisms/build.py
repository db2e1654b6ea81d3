"""A mechanism by its catalog id, with parameters checked against the catalog."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnlab_kernels.catalog import MECHANISMS, CatalogError, mechanism, validate_parameters
from attnlab_kernels.mechanisms.base import SoftmaxModule
from attnlab_kernels.mechanisms.flash import FlashAttention
from attnlab_kernels.mechanisms.grouped_query import GroupedQueryAttention
from attnlab_kernels.mechanisms.multi_head import MultiHeadAttention
from attnlab_kernels.mechanisms.sliding_window import SlidingWindowAttention

BUILT: dict[str, Callable[..., SoftmaxModule]] = {
    "multi_head": MultiHeadAttention,
    "grouped_query": GroupedQueryAttention,
    "sliding_window": SlidingWindowAttention,
    "flash": FlashAttention,
}
# arguments of every module, beside the catalog's parameters
SHARED = ("bias", "causal", "dropout", "implementation", "layer_idx", "rope_base", "use_rotary")


def build_mechanism(mechanism_id: str, *, dim: int, num_heads: int, **parameters: Any) -> SoftmaxModule:
    """The module of a catalog entry.

    Args:
        dim: model width.
        num_heads: query heads.
        parameters: the catalog's parameters, and any of ``SHARED``. Without dropout unless asked for.

    Raises:
        CatalogError: unknown, or not for experiments yet, or a parameter that does not fit; ValueError from the module.
    """
    record = mechanism(mechanism_id)
    if mechanism_id not in BUILT:
        built = ", ".join(name for name in MECHANISMS if name in BUILT)
        raise CatalogError(f"mechanism must be one that experiments can run: {built}; got {record.id!r}")
    shared = {"dropout": 0.0} | {name: parameters.pop(name) for name in SHARED if name in parameters}
    own = validate_parameters(mechanism_id, parameters)
    if mechanism_id == "grouped_query" and own["num_kv_heads"] is None:
        own["num_kv_heads"] = quarter(num_heads)
    return BUILT[mechanism_id](dim=dim, num_heads=num_heads, **own, **shared)


def quarter(num_heads: int) -> int:
    """A quarter of the heads, or the next smaller divisor."""
    return next(count for count in range(max(1, num_heads // 4), 0, -1) if num_heads % count == 0)
