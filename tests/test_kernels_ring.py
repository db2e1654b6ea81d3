"""Ring attention: full SDPA forward and backward, real gloo rings of two and three ranks, and the laws of layouts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from attnlab_kernels import (
    BlockwiseRingAttention,
    Causal,
    GroupedQueryAttention,
    Padding,
    RingAttention,
    Unsupported,
    Window,
    observing,
)
from attnlab_kernels.operations.ring.attention import ring_attend
from attnlab_kernels.operations.ring.layout import (
    LAYOUTS,
    RingError,
    imbalance,
    owners,
    places,
    shard_positions,
    work,
)
from attnlab_kernels.operations.ring.link import Ring
from attnlab_kernels.operations.ring.shards import join, shard, split
from attnlab_kernels.operations.ring.tile import merge

DIM, HEADS, KV_HEADS, BATCH = 12, 6, 3, 2
SIZES = [(1, 1), (7, 1), (7, 2), (13, 3), (13, 4), (24, 3), (5, 4)]


def module(**given: Any) -> RingAttention:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_kv_heads": KV_HEADS} | given
    return RingAttention(DIM, HEADS, **settings).double()


def tokens(length: int, seed: int = 1) -> Tensor:
    return torch.randn(BATCH, length, DIM, dtype=torch.float64, generator=torch.manual_seed(seed))


def full(attention: RingAttention, x: Tensor, source: Tensor, allowed: Tensor) -> Tensor:
    """The oracle: SDPA with a dense mask over the whole sequence."""

    def heads(projection: torch.nn.Linear, part: Tensor) -> Tensor:
        return projection(part).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    result = functional.scaled_dot_product_attention(
        heads(attention.q_proj, x),
        heads(attention.k_proj, source),
        heads(attention.v_proj, source),
        attn_mask=allowed,
        scale=attention.scale,
        enable_gqa=True,
    )
    return attention.o_proj(result.transpose(1, 2).flatten(2))


def lower_right(num_queries: int, num_keys: int) -> Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


def gradients(output: Tensor, attention: torch.nn.Module, *inputs: Tensor) -> list[Tensor]:
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.manual_seed(2))
    return list(torch.autograd.grad((output * weights).sum(), [*inputs, *attention.parameters()]))


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# layouts


@pytest.mark.parametrize(("length", "size"), SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_has_one_owner_and_every_rank_as_many_slots(layout, length, size):
    table = shard_positions(layout, length, size)
    assert table.shape[0] == size
    assert sorted(table[table >= 0].tolist()) == list(range(length))
    assert table.size - length < (2 * size if layout == "zigzag" else size)
    for rank, row in enumerate(table):
        assert (np.diff(row[row >= 0]) > 0).all()
        assert (owners(layout, length, size)[row[row >= 0]] == rank).all()
    assert (table.ravel()[places(layout, length, size)] == np.arange(length)).all()


def test_layouts_are_the_ones_their_papers_draw():
    assert shard_positions("contiguous", 8, 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shard_positions("striped", 8, 2).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert shard_positions("zigzag", 8, 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize(("layout", "expected"), [("contiguous", 1.74), ("striped", 1.05), ("zigzag", 1.00)])
def test_causal_load_of_four_ranks_is_balanced_as_published(layout, expected):
    assert round(imbalance(work(layout, 64, 64, 4)), 2) == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_counts_every_allowed_pair_where_it_meets(layout, causal):
    queries, keys, size = 10, 13, 3
    allowed = lower_right(queries, keys).numpy() if causal else np.ones((queries, keys), bool)
    expected = np.zeros((size, size), int)
    for i, j in zip(*np.nonzero(allowed), strict=True):
        rank, source = owners(layout, queries, size)[i], owners(layout, keys, size)[j]
        expected[rank, (rank - source) % size] += 1
    assert (work(layout, queries, keys, size, causal=causal) == expected).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_joined_are_the_tensor(layout):
    x = tokens(11)
    parts, positions = split(x, size=3, layout=layout, dim=1)
    assert torch.equal(join(parts, length=11, layout=layout, dim=1), x)
    assert not parts.movedim(2, 1)[positions < 0].any()
    part, own = shard(x, 2, size=3, layout=layout)
    assert torch.equal(part, parts[2])
    assert torch.equal(own, positions[2])


# merge


def test_merging_dead_rows_gives_zero_and_minus_infinity_and_no_nan():
    dead, alive = torch.zeros(4, 3), torch.randn(4, 3)
    nothing, some = torch.full((4,), -torch.inf), torch.randn(4)
    output, lse = merge(dead, nothing, dead, nothing)
    assert not output.any()
    assert torch.isneginf(lse).all()
    for one in (merge(dead, nothing, alive, some), merge(alive, some, dead, nothing)):
        torch.testing.assert_close(one, (alive, some))


def test_merging_parts_equals_attending_to_their_union():
    scores, values = torch.randn(5, 9, dtype=torch.float64) * 40, torch.randn(9, 4, dtype=torch.float64)
    parts = [
        (scores[:, part].softmax(-1) @ values[part], scores[:, part].logsumexp(-1))
        for part in (slice(0, 2), slice(2, 9))
    ]
    assert_same(merge(*parts[0], *parts[1]), (scores.softmax(-1) @ values, scores.logsumexp(-1)))


# one process


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "size"), SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_simulated_ring_equals_full_attention_forward_and_backward(layout, length, size, causal):
    attention = module(ring_size=size, layout=layout, causal=causal)
    x = tokens(length).requires_grad_()
    allowed = lower_right(length, length) if causal else torch.ones(length, length, dtype=torch.bool)
    output, expected = attention(x), full(attention, x, x, allowed)
    assert_same(output, expected)
    assert_same(gradients(output, attention, x), gradients(expected, attention, x))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(5, 11), (11, 5)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_lengths_align_at_the_newest_token(layout, queries, keys, overlap):
    attention = BlockwiseRingAttention(
        DIM, HEADS, 2, ring_size=3, layout=layout, overlap_comm_compute=overlap
    ).double()
    x, source = tokens(queries).requires_grad_(), tokens(keys, seed=3).requires_grad_()
    output = attention(x, source)
    expected = full(attention, x, source, lower_right(queries, keys))
    assert_same(output, expected)
    assert_same(gradients(output, attention, x, source), gradients(expected, attention, x, source))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_finite_differences(layout):
    table = torch.from_numpy(shard_positions(layout, 5, 2))
    generator = torch.manual_seed(4)
    q, k, v = (
        torch.randn(2, 1, heads, table.shape[1], 2, dtype=torch.float64, generator=generator)
        for heads in (2, 1, 1)
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attend(q, k, v, table, table, ring=Ring(2), scale=0.7).output

    assert torch.autograd.gradcheck(run, [part.requires_grad_() for part in (q, k, v)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_in_a_slot_without_a_token_changes_nothing_forward_or_backward(layout):
    table = torch.from_numpy(shard_positions(layout, 7, 3))
    empty = (table < 0)[:, None, None, :, None]
    generator = torch.manual_seed(6)
    shape = (3, 1, 2, table.shape[1], 2)
    q, k, v, weights = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(4))
    found = []
    for filling in (0.0, torch.nan):
        parts = [torch.where(empty, filling, part).requires_grad_() for part in (q, k, v)]
        output = ring_attend(parts[0], parts[1], parts[2], table, table, ring=Ring(3), scale=0.7).output
        output.backward(torch.where(empty, filling, weights))
        found.append([output.detach(), *(part.grad for part in parts)])
        assert not output.masked_select(empty).any()
    assert empty.any()
    assert_same(*found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_rotated_by_their_place_in_the_text_not_in_the_shard(layout):
    attention = module(ring_size=3, layout=layout, use_rotary=True, causal=True, head_dim=4)
    plain = GroupedQueryAttention(
        dim=DIM, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=4, use_rotary=True
    ).double()
    plain.load_state_dict(attention.state_dict())
    x = tokens(10)
    torch.testing.assert_close(attention(x), plain(x)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_that_are_all_in_the_future_are_skipped_and_no_other(layout):
    result = module(ring_size=4, layout=layout)(tokens(16), return_dict=True)
    pairs = work(layout, 16, 16, 4)
    assert len(result.aux["tiles"]) == 16
    for tile in result.aux["tiles"]:
        assert tile.step == (tile.rank - tile.source) % 4
        assert tile.skipped == (pairs[tile.rank, tile.step] == 0)
    assert sum(tile.skipped for tile in result.aux["tiles"]) == (6 if layout == "contiguous" else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_that_do_not_exist_are_never_read_and_dead_rows_are_zero(layout):
    attention = module(ring_size=3, layout=layout)
    generator = torch.manual_seed(5)
    q, k, v = (
        torch.randn(BATCH, heads, 10, 2, dtype=torch.float64, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    keep = torch.ones(BATCH, 10, dtype=torch.bool)
    keep[0, [0, 1, 4]] = False
    keep[1] = False
    clean = [part.clone().requires_grad_() for part in (q, k, v)]
    expected = functional.scaled_dot_product_attention(
        *clean, attn_mask=lower_right(10, 10) & keep[:, None, None], scale=attention.scale, enable_gqa=True
    )
    k, v = (torch.where(keep[:, None, :, None], part, torch.nan) for part in (k, v))
    dirty = [part.requires_grad_() for part in (q, k, v)]
    result = attention(*dirty, attention_mask=keep, return_dict=True)
    assert_same(result.output, attention.o_proj(expected.transpose(1, 2).flatten(2)))
    assert torch.isneginf(result.lse[1]).all()
    assert torch.isneginf(result.lse[0, :, :2]).all()
    weights = torch.randn(result.output.shape, dtype=torch.float64)
    target = attention.o_proj(expected.transpose(1, 2).flatten(2))
    found, wanted = (
        torch.autograd.grad((output * weights).sum(), inputs)
        for output, inputs in ((result.output, dirty), (target, clean))
    )
    assert_same(found, wanted)


def test_half_types_keep_their_type_and_accumulate_in_float32():
    attention = RingAttention(DIM, HEADS, ring_size=4, layout="zigzag")
    x = tokens(33).float()
    exact = attention(x)
    output = attention.bfloat16()(x.bfloat16(), return_dict=True)
    assert output.output.dtype == torch.bfloat16
    assert output.lse.dtype == torch.float32
    torch.testing.assert_close(output.output.float(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_effective_map_times_values_is_the_output_and_its_steps_are_those_that_ran(layout):
    attention = module(ring_size=3, layout=layout)
    attention.o_proj = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    x, mask = tokens(11), Padding(((2, 11), (0, 9)))
    result = attention(x, attention_mask=mask, return_dict=True)
    values = attention.v_proj(x).unflatten(-1, (-1, 2)).transpose(1, 2)
    for head, batch in product((0, 5), (0, 1)):
        shown = attention.effective_map(x, head=head, batch=batch, attention_mask=mask)
        everything = shown.tile(slice(None), slice(None))
        found = result.output.unflatten(-1, (-1, 2))[batch, :, head].detach().numpy()
        assert np.abs(everything @ values[batch, head // 2].detach().numpy() - found).max() < 1e-6
        step = shown.step(slice(None), slice(None))
        assert ((step >= 0) == (everything > 0)).all()
        ran = {(t.rank, t.source): t.step for t in result.aux["tiles"] if not t.skipped}
        for i, j in zip(*np.nonzero(everything), strict=True):
            assert step[i, j] == ran[int(shown.query_owner[i]), int(shown.key_owner[j])]
        live = np.bincount(shown.query_owner, shown.row_sums()) / np.bincount(shown.query_owner)
        np.testing.assert_allclose(shown.mass().sum(axis=1), live, atol=1e-6)


def test_observers_see_the_call_over_the_whole_sequence():
    calls = []
    with observing(calls.append):
        module(ring_size=3, layout="striped")(tokens(8), attention_mask=Padding(((1, 8),)))
    (call,) = calls
    assert call.implementation == "ring"
    assert call.mask == (Causal() & Padding(((1, 8),)))
    assert call.q.shape == (BATCH, HEADS, 8, 2)


def test_the_output_alone_comes_back_from_the_documented_call():
    output = RingAttention(dim=DIM, num_heads=HEADS, ring_size=4)(torch.randn(1, 9, DIM))
    assert isinstance(output, Tensor)
    assert output.shape == (1, 9, DIM)


def test_what_does_not_fit_is_refused_by_name():
    x = tokens(6)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"layout": "spiral"}, "layout"),
        ({"ring_size": 0}, "ring_size"),
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"implementation": "eager"}, "implementation"),
    ]
    for settings, name in refused:
        with pytest.raises(ValueError, match=name):
            module(**settings)
    with pytest.raises(RingError, match="ring_size must be at most the 6 tokens; got 7"):
        module(ring_size=7)(x)
    with pytest.raises(ValueError, match="without ring_group"):
        module()(x, positions=torch.arange(6))
    with pytest.raises(ValueError, match="already projected"):
        module()(torch.zeros(1, HEADS, 6, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="causal or padding"):
        module()(x, attention_mask=Window(2))
    with pytest.raises(Unsupported, match="drops no probabilities"):
        module(dropout=0.1).train()(x)


def test_who_owns_what_is_known_without_torch():
    code = "import sys, attnlab_kernels.operations.ring.layout, attnlab_kernels.ring_map; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


# real process groups

GROUPS = {"two": (1, 2), "three": (0, 1, 2)}
CASES: dict[str, dict[str, Any]] = {
    f"{group}-{layout}-{length}": {"group": group, "layout": layout, "length": length}
    for group, layout, length in product(GROUPS, LAYOUTS, (12, 17))
} | {
    "full": {"group": "three", "layout": "zigzag", "length": 13, "causal": False},
    "blocks": {"group": "three", "layout": "striped", "length": 20, "block_size": 2},
    "after": {"group": "two", "layout": "zigzag", "length": 9, "overlap_comm_compute": False},
    "padded": {"group": "three", "layout": "striped", "length": 14, "pad": (3, 12)},
    "rotary": {"group": "three", "layout": "zigzag", "length": 14, "use_rotary": True},
    "more keys": {"group": "three", "layout": "zigzag", "length": 6, "keys": 12},
    "fewer keys": {"group": "two", "layout": "striped", "length": 10, "keys": 6},
    "uneven keys": {"group": "two", "layout": "contiguous", "length": 7, "keys": 9},
}


def case_settings(case: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in case.items() if name not in ("group", "length", "pad", "keys")}


def take_part(case: dict[str, Any], group: dist.ProcessGroup) -> dict[str, np.ndarray]:
    """One rank's forward and backward: output, gradients of its tokens and of the weights, and positions."""
    attention, length = module(**case_settings(case)), case["length"]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    cut = {"size": size, "layout": case["layout"]}
    part, positions = shard(tokens(length), rank, **cut)
    source, key_positions = shard(tokens(case.get("keys", length), seed=3), rank, **cut)
    slopes = torch.randn(BATCH, length, DIM, dtype=torch.float64, generator=torch.manual_seed(2))
    weights, _ = shard(slopes, rank, **cut)
    inputs = [part, source] if "keys" in case else [part]
    given: dict[str, Any] = {}
    if length % size or (positions < 0).any():
        # full shards need no positions
        given["positions"] = torch.where(positions < 0, -1, positions + case.get("keys", length) - length)
        given["key_positions"] = key_positions if "keys" in case else None
    result = attention(
        *(tensor.requires_grad_() for tensor in inputs),
        ring_group=group,
        attention_mask=Padding((case["pad"],)) if "pad" in case else None,
        return_dict=True,
        **given,
    )
    found = torch.autograd.grad((result.output * weights).sum(), [*inputs, *attention.parameters()])
    return {f"grad{index}": grad.numpy() for index, grad in enumerate(found)} | {
        "output": result.output.detach().numpy(),
        "positions": positions.numpy(),
        "key_positions": key_positions.numpy(),
        "tiles": np.array(result.aux["tiles"]),
    }


