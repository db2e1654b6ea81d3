"""Self-attention under the two names and with the constructors that older code has for it."""

from __future__ import annotations

from typing import Any

from attnlab_kernels.mechanisms.self_attention import SelfAttention


class BaseAttention(SelfAttention):
    """``SelfAttention`` without biases, with dropout 0.1 in training.

    Args:
        hidden_size: model width, a multiple of ``num_heads`` (also: dim, d_model, embed_dim, query_dim).
        use_flash_attention: False keeps to the reference, which forms the scores; True lets the lab choose.
        attention_scale: default ``1 / sqrt(head_dim)``.
        others: as of SelfAttention.
    """

    def __init__(
        self,
        hidden_size: int | None = None,
        num_heads: int = 8,
        dropout: float = 0.1,
        use_flash_attention: bool = False,
        attention_scale: float | None = None,
        *,
        bias: bool = False,
        implementation: str = "auto",
        **others: Any,
    ) -> None:
        if not use_flash_attention and implementation not in ("auto", "eager"):
            raise ValueError(f"use_flash_attention=False means eager; got implementation {implementation!r}")
        super().__init__(
            hidden_size,
            num_heads,
            dropout,
            bias,
            attention_scale=attention_scale,
            implementation=implementation if use_flash_attention else "eager",
            **others,
        )
        self.use_flash_attention = use_flash_attention


class MultiHeadSelfAttention(SelfAttention):
    """``SelfAttention`` with dropout 0.1 in training.

    Args:
        others: as of SelfAttention.
    """

    def __init__(
        self,
        hidden_size: int | None = None,
        num_heads: int = 8,
        dropout: float = 0.1,
        bias: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(hidden_size, num_heads, dropout, bias, **others)
