"""The pool against a dict, and paged attention against the same attention with its keys in one piece."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab_kernels import MECHANISMS, GroupedQueryAttention, PagedAttention, SlidingWindowAttention
from attnlab_kernels.caches import CacheError
from attnlab_kernels.masks import Causal, Window
from attnlab_kernels.operations.paged.reference import gather, walk
from attnlab_kernels.operations.softmax import eager
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.paged_cache import OutOfBlocks, PagedKV
from attnlab_kernels.paged_sequences import PagedSequences

FORMS = ["walk", "auto", "eager"]


def rows(numbers) -> torch.Tensor:
    """Keys ``[n, 1, 1]`` whose one number is the token."""
    return torch.tensor(list(numbers), dtype=torch.float32)[:, None, None]


def held(pages: PagedKV, seq_id, layer: int = 0) -> list[int]:
    length = pages.length(seq_id, layer)
    if length == 0:
        return []
    keys, values = (gather(pool, pages.table(seq_id), length).flatten() for pool in pages.pools(layer))
    assert torch.equal(values, -keys)
    return [int(number) for number in keys.tolist()]


def put(pages: PagedKV, seq_ids, lists, layer: int = 0, **extra) -> None:
    keys = [rows(numbers) for numbers in lists]
    pages.append(layer, seq_ids, keys, [-key for key in keys], **extra)


def check_counts(pages: PagedKV) -> None:
    references = Counter(block for seq_id in pages.sequences for block in pages.table(seq_id))
    assert all(pages.pool.references(block) == references[block] for block in range(pages.pool.num_blocks))
    assert pages.pool.free_blocks == pages.pool.num_blocks - len(references)
    assert all(len(pages.table(s)) == -(-pages.length(s) // pages.block_size) for s in pages.sequences)


ACTIONS = ["prompt", "append", "append", "both", "fork", "fork", "crop", "free"]
ACTION = st.tuples(
    st.sampled_from(ACTIONS), st.integers(0, 2), st.integers(0, 2), st.integers(0, 7), st.integers(0, 1)
)


def act(pages: PagedKV, model: dict, token: int, action: str, first: int, second: int, count: int, end: int):
    """Do the same to the pool and to lists in a dict; only the pool may run out, and then the dict waits."""
    if action == "prompt" or first not in model:
        if first in model:
            pages.free(first)
            del model[first]
        # few different prompts, so that they meet again
        prompt = [*range(count), 50 + end]
        reused = pages.open(first, prompt)
        try:
            put(pages, [first], [prompt[reused:]])
        except OutOfBlocks:
            pages.free(first)
            raise
        model[first] = prompt
    elif action == "append" or (action == "both" and (first == second or second not in model)):
        put(pages, [first], [range(100 * token, 100 * token + count)])
        model[first] = [*model[first], *range(100 * token, 100 * token + count)]
    elif action == "both":
        put(pages, [first, second], [[100 * token], [100 * token + 1] * count])
        model[first] = [*model[first], 100 * token]
        model[second] = [*model[second], *([100 * token + 1] * count)]
    elif action == "crop":
        length = min(count, len(model[first]))
        pages.crop(first, length)
        model[first] = model[first][:length]
    elif action == "free":
        pages.free(first)
        del model[first]
    elif first != second:
        if second in model:
            pages.free(second)
        pages.fork(first, second)
        model[second] = list(model[first])


@given(st.integers(1, 4), st.integers(6, 20), st.lists(ACTION, min_size=20, max_size=50))
@settings(max_examples=150, deadline=None)
def test_any_history_reads_like_lists_in_a_dict(block_size, num_blocks, actions):
    pages, model = PagedKV(num_blocks, block_size, 1, 1), {}
    for token, action in enumerate(actions, start=1):
        before = {seq_id: pages.table(seq_id) for seq_id in pages.sequences}
        try:
            act(pages, model, token, *action)
        except OutOfBlocks:
            assert all(before[seq_id] == pages.table(seq_id) for seq_id in pages.sequences)
        assert {seq_id: held(pages, seq_id) for seq_id in pages.sequences} == model
        check_counts(pages)


def test_a_fork_shares_every_block_and_copies_only_the_one_that_is_written():
    pages = PagedKV(8, 4, 1, 1)
    pages.open("a")
    put(pages, ["a"], [range(6)])
    pages.fork("a", "b")
    assert pages.table("a") == pages.table("b")
    assert pages.usage()[:3] == (2, 6, 2)
    put(pages, ["b"], [[60]])
    assert pages.table("a")[0] == pages.table("b")[0]
    assert pages.table("a")[1] != pages.table("b")[1]
    put(pages, ["a"], [[70, 71]])
    assert held(pages, "a") == [0, 1, 2, 3, 4, 5, 70, 71]
    assert held(pages, "b") == [0, 1, 2, 3, 4, 5, 60]
    assert pages.usage()[:3] == (3, 5, 1)
    assert pages.usage().filled == pytest.approx(11 / 12)


def test_when_all_who_share_a_block_write_at_once_one_of_them_keeps_it():
    pages = PagedKV(3, 4, 1, 1)
    pages.open(0)
    put(pages, [0], [[1, 2]])
    pages.fork(0, 1)
    pages.fork(0, 2)
    put(pages, [0, 1, 2], [[3], [4], [5]])
    assert [held(pages, s) for s in (0, 1, 2)] == [[1, 2, 3], [1, 2, 4], [1, 2, 5]]
    assert pages.pool.free_blocks == 0


def test_out_of_blocks_changes_nothing():
    pages = PagedKV(3, 2, 1, 1)
    pages.open("a")
    pages.open("b")
    put(pages, ["a"], [[1, 2, 3]])
    pages.fork("a", "c")
    with pytest.raises(OutOfBlocks, match=r"2 blocks are needed and 1 of num_blocks = 3 are free"):
        put(pages, ["a", "b"], [[4], [5]])
    assert (held(pages, "a"), held(pages, "b"), held(pages, "c")) == ([1, 2, 3], [], [1, 2, 3])
    check_counts(pages)
    pages.free("c")
    put(pages, ["a", "b"], [[4], [5]])
    assert (held(pages, "a"), held(pages, "b")) == ([1, 2, 3, 4], [5])


def test_a_second_free_is_an_error():
    pages = PagedKV(2, 2, 1, 1)
    pages.open(0)
    pages.free(0)
    for call in (lambda: pages.free(0), lambda: pages.fork(0, 1), lambda: pages.table(0)):
        with pytest.raises(CacheError, match="seq_id must be an open sequence"):
            call()


def test_an_equal_prompt_shares_its_full_blocks_but_computes_its_last_token():
    pages = PagedKV(16, 4, 1, 1)
    prompt = list(range(10, 22))
    assert pages.open("a", prompt) == 0
    put(pages, ["a"], [prompt])
    assert pages.open("b", prompt) == 8
    assert pages.open("longer", [*prompt, 5]) == 12
    assert pages.open("other end", [*prompt[:7], 0, *prompt[8:]]) == 4
    assert pages.open("other start", [0, *prompt[1:]]) == 0
    assert pages.open("other adapter", prompt, extra="lora") == 0
    assert pages.table("longer") == pages.table("a")
    put(pages, ["b"], [prompt[8:]])
    assert held(pages, "b") == prompt
    assert held(pages, "longer") == prompt


def test_a_known_prompt_outlives_its_sequence_until_the_pool_needs_the_blocks():
    pages = PagedKV(4, 2, 1, 1)
    prompt = [1, 2, 3, 4, 5]
    pages.open("a", prompt)
    put(pages, ["a"], [prompt])
    pages.free("a")
    assert pages.pool.free_blocks == 4
    assert pages.open("b", prompt) == 4
    assert held(pages, "b") == prompt[:4]
    pages.free("b")
    pages.open("c")
    put(pages, ["c"], [range(90, 95)])
    # three blocks were needed: two were empty, and the later of the known ones went first
    assert pages.open("d", prompt) == 2
    assert held(pages, "d") == [1, 2]


def test_generated_tokens_are_shared_too_when_they_are_named():
    pages = PagedKV(8, 2, 1, 1)
    pages.open("a", [1, 2, 3])
    put(pages, ["a"], [[1, 2, 3]])
    put(pages, ["a"], [[4]], tokens=[[4]])
    put(pages, ["a"], [[5]])
    put(pages, ["a"], [[6]], tokens=[[6]])
    assert pages.open("b", [1, 2, 3, 4, 5, 6, 7]) == 4


def test_a_cropped_block_that_is_written_anew_is_no_longer_found():
    pages = PagedKV(8, 4, 1, 1)
    pages.open("a", [1, 2, 3, 4, 5])
    put(pages, ["a"], [[1, 2, 3, 4, 5]])
    pages.crop("a", 2)
    put(pages, ["a"], [[9, 9]])
    assert pages.open("b", [1, 2, 3, 4, 5]) == 0


def test_layers_share_a_table_and_a_copied_block_is_copied_in_all_of_them():
    pages = PagedKV(8, 4, 1, 1, layers=2)
    pages.open("a")
    for layer in (0, 1):
        put(pages, ["a"], [[10 * layer + 1, 10 * layer + 2]], layer)
    pages.fork("a", "b")
    put(pages, ["b"], [[3]], 0)
    assert held(pages, "b", 1) == [11, 12]
    put(pages, ["b"], [[13]], 1)
    assert (held(pages, "b", 0), held(pages, "b", 1)) == ([1, 2, 3], [11, 12, 13])
    assert (held(pages, "a", 0), held(pages, "a", 1)) == ([1, 2], [11, 12])


def make(seed: int = 0, **changes) -> PagedAttention:
    torch.manual_seed(seed)
    arguments = {"num_kv_heads": 2, "block_size": 4, "num_blocks": 40, "use_rotary": True} | changes
    return PagedAttention(d_model=24, num_heads=4, **arguments).eval()


def contiguous(module: PagedAttention) -> GroupedQueryAttention:
    whole = GroupedQueryAttention(
        dim=24, num_heads=4, num_kv_heads=module.num_kv_heads, use_rotary=module.use_rotary
    )
    whole.load_state_dict(module.state_dict(), strict=True)
    return whole.eval()


def hidden(tokens: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, 24, generator=torch.Generator().manual_seed(seed))


def spoil(pages: PagedKV) -> None:
    """NaN in every slot that holds no token."""
    for pool in pages.pools():
        used = torch.zeros(pool.shape[:2], dtype=torch.bool)
        for seq_id in pages.sequences:
            for position in range(pages.length(seq_id)):
                block = pages.table(seq_id)[position // pages.block_size]
                used[block, position % pages.block_size] = True
        pool[~used] = torch.nan


@pytest.mark.parametrize("chunks", [[13, 1, 1, 1, 7], [1] * 9, [23], [2, 21]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_chunking_equals_grouped_query_attention_in_one_pass(form, chunks):
    module, x = make(), hidden(sum(chunks))
    with torch.no_grad():
        expected = contiguous(module)(x)[0]
        parts = []
        for part in x.split(chunks, dim=1):
            parts.append(module(part, implementation=form)[0])
            spoil(module.pages)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-6, rtol=1e-5)


def test_the_call_of_the_catalog_gives_three_and_says_where_the_tokens_lie():
    module = make(num_kv_heads=None)
    output, maps, state = module(hidden(6, batch=1), seq_id=0, use_cache=True)
    assert output.shape == (1, 6, 24)
    assert maps is None
    assert (state["seq_id"], state["seq_len"], state["num_blocks"]) == (0, 6, 2)
    assert state["block_ids"] == module.pages.table(0)
    shape = {"block_size": 4, "num_blocks": 40, "num_kv_heads": None}
    assert state.nbytes() == MECHANISMS["paged"].cache_bytes(4, 4, 6, 6, 1, 4, **shape)


@pytest.mark.parametrize("form", FORMS)
def test_a_ragged_batch_equals_each_sequence_alone(form):
    module, x = make(), hidden(9, batch=3)
    first, second = [9, 2, 5], [1, 4, 0]
    with torch.no_grad():
        x[1, 2:] = torch.nan
        module(x, seq_ids="abc", lengths=first, implementation=form)
        spoil(module.pages)
        y = hidden(4, batch=3, seed=2)
        result = module(y, seq_ids="abc", lengths=second, implementation=form, return_dict=True)
        for row, (prefix, new) in enumerate(zip(first, second, strict=True)):
            alone = torch.cat((x[row, :prefix], y[row, :new]))[None]
            expected = contiguous(module)(alone)[0][0, prefix:]
            torch.testing.assert_close(result.output[row, :new], expected, atol=2e-6, rtol=1e-5)
            assert (result.output[row, new:] == 0).all()
            assert torch.isneginf(result.lse[row, :, new:]).all()


def test_padding_last_says_the_same_as_lengths():
    module, x = make(), hidden(5)
    kept = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    masked = module(x, seq_ids="ab", attention_mask=kept)[0]
    assert torch.equal(masked, module(x, seq_ids="cd", lengths=[5, 3])[0])
    with pytest.raises(ValueError, match="padding last"):
        module(x, seq_ids="ef", attention_mask=kept.flip(1))


def test_a_fork_goes_on_like_a_sequence_of_its_own():
    module, x = make(), hidden(11, batch=1)
    ends = hidden(3, batch=2, seed=5)
    with torch.no_grad():
        module(x, seq_id="parent")
        module.fork_sequence("parent", "child")
        together = module(ends, seq_ids=["parent", "child"])[0]
        whole = contiguous(module)(torch.cat((x.expand(2, -1, -1), ends), dim=1))[0]
    torch.testing.assert_close(together, whole[:, 11:], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["walk", "auto"])
def test_the_map_is_in_logical_order(form):
    module, x = make(), hidden(7, batch=1)
    with torch.no_grad():
        module(hidden(5, batch=1, seed=9), seq_id="other")
        module(x[:, :3], seq_id="mine")
        module(hidden(5, batch=1, seed=9), seq_id="other")
        maps = module(x[:, 3:], seq_id="mine", implementation=form, output_attentions=True)[1]
        expected = contiguous(module)(x, output_attentions=True)[1]
    first, second = module.pages.table("mine")
    assert second != first + 1
    torch.testing.assert_close(maps, expected[:, :, 3:], atol=2e-6, rtol=0)


def test_out_of_blocks_leaves_the_module_as_it_was():
    module, x = make(num_blocks=3), hidden(8)
    module(x[:1, :3], seq_id="a")
    with pytest.raises(OutOfBlocks):
        module(x, seq_ids=["a", "new"])
    assert module.pages.sequences == ("a",)
    assert module.pages.length("a") == 3
    with torch.no_grad():
        again = module(x[:1, 3:], seq_id="a")[0]
        torch.testing.assert_close(again, contiguous(module)(x[:1])[0][:, 3:], atol=2e-6, rtol=1e-5)


def test_a_call_that_fails_after_it_has_written_leaves_the_sequences_as_they_were():
    module, x = make(), hidden(9, batch=1)
    module(x[:, :5], seq_id="a")
    for seq_id in ("a", "new"):
        with pytest.raises(Unsupported):
            module(x[:, 5:], seq_id=seq_id, implementation="sdpa_cudnn")
    assert module.pages.sequences == ("a",)
    check_counts(module.pages)
    with torch.no_grad():
        again = module(x[:, 5:], seq_id="a")[0]
        torch.testing.assert_close(again, contiguous(module)(x)[0][:, 5:], atol=2e-6, rtol=1e-5)


def test_a_cache_whose_sequence_has_ended_does_not_begin_a_new_one():
    module, x = make(), hidden(3, batch=1)
    cache = module(x, seq_id="a")[2]
    module.free_sequence("a")
    with pytest.raises(CacheError, match="seq_id must be an open sequence"):
        module(x, past_key_value=cache)
    assert module.pages.sequences == ()


def test_one_layer_can_be_cropped_without_the_others():
    pages = PagedKV(4, 2, 1, 1, layers=2)
    pages.open("a")
    put(pages, ["a"], [[1, 2, 3]], 0)
    put(pages, ["a"], [[4, 5, 6]], 1)
    pages.crop("a", 1, layer=1)
    assert (held(pages, "a", 0), held(pages, "a", 1)) == ([1, 2, 3], [4])
    pages.crop("a", 0, layer=0)
    assert len(pages.table("a")) == 1


def test_without_a_cache_nothing_is_kept_and_gradients_flow():
    module, x = make(), hidden(5).requires_grad_()
    output = module(x, use_cache=False)[0]
    torch.testing.assert_close(output, contiguous(module)(x)[0], atol=2e-6, rtol=1e-5)
    output.sum().backward()
    assert x.grad is not None
    assert module.pages.sequences == ()
    assert not module(x)[0].grad_fn


def test_another_module_can_keep_its_tokens_in_a_pool():
    module, x = make(), hidden(9)
    whole = SlidingWindowAttention(dim=24, num_heads=4, num_kv_heads=2, window_size=5, use_rotary=True).eval()
    whole.load_state_dict(module.state_dict(), strict=True)
    pages = PagedKV(20, 4, 2, 6)
    cache = PagedSequences.fresh(pages, 2)
    with torch.no_grad():
        parts = [whole(part, past_key_value=cache, use_cache=True)[0] for part in x.split([5, 1, 3], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole(x)[0], atol=2e-6, rtol=1e-5)
        cache.crop(4)
        copy = cache.clone()
        copy.reorder(torch.tensor([1, 1]))
        swapped = torch.cat((x[1:, :4].expand(2, -1, -1), x[:, 4:]), dim=1)
        output = whole(x[:, 4:], past_key_value=copy)[0]
        torch.testing.assert_close(output, whole(swapped)[0][:, 4:], atol=2e-6, rtol=1e-5)
    assert cache.seq_len == 4
    copy.free()
    cache.free()
    assert pages.pool.free_blocks == 20


def test_walking_equals_the_paged_attention_of_torch():
    from torch.nn.attention.experimental import _paged_attention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    generator = torch.Generator().manual_seed(4)
    lengths, size, num_blocks = [37, 5, 48], 16, 13
    key, value = (torch.randn(3, 2, 48, 8, generator=generator) for _ in range(2))
    query = torch.randn(3, 4, 48, 8, generator=generator)
    theirs = _paged_attention.PagedAttention(num_blocks, size, max_batch_size=3, device="cpu")
    theirs.empty_pages = torch.randperm(num_blocks, generator=generator).tolist()
    # theirs multiplies the weight 0 with what lies in a slot, so its garbage must be finite
    pools = [torch.full((1, 2, num_blocks * size, 8), 1e3) for _ in range(2)]
    batch = torch.arange(3)
    for row in batch:
        theirs.reserve(row, torch.tensor(48))
    theirs.assign(batch, torch.arange(48).expand(3, -1), key, value, *pools)
    causal = create_block_mask(lambda b, h, q, k: q >= k, 3, None, 48, 48, device="cpu", BLOCK_SIZE=size)
    mask = theirs.convert_logical_block_mask(causal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that flex is slow without compiling
        expected = flex_attention(query, pools[0], pools[1], block_mask=mask, enable_gqa=True)
    assert isinstance(expected, torch.Tensor)
    key_pool, value_pool = (pool[0].unflatten(1, (num_blocks, size)).permute(1, 2, 0, 3) for pool in pools)
    for row, length in enumerate(lengths):
        table = theirs.page_table[row, : -(-length // size)].tolist()
        output, _ = walk(query[row, :, :length], key_pool, value_pool, table, length)
        torch.testing.assert_close(output, expected[row, :, :length], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", [Causal(), Window(2), Window(0), Window(3, 1)], ids=lambda m: m.describe())
@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 11), (5, 11), (11, 11)])
def test_walking_equals_the_reference_on_gathered_keys(mask, count, length):
    generator = torch.Generator().manual_seed(2)
    pool = torch.randn(9, 4, 2, 5, generator=generator, dtype=torch.float64)
    table = [6, 1, 8]
    pool[[0, 2, 3, 4, 5, 7]] = torch.nan
    if length == 11:
        pool[8, 3] = torch.nan
    query = 20 * torch.randn(6, count, 5, generator=generator, dtype=torch.float64)
    output, lse = walk(query, pool, pool.flip(-1), table, length, mask=mask)
    key, value = gather(pool, table, length)[None], gather(pool.flip(-1), table, length)[None]
    expected, expected_lse = eager.run(query[None], key, value, mask=mask, scale=5**-0.5)
    torch.testing.assert_close(output, expected[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, expected_lse[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seq_ids": [0]}, "seq_ids must name a sequence for each of the 2 rows"),
        ({"seq_id": 0}, "seq_ids must name a sequence for each of the 2 rows"),
        ({"seq_ids": [0, 0]}, "seq_ids must be different"),
        ({"seq_id": 0, "seq_ids": [0, 1]}, "give one of them"),
        ({"lengths": [1]}, "lengths must be 2 whole numbers of 0..3"),
        ({"lengths": [1, 4]}, "lengths must be 2 whole numbers of 0..3"),
        ({"causal": False}, "causal must be True"),
        (
            {"past_key_value": (torch.zeros(1), torch.zeros(1))},
            "must be PagedSequences of this module's pool",
        ),
        ({"use_cache": False, "implementation": "walk"}, "needs use_cache=True"),
    ],
    ids=str,
)
def test_a_call_that_does_not_fit_is_refused_and_opens_nothing(call, message):
    module = make()
    with pytest.raises(ValueError, match=message):
        module(hidden(3), **call)
    assert module.pages.sequences == ()


@pytest.mark.parametrize("name", ["block_size", "num_blocks"])
def test_a_pool_has_at_least_one_block_of_one_token(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        make(**{name: 0})
