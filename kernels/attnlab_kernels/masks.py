"""Which key each query may attend to: one description, lowered to whatever an implementation wants. No torch.

Query row ``i`` of ``num_queries`` sits at absolute position ``p = num_keys - num_queries + i`` (bottom-right
alignment: the last query is the newest token), so prefill, chunks and one-token decoding share one meaning.
A row that may attend to nothing is dead: zero output, log-sum-exp of minus infinity, a map row of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK_KINDS = ("full", "causal", "window", "padding", "and")


class MaskError(ValueError):
    """A mask that cannot mean anything; the text names the argument, the rule and the value."""


@dataclass(frozen=True)
class Band:
    """Normal form of every mask here: keys ``p - left <= j <= p + right`` in one key range a batch element.

    ``None`` means unbounded on that side; ``ranges`` is ``None`` where every key exists, else one
    ``(start, stop)`` for each batch element (a single one serves the whole batch).
    """

    left: int | None = None
    right: int | None = None
    ranges: tuple[tuple[int, int], ...] | None = None

    def key_interval(self, num_keys: int, batch: int = 0) -> tuple[int, int]:
        """Keys ``[start, stop)`` that exist for this batch element."""
        if self.ranges is None:
            return 0, num_keys
        if len(self.ranges) > 1 and not 0 <= batch < len(self.ranges):
            raise MaskError(
                f"batch must be one of 0..{len(self.ranges) - 1}, the padding mask's sequences; got {batch}"
            )
        start, stop = self.ranges[batch if len(self.ranges) > 1 else 0]
        return min(start, num_keys), min(stop, num_keys)

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
        return first, last


@dataclass(frozen=True)
class Mask:
    """Base of the algebra. Combine with ``&``; ``allowed`` is a dense tile, ``key_range`` what to visit."""

    def band(self) -> Band:
        """This mask in normal form."""
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for a page or a table."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """A plain dict that ``mask_from_json`` reads back."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        """Keys that both masks allow, simplified to the fewest parts."""
        return mask_from_band(And((self, other)).band())

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
        first, last = self.band().row_limits(rows, num_queries=num_queries, num_keys=num_keys, batch=batch)
        keys = np.asarray(cols, np.int64)[None, :]
        return (keys >= first[:, None]) & (keys < last[:, None])

    def key_range(
        self, start: int, stop: int, *, num_queries: int, num_keys: int, batch: int = 0
    ) -> tuple[int, int]:
        """Smallest ``[lo, hi)`` holding every key allowed to rows ``start..stop``; ``lo == hi`` if none."""
        edges = np.array([start, stop - 1])
        first, last = self.band().row_limits(edges, num_queries=num_queries, num_keys=num_keys, batch=batch)
        lo, hi = int(first[0]), int(last[1])
        return (lo, hi) if start < stop and lo < hi else (0, 0)

    def count(self, num_queries: int, num_keys: int, batch: int = 0) -> int:
        """Exact number of allowed (query, key) pairs of one batch element, in O(num_queries)."""
        first, last = self.band().row_limits(
            np.arange(num_queries), num_queries=num_queries, num_keys=num_keys, batch=batch
        )
        return int(np.maximum(last - first, 0).sum())

    def dead_rows(self, num_queries: int, num_keys: int, batch: int = 0) -> NDArray[np.bool_]:
        """True for the query rows that may attend to no key: bool ``[num_queries]``."""
        first, last = self.band().row_limits(
            np.arange(num_queries), num_queries=num_queries, num_keys=num_keys, batch=batch
        )
        return first >= last


@dataclass(frozen=True)
class Full(Mask):
    """Every query attends to every key."""

    def band(self) -> Band:
        return Band()

    def describe(self) -> str:
        return "full"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "full"}


@dataclass(frozen=True)
class Causal(Mask):
    """Key ``j`` is allowed to the query at position ``p`` iff ``j <= p``."""

    def band(self) -> Band:
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

    def band(self) -> Band:
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

    def band(self) -> Band:
        return Band(ranges=self.ranges)

    def describe(self) -> str:
        if len(self.ranges) == 1:
            return f"keys {self.ranges[0][0]}..{self.ranges[0][1]}"
        return f"padding ({len(self.ranges)} sequences)"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "padding", "ranges": [list(pair) for pair in self.ranges]}


@dataclass(frozen=True)
class And(Mask):
    """Keys that every part allows. Written ``a & b``, which also simplifies."""

    parts: tuple[Mask, ...]

    def band(self) -> Band:
        left = right = ranges = None
        for band in (part.band() for part in self.parts):
            left = _smaller(left, band.left)
            right = _smaller(right, band.right)
            ranges = _common_ranges(ranges, band.ranges)
        return Band(left, right, ranges)

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
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise MaskError(
            f"padding masks must describe the same batch; got {len(first)} and {len(second)} sequences"
        )
    size = max(len(first), len(second))
    pairs = zip(first * (size // len(first)), second * (size // len(second)), strict=True)
    common = ((max(a[0], b[0]), min(a[1], b[1])) for a, b in pairs)
    return tuple((start, max(start, stop)) for start, stop in common)
