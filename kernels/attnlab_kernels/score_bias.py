"""What is added to the scores of one head, as a map keeps it: dense, by distance, or of low rank. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


class ScoreBias(Protocol):
    """Any region of an additive bias ``[Sq, Sk]`` of one head."""

    def check(self, num_queries: int, num_keys: int) -> None:
        """ValueError, if it does not cover a map of this shape."""
        ...

    def tile(self, rows: NDArray[np.int64], cols: NDArray[np.int64], offset: int) -> Floats:
        """``[rows, cols]``, or what broadcasts to it; query row i sits at position ``offset + i``."""
        ...


@dataclass(frozen=True, eq=False)
class DenseBias:
    """A whole bias ``[Sq, Sk]``; a side may be 1 and then serves every row or column."""

    values: Floats

    def check(self, num_queries: int, num_keys: int) -> None:
        shape = self.values.shape
        if len(shape) != 2 or shape[0] not in (1, num_queries) or shape[1] not in (1, num_keys):
            raise ValueError(f"bias must broadcast to [{num_queries}, {num_keys}]; got {shape}")

    def tile(self, rows: NDArray[np.int64], cols: NDArray[np.int64], offset: int) -> Floats:
        single = [np.zeros(1, np.int64) if size == 1 else None for size in self.values.shape]
        first, second = (
            index if alone is None else alone for index, alone in zip((rows, cols), single, strict=True)
        )
        return self.values[np.ix_(first, second)]


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A bias of the distance ``j - p`` alone, as in T5 (https://arxiv.org/abs/1910.10683).

    Args:
        values: ``[distances]``, of the distances ``first``, ``first + 1``, ...; outside, the nearest end.
        first: the distance of ``values[0]``.
    """

    values: Floats
    first: int

    def check(self, num_queries: int, num_keys: int) -> None:
        if self.values.ndim != 1 or not len(self.values):
            raise ValueError(f"values must be [distances], at least one; got {self.values.shape}")

    def tile(self, rows: NDArray[np.int64], cols: NDArray[np.int64], offset: int) -> Floats:
        distance = cols[None, :] - (rows[:, None] + offset)
        return self.values[np.clip(distance - self.first, 0, len(self.values) - 1)]


@dataclass(frozen=True, eq=False)
class LowRankBias:
    """A bias of low rank, ``left @ right.T``: left ``[Sq, R]``, right ``[Sk, R]``."""

    left: Floats
    right: Floats

    def check(self, num_queries: int, num_keys: int) -> None:
        rank = self.left.shape[-1]
        if self.left.shape != (num_queries, rank) or self.right.shape != (num_keys, rank):
            raise ValueError(
                f"left must be [{num_queries}, R] and right [{num_keys}, R]; got {self.left.shape} and "
                f"{self.right.shape}"
            )

    def tile(self, rows: NDArray[np.int64], cols: NDArray[np.int64], offset: int) -> Floats:
        return self.left[rows].astype(np.float64) @ self.right[cols].astype(np.float64).T
