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
from .swaps.served import RANKS, ChunkedPrefillSwap, MemoryEfficientSwap, PagedSwap, RingSwap
from .swaps.softmax import Attended, CrossSwap, ModelCall, Shape, Swap

__all__ = ["Attended", "ModelCall", "Shape", "Swap", "plan_swap"]

UNFUSED = ("eager", "sdpa_math")
"""implementations that form the n x n matrix"""

Given = dict[str, Any]


def plan_swap(mechanism: str, parameters: Given, implementation: str) -> Swap:
    """Return what a mechanism does inside a model. It keeps what it learns of the tokens: one for every run.

    Raises:
        Unsupported: the mechanism cannot go into trained weights, or the implementation contradicts it.
    """
    known = MECHANISMS[mechanism]
    if mechanism not in _PLANS:
        raise Unsupported(f"{mechanism}: cannot be put into trained weights: {known.swap_note}")
    return _PLANS[mechanism](implementation, known.validate(parameters))


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
    raise Unsupported("efficient: spatial_reduction needs a trained convolution over a grid of tokens")


def _flash_attention_3(implementation: str, given: Given) -> Swap:
    return FlashAttention3Swap(
        "flash_attention_3",
        implementation,
        use_fp8=given["use_fp8"],
        fp8_block_size=given["fp8_block_size"],
    )


def _latent(implementation: str, given: Given) -> Swap:
    return LatentSwap("multi_head_latent", implementation, rank=given["kv_lora_rank"])


def _paged(implementation: str, given: Given) -> Swap:
    sizes = {name: given[name] for name in ("num_kv_heads", "block_size", "num_blocks")}
    return PagedSwap("paged", implementation, **sizes)


def _ring(implementation: str, given: Given) -> Swap:
    return RingSwap(
        "ring",
        implementation,
        ring_size=given["ring_size"] or RANKS,
        layout=given.get("layout", "contiguous"),
    )


def _chunked_prefill(implementation: str, given: Given) -> Swap:
    return ChunkedPrefillSwap("chunked_prefill", implementation, chunk_size=given["chunk_size"])


_PLANS: dict[str, Callable[[str, Given], Swap]] = {
    "multi_head": _plain("multi_head"),
    "self": _plain("self"),
    "cross": _cross,
    "flash": _flash,
    "sliding_window": _plain("sliding_window"),
    "grouped_query": _plain("grouped_query"),
    "efficient": _efficient,
    "flash_attention_3": _flash_attention_3,
    "multi_head_latent": _latent,
    "paged": _paged,
    "ring": _ring,
    "chunked_prefill": _chunked_prefill,
}
