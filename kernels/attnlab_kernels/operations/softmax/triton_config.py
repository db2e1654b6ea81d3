"""Tiles of our Triton kernels: a plain function of shape and card, never tuned at run time. Needs no triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tile and launch numbers of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


FLOAT32 = {
    16: Config(32, 32, 4, 2),
    32: Config(32, 32, 4, 2),
    64: Config(32, 16, 4, 2),
    128: Config(32, 16, 8, 2),
    256: Config(16, 16, 4, 1),
}
FLOAT32_FEW_ROWS = {dim: Config(16, 16, 4, 1 if dim == 256 else 2) for dim in FLOAT32}
_SMALL = (16, 32, 64)
# padded head dimension -> tile, for many rows, up to 64 and up to 16
HALF: dict[int, tuple[dict[int, Config], ...]] = {
    80: (
        {dim: Config(128, 64, 4, 3) for dim in _SMALL}
        | {128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
        {dim: Config(64, 64, 4, 2 if dim == 32 else 3) for dim in (*_SMALL, 128)}
        | {256: Config(64, 32, 8, 2)},
        {dim: Config(16, 64, 4, 3) for dim in (*_SMALL, 128)} | {256: Config(16, 32, 4, 2)},
    ),
    90: (
        {dim: Config(128, 128, 8, 2) for dim in (*_SMALL, 128)} | {256: Config(128, 32, 8, 2)},
        {dim: Config(64, 128, 4, 2) for dim in _SMALL}
        | {128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 2)},
        {dim: Config(16, 128, 4, 2) for dim in _SMALL}
        | {128: Config(16, 64, 4, 3), 256: Config(16, 64, 4, 2)},
    ),
    100: (
        {dim: Config(128, 128, 8, 2) for dim in _SMALL}
        | {128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
        {dim: Config(64, 128, 4, 2) for dim in _SMALL}
        | {128: Config(64, 64, 4, 3), 256: Config(64, 32, 4, 2)},
        {dim: Config(16, 128, 4, 2) for dim in _SMALL}
        | {128: Config(16, 64, 4, 3), 256: Config(16, 64, 4, 2)},
    ),
}
# a soft cap, ALiBi or a bias keep more numbers alive for each score
HALF_MODIFIED: dict[int, dict[int, Config]] = {
    80: {dim: Config(64, 32, 4, 2) for dim in _SMALL} | {dim: Config(64, 16, 8, 2) for dim in (128, 256)},
    90: {dim: Config(64, 64, 4, 2) for dim in _SMALL}
    | {128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    100: {dim: Config(64, 64, 4, 2) for dim in _SMALL}
    | {128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 2)},
}
HALF_MODIFIED_FEW_ROWS = {dim: Config(16, 32, 4, 2) for dim in (*_SMALL, 128, 256)}
FEW_ROWS, MEDIUM_ROWS = 16, 64
# where those tiles would spill, because a table of blocks takes registers for addresses: for many rows, up to 64
HALF_PAGED: dict[tuple[int, int], tuple[Config, Config]] = {
    (80, 64): (Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    (80, 128): (Config(128, 32, 8, 3), Config(64, 64, 8, 2)),
    (90, 128): (Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
}


def choose_config(
    block_d: int,
    element_size: int,
    num_rows: int,
    capability: int,
    modified: bool = False,
    limited: bool = False,
    paged: bool = False,
) -> Config:
    """Tile for a padded head dimension, bytes of a number, query rows and compute capability (80, 90, 100).

    The widest tiles that were seen to keep everything in registers; a test compiles every one for every target.

    Args:
        modified: the call has a soft cap, ALiBi or a bias.
        limited: each query has limits of its own (documents), which take registers and make tiles narrow.
        paged: keys lie in the blocks of a pool.
    """
    if element_size == 4:
        # float32 products run on the plain cores, where small tiles lose nothing
        return FLOAT32[block_d] if num_rows > FEW_ROWS else FLOAT32_FEW_ROWS[block_d]
    generation = min(100, max(80, capability // 10 * 10))
    if modified or limited:
        if num_rows <= FEW_ROWS:
            return HALF_MODIFIED_FEW_ROWS[block_d]
        if modified and block_d <= 32 and (limited or generation > 80):
            return Config(32, 32, 4, 2)
        return HALF_MODIFIED[generation][block_d]
    tiles = tuple(table[block_d] for table in HALF[generation])
    if paged and (generation, block_d) in HALF_PAGED:
        tiles = (*HALF_PAGED[generation, block_d], tiles[2])
    return tiles[2 if num_rows <= FEW_ROWS else 1 if num_rows <= MEDIUM_ROWS else 0]


QUERY_FLOAT32 = {
    16: Config(32, 32, 4, 1),
    32: Config(32, 32, 4, 1),
    64: Config(16, 32, 4, 1),
    128: Config(16, 16, 4, 1),
    256: Config(16, 16, 8, 1),
}
KEY_FLOAT32 = QUERY_FLOAT32 | {dim: Config(16, 16, 4, 1) for dim in (16, 64)}
QUERY_HALF = {
    80: {dim: Config(64, 64, 4, 2) for dim in _SMALL}
    | {128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    90: {dim: Config(64, 64, 4, 2) for dim in _SMALL}
    | {128: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 1)},
}
# two sums, of dK and of dV, stay in registers
KEY_HALF = {
    80: {dim: Config(32, 64, 4, 2) for dim in _SMALL}
    | {128: Config(32, 64, 8, 1), 256: Config(32, 32, 8, 1)},
    90: {dim: Config(64, 64, 8, 2) for dim in _SMALL}
    | {128: Config(32, 128, 8, 2), 256: Config(32, 32, 8, 1)},
    100: {dim: Config(64, 64, 8, 2) for dim in _SMALL}
    | {128: Config(32, 64, 8, 1), 256: Config(32, 32, 8, 1)},
}
KEY_HALF_MODIFIED = {dim: Config(32, 32, 4, 1) for dim in (*_SMALL, 128)} | {256: Config(32, 32, 8, 1)}


def choose_query_config(block_d: int, element_size: int, capability: int, modified: bool = False) -> Config:
    """Tile of the kernel of dQ: ``block_m`` queries, ``block_n`` keys at a time."""
    if element_size == 4:
        return QUERY_FLOAT32[block_d]
    if modified and block_d <= 32 and capability >= 100:
        return Config(32, 32, 4, 1)
    return QUERY_HALF[80 if capability < 90 else 90][block_d]


def choose_key_config(
    block_d: int, element_size: int, capability: int, modified: bool = False, limited: bool = False
) -> Config:
    """Tile of the kernel of dK and dV: ``block_n`` keys, ``block_m`` queries at a time."""
    if element_size == 4:
        return KEY_FLOAT32[block_d]
    if modified:
        return KEY_HALF_MODIFIED[block_d]
    return KEY_HALF[80 if limited else min(100, max(80, capability // 10 * 10))][block_d]


def choose_splits(programs: int, num_tiles: int, multiprocessors: int) -> int:
    """Shares that the keys of a few query rows are cut into, so that every multiprocessor has two blocks to run."""
    wanted = -(-2 * multiprocessors // max(1, programs))
    # a share of fewer than four tiles costs more to join than it saves
    return max(1, min(wanted, num_tiles // 4, 64))
