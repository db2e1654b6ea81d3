"""What a ring adds to an attention map: which ranks own a pair's ends, and in which step they met. No torch.

Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context",
https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.effective_map import SoftmaxMap


@dataclass(frozen=True, eq=False)
class RingMap:
    """The map of one head, the same as without a ring, and its overlay.

    Args:
        attention: the softmax map over all tokens, in order.
        query_owner: rank of each query ``[Sq]``; key_owner of each key ``[Sk]``.
        size: ranks of the ring.
    """

    attention: SoftmaxMap
    query_owner: NDArray[np.integer[Any]]
    key_owner: NDArray[np.integer[Any]]
    size: int

    def __post_init__(self) -> None:
        if (self.query_owner.shape, self.key_owner.shape) != ((self.shape[0],), (self.shape[1],)):
            raise ValueError(
                f"query_owner must be [{self.shape[0]}] and key_owner [{self.shape[1]}]; got "
                f"{self.query_owner.shape} and {self.key_owner.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.attention.shape

    def tile(self, rows: slice, cols: slice) -> NDArray[np.float32]:
        """Probabilities of a region: float32 ``[rows, cols]``."""
        return self.attention.tile(rows, cols)

    def pool(
        self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max"
    ) -> NDArray[np.float32]:
        """As ``SoftmaxMap.pool``."""
        return self.attention.pool(rows, cols, height, width, reduce)

    def row_sums(self) -> NDArray[np.float64]:
        """Sum of each row over all keys."""
        return self.attention.row_sums()

    def step(self, rows: slice, cols: slice) -> NDArray[np.int64]:
        """Step in which the pair met: int64 ``[rows, cols]``, -1 where the mask forbids it."""
        num_queries, num_keys = self.shape
        met = (self.query_owner[rows, None] - self.key_owner[None, cols]) % self.size
        allowed = self.attention.mask.allowed(
            np.arange(num_queries)[rows],
            np.arange(num_keys)[cols],
            num_queries=num_queries,
            num_keys=num_keys,
            batch=self.attention.batch,
        )
        return np.where(allowed, met, -1).astype(np.int64)

    def mass(self) -> NDArray[np.float64]:
        """Probability that each rank's queries give to each rank's keys, a query: ``[query rank, key rank]``."""
        total = np.zeros((self.size, self.size))
        for start in range(0, self.shape[0], 256):
            rows = slice(start, min(start + 256, self.shape[0]))
            by_key = np.zeros((rows.stop - start, self.size))
            np.add.at(by_key.T, self.key_owner, self.tile(rows, slice(None)).T)
            np.add.at(total, self.query_owner[rows], by_key)
        counts = np.bincount(self.query_owner, minlength=self.size)
        return total / np.maximum(counts, 1)[:, None]
