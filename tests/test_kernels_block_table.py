"""Tables and blocks kept apart: counts against a dict, copy-on-write, and what a reader may see."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab_kernels import BlockTable, PagedKVCache
from attnlab_kernels.caches import CacheError
from attnlab_kernels.operations.paged.reference import walk

ACTION = st.tuples(
    st.sampled_from(["allocate", "fork", "free", "detach"]), st.integers(0, 3), st.integers(0, 3)
)


@given(actions=st.lists(ACTION, max_size=30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_block_is_free_exactly_while_nobody_holds_it(actions):
    table, model = BlockTable(7, 4, 2, 3), dict[int, list[int]]()
    for action, first, second in actions:
        try:
            if action == "allocate":
                model[first] = model.get(first, []) + table.allocate(second, first)
            elif action == "fork":
                table.fork(first, second)
                model[second] = list(model[first])
            elif action == "free":
                table.free(first)
                del model[first]
            elif table.detach(first, second) is not None:
                model[first][second] = table.get_block_ids(first)[second]
        except CacheError:
            pass  # refused, and the model stays as it was
        counts = Counter(block for blocks in model.values() for block in blocks)
        assert {name: table.get_block_ids(name) for name in model} == model
        assert all(table.references(block) == counts[block] for block in range(7))
        assert table.num_free_blocks == 7 - len(counts)


def test_a_child_that_writes_leaves_its_parent_as_it_was():
    table, cache = BlockTable(5, 4, 2, 3), PagedKVCache(5, 4, 2, 3)
    keys, values = torch.randn(2, 6, 2, 3)
    cache.write_batch(table.allocate(2, "parent"), keys, values)
    table.fork("parent", "child")
    copied = table.detach("child", 1)
    assert copied is not None
    cache.copy_block(*copied)
    cache.write(copied[1], 2, torch.ones(2, 3), torch.ones(2, 3))
    assert torch.equal(cache.read(table.get_block_ids("parent"), 6)[0], keys)
    assert torch.equal(cache.read(table.get_block_ids("child"), 7)[0][:6], keys)
    assert torch.equal(cache(table.get_block_ids("child"), 7)[1][6], torch.ones(2, 3))
    assert table.detach("child", 1) is None
    table.free("parent")
    assert table.num_free_blocks == 3


def test_what_is_written_is_read_in_logical_order_and_attended_to():
    cache = PagedKVCache(9, 4, 2, 3)
    cache.k_cache.fill_(torch.nan)
    cache.v_cache.fill_(torch.nan)
    keys, values = torch.randn(2, 10, 2, 3)
    cache.write_batch([7, 2, 4], keys, values)
    for got, want in zip(cache.read([7, 2, 4], 10), (keys, values), strict=True):
        assert torch.equal(got, want)
    query = torch.randn(4, 10, 3)
    output, _ = walk(query, cache.k_cache, cache.v_cache, [7, 2, 4], 10)
    want = torch.nn.functional.scaled_dot_product_attention(
        query[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], is_causal=True, enable_gqa=True
    )[0]
    torch.testing.assert_close(output, want, atol=1e-6, rtol=0)
    cache.clear_block(2)
    with pytest.raises(CacheError, match="block 2 holds 0 tokens"):
        cache.read([7, 2, 4], 10)


def test_a_pool_that_is_too_small_is_a_runtime_error_and_changes_nothing():
    table = BlockTable(num_blocks=3, block_size=16, num_heads=2, head_dim=8)
    table.allocate(2)
    with pytest.raises(RuntimeError, match="2 blocks are needed and 1 of num_blocks = 3 are free"):
        table.allocate(2)
    assert table.get_block_ids(0) == [0, 1]
    assert table.num_free_blocks == 1


def written() -> PagedKVCache:
    cache = PagedKVCache(5, 4, 2, 3)
    cache.write_batch([0], torch.zeros(3, 2, 3), torch.zeros(3, 2, 3))
    return cache


ROW = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: BlockTable(4, 0, 2, 3), "block_size must be at least 1; got 0"),
        (lambda: BlockTable(0, 4, 2, 3), "num_blocks must be at least 1; got 0"),
        (lambda: BlockTable(4, 4, 2, 3).allocate(-1), "num_blocks must be at least 0; got -1"),
        (
            lambda: BlockTable(4, 4, 2, 3).free("x"),
            r"seq_id must hold blocks \(those that do: none\); got 'x'",
        ),
        (lambda: BlockTable(4, 4, 2, 3).fork("x", "y"), "seq_id must hold blocks"),
        (lambda: BlockTable(4, 4, 2, 3).references(4), r"block_id must be one of 0\.\.3; got 4"),
        (lambda: PagedKVCache(4, 4, 0, 3), "num_heads must be at least 1; got 0"),
        (lambda: written().read([0], 4), "block 0 holds 3 tokens, and seq_len 4 asks for 4"),
        (lambda: written().read([0], 5), "seq_len must be between 0 and the 4 slots of block_ids; got 5"),
        (lambda: written().read([0, 0], 5), r"block ids must be different; got \[0, 0\]"),
        (lambda: written().read([-1], 1), r"block ids must be of 0\.\.4; got -1"),
        (lambda: written().write(0, 4, ROW, ROW), r"slot_idx must be one of 0\.\.3; got 4"),
        (lambda: written().write(0, 0, ROW, ROW.half()), r"value must be \[1, 2, 3\] of torch.float32; got"),
        (lambda: written().write_batch([0], torch.zeros(5, 2, 3), ROW), "keys must fit into the 4 slots"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(CacheError, match=says):
        call()
