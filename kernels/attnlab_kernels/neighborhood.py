"""Which pixels each pixel attends to: windows of a fixed number of keys on every axis. No torch.

Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143;
dilation: 2209.15001; stride: 2504.16922. A window shifts at a border, it never
shrinks: only a causal axis has fewer keys, near its start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.effective_map import BLOCK_CELLS, pixel_edges
from attnlab_kernels.masks import Full, Mask

Indices = NDArray[np.int64]


class NeighborhoodError(ValueError):
    """A neighbourhood that cannot be; the text names the argument, the rule and the value."""


def window_limits(
    length: int, kernel_size: int, dilation: int = 1, stride: int = 1, causal: bool = False
) -> tuple[Indices, Indices]:
    """First key and number of keys of every query on one axis; the keys lie ``dilation`` apart.

    A query sees its own residue class modulo ``dilation`` only. ``stride`` neighbouring queries of a class share the
    window of their leader: the middle one (right of the middle if even), or the last where causal.
    """
    query = np.arange(length, dtype=np.int64)
    residue, place = query % dilation, query // dilation
    size = (length - residue + dilation - 1) // dilation
    offset = stride - 1 if causal else stride // 2
    leader = np.minimum(place // stride * stride + offset, size - 1)
    if causal:
        start = np.maximum(leader - kernel_size + 1, 0)
        count = place - start + 1
    else:
        start = np.clip(leader - kernel_size // 2, 0, size - kernel_size)
        count = np.full_like(start, kernel_size)
    return start * dilation + residue, count


def inverse_limits(first: Indices, count: Indices, dilation: int) -> tuple[Indices, Indices]:
    """First query and number of queries that see each key of one axis, ``dilation`` apart, from ``window_limits``.

    Windows move only forwards along a residue class, so the queries of a key are a run as well.
    """
    length = len(first)
    start, size = np.zeros(length, np.int64), np.zeros(length, np.int64)
    for residue in range(min(dilation, length)):
        members = np.arange(residue, length, dilation)
        low = np.searchsorted(first[members] + (count[members] - 1) * dilation, members, side="left")
        high = np.searchsorted(first[members], members, side="right")
        start[members] = residue + low * dilation
        size[members] = np.maximum(high - low, 0)
    return start, size


@dataclass(frozen=True)
class Neighborhood:
    """Windows over a grid of ``space`` (one to three axes); the other fields have one entry for each axis.

    Raises:
        NeighborhoodError: a window longer than its axis, a stride longer than its window, another number of axes.
    """

    space: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    causal: tuple[bool, ...]

    def __post_init__(self) -> None:
        axes = len(self.space)
        if not 1 <= axes <= 3:
            raise NeighborhoodError(f"space must have 1, 2 or 3 axes; got {self.space}")
        for name in ("kernel_size", "dilation", "stride", "causal"):
            if len(getattr(self, name)) != axes:
                raise NeighborhoodError(
                    f"{name} must have {axes} entries, one an axis; got {getattr(self, name)}"
                )
        for length, kernel, dilation, stride in zip(
            self.space, self.kernel_size, self.dilation, self.stride, strict=True
        ):
            if kernel < 1 or dilation < 1:
                raise NeighborhoodError(
                    f"kernel_size and dilation must be at least 1; got {self.kernel_size} and {self.dilation}"
                )
            if not 1 <= stride <= kernel:
                raise NeighborhoodError(
                    f"stride must be between 1 and kernel_size on every axis; got {self.stride} and {self.kernel_size}"
                )
            if kernel * dilation > length:
                raise NeighborhoodError(
                    "kernel_size * dilation must fit into every axis; got "
                    f"{self.kernel_size} * {self.dilation} over {self.space}"
                )

    @cached_property
    def limits(self) -> tuple[tuple[Indices, Indices], ...]:
        """``window_limits`` of every axis."""
        axes = zip(self.space, self.kernel_size, self.dilation, self.stride, self.causal, strict=True)
        return tuple(window_limits(*axis) for axis in axes)

    @property
    def size(self) -> int:
        """Number of pixels; pixel numbers are row by row."""
        return math.prod(self.space)

    @property
    def slots(self) -> int:
        """Keys of a full window."""
        return math.prod(self.kernel_size)

    def count(self) -> int:
        """Exact number of (query, key) pairs."""
        return math.prod(int(count.sum()) for _, count in self.limits)

    def allowed(self, rows: Indices, cols: Indices) -> NDArray[np.bool_]:
        """Dense tile ``[rows, cols]``, True where pixel ``rows[i]`` attends to pixel ``cols[j]``."""
        result = np.ones((len(rows), len(cols)), bool)
        grids = zip(self._places(rows), self._places(cols), self.limits, self.dilation, strict=True)
        for query, key, (first, count), dilation in grids:
            step = key[None] - first[query][:, None]
            result &= (step >= 0) & (step % dilation == 0) & (step // dilation < count[query][:, None])
        return result

    def neighbors(self, row: int) -> Indices:
        """Pixels that pixel ``row`` attends to, in the order of the window."""
        places = (int(place[0]) for place in self._places(np.array([row])))
        axes = [
            first[place] + dilation * np.arange(count[place])
            for place, (first, count), dilation in zip(places, self.limits, self.dilation, strict=True)
        ]
        return np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), self.space).ravel()

    def windows(self, rows: Indices) -> tuple[Indices, NDArray[np.bool_]]:
        """Key pixels ``[rows, slots]`` in window order, and which of them exist (a causal window may lack some)."""
        keys = np.zeros((len(rows), 1), np.int64)
        exists = np.ones((len(rows), 1), bool)
        axes = zip(self._places(rows), self.space, self.kernel_size, self.dilation, self.limits, strict=True)
        for place, length, kernel, dilation, (first, count) in axes:
            slot = np.arange(kernel)
            present = slot < count[place][:, None]
            key = np.where(present, first[place][:, None] + dilation * slot, place[:, None])
            keys = (keys[:, :, None] * length + key[:, None]).reshape(len(rows), -1)
            exists = (exists[:, :, None] & present[:, None]).reshape(len(rows), -1)
        return keys, exists

    def offsets(self, rows: Indices, cols: Indices) -> tuple[Indices, ...]:
        """Key minus query in steps of the dilation plus ``kernel_size - 1``, broadcast, for each axis.

        Inside a window this is an index into a table of ``2 * kernel_size - 1``; outside it may be anything.
        """
        grids = zip(self._places(rows), self._places(cols), self.dilation, self.kernel_size, strict=True)
        return tuple((key - query) // step + kernel - 1 for query, key, step, kernel in grids)

    def _places(self, pixels: Indices) -> tuple[Indices, ...]:
        return tuple(np.unravel_index(pixels, self.space))


@dataclass(frozen=True, eq=False)
class NeighborhoodMap:
    """Neighborhood attention of one head of one batch element, from queries, keys and log-sum-exp.

    Args:
        query: ``[N, D]`` float, pixels row by row; key the same.
        lse: ``[N]`` natural log of the window's sum of exponentials; minus infinity for a dead row.
        scale: the factor on ``q . k``.
        bias: relative position table ``[2 k - 1, ...]``, one axis an axis, or None.
        visible: ``[N]`` bool, False for pixels that nobody may attend to; None means all are seen.
    """

    query: NDArray[np.floating[Any]]
    key: NDArray[np.floating[Any]]
    lse: NDArray[np.floating[Any]]
    scale: float
    neighborhood: Neighborhood
    bias: NDArray[np.floating[Any]] | None = None
    visible: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        size = self.neighborhood.size
        if self.query.shape[0] != size or self.key.shape != self.query.shape or self.lse.shape != (size,):
            raise NeighborhoodError(
                f"query, key [N, D] and lse [N] must have the {size} pixels of {self.neighborhood.space}; got "
                f"{self.query.shape}, {self.key.shape} and {self.lse.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.neighborhood.size, self.neighborhood.size

    @property
    def mask(self) -> Mask:
        """What bounds the windows in the order of the pixels: nothing."""
        return Full()

    def tile(self, rows: slice, cols: slice) -> NDArray[np.float32]:
        """Weights between two ranges of pixels: float32 ``[rows, cols]``, 0 outside the windows."""
        size = self.neighborhood.size
        return self._weights(np.arange(*rows.indices(size)), np.arange(*cols.indices(size)))

    def window(self, row: int) -> tuple[Indices, NDArray[np.float32]]:
        """The pixels that one query attends to, and their weights."""
        keys = self.neighborhood.neighbors(row)
        return keys, self._weights(np.array([row]), keys)[0]

    def image(self, row: int) -> NDArray[np.float32]:
        """The weights of one query at their true places, an array of ``space``."""
        keys, weights = self.window(row)
        picture = np.zeros(self.neighborhood.size, np.float32)
        picture[keys] = weights
        return picture.reshape(self.neighborhood.space)

    def row_sums(self) -> NDArray[np.float64]:
        """Sum of each row: 1, or 0 for a dead row. Costs one window a row."""
        return np.array([self.window(row)[1].sum(dtype=np.float64) for row in range(self.neighborhood.size)])

    def pool(
        self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max"
    ) -> NDArray[np.float32]:
        """Maximum or mean of the weights under each of ``height x width`` pixels of a region, as ``SoftmaxMap.pool``.

        Visits the windows of the rows, block by block, so the cost does not grow with the number of columns.
        """
        row_edges, col_edges = pixel_edges(rows, cols, self.shape, height, width, reduce)
        out = np.zeros((len(row_edges) - 1, len(col_edges) - 1), np.float64)
        step = max(1, BLOCK_CELLS // (self.neighborhood.slots * self.query.shape[1]))
        for start in range(int(row_edges[0]), int(row_edges[-1]), step):
            block = np.arange(start, min(start + step, int(row_edges[-1])))
            keys, exists = self.neighborhood.windows(block)
            inside = exists & (keys >= col_edges[0]) & (keys < col_edges[-1])
            weights = self._window_weights(block, keys)[inside]
            pixel_row = np.broadcast_to(np.searchsorted(row_edges, block, "right")[:, None] - 1, keys.shape)
            place = (pixel_row[inside], np.searchsorted(col_edges, keys[inside], "right") - 1)
            (np.maximum if reduce == "max" else np.add).at(out, place, weights)
        if reduce == "mean":
            out /= np.diff(row_edges)[:, None] * np.diff(col_edges)[None, :]
        return out.astype(np.float32)

    def allowed(self, rows: Indices, cols: Indices) -> NDArray[np.bool_]:
        """Dense tile ``[rows, cols]``, True where pixel ``rows[i]`` attends to pixel ``cols[j]``."""
        keep = self.neighborhood.allowed(rows, cols)
        return keep if self.visible is None else keep & self.visible[cols]

    def seen(self, row_edges: Indices, col_edges: Indices) -> NDArray[np.bool_]:
        """Pixels ``[rows, cols]`` between these edges under which some pair is allowed."""
        out = np.zeros((len(row_edges) - 1, len(col_edges) - 1), bool)
        rows = np.arange(row_edges[0], row_edges[-1])
        keys, exists = self.neighborhood.windows(rows)
        inside = exists & (keys >= col_edges[0]) & (keys < col_edges[-1])
        if self.visible is not None:
            inside &= self.visible[keys]
        row = np.broadcast_to(np.searchsorted(row_edges, rows, "right")[:, None] - 1, keys.shape)
        out[row[inside], np.searchsorted(col_edges, keys[inside], "right") - 1] = True
        return out

    def exact_lse(self) -> NDArray[np.float64]:
        """The log-sum-exp of every row in float64, from queries and keys; minus infinity for a dead row."""
        lse = np.empty(self.neighborhood.size)
        step = max(1, BLOCK_CELLS // (self.neighborhood.slots * self.query.shape[1]))
        for start in range(0, len(lse), step):
            rows = np.arange(start, min(start + step, len(lse)))
            keys, exists = self.neighborhood.windows(rows)
            scores = np.where(exists, self._window_scores(rows, keys), -np.inf)
            top = scores.max(axis=1)
            safe = np.where(np.isneginf(top), 0, top)
            with np.errstate(divide="ignore"):
                lse[rows] = np.log(np.exp(scores - safe[:, None]).sum(axis=1)) + safe
        return lse

    def _window_weights(self, rows: Indices, keys: Indices) -> NDArray[np.float64]:
        """Weights ``[rows, slots]`` of keys ``[rows, slots]``, whether they exist or not."""
        lse = self.lse[rows].astype(np.float64)
        return np.exp(self._window_scores(rows, keys) - np.where(np.isneginf(lse), np.inf, lse)[:, None])

    def _window_scores(self, rows: Indices, keys: Indices) -> NDArray[np.float64]:
        query, key = self.query[rows].astype(np.float64), self.key[keys].astype(np.float64)
        scores = np.einsum("rd,rsd->rs", query, key) * self.scale
        if self.bias is not None:
            scores += self.bias[self._bias_places(rows[:, None], keys)]
        if self.visible is not None:
            scores = np.where(self.visible[keys], scores, -np.inf)
        return scores

    def _bias_places(self, rows: Indices, cols: Indices) -> tuple[Indices, ...]:
        """Indices into the table for pairs of pixels; a pair outside a window gets any."""
        assert self.bias is not None
        indices = self.neighborhood.offsets(rows, cols)
        return tuple(
            np.clip(index, 0, size - 1) for index, size in zip(indices, self.bias.shape, strict=True)
        )

    def _weights(self, rows: Indices, cols: Indices) -> NDArray[np.float32]:
        keep = self.neighborhood.allowed(rows, cols)
        if self.visible is not None:
            keep &= self.visible[cols]
        scores = self.query[rows].astype(np.float64) @ self.key[cols].astype(np.float64).T * self.scale
        if self.bias is not None:
            scores += self.bias[self._bias_places(rows[:, None], cols[None])]
        lse = self.lse[rows].astype(np.float64)
        scores -= np.where(np.isneginf(lse), 0, lse)[:, None]
        return np.exp(np.where(keep, scores, -np.inf)).astype(np.float32)


def per_axis(name: str, value: int | bool | Sequence[int], axes: int) -> tuple[int, ...]:
    """One entry for each axis: a number is repeated, a sequence must have ``axes`` entries."""
    if isinstance(value, int):
        return (value,) * axes
    if len(value) != axes:
        raise NeighborhoodError(f"{name} must be one number or {axes}, one an axis; got {tuple(value)}")
    return tuple(value)
