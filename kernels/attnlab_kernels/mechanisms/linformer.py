"""Linformer. Wang et al., "Linformer: Self-Attention with Linear Complexity", https://arxiv.org/abs/2006.04768."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlab_kernels.attention_call import announce, composing
from attnlab_kernels.caches import Cache
from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.mechanisms.base import SoftmaxModule, read_width
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.position_bias import PositionBias


class LinformerAttention(SoftmaxModule):
    """``softmax(Q (E^T K)^T / sqrt(d)) F^T V``: a softmax over ``num_slots`` mixtures of the keys.

    Returns ``(output, map or None, None)``; the map is ``[B, H, n, num_slots]``, see ``effective_map``. Never causal
    (every slot holds every token) and without a cache. Padded keys add nothing to a slot.

    Args:
        dim: model width (also: hidden_size, d_model, embed_dim, query_dim).
        max_seq_length: most keys that the slots can mix; a shorter input uses the first rows.
        num_slots: k, mixtures of keys and of values.
    """

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 8,
        max_seq_length: int = 2048,
        num_slots: int = 256,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        *,
        causal: bool = False,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        for name, value in (("max_seq_length", max_seq_length), ("num_slots", num_slots)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        _refuse_causal(causal)
        super().__init__(
            dim=read_width("dim", dim, widths),
            num_heads=num_heads,
            head_dim=head_dim,
            dropout=dropout,
            bias=bias,
            layer_idx=layer_idx,
            implementation=implementation,
        )
        self.max_seq_length, self.num_slots = max_seq_length, num_slots
        reach = num_slots**-0.5
        self.key_slots = nn.Parameter(torch.empty(max_seq_length, num_slots).uniform_(-reach, reach))
        self.value_slots = nn.Parameter(torch.empty(max_seq_length, num_slots).uniform_(-reach, reach))

    def effective_map(self, slot_map: Tensor, num_keys: int) -> Tensor:
        """Weight of each token's value, ``slot_map F^T`` ``[B, H, n, num_keys]``; signed, rows sum to anything."""
        return slot_map @ self.value_slots[:num_keys].T.to(slot_map.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        *,
        causal: bool | None = None,
        position_bias: PositionBias | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **call: Any,
    ) -> Any:
        """As in ``SoftmaxModule``, with a mask of padding only.

        Raises:
            ValueError: causal, a cache, positions of keys, a mask of pairs, or more keys than ``max_seq_length``.
        """
        _refuse_causal(bool(causal))
        if position_bias is not None or position_embeddings is not None:
            raise ValueError(
                "position_bias and position_embeddings belong to keys, and slots have no position"
            )
        return super().forward(hidden_states, context, **call)

    def _open_cache(
        self, past: Cache | tuple[Tensor, Tensor] | None, use_cache: bool, context: Tensor | None
    ) -> Cache | None:
        if past is not None or use_cache:
            raise ValueError("use_cache is not for Linformer: a new token changes every slot")
        return None

    def _admit(
        self, key: Tensor, value: Tensor, mask: Mask, bias: Tensor | None, num_queries: int
    ) -> tuple[Tensor, Tensor, Mask, Tensor | None]:
        length = key.shape[2]
        if length > self.max_seq_length:
            raise ValueError(f"keys must be at most max_seq_length = {self.max_seq_length}; got {length}")
        band = mask.band()
        if bias is not None or band.left is not None or band.right is not None:
            raise ValueError(
                "attention_mask must be padding of [batch, keys] without holes: slots mix all keys"
            )
        key, value = lower.hide_padding(key, mask), lower.hide_padding(value, mask)
        return (
            self.key_slots[:length].T @ key,
            self.value_slots[:length].T @ value,
            Full(),
            None,
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, implementation: str
    ) -> AttentionOutput:
        with composing() as parts:
            result = super()._attend(q, k, v, mask, bias, implementation)
        for part in parts:
            announce(part.retold("slots", columns=f"{self.num_slots} slots, each a mixture of all keys"))
        return result


def _refuse_causal(causal: bool) -> None:
    if causal:
        raise ValueError("causal must be False for Linformer: every slot holds every token")
