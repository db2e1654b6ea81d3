"""What the softmax mechanisms share: projections, positions, cache, mask, result. Each module says how it differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from attnlab_kernels.caches import Cache, ContiguousKV
from attnlab_kernels.masks import Causal, Full, Mask
from attnlab_kernels.mechanisms.attention_mask import read_attention_mask, read_position_bias
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.api import attend
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.paged_sequences import PagedSequences
from attnlab_kernels.position_bias import PositionBias
from attnlab_kernels.positions import Rotary, rotate

WIDTH_NAMES = ("hidden_size", "dim", "d_model", "embed_dim", "query_dim")
CONTEXT_NAMES = ("key_value_states", "key_value")
# 2 GiB of float32; more than that is looked at through SoftmaxMap, region by region
MAP_LIMIT_BYTES = 2**31


class Step(NamedTuple):
    """What the new tokens of one call attend to, and how."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    bias: Tensor | None
    cache: Cache | None
    past: int
    """tokens that were in the cache before"""


class SoftmaxModule(nn.Module):
    """Projections around ``attend``. Parameters are ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``."""

    legacy_returns: ClassVar[int] = 3
    """what ``forward`` returns without ``return_dict``: 1 the output, 2 (output, cache), 3 (output, map, cache)"""
    cache_kinds: ClassVar[tuple[type[Cache], ...]] = (ContiguousKV, PagedSequences)
    """caches that can hold the keys and values of this module"""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        causal: bool = False,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if num_heads % num_kv_heads:
            divisors = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
            raise ValueError(
                f"num_kv_heads must divide num_heads = {num_heads} ({divisors}); got {num_kv_heads}"
            )
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"the width must be a multiple of num_heads, or head_dim given; got {dim} and {num_heads} heads"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}")
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1; got {head_dim}")
        self.dropout, self.causal = dropout, causal
        self.scale = self.head_dim**-0.5 if attention_scale is None else attention_scale
        self.use_rotary, self.rope_base = use_rotary, rope_base
        self.layer_idx, self.implementation = layer_idx, implementation
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        *,
        attention_mask: Mask | Tensor | None = None,
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
        """Attend from ``hidden_states`` ``[B, n, dim]`` to itself, or to ``context`` ``[B, m, dim]``.

        Args:
            attention_mask: a ``Mask`` or a tensor, see ``read_attention_mask``; joined to the module's own mask.
            position_ids: ``[n]`` or ``[B, n]`` for the module's own rotation; default: after the cached tokens.
            position_embeddings: ``(cos, sin)`` of the new tokens in the module's layout, instead of its own.
            position_bias: added to the scores: broadcasts to ``[B, H, n, m]``, or one of ``position_bias``'s.
            past_key_value: a cache, updated in place, or a ``(key, value)`` pair, which is left as it is.
            output_attentions: also return the map ``[B, H, n, m]`` (before dropout, detached).
            causal: overrides the module's setting.
            implementation: a name of ``operations.softmax``, or "auto" (alias: backend).

        Returns:
            ``AttentionOutput`` with ``return_dict=True``, else the class's legacy tuple.

        Raises:
            ValueError: an argument that does not fit; Unsupported if the implementation cannot run it.
        """
        context, implementation = read_aliases(context, implementation, aliases)
        self._check_input(hidden_states, context)
        query, key, value = self._project(hidden_states, hidden_states if context is None else context)
        step = self._open_step(
            query,
            key,
            value,
            context=context,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            position_bias=position_bias,
            past_key_value=past_key_value,
            use_cache=use_cache,
            causal=causal,
        )
        query = step.query
        key, value, mask, bias = self._admit(step.key, step.value, step.mask, step.bias, query.shape[2])
        result = self._attend(query, key, value, mask, bias, implementation or self.implementation)
        maps = self._map(query, key, mask, bias, result.lse) if output_attentions else None
        heads = result.output.transpose(1, 2).flatten(2)
        output = AttentionOutput(
            self.o_proj(heads), maps, step.cache if use_cache else None, result.lse, result.aux
        )
        return output if return_dict else self._legacy(output)

    def _open_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        context: Tensor | None,
        attention_mask: Mask | Tensor | None,
        position_ids: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        position_bias: PositionBias | None,
        past_key_value: Cache | tuple[Tensor, Tensor] | None,
        use_cache: bool,
        causal: bool | None,
    ) -> Step:
        """Give projected tokens their positions, put them into the cache, and read the masks of the call."""
        cache = self._open_cache(past_key_value, use_cache, context)
        past = cache.length(self.layer_idx) if cache is not None else 0
        query, key = self._encode(query, key, position_ids, position_embeddings, past, context)
        num_queries = query.shape[2]
        positions = torch.arange(key.shape[2], device=key.device)
        if cache is not None:
            key, value, positions = cache.update(self.layer_idx, key, value)
        given, bias = read_attention_mask(
            attention_mask,
            batch=query.shape[0],
            heads=self.num_heads,
            num_queries=num_queries,
            num_keys=key.shape[2],
        )
        if given.form().documents is not None and len(positions) and int(positions[0]) > 0:
            raise ValueError(
                "attention_mask must not hold documents once a cache has dropped keys; the first key kept is "
                f"{positions[0]}"
            )
        steps = torch.arange(past, past + num_queries, device=key.device)
        bias = read_position_bias(position_bias, bias, queries=steps, keys=positions)
        is_causal = self.causal and context is None if causal is None else causal
        return Step(query, key, value, self._own_mask(is_causal) & given, bias, cache, past)

    def _own_mask(self, causal: bool) -> Mask:
        return Causal() if causal else Full()

    def _new_cache(self) -> Cache:
        return ContiguousKV()

    def _admit(
        self, key: Tensor, value: Tensor, mask: Mask, bias: Tensor | None, num_queries: int
    ) -> tuple[Tensor, Tensor, Mask, Tensor | None]:
        """Last change of what is attended to."""
        return key, value, mask, bias

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, implementation: str
    ) -> AttentionOutput:
        dropout = self.dropout if self.training else 0.0
        bias = bias if bias is None else bias.to(q.dtype)
        return attend(
            q, k, v, mask=mask, scale=self.scale, bias=bias, dropout=dropout, implementation=implementation
        )

    def _legacy(self, output: AttentionOutput) -> Any:
        if self.legacy_returns == 1:
            return output.output
        if self.legacy_returns == 2:
            return output.output, output.cache
        return output.output, output.attentions, output.cache

    def _check_input(self, hidden_states: Tensor, context: Tensor | None) -> None:
        for name, tensor in (("hidden_states", hidden_states), ("context", context)):
            if tensor is not None and (tensor.dim() != 3 or tensor.shape[-1] != self.dim):
                raise ValueError(f"{name} must be [batch, tokens, {self.dim}]; got {list(tensor.shape)}")
        if context is not None and context.shape[0] != hidden_states.shape[0]:
            raise ValueError(
                f"context must have the batch of hidden_states, {hidden_states.shape[0]}; got {context.shape[0]}"
            )

    def _project(self, hidden_states: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def split(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        return split(self.q_proj(hidden_states)), split(self.k_proj(source)), split(self.v_proj(source))

    def _open_cache(
        self, past: Cache | tuple[Tensor, Tensor] | None, use_cache: bool, context: Tensor | None
    ) -> Cache | None:
        return open_cache(
            past,
            use_cache=use_cache,
            context=context,
            kinds=self.cache_kinds,
            make=self._new_cache,
            layer=self.layer_idx,
        )

    def _encode(
        self,
        query: Tensor,
        key: Tensor,
        position_ids: Tensor | None,
        tables: tuple[Tensor, Tensor] | None,
        past: int,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rotary = self._rotary()
        if tables is None and self.use_rotary and context is None:
            if position_ids is None:
                position_ids = torch.arange(past, past + query.shape[2], device=query.device)
            tables = rotary.tables(position_ids, query.shape[3])
        if tables is None:
            return query, key
        return rotate(query, *tables, layout=rotary.layout), rotate(key, *tables, layout=rotary.layout)

    def _rotary(self) -> Rotary:
        return self.use_rotary if isinstance(self.use_rotary, Rotary) else Rotary(self.rope_base)

    def _map(self, query: Tensor, key: Tensor, mask: Mask, bias: Tensor | None, lse: Tensor | None) -> Tensor:
        assert lse is not None
        batch, heads, num_queries = lse.shape
        size = 4 * batch * heads * num_queries * key.shape[2]
        if size > MAP_LIMIT_BYTES:
            raise ValueError(
                f"output_attentions would take {size:,} bytes, more than {MAP_LIMIT_BYTES:,}; "
                "look at regions with SoftmaxMap instead"
            )
        with torch.no_grad():
            keys = lower.hide_padding(key, mask).to(lse.dtype)
            groups = query.to(lse.dtype).reshape(batch, key.shape[1], -1, query.shape[-1])
            scores = (groups @ keys.transpose(-1, -2) * self.scale).reshape(batch, heads, num_queries, -1)
            scores = scores if bias is None else scores + bias
            safe = torch.where(torch.isneginf(lse), 0, lse)
            maps = torch.exp(scores - safe[..., None])
            allowed = lower.dense_batch(
                mask, num_queries=num_queries, num_keys=key.shape[2], batch_size=batch, device=query.device
            )
            return (maps if allowed is None else maps.masked_fill(~allowed, 0)).to(query.dtype)


def open_cache(
    past: Cache | tuple[Tensor, Tensor] | None,
    *,
    use_cache: bool,
    context: Tensor | None,
    kinds: tuple[type[Cache], ...],
    make: Callable[[], Cache],
    layer: int,
) -> Cache | None:
    """The cache of one call: the caller's own, a new one that holds the caller's pair, an empty one, or none."""
    if past is None and not use_cache:
        return None
    if context is not None:
        raise ValueError("use_cache with a context: a growing cache is for self-attention")
    if past is None or isinstance(past, tuple):
        cache = make()
        if past is not None:
            cache.update(layer, *past)
        return cache
    if type(past) in kinds:
        return past
    names = ", ".join(kind.__name__ for kind in kinds)
    raise ValueError(
        f"past_key_value must be a (key, value) pair or one of {names}; got {type(past).__name__}"
    )


def read_width(default_name: str, given: int | None, aliases: Mapping[str, Any]) -> int:
    """The model width under whichever of its names it came; ValueError if two disagree or none is given."""
    unknown = [name for name in aliases if name not in WIDTH_NAMES]
    if unknown:
        raise TypeError(f"unknown argument {unknown[0]!r}; the width may be called {', '.join(WIDTH_NAMES)}")
    widths = {name: value for name, value in {default_name: given, **aliases}.items() if value is not None}
    if not widths:
        raise ValueError(f"{default_name} (or {', '.join(WIDTH_NAMES)}) must be given")
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name}={value}" for name, value in widths.items())
        raise ValueError(f"names of the width must agree; got {said}")
    width = next(iter(widths.values()))
    if width < 1:
        raise ValueError(f"{next(iter(widths))} must be at least 1; got {width}")
    return width


def read_aliases(
    context: Tensor | None, implementation: str | None, aliases: dict[str, Any]
) -> tuple[Tensor | None, str | None]:
    for name in CONTEXT_NAMES:
        other = aliases.pop(name, None)
        if other is not None and context is not None:
            raise ValueError(f"context and {name} are two names of one argument; got both")
        context = context if other is None else other
    backend = aliases.pop("backend", None)
    if backend is not None and implementation is not None and backend != implementation:
        raise ValueError(f"implementation and backend must agree; got {implementation!r} and {backend!r}")
    if aliases:
        raise TypeError(f"unknown argument {next(iter(aliases))!r} of forward")
    return context, implementation or backend
