"""Which key each query may attend to: one description, lowered to whatever an implementation wants. No torch.

Query row ``i`` of ``num_queries`` sits at absolute position ``p = num_keys - num_queries + i`` (bottom-right
alignment: the last query is the newest token), so prefill, chunks and one-token decoding share one meaning.
A row that may attend to nothing is dead: zero output, log-sum-exp of minus infinity, a map row of zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
S = TypeVar("S")

MASK_KINDS = ("full", "causal", "window", "padding", "documents", "and")


class MaskError(ValueError):
    """A mask that cannot mean anything; the text names the argument, the rule and the value."""


@dataclass(frozen=True)
class Band:
    """Normal form of every mask here: keys ``p - left <= j <= p + right`` in one key range a batch element.

    ``None`` means unbounded on that side; ``ranges`` is ``None`` where every key exists, else one
    ``(start, stop)`` for each batch element (a single one serves the whole batch). ``documents``: likewise the
    lengths of the documents that cut the keys, each a run that only its own queries see.
    """

    left: int | None = None
    right: int | None = None
    ranges: tuple[tuple[int, int], ...] | None = None
    documents: tuple[tuple[int, ...], ...] | None = None

    @property
    def batch_size(self) -> int:
        """Number of sequences that are described one by one; 1 where all are alike."""
        return max(len(self.ranges or ((0, 0),)), len(self.documents or ((),)))

    @property
    def unbounded(self) -> bool:
        """Whether every query sees every key."""
        return (self.left, self.right, self.ranges, self.documents) == (None,) * 4

    def key_interval(self, num_keys: int, batch: int = 0) -> tuple[int, int]:
        """Keys ``[start, stop)`` that exist for this batch element."""
        if self.ranges is None:
            return 0, num_keys
        start, stop = _of_element(self.ranges, batch)
        return min(start, num_keys), min(stop, num_keys)

    def document_spans(self, num_keys: int, batch: int = 0) -> list[tuple[int, int]]:
        """Keys ``[start, stop)`` of each document that has any; one span of all keys where there are none."""
        if self.documents is None:
            return [(0, num_keys)]
        inner = np.cumsum(_of_element(self.documents, batch)[:-1]).tolist()
        return list(pairwise([0, *(edge for edge in inner if edge < num_keys), num_keys]))

    def row_limits(
        self, rows: NDArray[np.integer[Any]], *, num_queries: int, num_keys: int, batch: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First allowed key and one past the last, for each query row; a dead row has first >= last."""
        start, stop = self.key_interval(num_keys, batch)
        position = np.asarray(rows, np.int64) + (num_keys - num_queries)
        first = (
            np.full_like(position, start) if self.left is None else np.maximum(position - self.left, start)
        )
        last = (
            np.full_like(position, stop)
            if self.right is None
            else np.minimum(position + self.right + 1, stop)
        )
        if self.documents is None:
            return first, last
        spans = np.array(self.document_spans(num_keys, batch), np.int64)
        # a query before the first key belongs to no document
        own = spans[np.searchsorted(spans[:, 0], np.maximum(position, 0), side="right") - 1]
        first = np.maximum(first, own[:, 0])
        return first, np.where(position < 0, first, np.minimum(last, own[:, 1]))


