"""Cross-attention. Bahdanau et al., https://arxiv.org/abs/1409.0473; as a layer: Vaswani et al., 1706.03762."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnlab_kernels.caches import Cache
from attnlab_kernels.cross_cache import CrossKV
from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.mechanisms.attention_mask import read_attention_mask, read_position_bias
from attnlab_kernels.mechanisms.base import SoftmaxModule, read_aliases, read_width
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.position_bias import PositionBias
from attnlab_kernels.positions import Rotary

CONTEXT_WIDTHS = ("key_dim", "kv_dim", "context_dim")


class CrossAttention(SoftmaxModule):
    """Queries from one sequence, keys and values from another of its own length and width. Never causal.

    Returns the output alone, or ``(output, map)`` with ``return_attention=True``. Positions are not encoded: the two
    sequences do not share an axis. A context without tokens gives zeros before the output projection.

    Args:
        query_dim: width of the queries and of the output (also: hidden_size, dim, d_model, embed_dim).
        key_dim: width of the context, default as the queries (also: kv_dim, context_dim).
        head_dim: default ``query_dim // num_heads``; may be anything.
        use_flash_attention: False keeps to the reference, which forms the scores.
        max_seq_len: kept for the record; there is no table of this length.
    """

    legacy_returns: ClassVar[int] = 1

    def __init__(
        self,
        query_dim: int | None = None,
        key_dim: int | None = None,
        num_heads: int = 8,
        dropout: float = 0.1,
        use_flash_attention: bool = True,
        max_seq_len: int = 2048,
        *,
        kv_dim: int | None = None,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        _refuse_order(causal, bool(use_rotary))
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1 token; got {max_seq_len}")
        if not use_flash_attention and implementation not in ("auto", "eager"):
            raise ValueError(f"use_flash_attention=False means eager; got implementation {implementation!r}")
        super().__init__(
            dim=read_width("query_dim", query_dim, widths),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dropout=dropout,
            bias=bias,
            attention_scale=attention_scale,
            rope_base=rope_base,
            layer_idx=layer_idx,
            implementation=implementation if use_flash_attention else "eager",
        )
        given = zip(CONTEXT_WIDTHS, (key_dim, kv_dim, context_dim), strict=True)
        self.context_dim = _context_width(
            self.dim, {name: width for name, width in given if width is not None}
        )
        self.max_seq_len = max_seq_len
        self.k_proj = nn.Linear(self.context_dim, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(self.context_dim, self.num_kv_heads * self.head_dim, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        attention_mask: Mask | Tensor | None = None,
        return_attention: bool = False,
        *,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_bias: PositionBias | None = None,
        past_key_value: Cache | tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        causal: bool | None = None,
        return_dict: bool = False,
        implementation: str | None = None,
        **aliases: Any,
    ) -> Any:
        """Attend from ``hidden_states`` ``[B, n, query_dim]`` to ``context`` ``[B, m, key_dim]``.

        Args:
            context: may be None once ``past_key_value`` holds it. A filled cache wins: the context is not read again.
            attention_mask: True = attend, ``[B, m]`` over the context or ``[B, 1 | H, n, m]``; see the base class.
            past_key_value: a ``CrossKV``, filled by the first call, or a ``(key, value)`` pair of the whole context.
            use_cache: return the ``CrossKV``; without ``return_dict``, pass an empty one to be filled.

        Raises:
            ValueError: an argument that does not fit; Unsupported if the implementation cannot run it.
        """
        _refuse_order(bool(causal), position_embeddings is not None)
        context, implementation = read_aliases(context, implementation, aliases)
        if use_cache and not return_dict and not isinstance(past_key_value, CrossKV):
            raise ValueError("use_cache needs return_dict=True, or a CrossKV as past_key_value to write into")
        cache = self._cross_cache(past_key_value, use_cache)
        key, value = self._context(hidden_states, context, cache)
        query = _heads(self.q_proj(hidden_states), self.head_dim)
        mask, bias = self._masks(attention_mask, query, key)
        places = (torch.arange(part.shape[2], device=part.device) for part in (query, key))
        bias = read_position_bias(position_bias, bias, **dict(zip(("queries", "keys"), places, strict=True)))
        result = self._attend(query, key, value, mask, bias, implementation or self.implementation)
        wanted = return_attention or output_attentions
        maps = self._map(query, key, mask, bias, result.lse) if wanted else None
        heads = result.output.transpose(1, 2).flatten(2)
        output = AttentionOutput(self.o_proj(heads), maps, cache, result.lse, result.aux)
        if return_dict:
            return output
        return (output.output, maps) if wanted else output.output

    def _cross_cache(self, past: Cache | tuple[Tensor, Tensor] | None, use_cache: bool) -> CrossKV | None:
        if past is None:
            return CrossKV() if use_cache else None
        if isinstance(past, tuple):
            return CrossKV.from_tuple(past, self.layer_idx)
        if isinstance(past, CrossKV):
            return past
        raise ValueError(
            f"past_key_value must be a CrossKV or a (key, value) pair of the context; got {type(past).__name__}"
        )

    def _context(
        self, hidden_states: Tensor, context: Tensor | None, cache: CrossKV | None
    ) -> tuple[Tensor, Tensor]:
        self._check_input(hidden_states, None)
        if context is not None and (context.dim() != 3 or context.shape[-1] != self.context_dim):
            raise ValueError(
                f"context must be [batch, tokens, {self.context_dim}]; got {list(context.shape)}"
            )
        filled = cache is not None and cache.holds(self.layer_idx)
        if context is None and not filled:
            raise ValueError("context must be given, or be in the cross-attention cache of past_key_value")
        if cache is not None and filled:
            key, value, _ = cache.view(self.layer_idx)
            if context is not None and tuple(context.shape[:2]) != (key.shape[0], key.shape[2]):
                raise ValueError(
                    "context must be the one in past_key_value, "
                    f"[{key.shape[0]}, {key.shape[2]}, ..]; got {list(context.shape)}"
                )
        else:
            assert context is not None
            key, value = (_heads(proj(context), self.head_dim) for proj in (self.k_proj, self.v_proj))
        if key.shape[0] != hidden_states.shape[0]:
            raise ValueError(
                f"context must have the batch of hidden_states, {hidden_states.shape[0]}; got {key.shape[0]} "
                "(expand one context that all share)"
            )
        if cache is not None and not filled:
            cache.update(self.layer_idx, key, value)
        return key, value

    def _masks(self, given: Mask | Tensor | None, query: Tensor, key: Tensor) -> tuple[Mask, Tensor | None]:
        if key.shape[2] == 0:
            return Full(), None
        if isinstance(given, Mask) and (given.band().left is not None or given.band().right is not None):
            raise ValueError(
                f"attention_mask must not order queries and context on one axis; got {given.describe()}"
            )
        return read_attention_mask(
            given,
            batch=query.shape[0],
            heads=self.num_heads,
            num_queries=query.shape[2],
            num_keys=key.shape[2],
        )


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _refuse_order(causal: bool, rotary: bool) -> None:
    if causal:
        raise ValueError("causal must be False in cross-attention: queries and context have no common order")
    if rotary:
        raise ValueError("rotary positions need one axis for queries and keys; cross-attention has two")


def _context_width(query_dim: int, given: dict[str, int]) -> int:
    if len(set(given.values())) > 1:
        said = ", ".join(f"{name}={width}" for name, width in given.items())
        raise ValueError(f"names of the context's width must agree; got {said}")
    name, width = next(iter(given.items()), ("key_dim", query_dim))
    if width < 1:
        raise ValueError(f"{name} must be at least 1; got {width}")
    return width
