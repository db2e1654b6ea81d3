"""Any region of a signed map, the difference of two softmax maps. No torch.

Ye et al., "Differential Transformer", https://arxiv.org/abs/2410.05258: ``D = A1 - λ A2``. Entries may be
negative and a row sums to 1 - λ; nothing here renormalises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Mask
from attnlab_kernels.tile_pooling import pool_tiles


@dataclass(frozen=True, eq=False)
class DifferenceMap:
    """Differential attention of one head of one batch element.

    Args:
        first: the map that is kept.
        second: the map that is subtracted, of the same shape.
        weight: λ, one number or one for each query ``[Sq]``.
    """

    first: SoftmaxMap
    second: SoftmaxMap
    weight: float | NDArray[np.floating[Any]]

    def __post_init__(self) -> None:
        if self.first.shape != self.second.shape:
            raise ValueError(
                f"the two maps must share a shape; got {self.first.shape} and {self.second.shape}"
            )
        if np.shape(self.weight) not in ((), self.shape[:1]):
            raise ValueError(
                f"weight must be a number or one for each of {self.shape[0]} queries; got {np.shape(self.weight)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.first.shape

    @property
    def mask(self) -> Mask:
        """The mask of both maps."""
        return self.first.mask

    def tile(self, rows: slice, cols: slice) -> NDArray[np.float32]:
        """Signed weights of a region: float32 ``[rows, cols]``, 0 where masked."""
        weight = np.broadcast_to(np.asarray(self.weight, np.float32), self.shape[:1])[rows, None]
        subtracted = np.multiply(weight, self.second.tile(rows, cols), dtype=np.float32)
        return np.subtract(self.first.tile(rows, cols), subtracted, dtype=np.float32)

    def pool(
        self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max"
    ) -> NDArray[np.float32]:
        """As ``SoftmaxMap.pool``, with the signed weight of largest size as the maximum.

        Computes every cell of the region, block by block.
        """
        return pool_tiles(self, rows, cols, height, width, reduce)

    def row_sums(self) -> NDArray[np.float64]:
        """Sum of each row over all keys: 1 - λ, or 0 for a dead row."""
        return self.first.row_sums() - self.weight * self.second.row_sums()
