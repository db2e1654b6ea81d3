"""Tilings of sparse patterns for the CPU: each pair once, views that name the right tokens, and the cheapest cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from attnlab_kernels.masks import Full, Mask, Padding, Window
from attnlab_kernels.operations.sparse import fused, tilings
from attnlab_kernels.operations.sparse.dense import dense
from attnlab_kernels.operations.sparse.tilings import Group, Run, Tiling, choose_tiling, tiling_cost
from attnlab_kernels.patterns import BigBird, Dense, Fixed, Local, LocalGlobal, Longformer, Pattern, Strided

PATTERNS: dict[str, Pattern] = {
    "local": Local(True, 7),
    "local, both sides": Local(False, 40),
    "strided": Strided(True, 16),
    "strided, both sides": Strided(False, 11),
    "fixed": Fixed(True, 64, 3),
    "local and global": LocalGlobal(False, 9, 5),
    "longformer": Longformer(True, 30, 20),
    "bigbird": BigBird(True, 16, 2, layer=4),
    "bigbird, both sides": BigBird(False, 32, 1),
    "dense": Dense(True),
}
BANDS = [(None, None), (5, 0), (200, None)]
LENGTH = 331


def pairs(tiling: Tiling, head: int, shape: tuple[int, int]) -> np.ndarray:
    """How often a tiling has each (query, key)."""
    found = np.zeros(shape, int)
    for group in (group for groups in tiling for group in groups):
        tiles, height = group.rows.shape
        keys = group.keys[min(head, len(group.keys) - 1)]
        size = (tiles, group.keys.shape[0], height, keys.shape[1])
        keep = torch.ones(size, dtype=torch.bool) if group.keep is None else group.keep
        keep = keep[:, min(head, keep.shape[1] - 1)].expand(tiles, -1, -1)
        for row, column, kept in zip(group.rows, keys, keep, strict=True):
            np.add.at(found, (row.numpy()[:, None], column.numpy()[None]), kept.numpy())
    return found


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_tiling_has_each_pair_of_the_pattern_once(name, band):
    rows, columns = np.arange(30, LENGTH), np.arange(LENGTH)
    distance = columns - rows[:, None]
    left, right = (LENGTH if side is None else side for side in band)
    tiling = choose_tiling(PATTERNS[name], 30, LENGTH, LENGTH, 3, *band)
    for head in range(3):
        want = PATTERNS[name].allowed(rows, columns, num_keys=LENGTH, head=head)
        want = want & (distance >= -left) & (distance <= right)
        assert np.array_equal(pairs(tiling, head, want.shape), want.astype(int))


def numbers(run: Run, shape: torch.Size) -> torch.Tensor:
    tile, place = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    return run.first + tile * run.across + place * run.along


@pytest.mark.parametrize("name", PATTERNS)
def test_a_view_is_taken_of_the_tokens_that_the_group_names(name):
    groups = [group for groups in choose_tiling(PATTERNS[name], 0, LENGTH, LENGTH, 3) for group in groups]
    for group in groups:
        if group.row_run is not None:
            assert torch.equal(numbers(group.row_run, group.rows.shape), group.rows)
        if group.key_run is not None:
            assert torch.equal(numbers(group.key_run, group.keys.shape[1:]), group.keys[0])
        if group.causal:
            assert group.keep is not None
            assert torch.equal(group.keep[0, 0], torch.ones(group.keep.shape[2:]).tril().bool())


def test_windows_and_strides_copy_no_key():
    for pattern in (Local(True, 256), Strided(True, 64)):
        tiling = choose_tiling(pattern, 0, 4096, 4096, 8)
        assert all(group.key_run is not None for groups in tiling for group in groups)


@pytest.mark.parametrize("mask", [Full(), Window(9), Window(40) & Padding(((3, 300), (100, 200)))], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_fused_tiles_in_batches_are_the_dense_definition(name, mask: Mask, monkeypatch):
    monkeypatch.setattr(fused, "COPIED", 2**14)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, LENGTH, heads, 8, generator=generator).transpose(1, 2) for heads in (4, 2, 2))
    q = q[:, :, 30:]
    want = dense(q.double(), k.double(), v.double(), PATTERNS[name], mask=mask)
    if mask.form().ranges is not None:
        k[0, :, 300:], v[1, :, :100] = torch.nan, torch.inf
    output, lse = fused.run(q, k, v, PATTERNS[name], mask=mask)
    assert float((output - want).abs().max()) < 2e-6
    assert torch.equal(torch.isneginf(lse), (want == 0).all(-1))


def test_a_pair_is_cheaper_in_a_larger_tile():
    for sizes in ([(side, 64) for side in (8, 16, 64, 256)], [(64, side) for side in (8, 63, 64, 65, 512)]):
        costs = [tilings.pair_cost(*size) for size in sizes]
        assert all(less > more > 1 for less, more in pairwise(costs))


@pytest.mark.parametrize(
    ("pattern", "length", "heights"),
    [
        (Local(True, 256), 4096, {64}),
        (BigBird(True, 64, 3), 1024, {64}),
        (Local(False, 300), 320, {320}),
        (BigBird(False, 32, 3), 256, {256}),
        (Dense(True), 512, {256}),
    ],
    ids=str,
)
def test_what_is_nearly_full_or_short_runs_as_large_tiles(pattern, length, heights):
    tiling = choose_tiling(pattern, 0, length, length, 8)
    assert {group.rows.shape[1] for groups in tiling for group in groups} == heights


def test_larger_tiles_are_taken_only_where_their_cost_is_lower(monkeypatch):
    pattern, given = Local(False, 300), (0, 320, 320, 8)
    chosen = choose_tiling(pattern, *given)
    monkeypatch.setattr(tilings, "MOST_PAIRS", 0)
    choose_tiling.cache_clear()
    own = choose_tiling(pattern, *given)
    choose_tiling.cache_clear()
    assert tilings.describe(chosen).startswith("one tile with a dense mask")
    assert tilings.describe(own) == "5 tiles of up to 64 queries"
    assert tiling_cost(chosen, 8) < tiling_cost(own, 8)


def test_a_copied_key_and_a_call_have_a_price():
    rows, keys = torch.arange(64)[None], torch.arange(64)[None, None]
    view = Group(rows, keys, None, None, False, Run(0, 0, 1), Run(0, 0, 1))
    copied = view._replace(key_run=None)
    assert tiling_cost(((view,),), 8) < tiling_cost(((copied,),), 8)
    assert tiling_cost(((view,),), 8) < tiling_cost(((view,),), 1)
