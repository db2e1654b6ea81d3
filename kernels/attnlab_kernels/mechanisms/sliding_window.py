"""Sliding-window attention. Beltagy et al., https://arxiv.org/abs/2004.05150; causal as in Mistral, 2310.06825."""

from __future__ import annotations

from torch import Tensor

from attnlab_kernels.caches import Cache, ContiguousKV, RollingKV
from attnlab_kernels.masks import Mask, Window
from attnlab_kernels.mechanisms.base import SoftmaxModule, read_width
from attnlab_kernels.paged_sequences import PagedSequences
from attnlab_kernels.positions import Rotary


class SlidingWindowAttention(SoftmaxModule):
    """Each query attends to the last ``window_size`` keys, its own included, and the cache keeps no more.

    Returns ``(output, map or None, cache or None)``; the cache is a ``RollingKV``. Not causal, the window reaches
    ``window_size - 1`` keys to both sides. Loads the weights of transformers' MistralAttention as they are.

    Args:
        dim: model width (also: hidden_size, d_model, embed_dim, query_dim).
        window_size: keys of the window; at least 1, and 1 is the query's own key.
        num_kv_heads: a divisor of ``num_heads``; default all.
    """

    cache_kinds = (ContiguousKV, RollingKV, PagedSequences)

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 8,
        window_size: int = 4096,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        causal: bool = True,
        *,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, the query's own key; got {window_size}")
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
        self.window_size = window_size

    def _own_mask(self, causal: bool) -> Mask:
        reach = self.window_size - 1
        return Window(reach, 0 if causal else reach)

    def _open_cache(
        self, past: Cache | tuple[Tensor, Tensor] | None, use_cache: bool, context: Tensor | None
    ) -> Cache | None:
        cache = super()._open_cache(past, use_cache, context)
        if isinstance(cache, RollingKV) and cache.window < self.window_size:
            raise ValueError(
                f"past_key_value must keep the window of {self.window_size} keys; it is a RollingKV of {cache.window}"
            )
        return cache

    def _new_cache(self) -> Cache:
        return RollingKV(self.window_size)


SWA = SlidingWindowAttention
