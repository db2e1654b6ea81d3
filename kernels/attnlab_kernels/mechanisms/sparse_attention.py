"""Sparse attention. Child et al., https://arxiv.org/abs/1904.10509; Longformer: 2004.05150; BigBird: 2007.14062."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnlab_kernels.attention_call import AttentionCall, announce, heard
from attnlab_kernels.caches import Cache, ContiguousKV, RollingKV
from attnlab_kernels.masks import Causal, Mask
from attnlab_kernels.mechanisms.attention_mask import read_attention_mask
from attnlab_kernels.mechanisms.base import MAP_LIMIT_BYTES, SoftmaxModule, read_aliases, read_width
from attnlab_kernels.operations.sparse.api import SparseResult, check_implementation, sparse_attend
from attnlab_kernels.operations.sparse.dense import dense
from attnlab_kernels.operations.sparse.reference import full_map
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.paged_sequences import PagedSequences
from attnlab_kernels.patterns import Dense, Pattern, PatternError, build_pattern, pattern_to_json
from attnlab_kernels.position_bias import PositionBias
from attnlab_kernels.positions import Rotary
from attnlab_kernels.sparse_map import SparseMap

Tables = tuple[Tensor, Tensor]


class _Call(NamedTuple):
    """Arguments of one run over some of the rows."""

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Pattern
    options: dict[str, Any]

    def run(self, implementation: str, dropout: float = 0.0) -> SparseResult:
        named = {"dropout": dropout, "implementation": implementation, **self.options}
        return sparse_attend(self.query, self.key, self.value, self.pattern, **named)

    def full_map(self, lse: Tensor, num_keys: int) -> Tensor:
        """The rows' weights; zeros for keys that they do not reach."""
        maps = full_map(self.query, self.key, lse, self.pattern, **self.options)
        return nn.functional.pad(maps, (0, num_keys - maps.shape[-1]))


