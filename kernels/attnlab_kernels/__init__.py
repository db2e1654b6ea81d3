"""What attention is: mechanisms, operations, masks, caches.

Masks, the effective map and the catalog need numpy only. Everything that needs torch is looked up on first use, so
``import attnlab_kernels`` loads neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnlab_kernels.catalog import MECHANISMS, Mechanism, Parameter, validate_parameters
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import (
    And,
    Causal,
    Documents,
    Full,
    Mask,
    MaskError,
    Padding,
    Window,
    mask_from_json,
)

if TYPE_CHECKING:
    from attnlab_kernels.block_storage import PagedKVCache
    from attnlab_kernels.block_table import BlockTable
    from attnlab_kernels.difference_map import DifferenceMap
    from attnlab_kernels.expert_map import ExpertMap
    from attnlab_kernels.mechanisms.base_attention import BaseAttention, MultiHeadSelfAttention
    from attnlab_kernels.mechanisms.build import build_mechanism
    from attnlab_kernels.mechanisms.chunked_prefill import ChunkedPrefill
    from attnlab_kernels.mechanisms.cross_attention import CrossAttention
    from attnlab_kernels.mechanisms.cross_attention_layer import CrossAttentionLayer
    from attnlab_kernels.mechanisms.differential_attention import DiffAttn, DifferentialAttention
    from attnlab_kernels.mechanisms.efficient_attention import EfficientAttention, MemoryEfficientAttention
    from attnlab_kernels.mechanisms.flash import FlashAttention
    from attnlab_kernels.mechanisms.flash_attention_3 import (
        FlashAttention3,
        FlashAttention3Core,
        is_flash_attention_3_available,
    )
    from attnlab_kernels.mechanisms.grouped_query import GQA, GroupedQueryAttention
    from attnlab_kernels.mechanisms.linear_attention import (
        CausalLinearAttention,
        FAVORPlusAttention,
        LinearAttention,
    )
    from attnlab_kernels.mechanisms.linformer import LinformerAttention
    from attnlab_kernels.mechanisms.multi_head import MultiHeadAttention
    from attnlab_kernels.mechanisms.multi_head_latent import MLA, MultiHeadLatentAttention
    from attnlab_kernels.mechanisms.multi_head_latent_v2 import MultiHeadLatentAttentionV2
    from attnlab_kernels.mechanisms.neighborhood_attention import (
        NeighborhoodAttention,
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
    )
    from attnlab_kernels.mechanisms.paged import PagedAttention
    from attnlab_kernels.mechanisms.ring_attention import BlockwiseRingAttention, RingAttention
    from attnlab_kernels.mechanisms.self_attention import SelfAttention
    from attnlab_kernels.mechanisms.sliding_window import SWA, SlidingWindowAttention
    from attnlab_kernels.mechanisms.sparse_attention import DSA, BlockSparseAttention, SparseAttention
    from attnlab_kernels.mechanisms.switch_head import SwitchHead, SwitchHeadAttention
    from attnlab_kernels.neighborhood import Neighborhood, NeighborhoodMap
    from attnlab_kernels.operations.softmax.api import Unsupported, attend, observing, supports, survey
    from attnlab_kernels.output import AttentionOutput
    from attnlab_kernels.paged_cache import PagedKV
    from attnlab_kernels.position_bias import Alibi, BucketBias, WindowBias
    from attnlab_kernels.positions import Rotary
    from attnlab_kernels.ring_map import RingMap
    from attnlab_kernels.scheduler import ChunkedPrefillScheduler
    from attnlab_kernels.sparse_map import SparseMap

_LAZY = {
    "BaseAttention": "attnlab_kernels.mechanisms.base_attention",
    "MultiHeadSelfAttention": "attnlab_kernels.mechanisms.base_attention",
    "BlockTable": "attnlab_kernels.block_table",
    "PagedKVCache": "attnlab_kernels.block_storage",
    "CrossAttentionLayer": "attnlab_kernels.mechanisms.cross_attention_layer",
    "MultiHeadLatentAttentionV2": "attnlab_kernels.mechanisms.multi_head_latent_v2",
    "GQA": "attnlab_kernels.mechanisms.grouped_query",
    "SWA": "attnlab_kernels.mechanisms.sliding_window",
    "MLA": "attnlab_kernels.mechanisms.multi_head_latent",
    "DiffAttn": "attnlab_kernels.mechanisms.differential_attention",
    "SwitchHead": "attnlab_kernels.mechanisms.switch_head",
    "CausalLinearAttention": "attnlab_kernels.mechanisms.linear_attention",
    "Rotary": "attnlab_kernels.positions",
    "Alibi": "attnlab_kernels.position_bias",
    "BucketBias": "attnlab_kernels.position_bias",
    "WindowBias": "attnlab_kernels.position_bias",
    "AttentionOutput": "attnlab_kernels.output",
    "BlockSparseAttention": "attnlab_kernels.mechanisms.sparse_attention",
    "DSA": "attnlab_kernels.mechanisms.sparse_attention",
    "BlockwiseRingAttention": "attnlab_kernels.mechanisms.ring_attention",
    "DifferenceMap": "attnlab_kernels.difference_map",
    "DifferentialAttention": "attnlab_kernels.mechanisms.differential_attention",
    "ExpertMap": "attnlab_kernels.expert_map",
    "CrossAttention": "attnlab_kernels.mechanisms.cross_attention",
    "EfficientAttention": "attnlab_kernels.mechanisms.efficient_attention",
    "FAVORPlusAttention": "attnlab_kernels.mechanisms.linear_attention",
    "ChunkedPrefill": "attnlab_kernels.mechanisms.chunked_prefill",
    "ChunkedPrefillScheduler": "attnlab_kernels.scheduler",
    "FlashAttention": "attnlab_kernels.mechanisms.flash",
    "FlashAttention3": "attnlab_kernels.mechanisms.flash_attention_3",
    "FlashAttention3Core": "attnlab_kernels.mechanisms.flash_attention_3",
    "GroupedQueryAttention": "attnlab_kernels.mechanisms.grouped_query",
    "LinearAttention": "attnlab_kernels.mechanisms.linear_attention",
    "LinformerAttention": "attnlab_kernels.mechanisms.linformer",
    "MemoryEfficientAttention": "attnlab_kernels.mechanisms.efficient_attention",
    "MultiHeadAttention": "attnlab_kernels.mechanisms.multi_head",
    "Neighborhood": "attnlab_kernels.neighborhood",
    "NeighborhoodAttention": "attnlab_kernels.mechanisms.neighborhood_attention",
    "NeighborhoodAttention1D": "attnlab_kernels.mechanisms.neighborhood_attention",
    "NeighborhoodAttention2D": "attnlab_kernels.mechanisms.neighborhood_attention",
    "NeighborhoodAttention3D": "attnlab_kernels.mechanisms.neighborhood_attention",
    "NeighborhoodMap": "attnlab_kernels.neighborhood",
    "SelfAttention": "attnlab_kernels.mechanisms.self_attention",
    "MultiHeadLatentAttention": "attnlab_kernels.mechanisms.multi_head_latent",
    "PagedAttention": "attnlab_kernels.mechanisms.paged",
    "PagedKV": "attnlab_kernels.paged_cache",
    "RingAttention": "attnlab_kernels.mechanisms.ring_attention",
    "RingMap": "attnlab_kernels.ring_map",
    "SlidingWindowAttention": "attnlab_kernels.mechanisms.sliding_window",
    "SparseAttention": "attnlab_kernels.mechanisms.sparse_attention",
    "SparseMap": "attnlab_kernels.sparse_map",
    "SwitchHeadAttention": "attnlab_kernels.mechanisms.switch_head",
    "Unsupported": "attnlab_kernels.operations.softmax.api",
    "attend": "attnlab_kernels.operations.softmax.api",
    "build_mechanism": "attnlab_kernels.mechanisms.build",
    "is_flash_attention_3_available": "attnlab_kernels.mechanisms.flash_attention_3",
    "observing": "attnlab_kernels.operations.softmax.api",
    "supports": "attnlab_kernels.operations.softmax.api",
    "survey": "attnlab_kernels.operations.softmax.api",
}

__all__ = [
    "DSA",
    "GQA",
    "MECHANISMS",
    "MLA",
    "SWA",
    "Alibi",
    "And",
    "AttentionOutput",
    "BaseAttention",
    "BlockSparseAttention",
    "BlockTable",
    "BlockwiseRingAttention",
    "BucketBias",
    "Causal",
    "CausalLinearAttention",
    "ChunkedPrefill",
    "ChunkedPrefillScheduler",
    "CrossAttention",
    "CrossAttentionLayer",
    "DiffAttn",
    "DifferenceMap",
    "DifferentialAttention",
    "Documents",
    "EfficientAttention",
    "ExpertMap",
    "FAVORPlusAttention",
    "FlashAttention",
    "FlashAttention3",
    "FlashAttention3Core",
    "Full",
    "GroupedQueryAttention",
    "LinearAttention",
    "LinformerAttention",
    "Mask",
    "MaskError",
    "Mechanism",
    "MemoryEfficientAttention",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "MultiHeadLatentAttentionV2",
    "MultiHeadSelfAttention",
    "Neighborhood",
    "NeighborhoodAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodMap",
    "Padding",
    "PagedAttention",
    "PagedKV",
    "PagedKVCache",
    "Parameter",
    "RingAttention",
    "RingMap",
    "Rotary",
    "SelfAttention",
    "SlidingWindowAttention",
    "SoftmaxMap",
    "SparseAttention",
    "SparseMap",
    "SwitchHead",
    "SwitchHeadAttention",
    "Unsupported",
    "Window",
    "WindowBias",
    "attend",
    "build_mechanism",
    "is_flash_attention_3_available",
    "mask_from_json",
    "observing",
    "supports",
    "survey",
    "validate_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
