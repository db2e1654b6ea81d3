"""Laws of our Triton kernels beyond one call of attend. Run by ``test_kernels_triton`` under TRITON_INTERPRET=1.

Without it they are skipped here; on a CUDA device ``test_kernels_gpu`` holds the same kernels to their references.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Documents, Full, Mask, Padding, Window
from attnlab_kernels.operations.paged.api import attend_paged
from attnlab_kernels.operations.paged.write import write_cache
from attnlab_kernels.operations.softmax import triton_forward
from attnlab_kernels.operations.softmax.api import attend
from attnlab_kernels.operations.softmax.packed import attend_packed

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interpreted kernels need a process with TRITON_INTERPRET=1", allow_module_level=True)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN."""
    plain = torch.empty

    def empty(*sizes, **given):
        made = plain(*sizes, **given)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


def made(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def modifiers(heads: int, dtype=torch.float32) -> dict:
    return {
        "softcap": 1.9,
        "alibi": torch.linspace(0.05, 0.4, heads).to(dtype),
        "sinks": torch.linspace(-1, 3, heads).to(dtype),
    }


def worst(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None
    assert want is not None
    both = torch.isneginf(got.double()) & torch.isneginf(want.double())
    return (got.double() - want.double()).masked_fill(both, 0).abs().max().item()


def gradients(name, shape, mask, dtype, given):
    batch, heads, kv_heads, n, m, dim, value_dim = shape
    q, k, v = (
        made(batch, heads, n, dim),
        made(batch, kv_heads, m, dim, seed=1),
        made(batch, kv_heads, m, value_dim),
    )
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
    given = {
        key: value.detach().to(dtype).clone() if isinstance(value, Tensor) else value
        for key, value in given.items()
    }
    learned = [given[key].requires_grad_() for key in ("sinks",) if key in given]
    result = attend(*leaves, mask=mask, implementation=name, **given)
    (result.output * torch.linspace(-1, 1, value_dim, dtype=dtype)).sum().backward()
    return [leaf.grad for leaf in (*leaves, *learned) if leaf.grad is not None]


@pytest.mark.parametrize(
    ("dtype", "shape", "mask", "given"),
    [
        (torch.float32, (1, 4, 2, 21, 37, 16, 16), Causal(), {}),
        (torch.float16, (1, 2, 1, 21, 37, 16, 16), Causal(), {}),
        (torch.float32, (2, 2, 1, 41, 33, 13, 20), Causal() & Padding(((3, 30), (0, 0))), {}),
        (torch.float32, (1, 1, 1, 70, 70, 16, 16), Window(9, 3), {}),
        (torch.float32, (1, 4, 2, 20, 45, 24, 24), Causal(), modifiers(4)),
        (torch.float16, (1, 2, 1, 20, 33, 16, 16), Full(), modifiers(2) | {"bias": made(2, 20, 33, seed=5)}),
    ],
    ids=["grouped", "half", "dead rows", "window", "modified", "half with a bias"],
)
def test_gradients_stay_within_twice_the_error_of_the_same_dtype(dtype, shape, mask, given):
    want = gradients("eager", shape, mask, torch.float64, given)
    fair = gradients("eager", shape, mask, dtype, given)
    got = gradients("triton", shape, mask, dtype, given)
    assert len(got) == (4 if "sinks" in given else 3)
    for mine, base, exact in zip(got, fair, want, strict=True):
        assert mine.isfinite().all()
        # the reference keeps float32 inside; the kernel rounds the weights and their gradients to half
        step = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert worst(mine, exact) <= 2 * worst(base, exact) + step + 5e-6


LENGTHS = (5, 1, 17, 9)
RAGGED = Causal() & Documents((LENGTHS, (32,), (3, 29))) & Padding(((0, 32), (2, 30), (5, 9)))


@pytest.mark.parametrize(
    ("mask", "queries", "given"),
    [
        (Documents(LENGTHS), 32, {}),
        (Causal() & Documents(LENGTHS), 40, {}),
        (Window(3) & Documents(LENGTHS), 11, {}),
        (RAGGED, 32, {}),
        (RAGGED, 11, modifiers(4)),
    ],
    ids=["whole", "queries before the keys", "window", "ragged", "ragged and modified"],
)
def test_documents_have_the_values_and_gradients_of_the_reference(mask, queries, given):
    shape = (3, 4, 2, queries, 32, 16, 16)
    want = gradients("eager", shape, mask, torch.float64, given)
    fair = gradients("eager", shape, mask, torch.float32, given)
    got = gradients("triton", shape, mask, torch.float32, given)
    for mine, base, exact in zip(got, fair, want, strict=True):
        assert worst(mine, exact) <= 2 * worst(base, exact) + 5e-6
    parts = [made(3, heads, n, 16, seed=heads) for heads, n in ((4, queries), (2, 32), (2, 32))]
    given = {key: value.float() if isinstance(value, Tensor) else value for key, value in given.items()}
    result = attend(*(part.float() for part in parts), mask=mask, implementation="triton", **given)
    exact = attend(*parts, mask=mask, implementation="eager", **given)
    assert worst(result.output, exact.output) < 4e-6
    assert worst(result.lse, exact.lse) < 4e-6


@pytest.mark.parametrize("heads", [2, 8], ids=["blocks", "packed and split"])
def test_no_tile_outside_a_document_is_visited(heads):
    """Documents as long as two blocks: whatever lies in another one would show as NaN."""
    n = 64 if heads == 2 else 3
    q, k, v = (made(1, h, size, 16, dtype=torch.float32) for h, size in ((heads, n), (2, 256), (2, 256)))
    mask = Causal() & Documents((64, 64, 64, 64))
    want = attend(q, k[:, :, 192:], v[:, :, 192:], mask=Causal(), implementation="triton")
    k[:, :, :192] = v[:, :, :192] = torch.nan
    leaves = [part.requires_grad_() for part in (q, k, v)]
    result = attend(*leaves, mask=mask, implementation="triton")
    assert worst(result.output, want.output) < 2e-6
    grads = torch.autograd.grad(result.output.sum(), leaves)
    assert grads[0].isfinite().all()
    assert not grads[1][:, :, :192].any()


def test_two_backward_passes_give_the_same_bits():
    shape = (1, 4, 2, 20, 33, 16, 16)
    first, second = (gradients("triton", shape, Causal(), torch.float32, {}) for _ in range(2))
    assert all(torch.equal(mine, twice) for mine, twice in zip(first, second, strict=True))


@pytest.mark.parametrize("given", [{}, {"window": True}, {"modified": True}], ids=str)
def test_shares_of_the_keys_join_to_the_whole(given):
    q, k, v = made(1, 8, 1, 16, dtype=torch.float32), made(1, 2, 700, 16, seed=1), made(1, 2, 700, 12, seed=2)
    k, v = k.float(), v.float()
    extra = modifiers(8) if given.get("modified") else {}
    mask: Mask = Window(400) if given.get("window") else Causal()
    size = triton_forward.Size(batch=1, num_queries=1, num_keys=700, kv_heads=2)
    cut = triton_forward.plan(q, size, 12, bool(extra))
    assert cut.splits > 1
    assert cut.pack == 4
    mine = attend(q, k, v, mask=mask, implementation="triton", **extra)
    want = attend(q.double(), k.double(), v.double(), mask=mask, implementation="eager", **extra)
    assert mine.lse is not None
    assert want.lse is not None
    assert worst(mine.output, want.output) < 2e-6
    assert worst(mine.lse, want.lse) < 2e-6


def test_more_shares_than_live_keys_leave_no_trace():
    q, k = made(2, 4, 3, 16, dtype=torch.float32), made(2, 2, 600, 16, seed=1, dtype=torch.float32)
    mask = Causal() & Padding(((590, 600), (0, 0)))
    mine = attend(q, k, k, mask=mask, implementation="triton")
    want = attend(q, k, k, mask=mask, implementation="eager")
    assert mine.lse is not None
    assert want.lse is not None
    assert worst(mine.output, want.output) < 2e-6
    assert worst(mine.lse, want.lse) < 2e-6


@pytest.mark.parametrize(
    ("mask", "modified"), [(Full(), False), (Causal(), True), (Window(9), False)], ids=str
)
def test_packed_sequences_are_each_alone(mask, modified):
    starts, key_starts = torch.tensor([0, 5, 5, 42, 43]), torch.tensor([0, 9, 12, 40, 80])
    q, k, v = (made(n, h, 16, seed=n, dtype=torch.float32) for n, h in ((43, 4), (80, 2), (80, 2)))
    given = modifiers(4) if modified else {}
    mine = attend_packed(q, k, v, starts, key_starts, mask=mask, implementation="triton", **given)
    want = attend_packed(q, k, v, starts, key_starts, mask=mask, implementation="eager", **given)
    assert mine.lse is not None
    assert want.lse is not None
    assert mine.lse.shape == (4, 43)
    assert worst(mine.output, want.output) < 3e-6
    assert worst(mine.lse, want.lse) < 3e-6


def pools(block: int, lengths: list[int], kv_heads: int, dim: int, dtype):
    """Pools of NaN with the sequences' tokens in scattered blocks, tables that point nowhere past their end."""
    blocks = [-(-length // block) for length in lengths]
    order = np.random.default_rng(0).permutation(sum(blocks) + 3)
    tables = torch.full((len(lengths), max(blocks) + 2), 10**6, dtype=torch.int32)
    key_pool, value_pool = (
        torch.full((sum(blocks) + 3, block, kv_heads, d), torch.nan, dtype=dtype) for d in (dim, dim - 4)
    )
    first = 0
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        mine = torch.from_numpy(order[first : first + count].astype(np.int32))
        tables[row, :count] = mine
        for seed, pool in enumerate((key_pool, value_pool)):
            tokens = made(length, kv_heads, pool.shape[-1], seed=10 * row + seed, dtype=dtype)
            for place in range(length):
                pool[mine[place // block], place % block] = tokens[place]
        first += count
    return key_pool, value_pool, tables


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 5), (torch.float16, 16)], ids=str)
def test_decoding_reads_the_pool_through_its_tables_and_nothing_else(dtype, block):
    lengths = [1, 40, 301, 17]
    key_pool, value_pool, tables = pools(block, lengths, 2, 20, dtype)
    q = made(4, 8, 20, dtype=dtype)
    held = torch.tensor(lengths, dtype=torch.int32)
    mine = attend_paged(q, key_pool, value_pool, tables, held, implementation="triton")
    want = attend_paged(q, key_pool, value_pool, tables, held, implementation="eager")
    assert mine.lse is not None
    assert want.lse is not None
    tolerance = 3e-6 if dtype == torch.float32 else 2e-3
    assert worst(mine.output, want.output) < tolerance
    assert worst(mine.lse, want.lse) < tolerance


@pytest.mark.parametrize("given", [{}, {"mask": Window(11)}, {"modified": True}], ids=str)
def test_prompts_and_decoding_steps_share_one_paged_call(given):
    lengths = [60, 9, 35, 20]
    key_pool, value_pool, tables = pools(8, lengths, 2, 16, torch.float32)
    starts = torch.tensor([0, 37, 46, 47, 47], dtype=torch.int32)
    q = made(47, 4, 16, dtype=torch.float32)
    call = {"query_starts": starts, "mask": given.get("mask")} | (modifiers(4) if "modified" in given else {})
    held = torch.tensor(lengths, dtype=torch.int32)
    mine = attend_paged(q, key_pool, value_pool, tables, held, implementation="triton", **call)
    want = attend_paged(q, key_pool, value_pool, tables, held, implementation="eager", **call)
    assert mine.lse is not None
    assert want.lse is not None
    assert worst(mine.output, want.output) < 3e-6
    assert worst(mine.lse, want.lse) < 3e-6


def test_new_tokens_go_to_their_slots_and_minus_one_nowhere():
    keys, values = made(5, 2, 20, dtype=torch.float32), made(5, 2, 13, seed=1, dtype=torch.float32)
    slots = torch.tensor([17, -1, 0, 23, 8])
    both = []
    for name in ("triton", "eager"):
        key_pool, value_pool = torch.zeros(6, 4, 2, 20), torch.zeros(6, 4, 2, 13)
        assert write_cache(keys, values, key_pool, value_pool, slots, implementation=name) == name
        both.append((key_pool, value_pool))
    for mine, theirs in zip(*both, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(both[0][0].flatten(0, 1)[23], keys[3])
    assert int(both[0][0].flatten(0, 1).any(-1).any(-1).sum()) == 4


def test_keys_that_hold_their_values_are_written_alone():
    latents, slots = made(5, 1, 20, dtype=torch.float32), torch.tensor([17, 3, 0, 23, 8])
    pool = torch.zeros(6, 4, 1, 20)
    write_cache(latents, latents[..., :0], pool, pool[..., :0], slots, implementation="triton")
    assert torch.equal(pool.flatten(0, 1)[slots], latents)
    assert int(pool.count_nonzero()) == int(latents.count_nonzero())


@pytest.mark.parametrize(
    ("mask", "queries", "keys"), [(Full(), 37, 70), (Causal(), 70, 70), (Causal(), 40, 33)]
)
def test_the_hopper_kernel_equals_the_reference(mask, queries, keys):
    q = made(2, 4, queries, 64, dtype=torch.float16)
    k, v = (made(2, 2, keys, 64, seed=seed, dtype=torch.float16) for seed in (1, 2))
    mine = attend(q, k, v, mask=mask, implementation="triton_hopper")
    want = attend(q.double(), k.double(), v.double(), mask=mask, implementation="eager")
    fair = attend(q, k, v, mask=mask, implementation="sdpa_flash")
    assert mine.lse is not None
    assert want.lse is not None
    assert worst(mine.output, want.output) <= 2 * worst(fair.output, want.output) + 2e-4
    assert worst(mine.lse, want.lse) < 1e-5


def visited(monkeypatch, mask: Mask, queries: int, keys: int) -> int:
    """Tiles that one head's forward multiplies: each is two matrix products."""
    from triton.runtime.interpreter import InterpreterBuilder

    products, inner = [0], InterpreterBuilder.create_dot

    def counting(self, *arguments):
        products[0] += 1
        return inner(self, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    q, k = made(1, 1, queries, 16, dtype=torch.float32), made(1, 1, keys, 16, dtype=torch.float32)
    attend(q, k, k, mask=mask, implementation="triton")
    return products[0] // 2


@pytest.mark.parametrize(
    "mask", [Full(), Causal(), Window(20), Window(5, 9), Padding(((40, 90),)), Padding(((0, 0),))], ids=str
)
def test_tiles_without_an_allowed_pair_are_never_visited(mask, monkeypatch):
    n, side = 160, 32
    seen = visited(monkeypatch, mask, n, n)
    least = 0
    for start in range(0, n, side):
        low, high = mask.key_range(start, start + side, num_queries=n, num_keys=n)
        least += -(-(high - low) // side)
    # a row block has at most one tile more than its keys need, where the masked and the whole tiles meet
    assert least <= seen <= least + n // side
    if isinstance(mask, Full):
        assert seen == (n // side) ** 2
