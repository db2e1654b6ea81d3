"""Which blocks of a pool hold which sequence, for those who keep the blocks themselves.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180. Bookkeeping only; ``PagedKVCache`` holds such blocks, ``PagedKV`` does both at once.
"""

from __future__ import annotations

from collections.abc import Hashable

from attnlab_kernels.block_pool import BlockPool
from attnlab_kernels.caches import CacheError


class BlockTable:
    """The physical blocks of every sequence, in logical order, with a count of who shares them.

    Args:
        num_blocks: blocks of the pool, ``0..num_blocks - 1``.
        block_size: tokens of a block.
        num_heads: key and value heads of a token; what a block holds, for the record.
        head_dim: width of a head, likewise.
    """

    def __init__(self, num_blocks: int, block_size: int, num_heads: int, head_dim: int) -> None:
        for name, value in (("block_size", block_size), ("num_heads", num_heads), ("head_dim", head_dim)):
            if value < 1:
                raise CacheError(f"{name} must be at least 1; got {value}")
        self._pool = BlockPool(num_blocks)
        self._tables: dict[Hashable, list[int]] = {}
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_heads, self.head_dim = num_heads, head_dim

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.free_blocks

    def allocate(self, num_blocks: int, seq_id: Hashable = 0) -> list[int]:
        """Add blocks to the end of a sequence, new or not, and return them.

        Raises:
            OutOfBlocks: a RuntimeError, and no change, if fewer are free. CacheError: fewer than 0 asked for.
        """
        if num_blocks < 0:
            raise CacheError(f"num_blocks must be at least 0; got {num_blocks}")
        taken = self._pool.take(num_blocks)
        self._tables.setdefault(seq_id, []).extend(taken)
        return taken

    def free(self, seq_id: Hashable) -> None:
        """End a sequence; its blocks are free once nobody else holds them. CacheError if there is none."""
        self._pool.release(self._table(seq_id))
        del self._tables[seq_id]

    def get_block_ids(self, seq_id: Hashable) -> list[int]:
        """Blocks of a sequence in logical order; none for one that holds nothing."""
        return list(self._tables.get(seq_id, ()))

    def fork(self, src_seq_id: Hashable, dst_seq_id: Hashable) -> None:
        """A new sequence that shares every block of ``src_seq_id``. Who writes into one calls ``detach`` first."""
        table = self._table(src_seq_id)
        if dst_seq_id in self._tables:
            raise CacheError(f"dst_seq_id must be new; {dst_seq_id!r} holds blocks: free it first")
        self._pool.share(table)
        self._tables[dst_seq_id] = list(table)

    def detach(self, seq_id: Hashable, index: int) -> tuple[int, int] | None:
        """Copy-on-write: give the sequence its own block at logical ``index`` where others share it.

        Returns:
            ``(shared, own)``, to be copied (``PagedKVCache.copy_block``), or None if nobody shares the block.
        """
        table = self._table(seq_id)
        if not 0 <= index < len(table):
            raise CacheError(f"index must be one of the {len(table)} blocks of {seq_id!r}; got {index}")
        shared = table[index]
        if self._pool.references(shared) == 1:
            return None
        (own,) = self._pool.take(1)
        self._pool.release([shared])
        table[index] = own
        return shared, own

    def references(self, block_id: int) -> int:
        """How many sequences hold this block."""
        if not 0 <= block_id < self.num_blocks:
            raise CacheError(f"block_id must be one of 0..{self.num_blocks - 1}; got {block_id}")
        return self._pool.references(block_id)

    def _table(self, seq_id: Hashable) -> list[int]:
        if seq_id not in self._tables:
            known = ", ".join(repr(name) for name in list(self._tables)[:8]) or "none"
            raise CacheError(f"seq_id must hold blocks (those that do: {known}); got {seq_id!r}")
        return self._tables[seq_id]
