"""Any region of an attention map from O(n) numbers: queries, keys, the kernel's log-sum-exp. No torch.

``P[i, j] = exp(scale * q_i . k_j - lse_i)`` where the mask allows it, else 0; soft cap, ALiBi and bias change the
score as they did in the kernel, and a sink is in the log-sum-exp already. Nothing here ever holds n x n numbers:
regions are streamed by row blocks, and only keys inside the mask's ``key_range`` are touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.masks import Mask
from attnlab_kernels.score_bias import ScoreBias

# scores held at once: about the size of a second-level cache in float32
BLOCK_CELLS = 2**18
# keys of a block that is pooled: so few that they stay in that cache for all of its rows
BLOCK_KEYS = 2**10


@dataclass(frozen=True, eq=False)
class SoftmaxMap:
    """Softmax attention of one head of one batch element.

    Args:
        query: ``[Sq, D]`` float, as the kernel saw it (after position encoding).
        key: ``[Sk, D]`` float.
        lse: ``[Sq]`` natural log of the row's sum of ``exp(scale * q . k)``; minus infinity for a dead row.
        scale: the factor on ``q . k``.
        mask: the mask of the kernel call that gave ``lse``.
        batch: batch element, for padding masks.
        softcap: a scaled score s became ``softcap * tanh(s / softcap)``.
        alibi: slope of this head, taken ``|p - j|`` times from the score.
        bias: what was added to the score after that.
        sink: this head's sink score, which ``lse`` holds; rows then sum to less than 1.
    """

    query: NDArray[np.floating[Any]]
    key: NDArray[np.floating[Any]]
    lse: NDArray[np.floating[Any]]
    scale: float
    mask: Mask
    batch: int = 0
    softcap: float | None = None
    alibi: float | None = None
    bias: ScoreBias | None = None
    sink: float | None = None

    def __post_init__(self) -> None:
        if self.query.ndim != 2 or self.key.ndim != 2 or self.query.shape[1] != self.key.shape[1]:
            raise ValueError(
                f"query [Sq, D] and key [Sk, D] must share D; got {self.query.shape} and {self.key.shape}"
            )
        if self.lse.shape != self.query.shape[:1]:
            raise ValueError(f"lse must be [{self.query.shape[0]}], one number a query; got {self.lse.shape}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a finite number above 0; got {self.softcap}")
        if self.bias is not None:
            self.bias.check(*self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.query.shape[0], self.key.shape[0]

    def tile(self, rows: slice, cols: slice) -> NDArray[np.float32]:
        """Exact probabilities of a region: float32 ``[rows, cols]``, from scores in float64."""
        r0, r1 = _bounds(rows, self.shape[0], "rows")
        c0, c1 = _bounds(cols, self.shape[1], "cols")
        out = np.zeros((r1 - r0, c1 - c0), np.float32)
        for start, stop in self._spans(r0, r1, c1 - c0):
            lo, hi = self._visited(start, stop, c0, c1)
            if lo < hi:
                scores = self._log_weights(start, stop, lo, hi)
                np.exp(scores, out=out[start - r0 : stop - r0, lo - c0 : hi - c0], casting="same_kind")
        return out

    def pool(
        self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max"
    ) -> NDArray[np.float32]:
        """Maximum or mean of the probabilities under each of ``height x width`` pixels of a region.

        Pixel ``y`` covers rows ``floor(y * R / height)`` up to the next pixel's. A side with fewer cells than
        pixels keeps one pixel a cell, so a small region comes back as its tile. Masked cells count as 0.
        """
        return self.pools(rows, cols, height, width, (reduce,))[0]

    def pools(
        self, rows: slice, cols: slice, height: int, width: int, reductions: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """``pool`` for each of several reductions, from scores that are computed once."""
        edges = [pixel_edges(rows, cols, self.shape, height, width, reduce) for reduce in reductions]
        row_edges, col_edges = edges[0]
        r0, r1 = _bounds(rows, self.shape[0], "rows")
        c0, c1 = _bounds(cols, self.shape[1], "cols")
        if r1 - r0 <= height and c1 - c0 <= width:
            return [self.tile(rows, cols) for _ in reductions]
        sides = len(row_edges) - 1, len(col_edges) - 1
        made = [np.full(sides, -np.inf if reduce == "max" else 0.0, np.float32) for reduce in reductions]
        keys_wide = max(1, BLOCK_KEYS * sides[1] // max(1, c1 - c0))
        for start, stop in self._spans(r0, r1, min(c1 - c0, BLOCK_KEYS), (r1 - r0) // sides[0]):
            lo, hi = self._visited(start, stop, c0, c1)
            if lo >= hi:
                continue
            top, bottom = _bins(row_edges, start, stop)
            at_rows = np.clip(row_edges[top : bottom + 1], start, stop) - start
            first, last = _bins(col_edges, lo, hi)
            for left in range(first, last, keys_wide):
                right = min(left + keys_wide, last)
                scores = self._log_weights(start, stop, int(col_edges[left]), int(col_edges[right]))
                scores = scores.astype(np.float32)  # x e^x is small enough for it
                at_cols = col_edges[left : right + 1] - col_edges[left]
                for reduce, out in zip(reductions, made, strict=True):
                    fold = np.maximum if reduce == "max" else np.add
                    weights = scores if reduce == "max" else np.exp(scores)
                    region = out[top:bottom, left:right]
                    fold(region, fold_pixels(fold, weights, at_rows, at_cols), out=region)
        area = (np.diff(row_edges)[:, None] * np.diff(col_edges)[None, :]).astype(np.float32)
        # exp is monotonic, so a maximum needs it for the pixels only
        return [
            np.exp(out) if reduce == "max" else out / area
            for reduce, out in zip(reductions, made, strict=True)
        ]

    def row_sums(self, rows: slice | None = None) -> NDArray[np.float64]:
        """Sum of each row over all keys: float64, if the log-sum-exp is right 1 less the sink's share, 0 if dead."""
        r0, r1 = _bounds(rows or slice(None), self.shape[0], "rows")
        sums = np.zeros(r1 - r0, np.float64)
        for start, stop in self._spans(r0, r1, self.shape[1]):
            lo, hi = self._visited(start, stop, 0, self.shape[1])
            if lo < hi:
                scores = self._log_weights(start, stop, lo, hi)
                sums[start - r0 : stop - r0] = np.exp(scores, out=scores).sum(axis=1)
        return sums

    def sink_shares(self) -> NDArray[np.float64]:
        """What the sink takes of each row, float64 ``[Sq]``; zeros where there is none."""
        if self.sink is None:
            return np.zeros(self.shape[0])
        return np.exp(self.sink - self.lse.astype(np.float64))

    def _spans(self, start: int, stop: int, width: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Row blocks of about BLOCK_CELLS visited cells, of whole pixels where a pixel fits."""
        num_queries, num_keys = self.shape
        visited = self.mask.count(num_queries, num_keys, self.batch) // max(1, num_queries)
        # a block of s rows touches about visited + s keys, never more than the region's width
        step = int((math.sqrt(visited**2 + 4 * BLOCK_CELLS) - visited) / 2)
        step = max(1, step, BLOCK_CELLS // max(1, width))
        if step > multiple:
            step -= step % max(1, multiple)
        for row in range(start, stop, step):
            yield row, min(row + step, stop)

    def _visited(self, start: int, stop: int, c0: int, c1: int) -> tuple[int, int]:
        num_queries, num_keys = self.shape
        lo, hi = self.mask.key_range(
            start, stop, num_queries=num_queries, num_keys=num_keys, batch=self.batch
        )
        return max(lo, c0), min(hi, c1)

    def _log_weights(self, r0: int, r1: int, c0: int, c1: int) -> NDArray[np.float64]:
        """``scale * q . k - lse`` of a block, minus infinity where masked.

        In float64: scores of 60 have an ulp of 4e-6 in float32, and it would be the relative error of the weight.
        """
        num_queries, num_keys = self.shape
        rows, lse = np.arange(r0, r1), self.lse[r0:r1]
        # keys that do not exist may hold anything, also NaN and infinity: they are masked below
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = self.query[r0:r1].astype(np.float64) * self.scale
            scores = scaled @ self.key[c0:c1].astype(np.float64, copy=False).T
            scores = self._modified(scores, rows, np.arange(c0, c1))
            scores -= np.where(np.isneginf(lse), 0, lse).astype(np.float64)[:, None]
        first, last = self.mask.form().row_limits(
            rows, num_queries=num_queries, num_keys=num_keys, batch=self.batch
        )
        # every row of the block may see these keys, so only the keys around them need a mask
        open_lo = min(max(int(first.max()), c0), c1)
        open_hi = min(max(int(last.min()), open_lo), c1)
        for a, b in ((c0, open_lo), (open_hi, c1)):
            if a < b:
                keep = self.mask.allowed(
                    rows, np.arange(a, b), num_queries=num_queries, num_keys=num_keys, batch=self.batch
                )
                part = scores[:, a - c0 : b - c0]
                np.copyto(part, -np.inf, where=~keep)
        scores[np.isneginf(lse)] = -np.inf
        return scores

    def _modified(
        self, scores: NDArray[Any], rows: NDArray[np.int64], cols: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Scaled scores after soft cap, ALiBi and bias, in place."""
        offset = self.shape[1] - self.shape[0]
        if self.softcap is not None:
            scores /= scores.dtype.type(self.softcap)
            np.tanh(scores, out=scores)
            scores *= scores.dtype.type(self.softcap)
        if self.alibi is not None:
            distance = np.abs(rows[:, None] + offset - cols[None, :])
            scores -= scores.dtype.type(self.alibi) * distance.astype(scores.dtype)
        if self.bias is not None:
            scores += self.bias.tile(rows, cols, offset).astype(scores.dtype, copy=False)
        return scores


def pixel_edges(
    rows: slice, cols: slice, shape: tuple[int, int], height: int, width: int, reduce: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row and column of each pixel of a region, and one past the last; ValueError if there can be none."""
    if reduce not in ("max", "mean"):
        raise ValueError(f"reduce must be 'max' or 'mean'; got {reduce!r}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1 pixel; got {height} x {width}")
    return _edges(*_bounds(rows, shape[0], "rows"), height), _edges(*_bounds(cols, shape[1], "cols"), width)


def _bounds(part: slice, size: int, name: str) -> tuple[int, int]:
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError(f"{name} must be a slice with step 1; got {part}")
    return start, max(start, stop)


def _edges(start: int, stop: int, pixels: int) -> NDArray[np.int64]:
    count = max(1, min(pixels, stop - start))
    return start + np.arange(count + 1) * (stop - start) // count


def _bins(edges: NDArray[np.int64], lo: int, hi: int) -> tuple[int, int]:
    """First bin touching ``[lo, hi)`` and one past the last."""
    return int(np.searchsorted(edges, lo, "right")) - 1, int(np.searchsorted(edges, hi, "left"))


def fold_pixels(
    fold: np.ufunc, values: NDArray[Any], row_edges: NDArray[np.int64], col_edges: NDArray[np.int64]
) -> NDArray[Any]:
    """The values under each pixel, combined; edges rise from 0 to the size of each side."""
    return _fold_cols(fold, _fold_rows(fold, values, row_edges), col_edges)


def _fold_rows(fold: np.ufunc, values: NDArray[Any], edges: NDArray[np.int64]) -> NDArray[Any]:
    sizes = np.diff(edges)
    if (sizes == sizes[0]).all():
        return fold.reduce(values.reshape(len(sizes), int(sizes[0]), -1), axis=1)
    # a loop over whole rows beats ufunc.reduceat, which walks this axis cell by cell
    return np.stack([fold.reduce(values[a:b], axis=0) for a, b in pairwise(edges)])


def _fold_cols(fold: np.ufunc, values: NDArray[Any], edges: NDArray[np.int64]) -> NDArray[Any]:
    sizes = np.diff(edges)
    step = int(sizes[0])
    if step > 16 or not (sizes == step).all():
        return fold.reduceat(values, edges[:-1], axis=1)
    folded = values[:, 0::step].copy()
    for offset in range(1, step):
        fold(folded, values[:, offset::step], out=folded)
    return folded
