"""Keys and values in blocks of a pool, found through a table a sequence, shared until somebody writes.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.block_pool import BlockPool, OutOfBlocks, chain_digest
from attnlab_kernels.caches import CacheError

__all__ = ["OutOfBlocks", "PagedKV", "PoolUsage"]


class PoolUsage(NamedTuple):
    """How full the pool is."""

    used_blocks: int
    free_blocks: int
    shared_blocks: int
    """held by more than one sequence"""
    filled: float
    """share of the slots of the used blocks that hold a token; 1 where nothing is used"""


@dataclass
class _Sequence:
    layers: int
    table: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """of the leading full blocks, as far as their tokens are known"""
    extra: str = ""

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [0] * self.layers


class PagedKV:
    """A pool ``[num_blocks, block_size, Hkv, D]`` of keys and one of values for each layer, made on first use.

    All layers share one table a sequence. Position p of a sequence lies in block ``table[p // block_size]``, slot
    ``p % block_size``. What cannot be done is refused before anything changes.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens of a block.
        layers: layers that the pool serves.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, *, layers: int = 1
    ) -> None:
        sizes = {"block_size": block_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, value in (*sizes.items(), ("layers", layers)):
            if value < 1:
                raise CacheError(f"{name} must be at least 1; got {value}")
        self.pool = BlockPool(num_blocks)
        self.block_size, self.num_kv_heads, self.head_dim = block_size, num_kv_heads, head_dim
        self.layers = layers
        self._sequences: dict[Hashable, _Sequence] = {}
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def __contains__(self, seq_id: Hashable) -> bool:
        return seq_id in self._sequences

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """The sequences that are open."""
        return tuple(self._sequences)

    def open(self, seq_id: Hashable, tokens: Sequence[int] = (), *, extra: str = "") -> int:
        """Begin a sequence, and share what the pool already holds of its prompt.

        Args:
            tokens: ids of the prompt, which the next appends must bring in this order. Leading full blocks that
                hold the same tokens after the same tokens are shared, but never the whole prompt: the last token
                must be computed to go on.
            extra: what else decides the numbers (an adapter, an image); only equal ones share.

        Returns:
            how many tokens need no computing; append the rest.
        """
        if seq_id in self._sequences:
            raise CacheError(f"seq_id {seq_id!r} is open already; free it first")
        sequence = _Sequence(self.layers, extra=extra, tokens=[int(token) for token in tokens])
        parent = b""
        for start in range(0, len(sequence.tokens) - self.block_size, self.block_size):
            parent = chain_digest(parent, sequence.tokens[start : start + self.block_size], extra)
            block = self.pool.find(parent)
            if block is None:
                break
            sequence.table.append(block)
            sequence.digests.append(parent)
        self.pool.share(sequence.table)
        reused = len(sequence.table) * self.block_size
        sequence.lengths = [reused] * self.layers
        self._sequences[seq_id] = sequence
        return reused

    def append(
        self,
        layer: int,
        seq_ids: Sequence[Hashable],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Add ``[n_s, Hkv, D]`` to each sequence s, all of them or, with OutOfBlocks, none.

        Args:
            tokens: ids of the new tokens, if known, so that their blocks can be shared; once, with layer 0.
        """
        self._check_append(layer, seq_ids, keys, values)
        counts = [key.shape[0] for key in keys]
        if sum(counts) == 0:
            return
        self._make_room(layer, seq_ids, counts)
        key_pool, value_pool = self._pools(layer, keys[0], values[0])
        for index, seq_id in enumerate(seq_ids):
            sequence = self._sequences[seq_id]
            start = sequence.lengths[layer]
            slots = self._slots(sequence, start, start + counts[index], key_pool.device)
            key_pool.flatten(0, 1)[slots] = keys[index].detach()
            value_pool.flatten(0, 1)[slots] = values[index].detach()
            sequence.lengths[layer] += counts[index]
            if tokens is not None:
                known = min(len(sequence.tokens), start)
                sequence.tokens[known:] = [int(token) for token in tokens[index]] if known == start else []
            self._remember(sequence)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """A sequence that goes on from where ``parent`` is; blocks are copied only when one of them writes."""
        sequence = self._sequence(parent)
        if child in self._sequences:
            raise CacheError(f"seq_id {child!r} is open already; free it first")
        self.pool.share(sequence.table)
        self._sequences[child] = replace(
            sequence,
            table=list(sequence.table),
            lengths=list(sequence.lengths),
            tokens=list(sequence.tokens),
            digests=list(sequence.digests),
        )

    def free(self, seq_id: Hashable) -> None:
        """End a sequence; CacheError if it is not open (or was freed before)."""
        self.pool.release(self._sequence(seq_id).table)
        del self._sequences[seq_id]

    def crop(self, seq_id: Hashable, length: int, *, layer: int | None = None) -> None:
        """Forget a sequence's tokens from ``length`` on, in one layer or all, and give back the blocks that empties."""
        sequence = self._sequence(seq_id)
        longest = max(sequence.lengths) if layer is None else sequence.lengths[layer]
        if not 0 <= length <= longest:
            raise CacheError(f"length must be between 0 and the {longest} tokens of {seq_id!r}; got {length}")
        cut = range(self.layers) if layer is None else (layer,)
        for index in cut:
            sequence.lengths[index] = min(sequence.lengths[index], length)
        kept = -(-max(sequence.lengths) // self.block_size)
        self.pool.release(sequence.table[kept:])
        del sequence.table[kept:], sequence.tokens[length:], sequence.digests[length // self.block_size :]

    def length(self, seq_id: Hashable, layer: int = 0) -> int:
        """Tokens of a sequence that have passed this layer."""
        return self._sequence(seq_id).lengths[layer]

    def table(self, seq_id: Hashable) -> list[int]:
        """Physical blocks of a sequence, in logical order."""
        return list(self._sequence(seq_id).table)

    def pools(self, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, ``[num_blocks, block_size, Hkv, D]``; slots without a token hold anything."""
        key, value = self._keys[layer], self._values[layer]
        if key is None or value is None:
            raise CacheError(f"layer {layer} holds nothing yet")
        return key, value

    def nbytes(self) -> int:
        """Bytes of the blocks that sequences hold, each once, and 4 for every entry of a table."""
        used = {block for sequence in self._sequences.values() for block in sequence.table}
        pools = [pool for pool in (*self._keys, *self._values) if pool is not None]
        entries = sum(len(sequence.table) for sequence in self._sequences.values())
        return len(used) * sum(pool[0].nbytes for pool in pools) + 4 * entries

    def usage(self) -> PoolUsage:
        """How many blocks are used, free and shared, and how full the used ones are."""
        filled: dict[int, int] = {}
        for sequence in self._sequences.values():
            for index, block in enumerate(sequence.table):
                count = min(self.block_size, max(sequence.lengths) - index * self.block_size)
                filled[block] = max(filled.get(block, 0), count)
        shared = sum(self.pool.references(block) > 1 for block in filled)
        share = sum(filled.values()) / (len(filled) * self.block_size) if filled else 1.0
        return PoolUsage(len(filled), self.pool.free_blocks, shared, share)

    def _sequence(self, seq_id: Hashable) -> _Sequence:
        if seq_id not in self._sequences:
            known = ", ".join(repr(name) for name in list(self._sequences)[:8]) or "none"
            raise CacheError(f"seq_id must be an open sequence (open: {known}); got {seq_id!r}")
        return self._sequences[seq_id]

    def _check_append(
        self, layer: int, seq_ids: Sequence[Hashable], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        if not 0 <= layer < self.layers:
            raise CacheError(f"layer must be one of 0..{self.layers - 1}; got {layer}")
        if not len(seq_ids) == len(keys) == len(values) or len(set(seq_ids)) < len(seq_ids):
            raise CacheError(f"seq_ids must be different, one for each of {len(keys)} keys; got {seq_ids!r}")
        for seq_id, key, value in zip(seq_ids, keys, values, strict=True):
            self._sequence(seq_id)
            if key.shape != (key.shape[0], self.num_kv_heads, self.head_dim) or value.shape != key.shape:
                raise CacheError(
                    f"key and value must be [n, {self.num_kv_heads}, {self.head_dim}]; "
                    f"got {list(key.shape)} and {list(value.shape)}"
                )
            pool = self._keys[layer]
            home = (key.dtype, key.device) if pool is None else (pool.dtype, pool.device)
            if any((tensor.dtype, tensor.device) != home for tensor in (key, value)):
                raise CacheError(
                    f"key and value must be {home[0]} on {home[1]}, as the pool; got {key.dtype} on {key.device} "
                    f"and {value.dtype} on {value.device}"
                )

    def _make_room(self, layer: int, seq_ids: Sequence[Hashable], counts: Sequence[int]) -> None:
        """Blocks to write into that nobody else holds; OutOfBlocks before anything changes."""
        missing: list[int] = []
        shared: list[list[int]] = []
        kept: list[int] = []
        leaving: dict[int, int] = {}
        for seq_id, count in zip(seq_ids, counts, strict=True):
            sequence = self._sequences[seq_id]
            start = sequence.lengths[layer]
            needed = -(-(start + count) // self.block_size) if count else len(sequence.table)
            missing.append(max(0, needed - len(sequence.table)))
            mine: list[int] = []
            for index in range(start // self.block_size, min(needed, len(sequence.table))):
                block = sequence.table[index]
                # the last of those that held a block keeps it
                if self.pool.references(block) - leaving.get(block, 0) > 1:
                    leaving[block] = leaving.get(block, 0) + 1
                    mine.append(index)
                else:
                    kept.append(block)
            shared.append(mine)
        blocks = iter(self.pool.take(sum(missing) + sum(len(mine) for mine in shared)))
        for block in kept:
            self.pool.forget(block)
        for seq_id, count, mine in zip(seq_ids, missing, shared, strict=True):
            sequence = self._sequences[seq_id]
            for index in mine:
                self._copy_block(sequence, index, next(blocks))
            sequence.table += [next(blocks) for _ in range(count)]

    def _copy_block(self, sequence: _Sequence, index: int, target: int) -> None:
        source = sequence.table[index]
        for pool in (*self._keys, *self._values):
            if pool is not None:
                pool[target] = pool[source]
        self.pool.release([source])
        sequence.table[index] = target

    def _slots(self, sequence: _Sequence, start: int, stop: int, device: torch.device) -> Tensor:
        positions = torch.arange(start, stop, device=device)
        table = torch.tensor(sequence.table, dtype=torch.long, device=device)
        return table[positions // self.block_size] * self.block_size + positions % self.block_size

    def _pools(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._keys[layer] is None:
            shape = (self.pool.num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
            # a pool outlives the inference_mode in which it happens to be made
            with torch.inference_mode(False):
                self._keys[layer] = torch.zeros(shape, dtype=key.dtype, device=key.device)
                self._values[layer] = torch.zeros(shape, dtype=value.dtype, device=value.device)
        return self.pools(layer)

    def _remember(self, sequence: _Sequence) -> None:
        full = min(*sequence.lengths, len(sequence.tokens)) // self.block_size
        for index in range(len(sequence.digests), full):
            tokens = sequence.tokens[index * self.block_size : (index + 1) * self.block_size]
            parent = sequence.digests[-1] if sequence.digests else b""
            sequence.digests.append(chain_digest(parent, tokens, sequence.extra))
            self.pool.remember(sequence.table[index], sequence.digests[-1])
