"""PagedAttention. Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.attention_call import AttentionCall, announce, batched, composing, heard, softmax_call
from attnlab_kernels.caches import Cache
from attnlab_kernels.masks import Causal, Mask, Padding
from attnlab_kernels.mechanisms.attention_mask import read_attention_mask, read_position_bias
from attnlab_kernels.mechanisms.base import SoftmaxModule, read_aliases, read_width
from attnlab_kernels.operations.paged.reference import gather, walk
from attnlab_kernels.operations.softmax.api import AttendCall, Unsupported
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.paged_cache import PagedKV
from attnlab_kernels.paged_sequences import PagedSequences
from attnlab_kernels.position_bias import PositionBias
from attnlab_kernels.positions import Rotary


class PagedAttention(SoftmaxModule):
    """Causal attention whose keys and values live in fixed blocks of a pool, found through a table a sequence.

    Returns ``(output, map or None, cache or None)``; the cache is a ``PagedSequences``, which also answers to
    ``["seq_len"]`` and ``["block_ids"]``. The module keeps its sequences: a second call with the same ``seq_id`` goes
    on where the first ended, until ``free_sequence``. Weights are those of GroupedQueryAttention. For inference:
    with the pool in use no gradient is recorded.

    Args:
        d_model: model width (also: dim, hidden_size, embed_dim, query_dim).
        block_size: tokens of a block.
        num_blocks: blocks of the pool; OutOfBlocks when they do not suffice.
        num_kv_heads: a divisor of ``num_heads``; default all.
        layers: layers that share the pool's tables, if several modules use one ``pages``.
        implementation: "walk" visits block after block; any name of ``operations.softmax`` gathers first.
    """

    legacy_returns: ClassVar[int] = 3

    def __init__(
        self,
        d_model: int | None = None,
        num_heads: int = 8,
        head_dim: int | None = None,
        block_size: int = 16,
        num_blocks: int = 1024,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        *,
        causal: bool = True,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        layers: int = 1,
        pages: PagedKV | None = None,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        if not causal:
            raise ValueError("causal must be True: a sequence that grows has no future to attend to")
        super().__init__(
            dim=read_width("d_model", d_model, widths),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dropout=dropout,
            bias=bias,
            causal=True,
            attention_scale=attention_scale,
            use_rotary=use_rotary,
            rope_base=rope_base,
            layer_idx=layer_idx,
            implementation=implementation,
        )
        self.pages = pages or PagedKV(
            num_blocks, block_size, self.num_kv_heads, self.head_dim, layers=max(layers, layer_idx + 1)
        )

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        *,
        seq_id: Hashable | None = None,
        seq_ids: Sequence[Hashable] | None = None,
        lengths: Sequence[int] | None = None,
        attention_mask: Mask | Tensor | None = None,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_bias: PositionBias | None = None,
        past_key_value: Cache | tuple[Tensor, Tensor] | None = None,
        use_cache: bool = True,
        output_attentions: bool = False,
        causal: bool | None = None,
        return_dict: bool = False,
        implementation: str | None = None,
        **aliases: Any,
    ) -> Any:
        """Attend from new tokens ``[B, n, dim]`` to the tokens of their sequences so far and to each other.

        Args:
            seq_id: the one sequence, for a batch of one; opened if it is new.
            seq_ids: a sequence for every row. Default: row b is sequence b.
            lengths: new tokens of each row, ``<= n``; what follows them is padding, its output is zero.
            attention_mask: a ``Mask`` joined to the causal one, or ``[B, n]``, 1 = token, padding last.
            position_bias: a function of positions, as those of ``position_bias``; not for "walk".
            position_ids: ``[n]`` or ``[B, n]``; default: after each sequence's own tokens.
            past_key_value: a ``PagedSequences`` of this pool, instead of ``seq_ids``.
            use_cache: False attends to the new tokens alone and touches no sequence.
            output_attentions: also return the map ``[B, H, n, m]`` in logical order, zero past a sequence's end.
            implementation: "walk", a name of ``operations.softmax``, or "auto" (alias: backend).

        Raises:
            ValueError: an argument that does not fit; OutOfBlocks, and no change, if the pool is too small.
        """
        context, implementation = read_aliases(context, implementation, aliases)
        self._check_call(hidden_states, context, causal, position_bias)
        bias = position_bias if callable(position_bias) else None
        name = implementation or self.implementation
        batch, count = hidden_states.shape[:2]
        mask, counts = _read_mask(attention_mask, lengths, batch, count)
        with torch.no_grad() if use_cache else nullcontext():
            query, key, value = self._project(hidden_states, hidden_states)
            if not use_cache:
                if past_key_value is not None:
                    raise ValueError("use_cache must be True with past_key_value: its tokens are in the pool")
                query, key = self._encode(query, key, position_ids, position_embeddings, 0, None)
                with composing() as parts:
                    results = [
                        self._one(
                            query[b, :, :n],
                            key[b, :, :n],
                            value[b, :, :n],
                            mask,
                            name,
                            output_attentions,
                            bias,
                        )
                        for b, n in enumerate(counts)
                    ]
                self._announce(parts, [])
                return self._finish(results, count, None, return_dict)
            opened, cache = self._sequences(seq_id, seq_ids, past_key_value, batch)
            past = cache.lengths(self.layer_idx)
            try:
                if position_ids is None:
                    steps = torch.arange(count, device=query.device)
                    position_ids = torch.tensor(past, device=query.device)[:, None] + steps
                query, key = self._encode(query, key, position_ids, position_embeddings, 0, None)
                rows = [
                    [tensor[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)]
                    for tensor in (key, value)
                ]
                self.pages.append(self.layer_idx, cache.seq_ids, rows[0], rows[1])
                with composing() as parts:
                    results = [
                        self._paged(query[b, :, :n], cache.seq_ids[b], mask, name, output_attentions, bias)
                        for b, n in enumerate(counts)
                    ]
                self._announce(parts, self.pages.table(cache.seq_ids[0]))
                return self._finish(results, count, cache, return_dict)
            except BaseException:
                self._undo(cache, past, opened)
                raise

    def new_cache(self, batch: int = 1) -> PagedSequences:
        """New, empty sequences of this module's pool, to pass as ``past_key_value``."""
        return PagedSequences.fresh(self.pages, batch)

    def fork_sequence(self, parent: Hashable, child: Hashable) -> None:
        """A sequence that goes on from where ``parent`` is; shares its blocks until one of them writes."""
        self.pages.fork(parent, child)

    def free_sequence(self, seq_id: Hashable) -> None:
        """End a sequence and give its blocks back; CacheError if it is not open."""
        self.pages.free(seq_id)

    def _sequences(
        self,
        seq_id: Hashable | None,
        seq_ids: Sequence[Hashable] | None,
        past: Cache | tuple[Tensor, Tensor] | None,
        batch: int,
    ) -> tuple[list[Hashable], PagedSequences]:
        given = [name for name in (seq_id, seq_ids, past) if name is not None]
        if len(given) > 1:
            raise ValueError("seq_id, seq_ids and past_key_value all name the sequences; give one of them")
        if past is not None:
            if not isinstance(past, PagedSequences) or past.pages is not self.pages:
                raise ValueError(
                    f"past_key_value must be PagedSequences of this module's pool; got {type(past).__name__}"
                )
            past.lengths()  # CacheError if one of them has ended
            names = past.seq_ids
        elif seq_ids is not None:
            names = tuple(seq_ids)
        else:
            names = tuple(range(batch)) if seq_id is None else (seq_id,)
        if len(names) != batch:
            raise ValueError(f"seq_ids must name a sequence for each of the {batch} rows; got {names!r}")
        opened = [name for name in dict.fromkeys(names) if name not in self.pages]
        for name in opened:
            self.pages.open(name)
        return opened, past if isinstance(past, PagedSequences) else PagedSequences(self.pages, names)

    def _undo(self, cache: PagedSequences, past: list[int], opened: list[Hashable]) -> None:
        """A call that fails leaves every sequence as it was."""
        for seq_id, length in zip(cache.seq_ids, past, strict=True):
            if seq_id in opened and seq_id in self.pages:
                self.pages.free(seq_id)
            elif seq_id in self.pages:
                self.pages.crop(seq_id, length, layer=self.layer_idx)

    def _paged(
        self,
        query: Tensor,
        seq_id: Hashable,
        mask: Mask,
        name: str,
        output_attentions: bool,
        position_bias: PositionBias | None,
    ) -> AttentionOutput:
        table = self.pages.table(seq_id)
        length = self.pages.length(seq_id, self.layer_idx)
        if length:
            key_pool, value_pool = self.pages.pools(self.layer_idx)
        else:
            key_pool = value_pool = query.new_zeros(0, 1, self.num_kv_heads, self.head_dim)
        if name == "walk":
            if position_bias is not None:
                raise Unsupported("'walk' adds no position_bias: choose an implementation that gathers")
            output, lse = walk(query, key_pool, value_pool, table, length, mask=mask, scale=self.scale)
            if heard():
                announce(self._walked(query, output, lse, mask, table, length))
            aux = {"implementation": "walk", "reason": "asked for; block after block", "block_table": table}
            maps = None
            if output_attentions:
                keys = gather(key_pool, table, length)[None]
                maps = self._map(query[None], keys, mask, None, lse[None])[0]
            return AttentionOutput(output, maps, lse=lse, aux=aux)
        key, value = gather(key_pool, table, length), gather(value_pool, table, length)
        result = self._one(query, key, value, mask, name, output_attentions, position_bias)
        result.aux["reason"] = f"blocks gathered to one piece; {result.aux['reason']}"
        result.aux["block_table"] = table
        return result

    def _walked(
        self, query: Tensor, output: Tensor, lse: Tensor, mask: Mask, table: list[int], length: int
    ) -> AttentionCall:
        pools = self.pages.pools(self.layer_idx)
        key, value = (gather(pool, table, length)[None] for pool in pools)

        def again(query: Tensor) -> Tensor:
            return walk(query[0], *pools, table, length, mask=mask, scale=self.scale)[0][None]

        told = AttendCall(query[None], key, value, mask, self.scale, None, output[None], lse[None], "walk")
        plain = softmax_call(told)

        def reference(query: Tensor) -> Tensor:
            return plain.reference(query, key.to(query.dtype), value.to(query.dtype))

        # the pool holds keys and values: only queries can be given anew
        return replace(plain, run=again, reference=reference, operands=(query[None],))

    def _announce(self, parts: list[AttentionCall], table: list[int]) -> None:
        if parts:
            facts = {"block_size": self.pages.block_size, "block_table": list(table)} if table else {}
            announce(batched(parts).retold("paged" if table else "softmax", **facts))

    def _one(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        name: str,
        output_attentions: bool,
        position_bias: PositionBias | None,
    ) -> AttentionOutput:
        """One sequence, without the batch dimension."""
        if name == "walk":
            raise ValueError("implementation 'walk' needs use_cache=True: without a pool there are no blocks")
        places = torch.arange(key.shape[1], device=key.device)
        bias = read_position_bias(
            position_bias, None, queries=places[len(places) - query.shape[1] :], keys=places
        )
        result = self._attend(query[None], key[None], value[None], mask, bias, name)
        maps = None
        if output_attentions:
            maps = self._map(query[None], key[None], mask, bias, result.lse)[0]
        assert result.lse is not None
        return AttentionOutput(result.output[0], maps, lse=result.lse[0], aux=result.aux)

    def _finish(
        self, results: list[AttentionOutput], count: int, cache: PagedSequences | None, return_dict: bool
    ) -> Any:
        """Rows padded to one batch; what belongs to padding is zero, its log-sum-exp minus infinity."""
        heads = torch.stack([_pad_rows(r.output.transpose(0, 1).flatten(1), count) for r in results])
        counts = [r.output.shape[1] for r in results]
        output = self.o_proj(heads)
        if min(counts) < count:
            steps = torch.arange(count, device=output.device)
            kept = steps < torch.tensor(counts, device=output.device)[:, None]
            output = output.masked_fill(~kept[..., None], 0)
        lses = [
            functional.pad(r.lse, (0, count - r.lse.shape[-1]), value=-torch.inf)
            for r in results
            if r.lse is not None
        ]
        maps = [r.attentions for r in results if r.attentions is not None]
        width = max((m.shape[-1] for m in maps), default=0)
        padded = [functional.pad(m, (0, width - m.shape[-1], 0, count - m.shape[-2])) for m in maps]
        aux: dict[str, Any] = {name: results[0].aux[name] for name in ("implementation", "reason")}
        aux["block_tables"] = [r.aux.get("block_table", []) for r in results]
        result = AttentionOutput(
            output, torch.stack(padded) if padded else None, cache, torch.stack(lses), aux
        )
        return result if return_dict else self._legacy(result)

    def _check_call(
        self, hidden_states: Tensor, context: Tensor | None, causal: bool | None, bias: PositionBias | None
    ) -> None:
        self._check_input(hidden_states, context)
        if hidden_states.shape[0] == 0:
            raise ValueError("hidden_states must hold at least one sequence; got none")
        if context is not None:
            raise ValueError("context must be None: paged attention reads its own sequence only")
        if isinstance(bias, Tensor):
            raise ValueError("position_bias must be a function of positions: sequences differ in length")
        if causal is False:
            raise ValueError("causal must be True: a sequence that grows has no future to attend to")