@dataclass(frozen=True)
class Mask(ABC):
    """Base of the algebra. Combine with ``&``; ``allowed`` is a dense tile, ``key_range`` what to visit."""

    @abstractmethod
    def form(self) -> Band:
        """This mask in normal form."""

    def band(self) -> Band:
        """The normal form for those who read one band and its padding; MaskError for a mask with documents."""
        band = self.form()
        if band.documents is not None:
            raise MaskError(f"mask must be one band of keys here; got document ids: {self.describe()}")
        return band

    @abstractmethod
    def describe(self) -> str:
        """A few words for a page or a table."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """A plain dict that ``mask_from_json`` reads back."""

    def __and__(self, other: Mask) -> Mask:
        """Keys that both masks allow, simplified to the fewest parts."""
        return mask_from_band(And((self, other)).form())

    def allowed(
        self,
        rows: NDArray[np.integer[Any]],
        cols: NDArray[np.integer[Any]],
        *,
        num_queries: int,
        num_keys: int,
        batch: int = 0,
    ) -> NDArray[np.bool_]:
        """Dense tile ``[rows, cols]``, True where query ``rows[i]`` may attend to key ``cols[j]``."""
        first, last = self.form().row_limits(rows, num_queries=num_queries, num_keys=num_keys, batch=batch)
        keys = np.asarray(cols, np.int64)[None, :]
        return (keys >= first[:, None]) & (keys < last[:, None])

    def key_range(
        self, start: int, stop: int, *, num_queries: int, num_keys: int, batch: int = 0
    ) -> tuple[int, int]:
        """Smallest ``[lo, hi)`` holding every key allowed to rows ``start..stop``; ``lo == hi`` if none."""
        if start >= stop:
            return 0, 0
        band = self.form()
        # limits rise with the rows; only documents can leave a dead row at an edge and a live one inside
        rows = np.array([start, stop - 1]) if band.documents is None else np.arange(start, stop)
        first, last = band.row_limits(rows, num_queries=num_queries, num_keys=num_keys, batch=batch)
        if band.documents is not None:
            first, last = first[first < last], last[first < last]
        lo, hi = (int(first[0]), int(last[-1])) if len(first) else (0, 0)
        return (lo, hi) if lo < hi else (0, 0)

    def key_ranges(
        self, edges: NDArray[np.integer[Any]], *, num_queries: int, num_keys: int, batch: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``key_range`` of the rows from each edge to the next: ``lo`` and ``hi``, a number for each run of rows."""
        size = {"num_queries": num_queries, "num_keys": num_keys, "batch": batch}
        edges = np.asarray(edges, np.int64)
        band = self.form()
        if band.documents is not None:
            found = [self.key_range(start, stop, **size) for start, stop in pairwise(edges.tolist())]
            lo, hi = np.array(found, np.int64).reshape(-1, 2).T
            return lo, hi
        lo, hi = band.row_limits(edges[:-1], **size)[0], band.row_limits(edges[1:] - 1, **size)[1]
        some = (edges[:-1] < edges[1:]) & (lo < hi)
        return np.where(some, lo, 0), np.where(some, hi, 0)

    def count(self, num_queries: int, num_keys: int, batch: int = 0) -> int:
        """Exact number of allowed (query, key) pairs of one batch element, in O(num_queries)."""
        first, last = self.form().row_limits(
            np.arange(num_queries), num_queries=num_queries, num_keys=num_keys, batch=batch
        )
        return int(np.maximum(last - first, 0).sum())

    def dead_rows(self, num_queries: int, num_keys: int, batch: int = 0) -> NDArray[np.bool_]:
        """True for the query rows that may attend to no key: bool ``[num_queries]``."""
        first, last = self.form().row_limits(
            np.arange(num_queries), num_queries=num_queries, num_keys=num_keys, batch=batch
        )
        return first >= last


@dataclass(frozen=True)
class Full(Mask):
    """Every query attends to every key."""

    def form(self) -> Band:
        return Band()

    def describe(self) -> str:
        return "full"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "full"}


@dataclass(frozen=True)
class Causal(Mask):
    """Key ``j`` is allowed to the query at position ``p`` iff ``j <= p``."""

    def form(self) -> Band:
        return Band(right=0)

    def describe(self) -> str:
        return "causal"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "causal"}


@dataclass(frozen=True)
class Window(Mask):
    """Key ``j`` is allowed to the query at position ``p`` iff ``p - left <= j <= p + right``, ends included.

    NOTE: a causal window of ``w`` keys counts the query's own: ``Window(left=w - 1)``, as in Mistral.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        for name, value in (("left", self.left), ("right", self.right)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
                raise MaskError(f"{name} must be a whole number of keys >= 0; got {value!r}")

    def form(self) -> Band:
        return Band(int(self.left), int(self.right))

    def describe(self) -> str:
        if self.right == 0:
            return f"causal window of {self.left + 1} keys"
        return f"window of {self.left} keys before and {self.right} after"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "window", "left": int(self.left), "right": int(self.right)}


@dataclass(frozen=True)
class Padding(Mask):
    """Batch element ``b`` may attend to keys ``start <= j < stop``; one range alone serves every element."""

    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        pairs = tuple((int(start), int(stop)) for start, stop in self.ranges)
        if not pairs:
            raise MaskError("ranges must hold one (start, stop) for each batch element; got none")
        for start, stop in pairs:
            if not 0 <= start <= stop:
                raise MaskError(f"ranges must satisfy 0 <= start <= stop; got ({start}, {stop})")
        object.__setattr__(self, "ranges", pairs)

    def form(self) -> Band:
        return Band(ranges=self.ranges)

    def describe(self) -> str:
        if len(self.ranges) == 1:
            return f"keys {self.ranges[0][0]}..{self.ranges[0][1]}"
        return f"padding ({len(self.ranges)} sequences)"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "padding", "ranges": [list(pair) for pair in self.ranges]}


@dataclass(frozen=True)
class Documents(Mask):
    """Sequences packed end to end: a query attends only to keys of its own document.

    Args:
        lengths: tokens of each document in order, one list for each batch element; one list alone serves every
            element. The last document goes on to the last key, so a token that is being decoded belongs to it; a
            query before the first key belongs to none.
    """

    lengths: tuple[tuple[int, ...], ...]

    def __init__(self, lengths: Sequence[int] | Sequence[Sequence[int]]) -> None:
        rows = [lengths] if len(lengths) and isinstance(lengths[0], int | np.integer) else lengths
        if not len(rows) or not all(isinstance(row, Sequence | np.ndarray) and len(row) for row in rows):
            raise MaskError(f"lengths must hold the tokens of one document or more; got {lengths!r}")
        for value in (value for row in rows for value in row):  # pyright: ignore[reportGeneralTypeIssues]
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise MaskError(f"lengths must be whole numbers of tokens >= 1; got {value!r}")
        object.__setattr__(self, "lengths", tuple(tuple(int(value) for value in row) for row in rows))  # pyright: ignore[reportGeneralTypeIssues]

    @classmethod
    def from_ids(cls, ids: Any) -> Documents:
        """From the document of each token, integers ``[n]`` or ``[B, n]``; each document must be one run of tokens."""
        rows = np.atleast_2d(np.asarray(ids))
        if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
            raise MaskError(f"ids must be integers [n] or [B, n]; got {rows.dtype} {list(np.shape(ids))}")
        lengths = []
        for row in rows:
            edges = [0, *(np.flatnonzero(row[1:] != row[:-1]) + 1).tolist(), len(row)]
            if len(np.unique(row)) != len(edges) - 1:
                raise MaskError(f"ids must name each document in one run of tokens; got {row.tolist()}")
            lengths.append([stop - start for start, stop in pairwise(edges)])
        return cls(lengths)

    def form(self) -> Band:
        return Band(documents=self.lengths)

    def describe(self) -> str:
        if len(self.lengths) == 1:
            return f"{len(self.lengths[0])} documents"
        return f"documents ({len(self.lengths)} sequences)"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "documents", "lengths": [list(row) for row in self.lengths]}


@dataclass(frozen=True)
class And(Mask):
    """Keys that every part allows. Written ``a & b``, which also simplifies."""

    parts: tuple[Mask, ...]

    def form(self) -> Band:
        left = right = ranges = documents = None
        for band in (part.form() for part in self.parts):
            left = _smaller(left, band.left)
            right = _smaller(right, band.right)
            ranges = _common_ranges(ranges, band.ranges)
            documents = _common_documents(documents, band.documents)
        if ranges is not None and documents is not None:
            _paired(ranges, documents)
        return Band(left, right, ranges, documents)

    def describe(self) -> str:
        return " and ".join(part.describe() for part in self.parts) or "full"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "and", "parts": [part.to_json() for part in self.parts]}


def mask_from_json(value: Mapping[str, Any]) -> Mask:
    """Read a mask written by ``Mask.to_json``; MaskError names an unknown kind or a broken field."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    try:
        match kind:
            case "full":
                return Full()
            case "causal":
                return Causal()
            case "window":
                return Window(value["left"], value.get("right", 0))
            case "padding":
                return Padding(tuple((start, stop) for start, stop in value["ranges"]))
            case "documents":
                return Documents(value["lengths"])
            case "and":
                return And(tuple(mask_from_json(part) for part in value["parts"]))
    except (KeyError, TypeError) as error:
        raise MaskError(f"mask of kind {kind!r} is incomplete: {error!r} in {value!r}") from error
    raise MaskError(f"kind must be one of {', '.join(MASK_KINDS)}; got {value!r}")


