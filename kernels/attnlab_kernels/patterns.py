"""Which keys each query attends to in sparse attention: six patterns, and tiles that hold all their pairs. No torch.

Child et al., "Generating Long Sequences with Sparse Transformers", https://arxiv.org/abs/1904.10509 (strided, fixed);
Longformer: 2004.05150; BigBird: 2007.14062. Rows and columns are absolute positions, so prefill, chunks and
one-token decoding share one meaning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

# queries of a tile
SIDE = 64


class PatternError(ValueError):
    """A pattern that cannot be; the text names the argument, the rule and the value."""


class Tile(NamedTuple):
    """Queries ``[Q]``, keys ``[1 | H, K]`` (1: the same for all heads) and the pairs that count ``[1 | H, Q, K]``."""

    queries: Indices
    keys: Indices
    keep: Flags


@dataclass(frozen=True)
class Pattern(ABC):
    """Base of the patterns. ``causal`` leaves out keys after the query."""

    causal: bool

    def allowed(self, rows: Indices, cols: Indices, *, num_keys: int, head: int = 0) -> Flags:
        """Dense tile ``[rows, cols]``, True where position ``rows[i]`` attends to position ``cols[j]``.

        ``num_keys`` is the length of the sequence; only a pattern that is not causal may depend on it.
        """
        i, j = np.asarray(rows, np.int64)[:, None], np.asarray(cols, np.int64)[None]
        pairs = self._pairs(i, j, num_keys, head)
        return pairs & (j <= i) if self.causal else pairs

    def passes(self, start: int, stop: int, num_keys: int, heads: int = 1) -> tuple[list[Tile], ...]:
        """Tiles for the queries at positions ``start..stop``.

        Every pass has each query once; the passes share no pair, and all pairs together are the pattern's.
        """
        return (list(self._tiles(start, stop, num_keys)),)

    def visited(self, num_queries: int, num_keys: int, heads: int = 1) -> int:
        """Pairs of all heads that the tiles hold, masked ones included."""
        return sum(
            len(tile.queries) * tile.keys.shape[1] * heads
            for tiles in self.passes(num_keys - num_queries, num_keys, num_keys, heads)
            for tile in tiles
        )

    def count(self, num_queries: int, num_keys: int, heads: int = 1) -> int:
        """Exact number of pairs of all heads; costs as much as the tiles hold."""
        return sum(
            int(tile.keep.sum()) * (heads // len(tile.keep))
            for tiles in self.passes(num_keys - num_queries, num_keys, num_keys, heads)
            for tile in tiles
        )

    def key_blocks(self, query_block: int, block_size: int, num_keys: int, *, head: int = 0) -> Indices:
        """Numbers of the blocks of ``block_size`` keys that hold a pair of this block of queries, ascending."""
        rows = np.arange(query_block * block_size, min((query_block + 1) * block_size, num_keys))
        if not len(rows):
            raise PatternError(
                f"query_block must be below {-(-num_keys // block_size)}, the blocks of {num_keys} keys; "
                f"got {query_block}"
            )
        found = [
            tile.keys[pick][tile.keep[pick].any(axis=0)] // block_size
            for tiles in self.passes(int(rows[0]), int(rows[-1]) + 1, num_keys, head + 1)
            for tile in tiles
            for pick in (min(head, len(tile.keys) - 1),)
        ]
        return np.unique(np.concatenate(found))

    @abstractmethod
    def describe(self) -> str:
        """A few words for a page or a table."""

    @abstractmethod
    def _pairs(self, i: Indices, j: Indices, num_keys: int, head: int) -> Flags:
        """The pattern without the causal limit, for queries ``[n, 1]`` and keys ``[1, m]``."""

    def _keys(self, low: int, high: int, num_keys: int) -> Indices:
        """Keys that queries ``low..high`` (the last included) may attend to, ascending; more is waste, not error."""
        return np.arange(num_keys)

    def _cuts(self) -> tuple[int, ...]:
        """Positions that no tile of queries reaches across."""
        return ()

    def _tiles(self, start: int, stop: int, num_keys: int) -> Iterator[Tile]:
        for low, high in _blocks(start, stop, SIDE, self._cuts()):
            rows = np.arange(low, high)
            keys = self._keys(low, high - 1, num_keys)
            keys = keys[keys < (high if self.causal else num_keys)]
            yield Tile(rows, keys[None], self.allowed(rows, keys, num_keys=num_keys)[None])

    def _words(self) -> str:
        return ", causal" if self.causal else ""


@dataclass(frozen=True)
class Dense(Pattern):
    """Every key."""

    def describe(self) -> str:
        return f"every key{self._words()}"

    def _pairs(self, i: Indices, j: Indices, num_keys: int, head: int) -> Flags:
        return np.ones(np.broadcast_shapes(i.shape, j.shape), bool)


@dataclass(frozen=True)
class Local(Pattern):
    """The nearest keys, ``|i - j| < window``: causal, ``window`` of them, the query's own included."""

    window: int

    def __post_init__(self) -> None:
        _at_least("local_window", self.window, 1)

    def describe(self) -> str:
        return f"local, {self.window} keys{self._words()}"

    def _pairs(self, i: Indices, j: Indices, num_keys: int, head: int) -> Flags:
        return np.abs(i - j) < self.window

    def _keys(self, low: int, high: int, num_keys: int) -> Indices:
        return np.arange(max(0, low - self.window + 1), min(num_keys, high + self.window))


