"""Latent attention without a rotary key: the latent is all that is cached. After DeepSeek-AI, 2405.04434."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnlab_kernels.caches import Cache, CacheError
from attnlab_kernels.mechanisms.base import read_width
from attnlab_kernels.mechanisms.multi_head_latent import MultiHeadLatentAttention


class MultiHeadLatentAttentionV2(MultiHeadLatentAttention):
    """``MultiHeadLatentAttention`` whose keys have no position: every key and value comes from the latent alone.

    Returns ``(output, map or None, cache or None)``; ``cache[0]`` is the latent ``[B, m, d_latent]``. The name is of
    the constructor, not of DeepSeek-V2, which has the rotary key.

    Args:
        d_model: model width (also: dim, hidden_size, embed_dim, query_dim).
        d_latent: width of the latent, below ``num_heads * head_dim``.
        head_dim: width of a key and of a value; default ``d_model // num_heads``.
        bias: of the projection down and of the last one.
        use_layer_norm: LayerNorm of the latent, before it is cached; False leaves it as it is.
        others: as of MultiHeadLatentAttention.
    """

    def __init__(
        self,
        d_model: int | None = None,
        num_heads: int = 8,
        d_latent: int = 64,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        use_layer_norm: bool = True,
        **others: Any,
    ) -> None:
        widths = {
            name: others.pop(name)
            for name in ("dim", "hidden_size", "embed_dim", "query_dim")
            if name in others
        }
        width = read_width("d_model", d_model, widths)
        if num_heads < 1 or (head_dim is None and width % num_heads):
            raise ValueError(
                f"d_model must be a multiple of num_heads, or head_dim given; got {width} and {num_heads} heads"
            )
        head_dim = width // num_heads if head_dim is None else head_dim
        if d_latent >= num_heads * head_dim:
            raise ValueError(
                f"d_latent must be below num_heads * head_dim = {num_heads * head_dim}, or it compresses nothing; "
                f"got {d_latent}"
            )
        super().__init__(
            width,
            num_heads,
            d_latent,
            qk_rope_head_dim=0,
            qk_nope_head_dim=head_dim,
            v_head_dim=head_dim,
            dropout=dropout,
            bias=bias,
            **others,
        )
        self.head_dim, self.d_latent, self.use_layer_norm = head_dim, d_latent, use_layer_norm
        self.kv_a_layernorm = nn.LayerNorm(d_latent) if use_layer_norm else nn.Identity()

    def _open_cache(self, past: Cache | tuple[Tensor, ...] | None, use_cache: bool) -> Cache | None:
        if isinstance(past, tuple):
            latent = past[0]
            if latent.dim() != 3 or latent.shape[-1] != self.d_latent:
                raise CacheError(
                    f"past_key_value must hold a latent [batch, tokens, {self.d_latent}]; got {list(latent.shape)}"
                )
            past = (latent, latent.new_empty(*latent.shape[:2], 0))
        return super()._open_cache(past, use_cache)
