"""Any region of the map that linear attention implies, from features and denominators. No torch.

Katharopoulos et al., https://arxiv.org/abs/2006.16236: ``A_ij = phi(q_i) . phi(k_j) / den_i``. Shen et al.,
https://arxiv.org/abs/1812.01243, is the same with a softmax on each side and a denominator of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.masks import Mask
from attnlab_kernels.tile_pooling import pool_tiles


@dataclass(frozen=True, eq=False)
class LinearMap:
    """Linear attention of one head of one batch element.

    Args:
        query: features ``[Sq, f]``; key ``[Sk, f]``, zero where a key does not exist.
        denominator: ``[Sq]``, epsilon included; 1 where nothing is divided.
        mask: full, or causal.
    """

    query: NDArray[np.floating[Any]]
    key: NDArray[np.floating[Any]]
    denominator: NDArray[np.floating[Any]]
    mask: Mask

    def __post_init__(self) -> None:
        if self.query.ndim != 2 or self.key.ndim != 2 or self.query.shape[1] != self.key.shape[1]:
            raise ValueError(
                f"query [Sq, f] and key [Sk, f] must share f; got {self.query.shape} and {self.key.shape}"
            )
        if self.denominator.shape != self.query.shape[:1]:
            raise ValueError(
                f"denominator must be [{self.query.shape[0]}], one number a query; got {self.denominator.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.query.shape[0], self.key.shape[0]

    def tile(self, rows: slice, cols: slice) -> NDArray[np.float32]:
        """Weights of a region: float32 ``[rows, cols]``, from float64; 0 where masked."""
        picked, keys = np.arange(self.shape[0])[rows], np.arange(self.shape[1])[cols]
        weights = self.query[rows].astype(np.float64) @ self.key[cols].astype(np.float64).T
        below = self.denominator[rows].astype(np.float64)
        weights /= np.where(below == 0, 1, below)[:, None]
        allowed = self.mask.allowed(picked, keys, num_queries=self.shape[0], num_keys=self.shape[1])
        return np.where(allowed, weights, 0).astype(np.float32)

    def pool(
        self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max"
    ) -> NDArray[np.float32]:
        """As ``SoftmaxMap.pool``, with the signed weight of largest size as the maximum."""
        return pool_tiles(self, rows, cols, height, width, reduce)

    def row_sums(self) -> NDArray[np.float64]:
        """Sum of each row over all keys: 1 up to epsilon, where it is divided by its sum."""
        step = max(1, 2**18 // max(1, self.shape[1]))
        parts = [
            self.tile(slice(start, start + step), slice(None)).sum(axis=1, dtype=np.float64)
            for start in range(0, self.shape[0], step)
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def exact_denominator(self, eps: float) -> NDArray[np.float64]:
        """``phi(q_i) . z_i + eps`` in float64, z the sum of the features of the keys that row i sees."""
        num_queries, num_keys = self.shape
        sums = np.concatenate(
            (np.zeros((1, self.key.shape[1])), np.cumsum(self.key, axis=0, dtype=np.float64))
        )
        _, seen = self.mask.band().row_limits(
            np.arange(num_queries), num_queries=num_queries, num_keys=num_keys
        )
        return np.einsum("nf,nf->n", self.query.astype(np.float64), sums[seen]) + eps
