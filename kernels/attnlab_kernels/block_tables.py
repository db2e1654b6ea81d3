"""Which blocks of a pool each running sequence holds: room for a scheduler, slots for a step. No tensor here.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180. A block as long as the longest sequence makes it a contiguous cache, which sets that
much aside for each sequence, as servers did before.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnlab_kernels.block_pool import BlockPool, chain_digest
from attnlab_kernels.caches import CacheError


@dataclass
class _Held:
    blocks: list[int]
    prompt: Sequence[int] = ()
    """ids of the prompt, where its blocks may be shared"""
    digests: list[bytes] = field(default_factory=list)
    """of the leading full blocks of the prompt that are computed"""


class BlockTables:
    """Follows the scheduler's ``Room``. Position p of a sequence lies in block ``table[p // block_size]``.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens of a block.
        prompts: token ids of each sequence's prompt, for those whose leading full blocks may be shared with another
            that begins with the same tokens; None shares nothing.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prompts: Mapping[Any, Sequence[int]] | None = None
    ) -> None:
        if block_size < 1:
            raise CacheError(f"block_size must be at least 1; got {block_size}")
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._prompts = prompts or {}
        self._held: dict[Hashable, _Held] = {}

    @property
    def total_tokens(self) -> int:
        """Tokens that the pool has room for."""
        return self.pool.num_blocks * self.block_size

    @property
    def free_tokens(self) -> int:
        """Tokens that the blocks nobody holds have room for."""
        return self.pool.free_blocks * self.block_size

    @property
    def reserved_tokens(self) -> int:
        """Tokens that the blocks in use have room for, a shared block once."""
        return self.total_tokens - self.free_tokens

    @property
    def twice_tokens(self) -> int:
        """Tokens of shared blocks that a sum over all sequences counts once too often."""
        entries = sum(len(held.blocks) for held in self._held.values())
        return entries * self.block_size - self.reserved_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-tokens // self.block_size)

    def admit(self, seq_id: Hashable, tokens: int) -> int | None:
        """Take blocks for a prompt; how many of its tokens other sequences have computed, None where there is no room.

        The last token is never shared: it has to be computed to go on.
        """
        if seq_id in self._held:
            raise CacheError(f"seq_id {seq_id!r} holds blocks already; release it first")
        held = _Held([], self._prompts.get(seq_id, ()))
        shared = self._find_shared(held, tokens)
        self.pool.share(shared)
        needed = self.blocks_for(tokens) - len(shared)
        if needed > self.pool.free_blocks:
            self.pool.release(shared)
            return None
        held.blocks = shared + self.pool.take(needed)
        self._held[seq_id] = held
        return len(shared) * self.block_size

    def grow(self, seq_id: Hashable, tokens: int) -> bool:
        """Take the blocks that so many tokens need beyond those held; False, and no change, where there are none."""
        held = self._held[seq_id]
        needed = self.blocks_for(tokens) - len(held.blocks)
        if needed > self.pool.free_blocks:
            return False
        held.blocks += self.pool.take(max(needed, 0))
        return True

    def release(self, seq_id: Hashable) -> None:
        """Give all blocks of a sequence back; CacheError if it holds none."""
        if seq_id not in self._held:
            raise CacheError(f"seq_id {seq_id!r} holds no blocks")
        self.pool.release(self._held.pop(seq_id).blocks)

    def computed(self, seq_id: Hashable, tokens: int) -> None:
        """The first ``tokens`` of a sequence are in their blocks: from now on others may share the full ones."""
        held = self._held[seq_id]
        full = min(tokens, len(held.prompt)) // self.block_size
        for index in range(len(held.digests), full):
            held.digests.append(self._digest(held, index))
            self.pool.remember(held.blocks[index], held.digests[-1])

    def table(self, seq_id: Hashable) -> list[int]:
        """Blocks of a sequence in logical order."""
        return list(self._held[seq_id].blocks)

    def slots(self, seq_id: Hashable, start: int, stop: int) -> list[int]:
        """Slots of positions ``start..stop``, counted over the whole pool."""
        blocks, size = self._held[seq_id].blocks, self.block_size
        return [blocks[place // size] * size + place % size for place in range(start, stop)]

    def _find_shared(self, held: _Held, tokens: int) -> list[int]:
        shared: list[int] = []
        for index in range((min(len(held.prompt), tokens) - 1) // self.block_size):
            digest = self._digest(held, index)
            block = self.pool.find(digest)
            if block is None:
                break
            held.digests.append(digest)
            shared.append(block)
        return shared

    def _digest(self, held: _Held, index: int) -> bytes:
        tokens = held.prompt[index * self.block_size : (index + 1) * self.block_size]
        return chain_digest(held.digests[-1] if held.digests else b"", tokens)
