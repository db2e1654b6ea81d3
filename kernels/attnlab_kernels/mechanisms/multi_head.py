"""Multi-head attention. Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.masks import Mask
from attnlab_kernels.mechanisms.base import SoftmaxModule, read_width
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.positions import Rotary


class MultiHeadAttention(SoftmaxModule):
    """``concat_h softmax(Q_h K_h^T / sqrt(d)) V_h W_O`` with a key and value head for every query head.

    Returns ``(output, cache)``; the cache is None without ``use_cache``.

    Args:
        hidden_size: model width, a multiple of ``num_heads`` (also: dim, d_model, embed_dim, query_dim).
        dropout: share of the probabilities dropped in training.
        add_zero_attn: also attend to one key and value of zeros, which no mask hides (map column 0).
        use_rotary: rotate queries and keys by position.
        attention_scale: default ``1 / sqrt(head_dim)``.
    """

    legacy_returns: ClassVar[int] = 2

    def __init__(
        self,
        hidden_size: int | None = None,
        num_heads: int = 8,
        dropout: float = 0.1,
        bias: bool = True,
        add_zero_attn: bool = False,
        use_rotary: bool | Rotary = False,
        attention_scale: float | None = None,
        *,
        causal: bool = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        super().__init__(
            dim=read_width("hidden_size", hidden_size, widths),
            num_heads=num_heads,
            dropout=dropout,
            bias=bias,
            causal=causal,
            attention_scale=attention_scale,
            use_rotary=use_rotary,
            rope_base=rope_base,
            layer_idx=layer_idx,
            implementation=implementation,
        )
        self.add_zero_attn = add_zero_attn

    def _admit(
        self, key: Tensor, value: Tensor, mask: Mask, bias: Tensor | None, num_queries: int
    ) -> tuple[Tensor, Tensor, Mask, Tensor | None]:
        if not self.add_zero_attn:
            return key, value, mask, bias
        # in front, so that a causal mask still ends at the newest token and every query sees it
        front = (0, 0, 1, 0)
        allowed = lower.dense_batch(
            mask, num_queries=num_queries, num_keys=key.shape[2], batch_size=key.shape[0], device=key.device
        )
        if allowed is not None:
            forbidden = torch.zeros(allowed.shape, device=key.device).masked_fill_(~allowed, -torch.inf)
            bias = forbidden if bias is None else bias + forbidden
        key, value = lower.hide_padding(key, mask), lower.hide_padding(value, mask)
        wide: Any = None if bias is None else functional.pad(bias, (1, 0))
        return functional.pad(key, front), functional.pad(value, front), self._own_mask(False), wide