def mask_from_band(band: Band) -> Mask:
    """The mask with this normal form, in the fewest parts. A right end other than 0 needs a left one."""
    parts: list[Mask] = []
    if band.left is not None:
        parts.append(Window(band.left, band.right or 0))
    elif band.right == 0:
        parts.append(Causal())
    if band.ranges is not None:
        parts.append(Padding(band.ranges))
    if band.documents is not None:
        parts.append(Documents(band.documents))
    if not parts:
        return Full()
    return parts[0] if len(parts) == 1 else And(tuple(parts))


def _smaller(first: int | None, second: int | None) -> int | None:
    given = [value for value in (first, second) if value is not None]
    return min(given) if given else None


def _common_ranges(
    first: tuple[tuple[int, int], ...] | None, second: tuple[tuple[int, int], ...] | None
) -> tuple[tuple[int, int], ...] | None:
    if first is None or second is None:
        return first if second is None else second
    common = ((max(a[0], b[0]), min(a[1], b[1])) for a, b in _paired(first, second))
    return tuple((start, max(start, stop)) for start, stop in common)


def _common_documents(
    first: tuple[tuple[int, ...], ...] | None, second: tuple[tuple[int, ...], ...] | None
) -> tuple[tuple[int, ...], ...] | None:
    """Documents cut wherever either cuts."""
    if first is None or second is None:
        return first if second is None else second
    edges = (
        sorted({0, *np.cumsum(a).tolist()[:-1], *np.cumsum(b).tolist()[:-1]})
        for a, b in _paired(first, second)
    )
    ends = (max(sum(a), sum(b)) for a, b in _paired(first, second))
    return tuple(
        tuple(stop - start for start, stop in pairwise([*inner, end]))
        for inner, end in zip(edges, ends, strict=True)
    )


def _paired(first: tuple[T, ...], second: tuple[S, ...]) -> list[tuple[T, S]]:
    """Element by element of the batch; a single one serves all."""
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise MaskError(f"masks must describe the same batch; got {len(first)} and {len(second)} sequences")
    size = max(len(first), len(second))
    return list(zip(first * (size // len(first)), second * (size // len(second)), strict=True))


def _of_element(values: tuple[T, ...], batch: int) -> T:
    if len(values) > 1 and not 0 <= batch < len(values):
        raise MaskError(f"batch must be one of 0..{len(values) - 1}, the mask's sequences; got {batch}")
    return values[batch if len(values) > 1 else 0]
