"""A prompt in chunks equals the prompt in one pass, whatever is wrapped; and no prompt stalls a decoding step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnlab_kernels import (
    ChunkedPrefill,
    ChunkedPrefillScheduler,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    PagedAttention,
    SlidingWindowAttention,
)
from attnlab_kernels.masks import Padding, Window
from attnlab_kernels.positions import rope_tables

LATENT: dict[str, Any] = {"kv_lora_rank": 11, "qk_rope_head_dim": 6, "qk_nope_head_dim": 5, "v_head_dim": 7}
WRAPPED = {
    "multi_head": lambda: MultiHeadAttention(24, num_heads=4, dropout=0, causal=True, use_rotary=True),
    "grouped_query": lambda: GroupedQueryAttention(24, num_heads=4, num_kv_heads=2, use_rotary=True),
    "sliding_window": lambda: SlidingWindowAttention(24, num_heads=4, window_size=5, use_rotary=True),
    "latent": lambda: MultiHeadLatentAttention(24, num_heads=4, **LATENT),
    "paged": lambda: PagedAttention(24, num_heads=4, block_size=4, num_blocks=20, use_rotary=True),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return WRAPPED[name]().eval()


def hidden(tokens: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, 24, generator=torch.Generator().manual_seed(seed))


def one_pass(module: nn.Module, x: torch.Tensor, **options):
    return module(x, use_cache=False, return_dict=True, **options)


def same(left, right) -> None:
    torch.testing.assert_close(left, right, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 17, 500])
def test_any_chunk_size_equals_one_pass_and_decoding_goes_on_from_there(name, size):
    module, x = make(name), hidden(19)
    prefill = ChunkedPrefill(chunk_size=size, attention_module=module)
    with torch.no_grad():
        whole = one_pass(module, x)
        result = prefill.prefill(x[:, :17], return_dict=True)
        steps = [prefill.decode_step(x[:, i : i + 1])[0] for i in (17, 18)]
    same(torch.cat([result.output, *steps], dim=1), whole.output)
    same(result.lse, whole.lse[..., :17])
    assert result.aux["chunks"] == [(start, min(start + size, 17)) for start in range(0, 17, size)]
    assert prefill.cache.seq_len == 19


@pytest.mark.parametrize("name", WRAPPED)
def test_the_rows_of_all_chunks_are_the_map(name):
    module, x = make(name), hidden(13)
    with torch.no_grad():
        result = ChunkedPrefill(5, module)(x, output_attentions=True, return_dict=True)
        same(result.attentions, one_pass(module, x, output_attentions=True).attentions)


@pytest.mark.parametrize("name", ["multi_head", "grouped_query", "latent", "paged"])
@pytest.mark.parametrize("overlap", [1, 4])
def test_an_overlap_computes_again_and_changes_nothing(name, overlap):
    module, x = make(name), hidden(18)
    prefill = ChunkedPrefill(5, module, overlap_chunks=overlap)
    with torch.no_grad():
        output, cache = prefill(x[:, :17])
        same(output, one_pass(module, x[:, :17]).output)
        assert cache.seq_len == 17
        same(prefill.decode_step(x[:, 17:])[0], one_pass(module, x).output[:, 17:])


@pytest.mark.parametrize("chunk_size", [2, 5])
@pytest.mark.parametrize("kind", ["keys", "pairs", "heads", "added", "window", "padding"])
def test_a_mask_of_the_prompt_is_cut_where_the_chunks_are(kind, chunk_size):
    module, x = make("grouped_query"), hidden(13, batch=chunk_size)
    generator = torch.Generator().manual_seed(3)
    keys = torch.ones(chunk_size, 13, dtype=torch.bool)
    keys[0, 9:] = False
    keys[1, :2] = False
    mask = {
        "keys": keys,
        "pairs": torch.rand(13, 13, generator=generator) < 0.7,
        "heads": torch.rand(chunk_size, 4, 13, 13, generator=generator) < 0.7,
        "added": torch.randn(1, 4, 13, 13, generator=generator),
        "window": Window(3),
        "padding": Padding(((0, 9), *[(2, 13)] * (chunk_size - 1))),
    }[kind]
    with torch.no_grad():
        output = ChunkedPrefill(chunk_size, module)(x, attention_mask=mask, use_cache=False)
        same(output, one_pass(module, x, attention_mask=mask).output)


def test_given_positions_are_cut_too():
    module, x = make("grouped_query"), hidden(11)
    positions = torch.arange(40, 51)
    with torch.no_grad():
        chunked = ChunkedPrefill(4, module)
        same(chunked(x, position_ids=positions)[0], one_pass(module, x, position_ids=positions).output)
        tables = rope_tables(positions, 6)
        same(chunked(x, position_embeddings=tables)[0], one_pass(module, x, position_ids=positions).output)


def test_a_ragged_batch_equals_each_prompt_alone():
    module, x = make("grouped_query"), hidden(11, batch=3)
    kept = torch.arange(11) < torch.tensor([[11], [4], [7]])
    with torch.no_grad():
        together = ChunkedPrefill(3, module)(x, attention_mask=kept)[0]
        for row, length in enumerate((11, 4, 7)):
            same(together[row, :length], one_pass(module, x[row : row + 1, :length]).output[0])


@pytest.mark.parametrize("name", ["multi_head", "latent", "sliding_window"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_those_of_one_pass(name, checkpointing):
    module, x = make(name).double().train(), hidden(9).double().requires_grad_()
    chunked = ChunkedPrefill(4, module, use_gradient_checkpointing=checkpointing).train()
    wanted = [x, *module.parameters()]
    expected = torch.autograd.grad(one_pass(module, x).output.square().sum(), wanted)
    output, cache = chunked(x)
    assert cache.seq_len == 9
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = torch.autograd.grad(output.square().sum(), wanted)
    assert len(calls) == (3 if checkpointing else 0)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_a_new_prompt_begins_anew_and_clearing_gives_the_blocks_back():
    module = make("paged")
    prefill = ChunkedPrefill(3, module)
    with torch.no_grad():
        first = prefill(hidden(8))[0]
        assert prefill.get_cache_size() == 4 * 4 * 2 * 24 * 4 + 4 * 4
        same(prefill(hidden(8))[0], first)
    prefill.clear_cache()
    assert prefill.get_cache_size() == 0
    assert module.pages.pool.free_blocks == 20
    prefill(hidden(8), use_cache=False)
    assert module.pages.pool.free_blocks == 20
    with pytest.raises(ValueError, match="blocks are needed"):
        prefill(hidden(60))
    assert module.pages.pool.free_blocks == 20


def test_what_does_not_fit_is_refused():
    module, x = make("grouped_query"), hidden(5)
    for message, call in {
        "attention_module must be set": lambda: ChunkedPrefill()(x),
        "chunk_size must be at least 1": lambda: ChunkedPrefill(0, module),
        "overlap_chunks must be at least 0 tokens and below": lambda: ChunkedPrefill(4, overlap_chunks=4),
        "below chunk_size = 2": lambda: ChunkedPrefill(4, module, overlap_chunks=3)(x, chunk_size=2),
        "at most max_seq_len = 4": lambda: ChunkedPrefill(4, module, max_seq_len=4)(x),
        "causal must be True": lambda: ChunkedPrefill(4, module)(x, causal=False),
        "attention_module must be causal": lambda: ChunkedPrefill(4, MultiHeadAttention(24, 4)),
        "call prefill first": lambda: ChunkedPrefill(4, module).decode_step(x[:, :1]),
        "keeps no gradient": lambda: ChunkedPrefill(2, make("paged"), use_gradient_checkpointing=True)(x),
        "attention_mask must end in": lambda: ChunkedPrefill(4, module)(x, attention_mask=torch.ones(2, 4)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    full = ChunkedPrefill(4, module, max_seq_len=5)
    full.prefill(x)
    with pytest.raises(ValueError, match="at most max_seq_len = 5"):
        full.decode_step(x[:, :1])
    with pytest.raises(ValueError, match=r"hidden_states must be \[batch, 1, dim\]"):
        full.decode_step(x)


@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 20), st.integers(0, 6)), max_size=12),
)
@settings(max_examples=80, deadline=None)
def test_every_token_runs_once_in_order_and_no_decoding_sequence_waits(chunk, budget, sequences, arrivals):
    scheduler = ChunkedPrefillScheduler(chunk, budget, sequences)
    wanted, seen = {}, defaultdict(int)
    late = sorted(enumerate(arrivals), key=lambda pair: pair[1][0])
    step = 0
    while late or scheduler.has_pending():
        while late and late[0][1][0] <= step:
            seq_id, (_, prompt, new) = late.pop(0)
            scheduler.add_sequence(seq_id, prompt, new)
            wanted[seq_id] = prompt, prompt + new
        decoding = {s for s, (prompt, total) in wanted.items() if prompt <= seen[s] < total}
        begun = {s for s, (prompt, _) in wanted.items() if 0 < seen[s] < prompt}
        batch = scheduler.get_next_batch()
        assert sum(work.tokens for work in batch) <= budget
        assert len({work.seq_id for work in batch}) == len(batch) <= sequences
        # decodes, then prompts that have begun, then new ones
        ranks = [0 if w.kind == "decode" else 1 if w.seq_id in begun else 2 for w in batch]
        assert ranks == sorted(ranks)
        assert {work.seq_id for work in batch if work.kind == "decode"} == decoding
        for work in batch:
            assert work.start == seen[work.seq_id]
            assert 1 <= work.tokens <= (chunk if work.kind == "prefill" else 1)
            assert (work.kind == "decode") == (work.start >= wanted[work.seq_id][0])
            seen[work.seq_id] += work.tokens
        assert batch or not scheduler.has_pending()
        step += 1
    assert {s: seen[s] for s in wanted} == {s: total for s, (_, total) in wanted.items()}


def test_a_batch_is_filled_to_its_budget():
    scheduler = ChunkedPrefillScheduler(chunk_size=8, max_batch_tokens=10, max_batch_sequences=4)
    scheduler.add_sequence("a", 3, 5)
    scheduler.add_sequence("b", 20)
    assert scheduler.get_next_batch() == [("a", "prefill", 0, 3), ("b", "prefill", 0, 7)]
    scheduler.add_sequence("c", 4)
    assert scheduler.get_next_batch() == [
        ("a", "decode", 3, 1),
        ("b", "prefill", 7, 8),
        ("c", "prefill", 0, 1),
    ]


def test_a_sequence_that_is_ended_early_runs_no_more():
    scheduler = ChunkedPrefillScheduler(4, 8, 2)
    scheduler.add_sequence("a", 2, 50)
    scheduler.get_next_batch()
    scheduler.finish("a")
    assert not scheduler.has_pending()
    assert scheduler.get_next_batch() == []
    with pytest.raises(ValueError, match="must be a sequence that waits or runs"):
        scheduler.finish("a")
    scheduler.add_sequence("a", 1)
    with pytest.raises(ValueError, match="seq_id must be new"):
        scheduler.add_sequence("a", 1)
    for counts, message in {(0, 0): "prompt_tokens", (1, -1): "new_tokens"}.items():
        with pytest.raises(ValueError, match=message):
            scheduler.add_sequence("b", *counts)
    with pytest.raises(ValueError, match="max_batch_tokens must be at least 1"):
        ChunkedPrefillScheduler(4, 0)


class Positions:
    """What a sequence holds, as an oracle of one token a block: room for ``total`` tokens and nothing shared."""

    def __init__(self, total):
        self.total, self.held = total, {}

    def free(self):
        return self.total - sum(self.held.values())

    def admit(self, seq_id, tokens):
        assert seq_id not in self.held
        if tokens > self.free():
            return None
        self.held[seq_id] = tokens
        return 0

    def grow(self, seq_id, tokens):
        if tokens - self.held[seq_id] > self.free():
            return False
        self.held[seq_id] = max(tokens, self.held[seq_id])
        return True

    def release(self, seq_id):
        del self.held[seq_id]


@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 20),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_preempted_sequences_are_computed_again_and_all_end_within_the_room(
    chunk, budget, sequences, spare, arrivals
):
    room = Positions(max(prompt + new for _, prompt, new in arrivals) + spare)
    scheduler = ChunkedPrefillScheduler(chunk, budget, sequences, room=room)
    total: dict[Hashable, int] = {s: prompt + new for s, (_, prompt, new) in enumerate(arrivals)}
    late = sorted(enumerate(arrivals), key=lambda pair: pair[1][0])
    reached, begun, step = defaultdict(int), [], 0
    while late or scheduler.has_pending():
        while late and late[0][1][0] <= step:
            seq_id, (_, prompt, new) = late.pop(0)
            scheduler.add_sequence(seq_id, prompt, new)
        batch = scheduler.get_next_batch()
        assert sum(work.tokens for work in batch) <= budget
        assert room.free() >= 0
        for seq_id in scheduler.preempted:
            assert scheduler.waiting.index(seq_id) < len(scheduler.preempted)
            reached[seq_id] = 0
        for work in batch:
            assert work.start == reached[work.seq_id]
            reached[work.seq_id] += work.tokens
            assert room.held[work.seq_id] >= reached[work.seq_id]
            if work.seq_id not in begun:
                begun.append(work.seq_id)
            if reached[work.seq_id] == total[work.seq_id]:
                room.release(work.seq_id)
        assert batch or not scheduler.has_pending()
        step += 1
    assert dict(reached) == total
    assert room.held == {}
    # nobody overtakes: prompts begin as they came
    assert begun == [s for s, _ in sorted(enumerate(arrivals), key=lambda pair: pair[1][0])]


def test_the_sequence_that_began_last_gives_way():
    room = Positions(9)
    scheduler = ChunkedPrefillScheduler(8, 16, 4, room=room)
    scheduler.add_sequence("old", 4, 4)
    scheduler.add_sequence("new", 4, 2)
    assert len(scheduler.get_next_batch()) == 2
    # one position is left for two sequences that decode
    assert scheduler.get_next_batch() == [("old", "decode", 4, 1)]
    assert scheduler.preempted == ["new"]
    assert scheduler.waiting == ("new",)
    assert [scheduler.get_next_batch() for _ in range(3)] == [
        [("old", "decode", place, 1)] for place in (5, 6, 7)
    ]
    room.release("old")
    # its first token was known: five are computed again
    assert scheduler.get_next_batch() == [("new", "prefill", 0, 5)]
    assert scheduler.get_next_batch() == [("new", "decode", 5, 1)]
    assert not scheduler.has_pending()
