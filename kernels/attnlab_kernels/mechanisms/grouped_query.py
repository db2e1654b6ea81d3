"""Grouped-query attention. Ainslie et al., https://arxiv.org/abs/2305.13245; one group: Shazeer, 1911.02150."""

from __future__ import annotations

from attnlab_kernels.mechanisms.base import SoftmaxModule, read_width
from attnlab_kernels.positions import Rotary


class GroupedQueryAttention(SoftmaxModule):
    """Query head h reads key and value head ``h // (num_heads // num_kv_heads)``; the cache holds key heads only.

    Returns ``(output, map or None, cache or None)``. Causal unless told otherwise. Loads the weights of
    transformers' LlamaAttention as they are.

    Args:
        dim: model width (also: hidden_size, d_model, embed_dim, query_dim).
        num_kv_heads: a divisor of ``num_heads``; 1 is multi-query attention.
        head_dim: default ``dim // num_heads``; may be anything.
        max_position_embeddings: longest sequence that the module's own rotation is meant for.
    """

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 8,
        num_kv_heads: int = 1,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        max_position_embeddings: int = 8192,
        *,
        causal: bool = True,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        super().__init__(
            dim=read_width("dim", dim, widths),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dropout=dropout,
            bias=bias,
            causal=causal,
            attention_scale=attention_scale,
            use_rotary=use_rotary,
            rope_base=rope_base,
            layer_idx=layer_idx,
            implementation=implementation,
        )
        self.max_position_embeddings = max_position_embeddings


GQA = GroupedQueryAttention
