"""Who holds which block of a pool: reference counts, and full blocks that are found again by what they hold.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180. Bookkeeping only: no tensor is touched here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from attnlab_kernels.caches import CacheError


class OutOfBlocks(CacheError, RuntimeError):
    """The pool has fewer free blocks than are needed; nothing was changed. The arguments may well have been right."""


class BlockPool:
    """Blocks ``0..num_blocks - 1``. A free block that is still known by its contents is given away last."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise CacheError(f"num_blocks must be at least 1; got {num_blocks}")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._empty = deque(range(num_blocks))
        # blocks that nobody holds but whose contents are known, the longest unused first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._contents: dict[int, bytes] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken."""
        return len(self._empty) + len(self._idle)

    def references(self, block: int) -> int:
        """How many sequences hold this block."""
        return self._references[block]

    def take(self, count: int) -> list[int]:
        """``count`` blocks with one reference each; OutOfBlocks, and no change, if there are fewer."""
        if count > self.free_blocks:
            raise OutOfBlocks(
                f"{count} blocks are needed and {self.free_blocks} of num_blocks = {self.num_blocks} are free: "
                "free a sequence or make the pool larger"
            )
        taken = []
        for _ in range(count):
            if self._empty:
                block = self._empty.popleft()
            else:
                block, _ = self._idle.popitem(last=False)
                self.forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference for each block."""
        for block in blocks:
            self._idle.pop(block, None)
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less for each block; the last of a sequence is the first to be given away."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise CacheError(f"block {block} is freed twice")
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._contents:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def find(self, digest: bytes) -> int | None:
        """The block with these contents."""
        return self._block_of.get(digest)

    def remember(self, block: int, digest: bytes) -> None:
        """Make a full block findable; where another block has the same contents, that one stays."""
        if digest not in self._block_of and block not in self._contents:
            self._block_of[digest] = block
            self._contents[block] = digest

    def forget(self, block: int) -> None:
        """This block's contents are about to change."""
        digest = self._contents.pop(block, None)
        if digest is not None:
            del self._block_of[digest]


def chain_digest(parent: bytes, tokens: Sequence[int], extra: str = "") -> bytes:
    """What a block holds: its tokens, all tokens before it (``parent``) and what else decides its numbers."""
    text = f"{extra!r}:{','.join(str(int(token)) for token in tokens)}"
    return hashlib.sha256(parent + text.encode()).digest()
