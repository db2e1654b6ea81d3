"""Which keys a kernel visits for each tile of queries, as compressed lists made from a sparse pattern. No torch.

Nothing of size n x n is formed: what is built is as large as the pairs of the pattern's own tiles. The keys of a list
need not be neighbours (a strided pattern's are not), so a list names every key; those that every row of the tile sees
come first, and a block of only such keys needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.patterns import Flags, Indices, Pattern, Tile

Words = NDArray[np.int32]
# (rows, columns, pairs that count [rows, columns])
Piece = tuple[Indices, Indices, Flags]


class BlockLists(NamedTuple):
    """Compressed lists for L heads (1: the same for all), T tiles of M rows, C blocks of N columns, U masks.

    ``rows`` int32 ``[L, T, M]`` and ``columns`` int32 ``[C, N]`` hold numbers of tokens, -1 where there is none.
    ``spans`` int32 ``[L, T, 3]``: the first block of a tile, the first that needs a mask, one past the last.
    ``masks`` int32 ``[C]``: which of ``keep`` uint8 ``[U, M, N]`` a block has, -1 where every pair counts.
    """

    rows: Words
    spans: Words
    columns: Words
    masks: Words
    keep: NDArray[np.uint8]

    @property
    def visited(self) -> int:
        """Pairs that a kernel computes, padding included, summed over the lists."""
        return len(self.columns) * self.rows.shape[2] * self.columns.shape[1]


@lru_cache(maxsize=64)
def query_lists(
    pattern: Pattern, start: int, stop: int, num_keys: int, heads: int, tile: tuple[int, int]
) -> tuple[BlockLists, ...]:
    """Keys for every tile of ``tile[0]`` queries, ``tile[1]`` at a time; one entry a pass of the pattern.

    Args:
        start: position of the first query, ``stop`` one past the last; rows are numbered from ``start``.
    """
    return tuple(
        _compress([[(rows, [piece]) for rows, piece in _tiles(head, tile[0])] for head in pieces], tile)
        for pieces in _pieces(pattern, start, stop, num_keys, heads)
    )


@lru_cache(maxsize=64)
def key_lists(
    pattern: Pattern, start: int, stop: int, num_keys: int, heads: int, tile: tuple[int, int]
) -> tuple[BlockLists, ...]:
    """The other way round: queries for every tile of ``tile[0]`` keys, each key in exactly one tile."""
    return tuple(
        _compress([list(_inverted(head, num_keys, tile[0])) for head in pieces], tile)
        for pieces in _pieces(pattern, start, stop, num_keys, heads)
    )


def _pieces(
    pattern: Pattern, start: int, stop: int, num_keys: int, heads: int
) -> Iterator[list[list[Piece]]]:
    """For each pass, for each list of heads, what its tiles hold; queries are numbered from ``start``."""
    for tiles in pattern.passes(start, stop, num_keys, heads):
        lists = max(len(tile.keys) for tile in tiles)
        yield [[_of_head(tile, head, start) for tile in tiles] for head in range(lists)]


def _of_head(tile: Tile, head: int, start: int) -> Piece:
    pick = min(head, len(tile.keys) - 1)
    return tile.queries - start, tile.keys[pick], tile.keep[pick]


def _tiles(pieces: Iterable[Piece], size: int) -> Iterator[tuple[Indices, Piece]]:
    for queries, keys, keep in pieces:
        for first in range(0, len(queries), size):
            part = slice(first, first + size)
            yield queries[part], (queries[part], keys, keep[part])


def _inverted(pieces: list[Piece], num_keys: int, size: int) -> Iterator[tuple[Indices, list[Piece]]]:
    """Tiles of keys that the same queries see, and for each its queries.

    Keys are sorted by the last and the first piece that has them: neighbours stay neighbours, and those that everybody
    sees (globals, summaries, one residue class) come together instead of opening every tile to every query.
    """
    first, last = np.full(num_keys, len(pieces)), np.full(num_keys, -1)
    for number, (_, keys, keep) in enumerate(pieces):
        seen = keys[keep.any(axis=0)]
        first[seen] = np.minimum(first[seen], number)
        last[seen] = number
    order = np.lexsort((np.arange(num_keys), first, last))
    place = np.empty(num_keys, np.int64)
    place[order] = np.arange(num_keys)
    found: list[list[Piece]] = [[] for _ in range(-(-num_keys // size))]
    for queries, keys, keep in pieces:
        at = np.flatnonzero(keep.any(axis=0))
        at = at[np.argsort(place[keys[at]], kind="stable")]
        tiles = place[keys[at]] // size
        for part in np.split(at, np.flatnonzero(np.diff(tiles)) + 1) if len(at) else []:
            found[int(place[keys[part[0]]] // size)].append((keys[part], queries, keep[:, part].T))
    for number, parts in enumerate(found):
        yield order[number * size : (number + 1) * size], parts


def _compress(heads: list[list[tuple[Indices, list[Piece]]]], tile: tuple[int, int]) -> BlockLists:
    height, width = tile
    most = max(len(tiles) for tiles in heads)
    rows = np.full((len(heads), most, height), -1, np.int32)
    spans = np.zeros((len(heads), most, 3), np.int32)
    columns: list[Indices] = [np.zeros((0, width), np.int64)]
    masks: list[int] = []
    known: dict[bytes, int] = {}
    for head, tiles in enumerate(heads):
        for number, (members, pieces) in enumerate(tiles):
            rows[head, number, : len(members)] = members
            listed, keep, full = _joined(members, pieces, tile)
            first = len(masks)
            columns.append(listed)
            masks += [-1] * full + [known.setdefault(part.tobytes(), len(known)) for part in keep[full:]]
            spans[head, number] = first, first + full, len(masks)
    flat = np.frombuffer(bytearray().join(known), np.uint8)
    return BlockLists(
        rows,
        spans,
        np.concatenate(columns).astype(np.int32),
        np.array(masks, np.int32),
        flat.reshape(-1, height, width),
    )


def _joined(members: Indices, pieces: list[Piece], tile: tuple[int, int]) -> tuple[Indices, Any, int]:
    """Blocks of columns ``[c, N]`` of one tile, their pairs uint8 ``[c, M, N]``, and how many are full."""
    height, width = tile
    where = {int(row): at for at, row in enumerate(members)}
    listed, pairs = [np.zeros(0, np.int64)], [np.zeros((height, 0), bool)]
    for rows, columns, keep in pieces:
        seen = keep.any(axis=0)
        part = np.zeros((height, int(seen.sum())), bool)
        part[[where[int(row)] for row in rows]] = keep[:, seen]
        listed.append(columns[seen])
        pairs.append(part)
    names, held = np.concatenate(listed), np.concatenate(pairs, axis=1)
    whole = held[: len(members)].all(axis=0)
    order = np.argsort(~whole, kind="stable")
    count = -(-len(names) // width)
    blocks = np.full(count * width, -1, np.int64)
    blocks[: len(names)] = names[order]
    keep = np.zeros((height, count * width), np.uint8)
    keep[:, : len(names)] = held[:, order]
    tiled = keep.reshape(height, count, width).transpose(1, 0, 2)
    return blocks.reshape(count, width), np.ascontiguousarray(tiled), int(whole.sum()) // width
