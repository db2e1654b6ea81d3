"""Cross-attention as a layer of a decoder. Vaswani et al., https://arxiv.org/abs/1706.03762."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from attnlab_kernels.masks import Mask
from attnlab_kernels.mechanisms.cross_attention import CrossAttention
from attnlab_kernels.output import AttentionOutput

DEFAULTS = {"hidden_size": 256, "num_heads": 8, "dropout": 0.1}


class CrossAttentionLayer(nn.Module):
    """``x + CrossAttention(LayerNorm(x), context)``: the norm comes first, and the input is added to the result.

    Args:
        config: arguments of ``CrossAttention`` by name: hidden_size 256, num_heads 8 and dropout 0.1 where not given.
        options: the same, beside or instead of ``config``.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        twice = [name for name in options if name in (config or {})]
        if twice:
            raise ValueError(f"{twice[0]} must be given once; got it in config and as an argument")
        given = {**(config or {}), **options}
        if {"dim", "d_model", "embed_dim", "query_dim"} & given.keys():
            given = {name: value for name, value in DEFAULTS.items() if name != "hidden_size"} | given
        else:
            given = DEFAULTS | given
        self.attention = CrossAttention(**given)
        self.norm = nn.LayerNorm(self.attention.dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        attention_mask: Mask | Tensor | None = None,
        **call: Any,
    ) -> Any:
        """Add to ``x`` ``[B, n, hidden_size]`` what it gathers from ``context`` ``[B, m, key_dim]``.

        Args:
            call: as of ``CrossAttention``: return_attention, return_dict, past_key_value, ...

        Returns:
            The output, or what ``CrossAttention`` returns with the output replaced.
        """
        result = self.attention(self.norm(x), context, attention_mask, **call)
        if isinstance(result, AttentionOutput):
            return replace(result, output=x + result.output)
        return (x + result[0], *result[1:]) if isinstance(result, tuple) else x + result
