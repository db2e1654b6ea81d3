"""Any region of a sparse attention map from queries, keys and log-sum-exp. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.patterns import Indices, Pattern, PatternError

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class SparseMap:
    """Sparse attention of one head of one batch element.

    Args:
        query: ``[N, D]`` float, as the kernel saw it; key the same.
        lse: ``[N]`` natural log of the row's sum of exponentials; minus infinity for a dead row.
        scale: the factor on ``q . k``.
        mask: what the call forbade besides; batch is the element that its padding is read for.
        global_query: ``[G, D]`` for the first rows, where these have projections of their own; global_key ``[N, D]``,
            or as many as those rows attend to.
    """

    query: Floats
    key: Floats
    lse: Floats
    scale: float
    pattern: Pattern
    head: int = 0
    mask: Mask = Full()  # noqa: RUF009
    batch: int = 0
    global_query: Floats | None = None
    global_key: Floats | None = None

    def __post_init__(self) -> None:
        if self.key.shape != self.query.shape or self.lse.shape != self.query.shape[:1]:
            raise PatternError(
                "query, key [N, D] and lse [N] must agree; got "
                f"{self.query.shape}, {self.key.shape} and {self.lse.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return len(self.query), len(self.key)

    def tile(self, rows: slice, cols: slice) -> NDArray[np.float32]:
        """Weights between two ranges of positions: float32 ``[rows, cols]``, 0 outside the pattern."""
        picked = np.arange(*rows.indices(len(self.query))), np.arange(*cols.indices(len(self.key)))
        return self._weights(*picked).astype(np.float32)

    def row_sums(self) -> NDArray[np.float64]:
        """Sum of each row: 1, or 0 for a dead row. Costs what the pattern visits."""
        size = len(self.query)
        sums = np.zeros(size)
        for tiles in self.pattern.passes(0, size, size, self.head + 1):
            for queries, keys, keep in tiles:
                pick = min(self.head, len(keys) - 1)
                sums[queries] += (self._weights(queries, keys[pick]) * keep[pick]).sum(axis=1)
        return sums

    def _weights(self, rows: Indices, cols: Indices) -> NDArray[np.float64]:
        size = len(self.key)
        keep = self.pattern.allowed(rows, cols, num_keys=size, head=self.head)
        keep &= self.mask.allowed(rows, cols, num_queries=size, num_keys=size, batch=self.batch)
        scores = self._products(self.query, self.key, rows, cols)
        if self.global_query is not None and self.global_key is not None:
            special = rows < len(self.global_query)
            known = cols < len(self.global_key)
            scores[np.ix_(special, known)] = self._products(
                self.global_query, self.global_key, rows[special], cols[known]
            )
        lse = self.lse[rows].astype(np.float64)
        scores -= np.where(np.isneginf(lse), 0, lse)[:, None]
        return np.exp(np.where(keep, scores, -np.inf))

    def _products(self, query: Floats, key: Floats, rows: Indices, cols: Indices) -> NDArray[np.float64]:
        # keys that do not exist may hold anything: they are masked
        with np.errstate(invalid="ignore", over="ignore"):
            return query[rows].astype(np.float64) @ key[cols].astype(np.float64).T * self.scale
