"""Some sequences of a pool as one cache, so that any module can keep its tokens there.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.caches import CacheError, KVView
from attnlab_kernels.operations.paged.reference import gather
from attnlab_kernels.paged_cache import PagedKV

_names = itertools.count()


class PagedSequences:
    """Batch element b is sequence ``seq_ids[b]`` of ``pages``. Follows the cache protocol of ``caches``.

    Indexed by name it says where its one sequence lies: ``seq_id``, ``seq_len``, ``num_blocks``, ``block_ids``
    (lists, one entry a sequence, where there are several).
    """

    def __init__(self, pages: PagedKV, seq_ids: Sequence[Hashable]) -> None:
        self.pages, self.seq_ids = pages, tuple(seq_ids)

    @classmethod
    def fresh(cls, pages: PagedKV, batch: int) -> PagedSequences:
        """``batch`` new, empty sequences with names that nobody else uses."""
        names = [f"sequence {next(_names)}" for _ in range(batch)]
        for name in names:
            pages.open(name)
        return cls(pages, names)

    def update(self, layer: int, key: Tensor, value: Tensor, positions: Tensor | None = None) -> KVView:
        """Add ``[B, Hkv, n, D]``; a view is one piece, so the sequences must be equally long (else CacheError)."""
        lengths = self.lengths(layer)
        if len(set(lengths)) > 1:
            raise CacheError(f"sequences of one view must be equally long; got {lengths}")
        if key.dim() != 4 or key.shape[0] != len(self.seq_ids):
            raise CacheError(f"key must be [{len(self.seq_ids)}, Hkv, n, D]; got {list(key.shape)}")
        rows = [tensor.transpose(1, 2) for tensor in (key, value)]
        self.pages.append(layer, self.seq_ids, list(rows[0]), list(rows[1]))
        length = lengths[0] + key.shape[2]
        pools = self.pages.pools(layer)
        tables = [self.pages.table(seq_id) for seq_id in self.seq_ids]
        keys, values = (torch.stack([gather(pool, table, length) for table in tables]) for pool in pools)
        return KVView(keys, values, torch.arange(length, device=key.device))

    def lengths(self, layer: int = 0) -> list[int]:
        """Tokens of each sequence that have passed this layer."""
        return [self.pages.length(seq_id, layer) for seq_id in self.seq_ids]

    def length(self, layer: int = 0) -> int:
        """Tokens of the longest sequence that have passed this layer."""
        return max(self.lengths(layer), default=0)

    @property
    def seq_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.length()

    def nbytes(self) -> int:
        """Bytes of the whole pool's used blocks and tables, see ``PagedKV.nbytes``."""
        return self.pages.nbytes()

    def crop(self, length: int) -> None:
        """Forget the tokens of every sequence from ``length`` on."""
        for seq_id in self.seq_ids:
            self.pages.crop(seq_id, length)

    def reorder(self, index: Tensor) -> None:
        """Make batch element i what ``index[i]`` was; a sequence that is chosen twice is forked, not copied."""
        old = self.seq_ids
        new: list[Hashable] = []
        for position in index.tolist():
            if old[position] in new:
                child = f"sequence {next(_names)}"
                self.pages.fork(old[position], child)
                new.append(child)
            else:
                new.append(old[position])
        for seq_id in old:
            if seq_id not in new:
                self.pages.free(seq_id)
        self.seq_ids = tuple(new)

    def clone(self) -> PagedSequences:
        """Forks of all sequences: independent, and no block is copied until one of them writes."""
        names = [f"sequence {next(_names)}" for _ in self.seq_ids]
        for seq_id, name in zip(self.seq_ids, names, strict=True):
            self.pages.fork(seq_id, name)
        return PagedSequences(self.pages, names)

    def free(self) -> None:
        """End all sequences and give their blocks back."""
        for seq_id in self.seq_ids:
            self.pages.free(seq_id)

    def __getitem__(self, name: str) -> Any:
        tables = [self.pages.table(seq_id) for seq_id in self.seq_ids]
        facts: dict[str, list[Any]] = {
            "seq_id": list(self.seq_ids),
            "seq_len": self.lengths(),
            "num_blocks": [len(table) for table in tables],
            "block_ids": tables,
        }
        if name not in facts:
            raise KeyError(f"{name!r} is none of {', '.join(facts)}")
        return facts[name][0] if len(self.seq_ids) == 1 else facts[name]