def _pad_rows(rows: Tensor, count: int) -> Tensor:
    return functional.pad(rows, (0, 0, 0, count - rows.shape[0]))


def _read_mask(
    given: Mask | Tensor | None, lengths: Sequence[int] | None, batch: int, count: int
) -> tuple[Mask, list[int]]:
    """The mask of every sequence and how many new tokens each row has."""
    if isinstance(given, Tensor):
        if lengths is not None:
            raise ValueError("attention_mask and lengths both say which tokens are padding; give one")
        if given.dim() != 2 or tuple(given.shape) != (batch, count):
            raise ValueError(
                f"attention_mask must be a Mask or [{batch}, {count}], 1 = token; got {list(given.shape)}"
            )
        padding, bias = read_attention_mask(given, batch=batch, heads=1, num_queries=count, num_keys=count)
        ranges = padding.ranges if isinstance(padding, Padding) else ()
        if bias is not None or not ranges or any(start for start, _ in ranges):
            raise ValueError(
                "attention_mask of paged attention must hold whole numbers or bool, padding last"
            )
        return Causal(), [stop for _, stop in ranges]
    mask = Causal() if given is None else Causal() & given
    if mask.band().ranges is not None:
        raise ValueError("attention_mask must not be a Padding: say lengths for ragged rows")
    counts = [count] * batch if lengths is None else [int(length) for length in lengths]
    if len(counts) != batch or not all(0 <= length <= count for length in counts):
        raise ValueError(f"lengths must be {batch} whole numbers of 0..{count}; got {lengths}")
    return mask, counts
