"""Every implementation on a CUDA device against the float64 reference, with at most twice plain PyTorch's error.

Runs from a plain checkout: needs torch and pytest, no conftest and nothing installed (``make gpu-test``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.operations.paged.api import attend_paged
from attnlab_kernels.operations.paged.write import write_cache
from attnlab_kernels.operations.softmax.api import IMPLEMENTATIONS, Unsupported, attend, supports, survey
from attnlab_kernels.operations.softmax.packed import attend_packed

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = [
    pytest.mark.gpu,
    # torch.compile and cuDNN speak up on some versions; what they say is not what is tested here
    pytest.mark.filterwarnings("ignore"),
]

# batch, query heads, key heads, queries, keys, D, Dv
SHAPES = [
    (2, 4, 2, 257, 257, 64, 64),
    (1, 8, 8, 512, 512, 128, 128),
    (1, 4, 1, 1, 1000, 128, 128),
    (2, 4, 2, 130, 700, 80, 80),
    (1, 2, 1, 300, 200, 256, 256),
    (1, 2, 2, 200, 200, 40, 72),
    (1, 9, 3, 65, 65, 13, 13),
]
MASKS: list[Mask] = [
    Full(),
    Causal(),
    Window(99),
    Window(40, 30),
    Causal() & Padding(((5, 190),)),
    Window(63) & Padding(((0, 150),)),
    Padding(((0, 0),)),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def exact_float32():
    """float32 means float32: no TensorFloat-32 in the baseline."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, num_queries, num_keys, dim, value_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = [
        (batch, heads, num_queries, dim),
        (batch, kv_heads, num_keys, dim),
        (batch, kv_heads, num_keys, value_dim),
    ]
    q, k, v = (torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes)
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """What a careful PyTorch user writes in the inputs' own dtype: the measure of a fair error."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    size = {"num_queries": q.shape[2], "num_keys": k.shape[2]}
    keep = mask.allowed(np.arange(q.shape[2]), np.arange(k.shape[2]), **size)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.from_numpy(keep).to(DEVICE), -torch.inf)
    weights = torch.softmax(scores.float(), dim=-1).nan_to_num(0.0).to(q.dtype)
    return weights @ v, torch.logsumexp(scores.float(), dim=-1)


def worst(got: Tensor, want: Tensor) -> float:
    both_dead = torch.isneginf(got.double()) & torch.isneginf(want)
    return float((got.double() - want).masked_fill(both_dead, 0).abs().max())


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    exact = attend(q.double(), k.double(), v.double(), mask=mask, implementation="eager")
    assert exact.lse is not None
    return exact.output, exact.lse


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_equals_the_reference_or_says_why_not(name, dtype, shape, mask):
    q, k, v = inputs(shape, dtype)
    support = supports(name, q, k, v, mask=mask)
    if not support:
        assert len(support.reason) > 10
        with pytest.raises(Unsupported):
            attend(q, k, v, mask=mask, implementation=name)
        return
    want, want_lse = reference(q, k, v, mask)
    base, base_lse = plain(q, k, v, mask)
    result = attend(q, k, v, mask=mask, implementation=name)
    assert result.lse is not None
    assert worst(result.output, want) <= 2 * worst(base, want) + 5e-6
    assert worst(result.lse, want_lse) <= 2 * worst(base_lse, want_lse) + 1e-5
    dead = torch.isneginf(want_lse)
    assert torch.equal(torch.isneginf(result.lse), dead)
    assert not result.output[dead].any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(63), Causal() & Padding(((5, 150),))], ids=str)
def test_gradients_equal_the_references(name, mask):
    def gradients(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            t.detach().to(dtype).requires_grad_() for t in inputs((2, 4, 2, 160, 160, 64, 64), torch.bfloat16)
        ]
        output = attend(*leaves, mask=mask, implementation=implementation).output
        (output * torch.linspace(-1, 1, 64, device=DEVICE)).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    q, k, v = inputs((2, 4, 2, 160, 160, 64, 64), torch.bfloat16)
    if not supports(name, q, k, v, mask=mask, need_grad=True):
        with pytest.raises(Unsupported):
            gradients(name, torch.bfloat16)
        return
    exact = gradients("eager", torch.float64)
    fair = gradients("sdpa_math", torch.bfloat16)
    got = gradients(name, torch.bfloat16)
    assert len(exact) == len(got) == 3
    for mine, base, want in zip(got, fair, exact, strict=True):
        assert mine.isfinite().all()
        # the fused backward also rounds P and dS to bfloat16, which the float32 arithmetic of math does not
        assert worst(mine, want) <= 4 * worst(base, want) + 2e-2 * float(want.abs().max())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_of_fifty_with_a_late_maximum_stay_exact(name, dtype):
    n, dim = 777, 64
    ramp = torch.linspace(-1, 1, n, dtype=torch.float64, device=DEVICE)
    q = torch.full((1, 2, n, dim), 50 / dim**0.5, dtype=torch.float64, device=DEVICE)
    k = ramp[None, None, :, None].expand(1, 2, n, dim).contiguous()
    v = torch.randn(1, 2, n, dim, dtype=torch.float64, device=DEVICE)
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    if not supports(name, q, k, v, mask=Causal()):
        return
    want, want_lse = reference(q, k, v, Causal())
    base, base_lse = plain(q, k, v, Causal())
    result = attend(q, k, v, mask=Causal(), implementation=name)
    assert result.lse is not None
    assert worst(result.output, want) <= 2 * worst(base, want) + 5e-6
    assert worst(result.lse, want_lse) <= 2 * worst(base_lse, want_lse) + 5e-5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_lies_in_padded_slots_never_shows(name):
    q, k, v = inputs((2, 4, 2, 200, 200, 64, 64), torch.bfloat16)
    mask = Causal() & Padding(((3, 150), (0, 64)))
    if not supports(name, q, k, v, mask=mask):
        return
    clean = attend(q, k, v, mask=mask, implementation=name).output
    for tensor in (k, v):
        tensor[0, :, :3] = tensor[0, :, 150:] = tensor[1, :, 64:] = torch.nan
    assert torch.equal(attend(q, k, v, mask=mask, implementation=name).output, clean)


def modifiers(heads: int) -> dict[str, dict]:
    slopes = torch.linspace(0.01, 0.1, heads, device=DEVICE)
    sinks = torch.linspace(-1, 3, heads, device=DEVICE)
    return {
        "softcap": {"softcap": 5.0},
        "alibi": {"alibi": slopes},
        "sinks": {"sinks": sinks},
        "bias": {"bias": torch.randn(heads, 130, 300, device=DEVICE)},
        "all": {"softcap": 5.0, "alibi": slopes, "sinks": sinks},
    }


@pytest.mark.parametrize("feature", ["softcap", "alibi", "sinks", "bias", "all"])
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(63)], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_modifiers_give_the_reference_or_a_reason(name, mask, feature):
    q, k, v = inputs((2, 4, 2, 130, 300, 64, 64), torch.bfloat16)
    given = modifiers(4)[feature]
    support = supports(name, q, k, v, mask=mask, **given)
    if not support:
        assert len(support.reason) > 10
        return
    wide: dict[str, Any] = {
        key: value.double() if isinstance(value, Tensor) else value for key, value in given.items()
    }
    want = attend(q.double(), k.double(), v.double(), mask=mask, implementation="eager", **wide)
    fair = attend(q, k, v, mask=mask, implementation="eager", **given)
    mine = attend(q, k, v, mask=mask, implementation=name, **given)
    assert mine.lse is not None
    assert want.lse is not None
    step = torch.finfo(torch.bfloat16).eps * float(want.output.abs().max())
    # a bias that a kernel takes in bfloat16 is rounded there
    rounding = 2.0**-7 if feature == "bias" else 1e-4
    assert worst(mine.output, want.output) <= 2 * worst(fair.output, want.output) + 4 * step
    assert worst(mine.lse, want.lse) <= rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decoding_step_in_shares_equals_the_reference(dtype):
    q, k, v = inputs((2, 16, 2, 1, 5000, 128, 128), dtype)
    mine = attend(q, k, v, mask=Causal(), implementation="triton")
    want, want_lse = reference(q, k, v, Causal())
    base, base_lse = plain(q, k, v, Causal())
    assert mine.lse is not None
    assert worst(mine.output, want) <= 2 * worst(base, want) + 5e-6
    assert worst(mine.lse, want_lse) <= 2 * worst(base_lse, want_lse) + 1e-5


def test_packed_sequences_are_each_alone():
    starts, key_starts = torch.tensor([0, 200, 200, 201, 500]), torch.tensor([0, 300, 310, 600, 900])
    q, k, v = (
        torch.randn(n, h, 64, dtype=torch.bfloat16, device=DEVICE) for n, h in ((500, 8), (900, 2), (900, 2))
    )
    mine = attend_packed(q, k, v, starts, key_starts, mask=Causal(), implementation="triton")
    want = attend_packed(q, k, v, starts, key_starts, mask=Causal(), implementation="eager")
    assert mine.lse is not None
    assert want.lse is not None
    assert worst(mine.output, want.output.double()) < 2e-2
    assert worst(mine.lse, want.lse.double()) < 1e-4


def test_paged_decoding_and_prompts_read_the_pool_through_its_tables():
    lengths, block = [1, 1000, 4097, 63], 16
    blocks = [-(-length // block) for length in lengths]
    pools = [
        torch.full((sum(blocks), block, 2, 128), torch.nan, dtype=torch.bfloat16, device=DEVICE) for _ in "kv"
    ]
    order = torch.randperm(sum(blocks), device=DEVICE)
    tables = torch.full((4, max(blocks)), 10**6, dtype=torch.int32, device=DEVICE)
    first = 0
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        tables[row, :count] = order[first : first + count]
        places = torch.arange(length, device=DEVICE)
        slots = tables[row, places // block].long() * block + places % block
        new = [torch.randn(length, 2, 128, dtype=torch.bfloat16, device=DEVICE) for _ in "kv"]
        assert write_cache(new[0], new[1], pools[0], pools[1], slots) == "triton"
        first += count
    held = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    for counts in ([1, 1, 1, 1], [1, 400, 37, 63]):
        starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=DEVICE)
        q = torch.randn(sum(counts), 16, 128, dtype=torch.bfloat16, device=DEVICE)
        call = (q, pools[0], pools[1], tables, held)
        mine = attend_paged(*call, query_starts=starts, implementation="triton")
        want = attend_paged(*call, query_starts=starts, implementation="eager")
        assert mine.lse is not None
        assert want.lse is not None
        assert worst(mine.output, want.output.double()) < 2e-2
        assert worst(mine.lse, want.lse.double()) < 1e-4


def test_offsets_past_two_to_the_thirty_one_are_addressed():
    free, _ = torch.cuda.mem_get_info()
    heads, tokens, dim = 1, 70_000, 64
    batch = 2**31 // (heads * tokens * dim) + 2
    needed = 4 * batch * heads * tokens * dim * 2
    if free < 1.3 * needed:
        pytest.skip(f"needs {1.3 * needed / 2**30:.0f} GiB of free GPU memory; {free / 2**30:.0f} are")
    q = torch.randn(batch, heads, 16, dim, dtype=torch.bfloat16, device=DEVICE)
    k = torch.randn(batch, heads, tokens, dim, dtype=torch.bfloat16, device=DEVICE)
    whole = attend(q, k, k, mask=Causal(), implementation="triton").output[-1:]
    alone = attend(q[-1:], k[-1:], k[-1:], mask=Causal(), implementation="triton").output
    assert torch.equal(whole, alone)


def test_a_window_costs_what_it_covers():
    q, k, v = inputs((1, 16, 16, 16384, 16384, 64, 64), torch.bfloat16)

    def milliseconds(mask: Mask) -> float:
        times = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            attend(q, k, v, mask=mask, implementation="triton")
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return min(times)

    assert milliseconds(Window(255)) < 0.2 * milliseconds(Causal())


def test_auto_runs_a_fused_kernel_here():
    q, k, v = inputs((1, 8, 2, 512, 512, 128, 128), torch.bfloat16)
    assert (
        attend(q, k, v, mask=Causal()).aux["implementation"].startswith(("sdpa_", "flash_attn", "flashinfer"))
    )
    assert attend(q, k, v, mask=Window(63)).aux["implementation"].startswith(("triton", "flash_attn"))


def test_the_survey_names_what_this_card_runs():
    rows = {row["name"]: row for row in survey("cuda")}
    assert rows["sdpa_flash"]["available"], rows["sdpa_flash"]["reason"]
    assert rows["triton"]["available"], rows["triton"]["reason"]
    assert not rows["banded"]["available"]
