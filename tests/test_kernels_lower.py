"""What a mask becomes for kernels that know only full and causal: blocks, each pair in one of them, and small tiles."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from attnlab_kernels.masks import Causal, Documents, Full, Mask, Padding, Window
from attnlab_kernels.operations.softmax import lower, sdpa
from attnlab_kernels.operations.softmax.api import attend
from attnlab_kernels.operations.softmax.support import Modifiers

MASKS = [
    Full(),
    Causal(),
    Window(0),
    Window(5),
    Window(3, 4),
    Causal() & Padding(((2, 9), (0, 5))),
    Window(4, 2) & Padding(((3, 8), (6, 6))),
    Documents([4, 1, 6]),
    Causal() & Documents([[4, 1, 6], [2, 9, 3]]),
    Window(2) & Documents([5, 5]) & Padding(((1, 9),)),
]


def pairs_of(block: lower.Block, mask: Mask, num_queries: int, num_keys: int) -> np.ndarray:
    """The pairs ``[rows, keys]`` that a block computes."""
    rows, keys = block.rows.stop - block.rows.start, block.keys.stop - block.keys.start
    if block.kind == "masked":
        offset = num_keys - num_queries
        added = lower.band_tile(mask, block.rows, block.keys, offset, torch.float32, torch.device("cpu"))
        assert set(added.unique().tolist()) <= {0.0, -np.inf}
        return (added == 0).numpy()
    if block.kind == "causal":
        assert rows == keys
    everything = np.ones((rows, keys), bool)
    return np.tril(everything) if block.kind == "causal" else everything


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@pytest.mark.parametrize(("has_bias", "merge"), [(False, True), (False, False), (True, True)])
def test_every_pair_of_the_mask_is_in_one_block_and_no_other_pair_is(mask, has_bias, merge):
    for num_queries, num_keys in product((1, 4, 11, 17), (1, 7, 11, 13)):
        size = {"num_queries": num_queries, "num_keys": num_keys}
        blocks = lower.plan(mask, **size, batch_size=2, has_bias=has_bias, merge=merge)
        covered = np.zeros((2, num_queries, num_keys), int)
        for block in blocks:
            covered[block.batch, block.rows, block.keys] += pairs_of(block, mask, num_queries, num_keys)
        for batch in range(2):
            allowed = mask.allowed(np.arange(num_queries), np.arange(num_keys), **size, batch=batch)
            np.testing.assert_array_equal(covered[batch], allowed)


@pytest.mark.parametrize("limit", [0, 2**17], ids=["in parts", "small tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mask",
    [Causal(), Causal() & Padding(((2, 30), (5, 9))), Causal() & Documents([9, 30])],
    ids=lambda mask: mask.describe(),
)
def test_a_chunk_is_the_same_in_parts_and_in_one_small_tile(mask, dtype, limit, monkeypatch):
    monkeypatch.setattr(sdpa, "SMALL_TILE", limit)
    torch.manual_seed(0)
    q = torch.randn(2, 4, 13, 8, dtype=dtype)
    k, v = (torch.randn(2, 2, 39, 8, dtype=dtype) for _ in range(2))
    kinds = []

    def listened(*call):
        kinds.append("causal" if call[3] else "full" if call[4] is None else "masked")
        return sdpa.FLASH.call(*call)

    found = sdpa.run(sdpa.Kernel("sdpa_flash", listened), q, k, v, mask=mask, scale=0.4)
    assert ("masked" in kinds) == (limit > 0)
    want = attend(*(part.double() for part in (q, k, v)), mask=mask, scale=0.4, implementation="eager")
    atol = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0].double(), want.output, atol=atol, rtol=0)
    torch.testing.assert_close(found[1].double(), want.lse, atol=atol, rtol=0)


def test_a_sequence_without_a_live_row_is_zeros():
    q = torch.randn(1, 2, 5, 4)
    output, lse = sdpa.run_flash(q, q, q, mask=Causal() & Padding(((0, 0),)), scale=0.5)
    assert not output.any()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("lengths", [[8, 8, 8], [24], [8, 8, 8, 8], [9, 8, 7]], ids=str)
@pytest.mark.parametrize("mask", [Full(), Causal()], ids=lambda mask: mask.describe())
def test_documents_of_one_length_are_one_call_and_the_same_as_one_after_the_other(mask, lengths):
    """The last document goes on to the last key, so that a fourth of eight holds nothing of 24 tokens."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 24, 6)
    k, v = (torch.randn(1, 2, 24, 6) for _ in range(2))
    calls = []

    def listened(*call):
        calls.append(len(call[0]))
        return sdpa.FLASH.call(*call)

    packed, sinks = mask & Documents(lengths), torch.randn(4)
    modifiers = Modifiers(sinks=sinks)
    found = sdpa.run(
        sdpa.Kernel("sdpa_flash", listened), q, k, v, mask=packed, scale=0.4, modifiers=modifiers
    )
    assert calls == ([1, 1, 1] if lengths == [9, 8, 7] else [1] if lengths == [24] else [3])
    wide = (part.double() for part in (q, k, v))
    want = attend(*wide, mask=packed, scale=0.4, sinks=sinks, implementation="eager")
    torch.testing.assert_close(found[0].double(), want.output, atol=2e-6, rtol=0)
    torch.testing.assert_close(found[1].double(), want.lse, atol=2e-6, rtol=0)
