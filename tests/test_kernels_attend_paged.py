"""Attention over a pool through block tables on a CPU: gathered for the fused kernel, against every score in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnlab_kernels.masks import Causal, Window
from attnlab_kernels.operations.paged import gathered
from attnlab_kernels.operations.paged.api import attend_paged
from attnlab_kernels.operations.paged.reference import walk
from attnlab_kernels.operations.softmax import eager
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.lower import merge
from attnlab_kernels.operations.softmax.support import PLAIN

LENGTHS, NEW = [60, 9, 35, 20, 35], [37, 9, 1, 0, 1]


def call(dtype: torch.dtype = torch.float32, value_dim: int = 6) -> dict[str, Any]:
    """Five sequences, two of them alike, in a pool of blocks of 8 in any order; what holds no token is NaN."""
    generator = torch.Generator().manual_seed(0)
    pools = [torch.full((24, 8, 2, dim), torch.nan) for dim in (6, value_dim)]
    free = iter(torch.randperm(24, generator=generator).tolist())
    tables = torch.full((5, 8), -1, dtype=torch.int32)
    for row, length in enumerate(LENGTHS):
        for block in range(-(-length // 8)):
            tables[row, block] = next(free)
        for place in range(length):
            for pool in pools:
                slot = torch.randn(pool.shape[2:], generator=generator)
                pool[tables[row, place // 8], place % 8] = slot
    starts = torch.tensor([0, *NEW]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), 4, 6, generator=generator)
    return {
        "q": q.to(dtype),
        "key_pool": pools[0].to(dtype),
        "value_pool": pools[1].to(dtype),
        "tables": tables,
        "lengths": torch.tensor(LENGTHS).int(),
        "query_starts": starts,
    }


@pytest.mark.parametrize(
    "given",
    [{}, {"mask": Causal()}, {"mask": Window(11)}, {"alibi": torch.rand(4), "sinks": torch.randn(4)}],
    ids=lambda given: ",".join(given),
)
def test_gathered_blocks_give_what_every_score_in_memory_gives(given):
    arguments = call()
    wide = {name: part.double() if part.is_floating_point() else part for name, part in arguments.items()}
    mine = attend_paged(**arguments, **given)
    want = attend_paged(**wide, **given, implementation="eager")
    assert mine.aux["implementation"] == "fused"
    torch.testing.assert_close(mine.output.double(), want.output, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(mine.lse, want.lse, atol=2e-6, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("budget", [1, 1000, 2**20], ids="{} bytes".format)
def test_as_many_sequences_at_a_time_as_fit_give_the_same(budget, monkeypatch):
    """Twelve of four lengths decode, in blocks of any order, a few of them one after the other."""
    held = torch.tensor([5, 30, 17, 30, 5, 30, 5, 8, 30, 17, 5, 30]).int()
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(60, 8, 2, 6, generator=generator) for _ in range(2))
    tables = torch.randperm(60, generator=generator)[:48].reshape(12, 4).int()
    tables[3] = torch.arange(4)
    q = torch.randn(12, 4, 6, generator=generator)
    monkeypatch.setattr(gathered, "GATHERED_BYTES", budget)
    calls = []

    def listened(*call, **named):
        calls.append(len(call[0]))
        return eager.run(*call, **named)

    run = {"mask": Causal(), "scale": 0.4, "modifiers": PLAIN}
    with torch.no_grad():
        output, lse = gathered.run(listened, q, key, value, tables, [1] * 12, held.tolist(), **run)
    assert sum(calls) == 12
    assert {1: max(calls) == 1, 1000: 1 < max(calls) < 5, 2**20: max(calls) == 5}[budget]
    for row, length in enumerate(held.tolist()):
        want, sums = walk(q[row, :, None], key, value, tables[row].tolist(), length, scale=0.4)
        torch.testing.assert_close(output[row], want[:, 0], atol=2e-6, rtol=0)
        torch.testing.assert_close(lse[:, row], sums[:, 0], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("made", "given", "word"),
    [({"value_dim": 3}, {}, "Dv"), ({}, {"softcap": 5.0}, "soft")],
    ids=["values of another width", "soft cap"],
)
def test_what_the_fused_kernel_cannot_run_is_refused_and_auto_says_so(made, given, word):
    arguments = call(**made)
    with pytest.raises(Unsupported, match=word):
        attend_paged(**arguments, **given, implementation="fused")
    output = attend_paged(**arguments, **given)
    assert output.aux["implementation"] == "eager"
    assert word in output.aux["reason"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parts_merged_by_their_log_sum_exp_are_the_whole(dtype):
    torch.manual_seed(0)
    scores, values = 30 * torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    scores[0], scores[1, :, :8] = -torch.inf, -torch.inf
    parts = []
    for part in (slice(0, 3), slice(3, 8), slice(8, 12)):
        weights = torch.softmax(scores[..., part], -1).nan_to_num(0)
        parts.append(((weights @ values[part]).to(dtype), torch.logsumexp(scores[..., part], -1)))
    output, lse = merge(parts)
    want = torch.softmax(scores, -1).nan_to_num(0) @ values
    assert output.dtype == dtype
    near = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(output.double(), want, atol=near, rtol=near)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))