class SparseAttention(SoftmaxModule):
    """Each query attends along a fixed pattern, and only the pairs of the pattern's tiles are computed.

    Returns ``(output, map or None, cache or None)``. A cache needs ``causal``; ``local`` keeps its window, the other
    patterns every token.

    Args:
        dim: model width (also: hidden_size, d_model, embed_dim, query_dim).
        sparsity_pattern: "local", "strided", "fixed" (both of the Sparse Transformer), "local_global", "longformer"
            (global tokens have projections of their own, ``*_global_proj``) or "bigbird".
        local_window: keys of local and local_global, the query's own included (not causal: to each side); of
            longformer half on each side and one more, so it is even there.
        global_tokens: first tokens that see all and that all see, for local_global and longformer; of bigbird the
            blocks that hold so many (not causal: as many at the end).
        num_random: random blocks of a query block of bigbird.
        stride: of strided its distance and its local keys, of fixed the block.
        summary_tokens: last keys of each block of fixed that later blocks see.
        block_size: tokens of a block of bigbird.
        seed: of bigbird's random blocks; with ``layer_idx``, head and block it decides them, once and for all.
    """

    cache_kinds = (ContiguousKV, RollingKV, PagedSequences)

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 8,
        sparsity_pattern: str = "local",
        local_window: int = 256,
        global_tokens: int = 1,
        num_random: int = 3,
        stride: int = 64,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        causal: bool = True,
        *,
        summary_tokens: int = 1,
        block_size: int = 64,
        sliding_blocks: int = 3,
        seed: int = 0,
        num_kv_heads: int | None = None,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        check_implementation(implementation)
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
        self.sparsity_pattern, self.local_window, self.global_tokens = (
            sparsity_pattern,
            local_window,
            global_tokens,
        )
        self.num_random, self.stride, self.summary_tokens = num_random, stride, summary_tokens
        self.block_size, self.sliding_blocks, self.seed = block_size, sliding_blocks, seed
        self.pattern()
        if sparsity_pattern == "longformer":
            self.q_global_proj = nn.Linear(self.dim, self.q_proj.out_features, bias=bias)
            self.k_global_proj = nn.Linear(self.dim, self.k_proj.out_features, bias=bias)
            self.v_global_proj = nn.Linear(self.dim, self.v_proj.out_features, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        *,
        attention_mask: Mask | Tensor | None = None,
        position_ids: Tensor | None = None,
        position_embeddings: Tables | None = None,
        position_bias: PositionBias | None = None,
        past_key_value: Cache | Tables | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        causal: bool | None = None,
        return_dict: bool = False,
        implementation: str | None = None,
        **aliases: Any,
    ) -> Any:
        """Attend from ``hidden_states`` ``[B, n, dim]`` to itself and the cached tokens.

        The arguments are those of the other mechanisms, see ``SoftmaxModule.forward``. ``implementation`` (also:
        backend) is "tiled", "fused" (a CPU), "triton" (our kernel) or "auto". The cache of a Longformer module must
        begin with a chunk that has all of its global tokens: their own keys are not kept.

        Raises:
            ValueError: an argument that does not fit, a context, or a cache without ``causal``.
        """
        context, implementation = read_aliases(context, implementation, aliases)
        chosen = implementation or self.implementation
        check_implementation(chosen)
        if context is not None:
            raise PatternError(
                "context must be None: a pattern is of positions of one sequence; got a tensor"
            )
        is_causal = self.causal if causal is None else causal
        self._check_input(hidden_states, None)
        if not is_causal and (use_cache or past_key_value is not None):
            raise PatternError("causal must be True with a cache: cached tokens cannot attend to later ones")
        query, key, value = self._project(hidden_states, hidden_states)
        step = self._open_step(
            query,
            key,
            value,
            context=None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            position_bias=position_bias,
            past_key_value=past_key_value,
            use_cache=use_cache,
            causal=False,
        )
        query, key, value, mask, bias, cache, past = step
        pattern = self.pattern(is_causal)
        tables = (position_ids, position_embeddings)
        calls = self._calls(hidden_states, query, key, value, pattern, mask, bias, past, tables)
        dropout = self.dropout if self.training else 0.0
        ran = [call.run(chosen, dropout) for call in calls]
        results = [each.result for each in ran]
        lse = torch.cat([result.lse for result in results], dim=2)
        maps = None
        if output_attentions:
            _check_map(lse, key.shape[2])
            with torch.no_grad():
                parts = [
                    call.full_map(result.lse, key.shape[2])
                    for call, result in zip(calls, results, strict=True)
                ]
            maps = torch.cat(parts, dim=2).to(query.dtype)
        heads = torch.cat([result.output for result in results], dim=2)
        if heard():
            self._announce((query, key, value), calls, heads, lse, mask, pattern, ran[-1].implementation)
        output = AttentionOutput(
            self.o_proj(heads.transpose(1, 2).flatten(2)),
            maps,
            cache if use_cache else None,
            lse,
            {
                "implementation": ran[-1].implementation,
                "reason": ran[-1].reason,
                "pattern": pattern.describe(),
                "heads": heads,
            },
        )
        return output if return_dict else self._legacy(output)

    def _announce(
        self,
        plain: tuple[Tensor, Tensor, Tensor],
        calls: list[_Call],
        heads: Tensor,
        lse: Tensor,
        mask: Mask,
        pattern: Pattern,
        ran: str,
    ) -> None:
        def given(operands: tuple[Tensor, ...]) -> list[_Call]:
            parts = zip(calls, zip(*[iter(operands)] * 3, strict=True), strict=True)
            return [call._replace(query=q, key=k, value=v) for call, (q, k, v) in parts]

        def again(*operands: Tensor) -> Tensor:
            return torch.cat([call.run(ran).result.output for call in given(operands)], dim=2)

        def reference(*operands: Tensor) -> Tensor:
            made = [dense(c.query, c.key, c.value, c.pattern, **c.options) for c in given(operands)]
            return torch.cat(made, dim=2)

        first = calls[0] if isinstance(calls[0].pattern, Dense) else None
        announce(
            AttentionCall(
                "sparse",
                *plain,
                heads,
                lse,
                mask & Causal() if pattern.causal else mask,
                self.scale,
                ran,
                again,
                reference,
                tuple(tensor for call in calls for tensor in (call.query, call.key, call.value)),
                extra={} if first is None else {"global_query": first.query, "global_key": first.key},
                detail={"pattern": pattern_to_json(pattern)},
                row_values=() if first is None else (first.value,),
                unmapped="its scores have a bias" if calls[-1].options["bias"] is not None else "",
            )
        )

    def pattern(self, causal: bool | None = None) -> Pattern:
        """Who attends to whom."""
        causal = self.causal if causal is None else causal
        return build_pattern(
            self.sparsity_pattern,
            causal,
            local_window=self.local_window,
            global_tokens=self.global_tokens,
            num_random=self.num_random,
            stride=self.stride,
            summary_tokens=self.summary_tokens,
            block_size=self.block_size,
            sliding_blocks=self.sliding_blocks,
            seed=self.seed,
            layer=self.layer_idx,
        )

    def effective_map(
        self,
        hidden_states: Tensor,
        *,
        head: int,
        batch: int = 0,
        attention_mask: Mask | Tensor | None = None,
        causal: bool | None = None,
    ) -> SparseMap:
        """The map of one head over a whole sequence, to be looked at region by region; masks that are ranges only."""
        self._check_input(hidden_states, None)
        is_causal = self.causal if causal is None else causal
        size = hidden_states.shape[1]
        mask, bias = read_attention_mask(
            attention_mask, batch=len(hidden_states), heads=self.num_heads, num_queries=size, num_keys=size
        )
        if bias is not None:
            raise PatternError("attention_mask must be one range of keys a sequence for a map; it has pairs")
        pattern = self.pattern(is_causal)
        with torch.no_grad():
            query, key, value = self._project(hidden_states, hidden_states)
            query, key = self._encode(query, key, None, None, 0, None)
            calls = self._calls(hidden_states, query, key, value, pattern, mask, None, 0, (None, None))
            lse = torch.cat([call.run(self.implementation).result.lse for call in calls], dim=2)

        def plain(tensor: Tensor, of: int) -> Any:
            return tensor[batch, of].to(lse.dtype).cpu().numpy()

        kv_head = head // (self.num_heads // self.num_kv_heads)
        first = calls[0] if isinstance(calls[0].pattern, Dense) else None
        return SparseMap(
            plain(query, head),
            plain(key, kv_head),
            lse[batch, head].cpu().numpy(),
            self.scale,
            pattern,
            head,
            mask,
            batch,
            None if first is None else plain(first.query, head),
            None if first is None else plain(first.key, kv_head),
        )

    def _calls(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        mask: Mask,
        bias: Tensor | None,
        past: int,
        positions: tuple[Tensor | None, Tables | None],
    ) -> list[_Call]:
        """Arguments of ``run``: one call, and one before it for the global rows of a Longformer."""
        start = key.shape[2] - query.shape[2]
        rest: dict[str, Any] = {"scale": self.scale, "mask": mask, "bias": bias, "start": start}
        split = min(self.global_tokens, query.shape[2]) if past == 0 else 0
        if self.sparsity_pattern != "longformer" or split == 0:
            return [_Call(query, key, value, pattern, rest)]
        seen = split if pattern.causal else query.shape[2]
        q, k, v = self._project_global(hidden_states, split, seen, *positions)
        above = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])
        top = rest | {"start": 0, "bias": None if above is None else above[:, :, :split, :seen]}
        calls = [_Call(q, k, v, Dense(pattern.causal), top)]
        if split < query.shape[2]:
            below = rest | {"start": split, "bias": None if above is None else above[:, :, split:]}
            calls.append(_Call(query[:, :, split:], key, value, pattern, below))
        return calls

    def _project_global(
        self, hidden_states: Tensor, split: int, seen: int, ids: Tensor | None, tables: Tables | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first ``split`` tokens, keys and values of the first ``seen``, by the global projections."""

        def project(linear: nn.Linear, count: int) -> Tensor:
            return linear(hidden_states[:, :count]).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def turn(tensor: Tensor, count: int) -> Tensor:
            some_ids = None if ids is None else ids[..., :count]
            some = None if tables is None else (tables[0][..., :count, :], tables[1][..., :count, :])
            return self._encode(tensor, tensor, some_ids, some, 0, None)[0]

        query = turn(project(self.q_global_proj, split), split)
        key = turn(project(self.k_global_proj, seen), seen)
        return query, key, project(self.v_global_proj, seen)

    def _new_cache(self) -> Cache:
        return RollingKV(self.local_window) if self.sparsity_pattern == "local" else ContiguousKV()

    def _open_cache(
        self, past: Cache | Tables | None, use_cache: bool, context: Tensor | None
    ) -> Cache | None:
        if isinstance(past, RollingKV) and (
            self.sparsity_pattern != "local" or past.window < self.local_window
        ):
            raise PatternError(
                f"past_key_value must keep what {self.sparsity_pattern} attends to; it is a RollingKV of {past.window}"
            )
        cache = super()._open_cache(past, use_cache, context)
        held = cache.length(self.layer_idx) if cache is not None else 0
        if self.sparsity_pattern == "longformer" and 0 < held < self.global_tokens:
            raise PatternError(
                f"the first chunk must hold all {self.global_tokens} global tokens; the cache holds {held}"
            )
        return cache


class BlockSparseAttention(SparseAttention):
    """BigBird's pattern with every number of blocks given; returns ``(output, cache or None)``."""

    legacy_returns = 2

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 8,
        block_size: int = 64,
        num_global_blocks: int = 1,
        num_random_blocks: int = 1,
        num_sliding_blocks: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            "bigbird",
            global_tokens=num_global_blocks * block_size,
            num_random=num_random_blocks,
            block_size=block_size,
            sliding_blocks=num_sliding_blocks,
            **options,
        )


DSA = SparseAttention


def _check_map(lse: Tensor, num_keys: int) -> None:
    size = 4 * lse.numel() * num_keys
    if size > MAP_LIMIT_BYTES:
        raise ValueError(
            f"output_attentions would take {size:,} bytes, more than {MAP_LIMIT_BYTES:,}; "
            "look at regions with effective_map instead"
        )
