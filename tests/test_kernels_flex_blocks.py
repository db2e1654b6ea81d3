"""FlexAttention's block lists: a GPU kernel visits these and nothing else, so they must be exact without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.operations.softmax.flex import BLOCK, block_mask

MASKS: list[Mask] = [
    Causal(),
    Window(0),
    Window(127),
    Window(300),
    Window(50, 60),
    Causal() & Padding(((130, 400), (0, 0))),
    Window(200) & Padding(((5, 256), (384, 700))),
]


def listed(counts: torch.Tensor, indices: torch.Tensor) -> np.ndarray:
    """The lists of one kind as bool ``[batch, query blocks, key blocks]``."""
    dense = np.zeros(indices[:, 0].shape, bool)
    for batch, row in np.ndindex(dense.shape[:2]):
        dense[batch, row, indices[batch, 0, row, : counts[batch, 0, row]].tolist()] = True
    return dense


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(700, 700), (1, 640), (300, 701), (500, 300), (128, 256)]
)
def test_lists_hold_each_touched_block_once_and_call_whole_what_is_whole(mask, num_queries, num_keys):
    blocks = block_mask(mask, 2, num_queries, num_keys, torch.device("cpu"))
    assert blocks is not None
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_indices is not None
    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    whole = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & whole).any()
    for batch in range(len(partial)):
        allowed = mask.allowed(
            np.arange(num_queries),
            np.arange(num_keys),
            num_queries=num_queries,
            num_keys=num_keys,
            batch=batch,
        )
        for row, col in np.ndindex(partial.shape[1:]):
            tile = allowed[row * BLOCK : (row + 1) * BLOCK, col * BLOCK : (col + 1) * BLOCK]
            assert (partial | whole)[batch, row, col] == tile.any()
            # a block at the end of the keys may be called partial, never the other way round
            assert not whole[batch, row, col] or tile.all()
            if tile.all() and tile.shape[1] == BLOCK:
                assert whole[batch, row, col]


def test_the_mask_function_is_the_mask():
    mask = Window(20, 3) & Padding(((5, 90), (30, 31)))
    blocks = block_mask(mask, 2, 100, 130, torch.device("cpu"))
    assert blocks is not None
    rows, cols = torch.arange(100)[:, None], torch.arange(130)[None, :]
    for batch in range(2):
        got = blocks.mask_mod(torch.tensor(batch), torch.tensor(0), rows, cols)
        want = mask.allowed(np.arange(100), np.arange(130), num_queries=100, num_keys=130, batch=batch)
        np.testing.assert_array_equal(got.numpy(), want)


def test_a_full_mask_needs_no_lists():
    assert block_mask(Full(), 1, 10, 10, torch.device("cpu")) is None


def test_lists_of_a_long_window_are_made_without_the_square_mask():
    blocks = block_mask(Window(255), 1, 200_000, 200_000, torch.device("cpu"))
    assert blocks is not None
    assert int(blocks.kv_num_blocks.max()) <= 3
