"""Any region of a sparse attention map from queries, keys and log-sum-exp. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.effective_map import pixel_edges
from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.patterns import Indices, Pattern, PatternError, Tile

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class SparseMap:
    """Sparse attention of one head of one batch element.

    Args:
        query: ``[n, D]`` float, as the kernel saw it: of the last n positions; key ``[N, D]``.
        lse: ``[n]`` natural log of the row's sum of exponentials; minus infinity for a dead row.
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
        fits = self.key.shape[1:] == self.query.shape[1:] and len(self.query) <= len(self.key)
        if not fits or self.lse.shape != self.query.shape[:1]:
            raise PatternError(
                "query [n, D], key [N, D] and lse [n] must agree; got "
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
        sums = np.zeros(len(self.query))
        for rows, keys, keep in self._tiles(0, len(self.query)):
            sums[rows] += (self._weights(rows, keys) * keep).sum(axis=1)
        return sums

    def pool(
        self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max"
    ) -> NDArray[np.float32]:
        """As ``SoftmaxMap.pool``; visits the pattern's tiles, so the cost does not grow with what they leave out."""
        row_edges, col_edges = pixel_edges(rows, cols, self.shape, height, width, reduce)
        if row_edges[-1] - row_edges[0] <= height and col_edges[-1] - col_edges[0] <= width:
            return self.tile(rows, cols)
        out = np.zeros((len(row_edges) - 1, len(col_edges) - 1))
        fold = np.maximum if reduce == "max" else np.add
        for picked, keys, keep in self._tiles(int(row_edges[0]), int(row_edges[-1])):
            inside = (keys >= col_edges[0]) & (keys < col_edges[-1])
            weights = np.where(keep[:, inside], self._weights(picked, keys[inside]), 0)
            place = _pixels(row_edges, picked)[:, None], _pixels(col_edges, keys[inside])[None]
            fold.at(out, place, weights)
        if reduce == "mean":
            out /= np.diff(row_edges)[:, None] * np.diff(col_edges)[None]
        return out.astype(np.float32)

    def seen(self, row_edges: Indices, col_edges: Indices) -> NDArray[np.bool_]:
        """Pixels ``[rows, cols]`` between these edges under which some pair is allowed."""
        out = np.zeros((len(row_edges) - 1, len(col_edges) - 1), bool)
        for rows, keys, keep in self._tiles(int(row_edges[0]), int(row_edges[-1])):
            inside = (keys >= col_edges[0]) & (keys < col_edges[-1])
            pairs = keep[:, inside] & self._open(rows, keys[inside])
            place = _pixels(row_edges, rows)[:, None], _pixels(col_edges, keys[inside])[None]
            np.logical_or.at(out, place, pairs)
        return out

    def exact_lse(self) -> NDArray[np.float64]:
        """The log-sum-exp of every row in float64, from queries and keys; minus infinity for a dead row."""
        lse = np.full(len(self.query), -np.inf)
        for rows, keys, keep in self._tiles(0, len(self.query)):
            scores = np.where(keep & self._open(rows, keys), self._scores(rows, keys), -np.inf)
            top = np.maximum(scores.max(axis=1, initial=-np.inf), lse[rows])
            safe = np.where(np.isneginf(top), 0, top)
            total = np.exp(scores - safe[:, None]).sum(axis=1) + np.exp(lse[rows] - safe)
            with np.errstate(divide="ignore"):
                lse[rows] = np.log(total) + safe
        return lse

    def allowed(self, rows: Indices, cols: Indices) -> NDArray[np.bool_]:
        """Dense tile ``[rows, cols]``, True where the pair is in the pattern and not masked."""
        keep = self.pattern.allowed(rows + self._past, cols, num_keys=len(self.key), head=self.head)
        return keep & self._open(rows, cols)

    @property
    def _past(self) -> int:
        return len(self.key) - len(self.query)

    def _open(self, rows: Indices, cols: Indices) -> NDArray[np.bool_]:
        size = {"num_queries": len(self.query), "num_keys": len(self.key)}
        return self.mask.allowed(rows, cols, batch=self.batch, **size)

    def _tiles(self, start: int, stop: int) -> Iterator[Tile]:
        """Rows ``start..stop`` with this head's keys ``[K]`` and the pairs that count ``[Q, K]``."""
        if start == stop:
            return
        span = start + self._past, stop + self._past
        for tiles in self.pattern.passes(*span, len(self.key), self.head + 1):
            for queries, keys, keep in tiles:
                pick = min(self.head, len(keys) - 1)
                yield Tile(queries - self._past, keys[pick], keep[pick])

    def _weights(self, rows: Indices, cols: Indices) -> NDArray[np.float64]:
        lse = self.lse[rows].astype(np.float64)
        scores = self._scores(rows, cols) - np.where(np.isneginf(lse), 0, lse)[:, None]
        return np.exp(np.where(self.allowed(rows, cols), scores, -np.inf))

    def _scores(self, rows: Indices, cols: Indices) -> NDArray[np.float64]:
        scores = self._products(self.query, self.key, rows, cols)
        if self.global_query is not None and self.global_key is not None:
            special = rows < len(self.global_query)
            known = cols < len(self.global_key)
            scores[np.ix_(special, known)] = self._products(
                self.global_query, self.global_key, rows[special], cols[known]
            )
        return scores

    def _products(self, query: Floats, key: Floats, rows: Indices, cols: Indices) -> NDArray[np.float64]:
        # keys that do not exist may hold anything: they are masked
        with np.errstate(invalid="ignore", over="ignore"):
            return query[rows].astype(np.float64) @ key[cols].astype(np.float64).T * self.scale


def _pixels(edges: Indices, places: Indices) -> Indices:
    return np.searchsorted(edges, places, "right") - 1
