"""Block lists of sparse patterns: every pair once, no empty block, from the queries' side and from the keys'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab_kernels.block_lists import BlockLists, key_lists, query_lists
from attnlab_kernels.masks import Causal, Padding
from attnlab_kernels.operations.sparse.api import sparse_attend
from attnlab_kernels.operations.sparse.dense import dense
from attnlab_kernels.patterns import BigBird, Dense, Fixed, Local, LocalGlobal, Longformer, Pattern, Strided

LENGTH = 83
PATTERNS: dict[str, Pattern] = {
    "local": Local(True, 7),
    "local, both sides": Local(False, 20),
    "strided": Strided(True, 11),
    "strided, both sides": Strided(False, 11),
    "fixed": Fixed(True, 13, 3),
    "local and global": LocalGlobal(False, 9, 5),
    "longformer": Longformer(True, 6, 2),
    "bigbird": BigBird(True, 8, 2, layer=4),
    "bigbird, both sides": BigBird(False, 8, 1),
    "dense": Dense(True),
}


def pairs(lists: BlockLists, head: int, shape: tuple[int, int]) -> np.ndarray:
    """How often each (row, column) is in the lists of a head."""
    found = np.zeros(shape, int)
    pick = head % len(lists.rows)
    for rows, (first, middle, last) in zip(lists.rows[pick], lists.spans[pick], strict=True):
        assert first <= middle <= last
        for block in range(first, last):
            mask = lists.masks[block]
            assert (mask < 0) == (block < middle)
            keep = np.ones((len(rows), lists.columns.shape[1]), bool) if mask < 0 else lists.keep[mask] > 0
            keep = keep & (rows >= 0)[:, None]
            assert keep.any()
            row, column = np.nonzero(keep)
            assert (lists.columns[block][column] >= 0).all()
            np.add.at(found, (rows[row], lists.columns[block][column]), 1)
    return found


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("tile", [(16, 8), (32, 32)], ids=str)
def test_lists_from_both_sides_hold_each_pair_once_and_no_empty_block(name, tile):
    pattern, everything = PATTERNS[name], np.arange(LENGTH)
    for head in range(2):
        want = pattern.allowed(everything, everything, num_keys=LENGTH, head=head).astype(int)
        given = (pattern, 0, LENGTH, LENGTH, 2, tile)
        assert np.array_equal(sum(pairs(one, head, (LENGTH, LENGTH)) for one in query_lists(*given)), want)
        assert np.array_equal(sum(pairs(one, head, (LENGTH, LENGTH)) for one in key_lists(*given)), want.T)


@pytest.mark.parametrize(
    ("pattern", "bound"),
    [
        (Local(True, 512), 1.2),
        (Strided(True, 128), 2.5),
        (Fixed(True, 64, 16), 1.3),
        (Longformer(True, 256, 16), 2.0),
        (BigBird(True, 64, 3), 1.3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_visited_pairs_follow_the_pattern_in_both_directions(pattern, bound):
    n = 4096
    exact = pattern.count(n, n, 1)
    for made in (query_lists, key_lists):
        lists = made(pattern, 0, n, n, 1, (64, 64))
        assert sum(one.visited for one in lists) <= bound * exact
        assert sum(one.visited for one in lists) < 0.2 * n * n


@pytest.mark.parametrize("mask", [None, Causal(), Padding(((3, 70), (0, 0)))], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_fused_tiles_are_the_dense_definition(name, mask):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, LENGTH, 12, generator=generator) for heads in (4, 2, 2))
    q = q[:, :, 31:]
    want = dense(q.double(), k.double(), v.double(), PATTERNS[name], mask=mask)
    exact = sparse_attend(
        q.double(), k.double(), v.double(), PATTERNS[name], mask=mask, implementation="tiled"
    )
    if mask is not None and mask.form().ranges is not None:
        k[0, :, 70:], v[0, :, 70:], k[1], v[1] = (torch.nan,) * 4
    got, ran, _ = sparse_attend(q, k, v, PATTERNS[name], mask=mask)
    assert ran == "fused"
    assert float((got.output - want).abs().max()) < 2e-6
    torch.testing.assert_close(got.lse.double(), exact.result.lse, atol=2e-6, rtol=0)