@dataclass(frozen=True)
class Strided(Pattern):
    """The nearest ``stride`` keys, and every key whose distance is a multiple of ``stride``."""

    stride: int

    def __post_init__(self) -> None:
        _at_least("stride", self.stride, 1)

    def describe(self) -> str:
        return f"strided, {self.stride}{self._words()}"

    def passes(self, start: int, stop: int, num_keys: int, heads: int = 1) -> tuple[list[Tile], ...]:
        near = Local(self.causal, self.stride)
        return near.passes(start, stop, num_keys)[0], list(self._far(start, stop, num_keys, near))

    def _pairs(self, i: Indices, j: Indices, num_keys: int, head: int) -> Flags:
        return (np.abs(i - j) < self.stride) | ((i - j) % self.stride == 0)

    def _far(self, start: int, stop: int, num_keys: int, near: Local) -> Iterator[Tile]:
        """One residue class after another: there the far keys are dense."""
        for first in range(start, min(start + self.stride, stop)):
            members = np.arange(first, stop, self.stride)
            for rows in (members[at : at + SIDE] for at in range(0, len(members), SIDE)):
                end = int(rows[-1]) + 1 if self.causal else num_keys
                keys = np.arange(first % self.stride, end, self.stride)
                keep = self.allowed(rows, keys, num_keys=num_keys) & ~near.allowed(
                    rows, keys, num_keys=num_keys
                )
                yield Tile(rows, keys[None], keep[None])


