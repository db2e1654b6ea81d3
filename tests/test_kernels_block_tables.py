"""Block tables: who holds what, what is shared, and that everything comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab_kernels.block_tables import BlockTables
from attnlab_kernels.caches import CacheError

STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=40)


@given(st.integers(1, 12), st.integers(1, 5), st.booleans(), STEPS)
@settings(max_examples=150, deadline=None)
def test_every_token_has_a_slot_of_its_own_and_no_room_is_lost(blocks, size, shares, steps):
    prompts = {s: [7] * 11 + [s] * 9 for s in range(6)} if shares else None
    tables = BlockTables(blocks, size, prompts)
    length: dict[int, int] = {}
    for seq_id, asked in steps:
        free = tables.free_tokens
        if seq_id not in length and asked:
            reused = tables.admit(seq_id, min(asked, 20))
            if reused is None:
                assert tables.free_tokens == free
                assert tables.blocks_for(min(asked, 20)) * size > free
            else:
                assert reused < min(asked, 20)
                length[seq_id] = min(asked, 20)
                tables.computed(seq_id, length[seq_id])
        elif seq_id in length and asked > length[seq_id]:
            grown = tables.grow(seq_id, asked)
            assert grown or tables.free_tokens == free
            length[seq_id] = asked if grown else length[seq_id]
        elif seq_id in length:
            tables.release(seq_id)
            del length[seq_id]
        owners: dict[int, tuple[int, int]] = {}
        for name, tokens in length.items():
            for place, slot in enumerate(tables.slots(name, 0, tokens)):
                assert 0 <= slot < tables.total_tokens
                other, where = owners.setdefault(slot, (name, place))
                # a slot that two sequences hold is the same place of the same prompt
                assert (other, where) == (name, place) or (shares and place == where < 20)
        held = sum(length.values()) - tables.twice_tokens
        assert len(owners) == held <= tables.reserved_tokens <= tables.total_tokens
        assert tables.free_tokens + tables.reserved_tokens == tables.total_tokens == blocks * size
    for name in length:
        tables.release(name)
    assert tables.free_tokens == tables.total_tokens


def test_full_blocks_of_an_equal_prompt_are_shared_but_never_its_last_token():
    prompts = {"a": [1, 2, 3, 4, 5, 6], "b": [1, 2, 3, 4, 5, 6], "c": [1, 2, 3, 4], "d": [9, 2, 3, 4, 5, 6]}
    tables = BlockTables(16, 2, prompts)
    assert tables.admit("a", 6) == 0
    # nothing is shared before it is computed
    assert tables.admit("b", 6) == 0
    tables.release("b")
    tables.computed("a", 5)
    assert tables.admit("b", 6) == 4
    assert tables.table("b")[:2] == tables.table("a")[:2]
    assert tables.table("b")[2] != tables.table("a")[2]
    assert tables.admit("c", 4) == 2
    assert tables.admit("d", 6) == 0
    assert tables.twice_tokens == 6


def test_a_contiguous_cache_is_one_block_a_sequence():
    tables = BlockTables(3, 100)
    assert [tables.admit(name, 7) for name in range(3)] == [0, 0, 0]
    assert tables.admit("late", 1) is None
    assert tables.grow(0, 100)
    assert not tables.grow(0, 101)
    assert tables.reserved_tokens == 300


def test_mistakes_are_told():
    tables = BlockTables(2, 2)
    with pytest.raises(CacheError, match="block_size must be at least 1; got 0"):
        BlockTables(2, 0)
    tables.admit("a", 1)
    with pytest.raises(CacheError, match="holds blocks already"):
        tables.admit("a", 1)
    tables.release("a")
    with pytest.raises(CacheError, match="holds no blocks"):
        tables.release("a")
