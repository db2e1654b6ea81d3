"""Putting a mechanism into trained weights: what changes in each attention, and what kind of swap that is.

Exact swaps compute the same numbers another way. Approximate ones compute something else with the same
weights, so their loss has to be measured. Everything else is no swap and is refused with the reason.
"""

from collections.abc import Callable
from typing import Any

from attnlab_kernels.catalog import MECHANISMS
from attnlab_kernels.operations.softmax.api import Unsupported

from .swaps.eight_bit import FlashAttention3Swap
from .swaps.latent import LatentSwap
from .swaps.linear import LinearSwap, SeparableSwap
from .swaps.served import ChunkedPrefillSwap, MemoryEfficientSwap, PagedSwap, RingSwap
from .swaps.softmax import Attended, CrossSwap, ModelCall, Shape, Swap
from .swaps.sparse import NeighborhoodSwap, SparseSwap

__all__ = ["Attended", "ModelCall", "Shape", "Swap", "plan_swap"]

UNFUSED = ("eager", "sdpa_math")
"""implementations that form the n x n matrix"""

Given = dict[str, Any]


def plan_swap(mechanism: str, parameters: Given, implementation: str, *, seed: int = 0) -> Swap:
    """Return what a mechanism does inside a model. It keeps what it learns of the tokens: one for every run.

    Args:
        seed: of whatever the mechanism draws and has no seed of its own for.

    Raises:
        Unsupported: the mechanism cannot go into trained weights, or the implementation contradicts it.
    """
    known = MECHANISMS[mechanism]
    if known.swap == "not_applicable" or mechanism not in _PLANS:
        raise Unsupported(f"{mechanism}: cannot be put into trained weights: {known.swap_note}")
    swap = _PLANS[mechanism](implementation, known.validate(parameters))
    if isinstance(swap, LinearSwap):
        swap.seed = seed
    return swap


def _plain(mechanism: str) -> Callable[[str, Given], Swap]:
    def plan(implementation: str, given: Given) -> Swap:
        window, kv_heads = given.get("window_size"), given.get("num_kv_heads")
        return Swap(mechanism, implementation, window, kv_heads)

    return plan


def _cross(implementation: str, given: Given) -> Swap:
    return CrossSwap("cross", implementation)


def _flash(implementation: str, given: Given) -> Swap:
    if implementation in UNFUSED:
        raise Unsupported(f"flash: is fused, and {implementation} forms the n x n matrix")
    return Swap("flash", implementation)


def _efficient(implementation: str, given: Given) -> Swap:
    if given["variant"] == "memory_efficient":
        return MemoryEfficientSwap("efficient", implementation, chunk_size=given["chunk_size"])
    if given["variant"] == "linear":
        return SeparableSwap("efficient", implementation)
    raise Unsupported("efficient: spatial_reduction needs a trained convolution over a grid of tokens")


def _linear(implementation: str, given: Given) -> Swap:
    if given["variant"] != "kernel":
        raise Unsupported("linear: linformer mixes keys by projections that need training")
    if given["feature_map"] == "identity":
        raise Unsupported("linear: identity features divide by nothing, so their rows sum to anything")
    numbers = {name: given[name] for name in ("feature_map", "num_features", "eps")}
    return LinearSwap("linear", implementation, **numbers)


def _sparse(implementation: str, given: Given) -> Swap:
    numbers = {name: given[name] for name in given if name not in ("sparsity_pattern", "num_kv_heads")}
    return SparseSwap(
        "sparse",
        implementation,
        num_kv_heads=given["num_kv_heads"],
        pattern=given["sparsity_pattern"],
        numbers=numbers,
    )


def _neighborhood(implementation: str, given: Given) -> Swap:
    if given["dims"] != 1 or given["relative_position_bias"]:
        raise Unsupported(
            "neighborhood: a model's tokens lie on one axis here, and its weights have no bias for places in a window"
        )
    sizes = {name: given[name] for name in ("kernel_size", "dilation", "stride")}
    return NeighborhoodSwap("neighborhood", implementation, **sizes)


def _flash_attention_3(implementation: str, given: Given) -> Swap:
    return FlashAttention3Swap(
        "flash_attention_3",
        implementation,
        use_fp8=given["use_fp8"],
        fp8_block_size=given["fp8_block_size"],
    )


def _latent(implementation: str, given: Given) -> Swap:
    return LatentSwap("multi_head_latent", implementation, rank=given["kv_lora_rank"], form=given["form"])


def _paged(implementation: str, given: Given) -> Swap:
    sizes = {name: given[name] for name in ("num_kv_heads", "block_size", "num_blocks")}
    return PagedSwap("paged", implementation, **sizes)


def _ring(implementation: str, given: Given) -> Swap:
    sizes = {name: given[name] for name in ("num_kv_heads", "ring_size", "layout", "block_size")}
    return RingSwap("ring", implementation, **sizes)


def _chunked_prefill(implementation: str, given: Given) -> Swap:
    sizes = {name: given[name] for name in ("num_kv_heads", "chunk_size")}
    return ChunkedPrefillSwap("chunked_prefill", implementation, **sizes)


_PLANS: dict[str, Callable[[str, Given], Swap]] = {
    "multi_head": _plain("multi_head"),
    "self": _plain("self"),
    "cross": _cross,
    "flash": _flash,
    "sliding_window": _plain("sliding_window"),
    "grouped_query": _plain("grouped_query"),
    "linear": _linear,
    "sparse": _sparse,
    "neighborhood": _neighborhood,
    "efficient": _efficient,
    "flash_attention_3": _flash_attention_3,
    "multi_head_latent": _latent,
    "paged": _paged,
    "ring": _ring,
    "chunked_prefill": _chunked_prefill,
}
