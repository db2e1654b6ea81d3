"""The blocks themselves: keys and values in fixed slots, for those who keep the tables (``BlockTable``) themselves.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnlab_kernels.caches import CacheError
from attnlab_kernels.operations.paged.reference import gather


class PagedKVCache(nn.Module):
    """Keys ``k_cache`` and values ``v_cache`` ``[num_blocks, block_size, num_heads, head_dim]``, made at once.

    ``block_fill_count`` ``[num_blocks]`` int32 is one past the last slot written of each block; ``read`` refuses to
    go beyond it.

    Args:
        num_heads: key and value heads.
        dtype: of the buffers; what is written must have it.
    """

    k_cache: Tensor
    v_cache: Tensor
    block_fill_count: Tensor

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        num_heads: int = 32,
        head_dim: int = 128,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_heads": num_heads}
        for name, value in (sizes | {"head_dim": head_dim}).items():
            if value < 1:
                raise CacheError(f"{name} must be at least 1; got {value}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_heads, self.head_dim = num_heads, head_dim
        shape = (num_blocks, block_size, num_heads, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("block_fill_count", torch.zeros(num_blocks, dtype=torch.int32), persistent=False)

    def write(self, block_idx: int, slot_idx: int, key: Tensor, value: Tensor) -> None:
        """Put one token's ``[H, D]`` (or ``[1, H, D]``) key and value into a slot."""
        if not 0 <= slot_idx < self.block_size:
            raise CacheError(f"slot_idx must be one of 0..{self.block_size - 1}; got {slot_idx}")
        key, value = (part[None] if part.dim() == 2 else part for part in (key, value))
        if key.shape[0] != 1:
            raise CacheError(f"key must be one token; got {key.shape[0]} (write_batch takes many)")
        self._put([block_idx], slot_idx, key, value)

    def write_batch(self, block_ids: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Put ``[n, H, D]`` keys and values one after the other, from the first slot of the first block on."""
        room = len(block_ids) * self.block_size
        if keys.shape[0] > room:
            raise CacheError(f"keys must fit into the {room} slots of block_ids; got {keys.shape[0]}")
        self._put(block_ids, 0, keys, values)

    def read(self, block_ids: Sequence[int], seq_len: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[seq_len, H, D]`` of a sequence whose blocks these are, in logical order."""
        blocks = self._checked(block_ids)
        if not 0 <= seq_len <= len(blocks) * self.block_size:
            room = len(blocks) * self.block_size
            raise CacheError(f"seq_len must be between 0 and the {room} slots of block_ids; got {seq_len}")
        filled = self.block_fill_count.tolist()
        for index in range(-(-seq_len // self.block_size)):
            wanted = min(self.block_size, seq_len - index * self.block_size)
            if filled[blocks[index]] < wanted:
                raise CacheError(
                    f"seq_len must end inside what was written: block {blocks[index]} holds "
                    f"{filled[blocks[index]]} tokens, and seq_len {seq_len} asks for {wanted} of it"
                )
        key, value = (gather(pool, blocks, seq_len).transpose(0, 1) for pool in (self.k_cache, self.v_cache))
        return key, value

    def forward(self, block_ids: Sequence[int], seq_len: int) -> tuple[Tensor, Tensor]:
        """The same as ``read``."""
        return self.read(block_ids, seq_len)

    def copy_block(self, source: int, target: int) -> None:
        """Make ``target`` hold what ``source`` holds: the copy of copy-on-write, see ``BlockTable.detach``."""
        source, target = self._checked([source, target])
        for buffer in (self.k_cache, self.v_cache, self.block_fill_count):
            buffer[target] = buffer[source]

    def clear_block(self, block_idx: int) -> None:
        """Forget what a block holds."""
        (block,) = self._checked([block_idx])
        for buffer in (self.k_cache, self.v_cache, self.block_fill_count):
            buffer[block] = 0

    def _put(self, block_ids: Sequence[int], first: int, keys: Tensor, values: Tensor) -> None:
        shape = (keys.shape[0], self.num_heads, self.head_dim)
        for name, part in (("key", keys), ("value", values)):
            if part.shape != shape or part.dtype != self.k_cache.dtype:
                raise CacheError(
                    f"{name} must be {list(shape)} of {self.k_cache.dtype}; got {list(part.shape)} of {part.dtype}"
                )
        places = torch.arange(first, first + keys.shape[0], device=self.k_cache.device)
        table = torch.tensor(self._checked(block_ids), dtype=torch.long, device=places.device)
        blocks, slots = table[places // self.block_size], places % self.block_size
        self.k_cache[blocks, slots] = keys.detach()
        self.v_cache[blocks, slots] = values.detach()
        self.block_fill_count.scatter_reduce_(0, blocks, (slots + 1).int(), reduce="amax")

    def _checked(self, block_ids: Sequence[int]) -> list[int]:
        for block in block_ids:
            if not 0 <= block < self.num_blocks:
                raise CacheError(f"block ids must be of 0..{self.num_blocks - 1}; got {block}")
        if len(set(block_ids)) < len(block_ids):
            raise CacheError(f"block ids must be different; got {list(block_ids)}")
        return [int(block) for block in block_ids]
