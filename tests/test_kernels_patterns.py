"""Sparse patterns by themselves: what they cost, and how BigBird's random blocks fall."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from attnlab_kernels.patterns import BigBird, Fixed, Local, LocalGlobal, Longformer, Strided


@pytest.mark.parametrize("causal", [True, False])
def test_visited_pairs_follow_the_pattern(causal):
    linear = [
        Local(causal, 256),
        LocalGlobal(causal, 256, 4),
        Longformer(causal, 256, 4),
        BigBird(causal, 64, 3),
    ]
    for pattern in linear:
        assert pattern.visited(8192, 8192) < 2.15 * pattern.visited(4096, 4096)
        assert pattern.visited(8192, 8192) < 2 * pattern.count(8192, 8192)
    # a global token costs its own row, not the rows beside it
    short = LocalGlobal(causal, 2, 1), Local(causal, 2)
    rows = [pattern.visited(8192, 8192) for pattern in short]
    assert rows[0] - rows[1] < 2.1 * 8192
    # the stride is the square root: n^1.5, so four times the tokens are eight times the pairs, not sixteen
    for make in (lambda size: Strided(causal, size), lambda size: Fixed(causal, size)):
        assert make(128).visited(16384, 16384) < 8.8 * make(64).visited(4096, 4096)
        assert make(128).visited(16384, 16384) < 16384**2 / 20


def test_random_blocks_are_distinct_new_and_differ_by_head_layer_and_seed():
    pattern = BigBird(False, 8, 3)
    for block in range(1, 29):
        shared, drawn = pattern.blocks(block, 240, 5)
        for row in drawn:
            assert len({*row.tolist(), *shared.tolist()}) == len(row) + len(shared)
            assert len(row) == 3
    first = pattern.blocks(10, 240, 5)[1].tolist()
    assert len({tuple(row) for row in first}) > 1
    for other in (BigBird(False, 8, 3, layer=1), BigBird(False, 8, 3, seed=1)):
        assert other.blocks(10, 240, 5)[1].tolist() != first


def test_random_blocks_are_drawn_evenly():
    pattern = BigBird(True, 1, 2)
    drawn = np.concatenate([BigBird(True, 1, 2, seed=s).blocks(12, 13, 50)[1] for s in range(40)])
    counts = np.bincount(drawn.ravel(), minlength=12)
    others = counts[1:11]
    assert pattern.blocks(12, 13)[0].tolist() == [0, 11, 12]
    assert counts.sum() == others.sum() == 4000
    # 400 expected of each; five standard deviations
    assert abs(others - 400).max() < 5 * 360**0.5


def test_causal_random_blocks_do_not_depend_on_what_comes_after():
    pattern = BigBird(True, 8, 3)
    for block in range(12):
        short, long = pattern.blocks(block, (block + 1) * 8, 2), pattern.blocks(block, 4000, 6)
        assert short[0].tolist() == long[0].tolist()
        assert short[1].tolist() == long[1][:2].tolist()


def test_patterns_and_map_load_no_torch():
    code = (
        "import sys, attnlab_kernels.patterns, attnlab_kernels.sparse_map; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