def be_a_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=30)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=3, timeout=wait)
    groups: dict[str, Any] = {
        name: dist.new_group(list(ranks), timeout=wait) for name, ranks in GROUPS.items()
    }
    for name, case in CASES.items():
        if rank in GROUPS[case["group"]]:
            arrays: dict[str, Any] = take_part(case, groups[case["group"]])
            np.savez(folder / f"{name}-{rank}.npz", **arrays)
    dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[subprocess.Popen[str]]]]:
    """Three ranks in processes of their own, at work beside the tests that need none."""
    folder = tmp_path_factory.mktemp("ring")
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | loopback,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    yield folder, processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def ranks(running: tuple[Path, list[subprocess.Popen[str]]]) -> Path:
    """Folder of what three gloo ranks computed for every case."""
    folder, processes = running
    deadline = time.monotonic() + 90
    for process in processes:
        _, errors = process.communicate(timeout=max(1, deadline - time.monotonic()))
        assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_gloo_ring_equals_full_attention_forward_and_backward(name, ranks):
    case = CASES[name]
    attention, length = module(**case_settings(case)), case["length"]
    inputs = [tokens(length).requires_grad_()]
    if "keys" in case:
        inputs.append(tokens(case["keys"], seed=3).requires_grad_())
    if case.get("use_rotary"):
        expected = attention(*inputs)  # one rank, held to be right above
    else:
        num_keys = inputs[-1].shape[1]
        allowed = lower_right(length, num_keys) | (not case.get("causal", True))
        start, stop = case.get("pad", (0, num_keys))
        allowed[:, :start], allowed[:, stop:] = False, False
        expected = full(attention, inputs[0], inputs[-1], allowed)
    wanted = gradients(expected, attention, *inputs)
    parts = [np.load(ranks / f"{name}-{rank}.npz") for rank in GROUPS[case["group"]]]
    for part in parts:
        for index, which in enumerate(("positions", "key_positions")[: len(inputs)]):
            real = part[which] >= 0
            assert_same(part[f"grad{index}"][:, real], wanted[index].numpy()[:, part[which][real]])
        real = part["positions"] >= 0
        assert_same(part["output"][:, real], expected.detach().numpy()[:, part["positions"][real]])
    assert sum((part["positions"] >= 0).sum() for part in parts) == length
    for index, weight in enumerate(wanted[len(inputs) :], start=len(inputs)):
        assert_same(sum(part[f"grad{index}"] for part in parts), weight.numpy())


def test_gloo_ranks_skip_the_future_and_meet_in_the_order_of_the_ring(ranks):
    tiles = np.concatenate([np.load(ranks / f"three-contiguous-12-{rank}.npz")["tiles"] for rank in range(3)])
    assert sorted(map(tuple, tiles.tolist())) == sorted(
        (rank, source, (rank - source) % 3, int(source > rank))
        for rank, source in product(range(3), repeat=2)
    )


if __name__ == "__main__":
    be_a_rank(int(sys.argv[1]), Path(sys.argv[2]))
