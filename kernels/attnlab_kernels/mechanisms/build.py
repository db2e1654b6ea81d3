"""A mechanism by its catalog id, with parameters checked against the catalog."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from attnlab_kernels.catalog import mechanism, validate_parameters
from attnlab_kernels.mechanisms.chunked_prefill import ChunkedPrefill
from attnlab_kernels.mechanisms.cross_attention import CrossAttention
from attnlab_kernels.mechanisms.differential_attention import DifferentialAttention
from attnlab_kernels.mechanisms.efficient_attention import EfficientAttention
from attnlab_kernels.mechanisms.flash import FlashAttention
from attnlab_kernels.mechanisms.flash_attention_3 import FlashAttention3
from attnlab_kernels.mechanisms.grouped_query import GroupedQueryAttention
from attnlab_kernels.mechanisms.linear_attention import LinearAttention
from attnlab_kernels.mechanisms.linformer import LinformerAttention
from attnlab_kernels.mechanisms.multi_head import MultiHeadAttention
from attnlab_kernels.mechanisms.multi_head_latent import MultiHeadLatentAttention
from attnlab_kernels.mechanisms.neighborhood_attention import NeighborhoodAttention
from attnlab_kernels.mechanisms.paged import PagedAttention
from attnlab_kernels.mechanisms.ring_attention import RingAttention
from attnlab_kernels.mechanisms.self_attention import SelfAttention
from attnlab_kernels.mechanisms.sliding_window import SlidingWindowAttention
from attnlab_kernels.mechanisms.sparse_attention import SparseAttention
from attnlab_kernels.mechanisms.switch_head import SwitchHeadAttention

# arguments of the modules, beside the catalog's parameters; each module takes those that it has
SHARED = ("bias", "causal", "dropout", "implementation", "layer_idx", "rope_base", "use_rotary")
Settings = dict[str, Any]


def build_mechanism(mechanism_id: str, *, dim: int, num_heads: int, **parameters: Any) -> nn.Module:
    """The module of a catalog entry.

    Args:
        dim: model width.
        num_heads: query heads.
        parameters: the catalog's parameters, and any of ``SHARED``. Without dropout unless asked for.

    Raises:
        CatalogError: unknown, or a parameter that does not fit; ValueError from the module.
    """
    mechanism(mechanism_id)
    shared = {"dropout": 0.0} | {name: parameters.pop(name) for name in SHARED if name in parameters}
    own = validate_parameters(mechanism_id, parameters)
    return BUILDERS[mechanism_id](own, {"dim": dim, "num_heads": num_heads} | shared)


def quarter(num_heads: int) -> int:
    """A quarter of the heads, or the next smaller divisor."""
    return next(count for count in range(max(1, num_heads // 4), 0, -1) if num_heads % count == 0)


def _grouped_query(own: Settings, shared: Settings) -> nn.Module:
    own["num_kv_heads"] = own["num_kv_heads"] or quarter(shared["num_heads"])
    return GroupedQueryAttention(**own, **shared)


def _cross(own: Settings, shared: Settings) -> nn.Module:
    # how long the context is, its reader decides
    return CrossAttention(context_dim=own["context_dim"], **_bidirectional(shared))


def _linear(own: Settings, shared: Settings) -> nn.Module:
    slots = {name: own.pop(name) for name in ("num_slots", "max_seq_length")}
    if own.pop("variant") == "linformer":
        return LinformerAttention(**slots, **_bidirectional(shared))
    return LinearAttention(**own, **shared)


def _efficient(own: Settings, shared: Settings) -> nn.Module:
    settings = {name: own[name] for name in ("variant", "chunk_size", "reduction")}
    plain = shared if own["variant"] == "memory_efficient" else _bidirectional(shared)
    return EfficientAttention(**settings, **plain)


def _differential(own: Settings, shared: Settings) -> nn.Module:
    if own.pop("lambda_schedule"):
        own["lambda_init"] = "schedule"
    return DifferentialAttention(**own, **shared)


def _neighborhood(own: Settings, shared: Settings) -> nn.Module:
    own.pop("grid_height")
    kept = {name: value for name, value in shared.items() if name in ("dim", "num_heads", "bias", "dropout")}
    causal = {"causal": shared["causal"]} if "causal" in shared else {}
    return NeighborhoodAttention(**own, **kept, **causal)


def _chunked_prefill(own: Settings, shared: Settings) -> nn.Module:
    kv_heads = own["num_kv_heads"] or shared["num_heads"]
    wrapped = GroupedQueryAttention(num_kv_heads=kv_heads, **shared)
    return ChunkedPrefill(own["chunk_size"], wrapped)


def _bidirectional(shared: Settings) -> Settings:
    """For what has no causal form: it sees every key whatever was asked for."""
    return {
        name: value for name, value in shared.items() if name not in ("causal", "use_rotary", "rope_base")
    }


def _plain(module: Callable[..., nn.Module]) -> Callable[[Settings, Settings], nn.Module]:
    return lambda own, shared: module(**own, **shared)


BUILDERS: dict[str, Callable[[Settings, Settings], nn.Module]] = {
    "multi_head": _plain(MultiHeadAttention),
    "self": _plain(SelfAttention),
    "cross": _cross,
    "flash": _plain(FlashAttention),
    "linear": _linear,
    "sparse": _plain(SparseAttention),
    "sliding_window": _plain(SlidingWindowAttention),
    "efficient": _efficient,
    "grouped_query": _grouped_query,
    "multi_head_latent": _plain(MultiHeadLatentAttention),
    "paged": _plain(PagedAttention),
    "flash_attention_3": _plain(FlashAttention3),
    "ring": _plain(RingAttention),
    "differential": _differential,
    "neighborhood": _neighborhood,
    "switch_head": _plain(SwitchHeadAttention),
    "chunked_prefill": _chunked_prefill,
}
