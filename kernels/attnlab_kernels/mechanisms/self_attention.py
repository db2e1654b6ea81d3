"""Self-attention. Cheng et al., https://arxiv.org/abs/1601.06733; as a layer: Vaswani et al., 1706.03762."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from attnlab_kernels.caches import Cache
from attnlab_kernels.mechanisms.base import SoftmaxModule, read_width
from attnlab_kernels.positions import Rotary


class SelfAttention(SoftmaxModule):
    """Each token gathers from the tokens of its own sequence, itself included.

    Returns the output alone, or ``(output, map)`` with ``return_attention=True``.

    Args:
        hidden_size: model width, a multiple of ``num_heads`` (also: dim, d_model, embed_dim, query_dim).
        is_causal: a token attends to itself and to what came before it.
        max_seq_length: kept for the record. There is no table or mask of this length, so longer input runs.
    """

    legacy_returns: ClassVar[int] = 1

    def __init__(
        self,
        hidden_size: int | None = None,
        num_heads: int = 8,
        dropout: float = 0.0,
        bias: bool = True,
        is_causal: bool = False,
        max_seq_length: int = 2048,
        *,
        causal: bool | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        if max_seq_length < 1:
            raise ValueError(f"max_seq_length must be at least 1 token; got {max_seq_length}")
        if is_causal and causal is False:
            raise ValueError("is_causal and causal are two names of one argument; got True and False")
        super().__init__(
            dim=read_width("hidden_size", hidden_size, widths),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dropout=dropout,
            bias=bias,
            causal=is_causal or bool(causal),
            attention_scale=attention_scale,
            use_rotary=use_rotary,
            rope_base=rope_base,
            layer_idx=layer_idx,
            implementation=implementation,
        )
        self.max_seq_length = max_seq_length

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        *,
        return_attention: bool = False,
        output_attentions: bool = False,
        past_key_value: Cache | tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
        return_dict: bool = False,
        **call: Any,
    ) -> Any:
        """Attend from ``hidden_states`` ``[B, n, dim]`` to itself; arguments as in ``SoftmaxModule``.

        Args:
            context: must be None; another sequence is for ``CrossAttention``.
            return_attention: also return the map ``[B, H, n, m]`` (also: output_attentions).

        Raises:
            ValueError: an argument that does not fit, or a new cache that the legacy return would drop.
        """
        if context is not None or any(
            call.get(name) is not None for name in ("key_value_states", "key_value")
        ):
            raise ValueError(
                "context must be None in self-attention; use CrossAttention for a second sequence, and "
                "attention_mask= for a mask"
            )
        if use_cache and not return_dict and not hasattr(past_key_value, "update"):
            raise ValueError(
                "use_cache needs return_dict=True, or a cache object as past_key_value to write into"
            )
        wanted = return_attention or output_attentions
        result = super().forward(
            hidden_states,
            output_attentions=wanted,
            past_key_value=past_key_value,
            use_cache=use_cache,
            return_dict=True,
            **call,
        )
        if return_dict:
            return result
        return (result.output, result.attentions) if wanted else result.output