@dataclass(frozen=True)
class Fixed(Pattern):
    """The keys of the query's own block of ``stride``, and the last ``summary`` keys of every block."""

    stride: int
    summary: int = 1

    def __post_init__(self) -> None:
        _at_least("stride", self.stride, 1)
        if not 1 <= self.summary <= self.stride:
            raise PatternError(
                f"summary_tokens must be between 1 and stride = {self.stride}; got {self.summary}"
            )

    def describe(self) -> str:
        return f"fixed, blocks of {self.stride} with {self.summary} summary keys{self._words()}"

    def _pairs(self, i: Indices, j: Indices, num_keys: int, head: int) -> Flags:
        return (i // self.stride == j // self.stride) | (j % self.stride >= self.stride - self.summary)

    def _keys(self, low: int, high: int, num_keys: int) -> Indices:
        own = np.arange(low // self.stride * self.stride, (high // self.stride + 1) * self.stride)
        ends = np.arange(self.stride, (high + 1 if self.causal else num_keys) + self.stride, self.stride)
        summaries = (ends[:, None] - 1 - np.arange(self.summary)).ravel()
        return np.union1d(own, summaries)


@dataclass(frozen=True)
class LocalGlobal(Pattern):
    """The nearest keys as in ``Local``, and the first ``global_tokens``; not causal, these attend to every key."""

    window: int
    global_tokens: int

    def __post_init__(self) -> None:
        _at_least("local_window", self.window, 1)
        _at_least("global_tokens", self.global_tokens, 0)

    @property
    def reach(self) -> int:
        """Distance of the farthest local key."""
        return self.window - 1

    def describe(self) -> str:
        return f"local, {self.window} keys, and {self.global_tokens} global{self._words()}"

    def _pairs(self, i: Indices, j: Indices, num_keys: int, head: int) -> Flags:
        return (np.abs(i - j) <= self.reach) | (j < self.global_tokens) | (i < self.global_tokens)

    def _cuts(self) -> tuple[int, ...]:
        return (self.global_tokens,)

    def _keys(self, low: int, high: int, num_keys: int) -> Indices:
        if low < self.global_tokens:
            return np.arange(num_keys)
        near = np.arange(max(0, low - self.reach), min(num_keys, high + self.reach + 1))
        return np.union1d(np.arange(min(self.global_tokens, num_keys)), near)


@dataclass(frozen=True)
class Longformer(LocalGlobal):
    """``window / 2`` keys on each side and the query's own, and the first ``global_tokens`` as in ``LocalGlobal``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2 or self.window % 2:
            raise PatternError(
                f"local_window must be even and at least 2 for longformer, half on each side; got {self.window}"
            )

    @property
    def reach(self) -> int:
        return self.window // 2

    def describe(self) -> str:
        return f"Longformer, {self.window} + 1 keys, {self.global_tokens} global{self._words()}"


@dataclass(frozen=True)
class BigBird(Pattern):
    """Blocks: the first (not causal, also the last) are global, then the neighbours, then some at random.

    A query block that is global itself attends to every key. The random blocks of a query block are drawn without
    repetition from those that it does not have yet (causal: from those before it), by a hash of seed, layer, head
    and block: the same in every call, and causal, whatever comes after.
    """

    block_size: int
    num_random: int
    global_blocks: int = 1
    sliding_blocks: int = 3
    seed: int = 0
    layer: int = 0

    def __post_init__(self) -> None:
        _at_least("block_size", self.block_size, 1)
        _at_least("num_random", self.num_random, 0)
        _at_least("global blocks", self.global_blocks, 0)
        if self.sliding_blocks < 1 or self.sliding_blocks % 2 == 0:
            raise PatternError(
                f"sliding blocks must be odd, the query's own in the middle; got {self.sliding_blocks}"
            )

    def describe(self) -> str:
        return (
            f"BigBird, blocks of {self.block_size}: {self.global_blocks} global, {self.sliding_blocks} sliding, "
            f"{self.num_random} random{self._words()}"
        )

    def blocks(self, block: int, num_keys: int, heads: int = 1) -> tuple[Indices, Indices]:
        """Key blocks of a query block: those of every head, ascending, and the random ones ``[heads, at most r]``."""
        total = block + 1 if self.causal else -(-num_keys // self.block_size)
        everything = np.arange(total)
        edge = np.zeros(total, bool)
        edge[: self.global_blocks] = True
        if not self.causal:
            edge[max(0, total - self.global_blocks) :] = True
        if edge[block]:
            return everything, np.zeros((heads, 0), np.int64)
        has = edge | (np.abs(everything - block) <= self.sliding_blocks // 2)
        others = everything[~has]
        return everything[has], others[self._draw(block, len(others), heads)]

    def passes(self, start: int, stop: int, num_keys: int, heads: int = 1) -> tuple[list[Tile], ...]:
        return ([self._tile(low, high, num_keys, heads) for low, high in self._rows(start, stop)],)

    def _pairs(self, i: Indices, j: Indices, num_keys: int, head: int) -> Flags:
        result = np.zeros((len(i), j.shape[1]), bool)
        own = i[:, 0] // self.block_size
        for block in np.unique(own):
            shared, drawn = self.blocks(int(block), num_keys, heads=head + 1)
            result[own == block] = np.isin(j // self.block_size, np.concatenate((shared, drawn[head])))
        return result

    def _rows(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        size = self.block_size
        for block in range(start // size, -(-stop // size)):
            yield from _blocks(max(start, block * size), min(stop, (block + 1) * size), SIDE, ())

    def _tile(self, low: int, high: int, num_keys: int, heads: int) -> Tile:
        shared, drawn = self.blocks(low // self.block_size, num_keys, heads)
        within = np.arange(self.block_size)
        same = (shared[:, None] * self.block_size + within).ravel()
        # only a last block can be shorter, and no random block is the last
        same = same[same < (high if self.causal else num_keys)]
        other = (drawn[..., None] * self.block_size + within).reshape(heads, -1)
        keys = np.concatenate((np.broadcast_to(same, (heads, len(same))), other), axis=1)
        rows = np.arange(low, high)
        keep = (
            keys[:, None] <= rows[:, None]
            if self.causal
            else np.ones((heads, len(rows), keys.shape[1]), bool)
        )
        return Tile(rows, keys, keep)

    def _draw(self, block: int, choices: int, heads: int) -> Indices:
        """Floyd's sampling of ``num_random`` numbers below ``choices`` without repetition, for each head."""
        size = min(self.num_random, choices)
        chosen = np.full((heads, size), -1, np.int64)
        for slot, last in enumerate(range(choices - size, choices)):
            number = counter_hash(self.seed, self.layer, np.arange(heads), block, slot)
            value = (number % np.uint64(last + 1)).astype(np.int64)
            taken = (chosen == value[:, None]).any(axis=1)
            chosen[:, slot] = np.where(taken, last, value)
        return np.sort(chosen, axis=1)


PATTERNS = ("local", "strided", "fixed", "local_global", "longformer", "bigbird")


def build_pattern(
    name: str,
    causal: bool,
    *,
    local_window: int = 256,
    global_tokens: int = 1,
    num_random: int = 3,
    stride: int = 64,
    summary_tokens: int = 1,
    block_size: int = 64,
    sliding_blocks: int = 3,
    seed: int = 0,
    layer: int = 0,
) -> Pattern:
    """The pattern of that name, see ``SparseAttention`` for the numbers; each pattern reads its own.

    Raises:
        PatternError: an unknown name, or a number that does not fit.
    """
    match name:
        case "local":
            return Local(causal, local_window)
        case "strided":
            return Strided(causal, stride)
        case "fixed":
            return Fixed(causal, stride, summary_tokens)
        case "local_global":
            return LocalGlobal(causal, local_window, global_tokens)
        case "longformer":
            return Longformer(causal, local_window, global_tokens)
        case "bigbird":
            _at_least("block_size", block_size, 1)
            blocks = -(-global_tokens // block_size)
            return BigBird(causal, block_size, num_random, blocks, sliding_blocks, seed, layer)
    raise PatternError(f"sparsity_pattern must be one of {', '.join(PATTERNS)}; got {name!r}")


def counter_hash(*parts: int | NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """64 well mixed bits of these numbers in this order (splitmix64); arrays broadcast."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = state ^ np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64)
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _blocks(start: int, stop: int, side: int, cuts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges that together are ``start..stop``, none longer than ``side`` or across a cut."""
    edges = [start, *sorted(cut for cut in cuts if start < cut < stop), stop]
    for low, high in pairwise(edges):
        for first in range(low, high, side):
            yield first, min(first + side, high)


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise PatternError(f"{name} must be a whole number of at least {least}; got {value!r}")


def pattern_to_json(pattern: Pattern) -> dict[str, Any]:
    """Its kind and fields, from which ``pattern_from_json`` makes an equal one."""
    return {"kind": type(pattern).__name__} | asdict(pattern)


def pattern_from_json(document: dict[str, Any]) -> Pattern:
    """The pattern; PatternError for another kind."""
    kinds = {kind.__name__: kind for kind in (Dense, Local, Strided, Fixed, LocalGlobal, Longformer, BigBird)}
    fields = dict(document)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise PatternError(f"kind must be one of {', '.join(kinds)}; got {kind!r}")
    return kinds[kind](**fields)
