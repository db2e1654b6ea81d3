"""Each probe against arithmetic that can be done by hand or in float64."""

import ctypes
import inspect
import math
import mmap
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from attnlab.hook import LayerCall
from attnlab.outcomes import CheckFailed, ending_of
from attnlab.probes.accuracy import attention_errors, compare_hidden, compare_logits, over_budget, perplexity
from attnlab.probes.kernel import KernelCall
from attnlab.probes.maps import capture_call, element_mask, output_defect, refine
from attnlab.probes.memory import HeapBound, heap_kept, mapped_copy, peak_memory, resident
from attnlab.probes.timing import kernels_that_ran, latency
from attnlab_kernels.masks import Causal, Documents, Full, Mask, Padding, Window
from attnlab_kernels.operations.softmax.api import Unsupported, attend
from attnlab_storage.results import MeasurementRow

CPU = torch.device("cpu")
MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(4),
    "both ways": Window(3, 2),
    "padded": Causal() & Padding(((3, 13),)),
    "dead": Padding(((0, 0),)),
    "packed": Causal() & Documents((3, 1, 9)),
}


def made_call(
    mask: Mask,
    *,
    batch: int = 1,
    queries: int = 13,
    keys: int = 13,
    dtype: torch.dtype = torch.float32,
    sharp: float = 3,
) -> LayerCall:
    random = torch.Generator().manual_seed(3)
    query = (torch.randn(batch, 6, queries, 8, generator=random) * sharp).to(dtype)
    key = torch.randn(batch, 2, keys, 8, generator=random).to(dtype)
    value = torch.randn(batch, 2, keys, 8, generator=random).to(dtype)
    result = attend(query, key, value, mask=mask, scale=0.5, implementation="eager")
    assert result.lse is not None
    return LayerCall(
        2, "layer", query, key, value, mask, 0.5, result.output, result.lse, "eager", "asked for"
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("cells", [1 << 21, 6 * 13 * 2])
def test_the_kept_log_sum_exp_is_exact(mask: Mask, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnlab.probes.maps.BLOCK_CELLS", cells)
    call = made_call(mask, sharp=12)
    row, (name, lse, dtype) = refine(capture_call(call), call.query[0].numpy(), call.key[0].numpy(), CPU)
    query, key = call.query[0].double().numpy(), call.key[0].double().numpy()
    scores = np.einsum("hid,hjd->hij", query, np.repeat(key, 3, 0)) * 0.5
    allowed = mask.allowed(np.arange(13), np.arange(13), num_queries=13, num_keys=13)
    with np.errstate(divide="ignore"):
        wanted = np.log(np.where(allowed, np.exp(scores), 0).sum(-1))
    assert (name, dtype) == ("lse", "float64")
    np.testing.assert_allclose(lse, wanted, atol=1e-12)
    assert row.row_sum_defect < 1e-6
    assert row.output_defect < 1e-4
    assert (row.detail or {})["lse_defect"] < 1e-4


@pytest.mark.parametrize("keys", [4096, 5])
def test_a_wrong_kernel_is_seen_by_its_output_and_its_log_sum_exp(
    keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnlab.probes.maps.CHECKED_KEYS", keys)
    call = made_call(Causal())
    broken = replace(call, output=call.output * 1.01)
    assert output_defect(call) < 1e-5 < output_defect(broken)
    shifted = replace(call, lse=call.lse + 0.01)
    row, _ = refine(capture_call(shifted), call.query[0].numpy(), call.key[0].numpy(), CPU)
    assert (row.detail or {})["lse_defect"] == pytest.approx(0.01, rel=1e-3)
    assert row.output_defect > 1e-4


def test_freed_memory_is_given_back_only_where_much_of_it_has_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = {"VmRSS": 100}
    in_use = iter((110, 160, 170))
    trims: list[int] = []

    def trim() -> None:
        trims.append(grown["VmRSS"])
        grown["VmRSS"] = next(in_use)

    monkeypatch.setattr("attnlab.probes.memory.resident", grown.__getitem__)
    monkeypatch.setattr("attnlab.probes.memory.trim_heap", trim)
    heap = HeapBound(50)
    for now in (120, 150, 151, 150, 152, 184, 185, 186):
        grown["VmRSS"] = now
        heap.hold()
    assert trims == [151, 152, 186]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the heap is glibc's")
def test_large_blocks_are_used_again_while_the_heap_is_kept_and_given_back_at_the_end() -> None:
    block, layers = 48 << 20, 12
    with heap_kept():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(layers):
            torch.empty(block, dtype=torch.uint8).fill_(1)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        kept = resident("VmRSS")
    # an aligned block may miss the hole that its like has left by a few bytes, so there can be two
    assert faults < layers / 3 * block / mmap.PAGESIZE
    assert resident("VmRSS") < kept - block // 2


def test_what_outlives_a_layer_is_a_copy_of_its_own() -> None:
    lse = np.linspace(0, 1, 3 * 17, dtype=np.float32).reshape(3, 17)
    copy = mapped_copy(lse)
    np.testing.assert_array_equal(copy, lse)
    assert not np.shares_memory(copy, lse)
    call = made_call(Causal())
    kept = capture_call(call).kernel_lse
    np.testing.assert_array_equal(kept, call.lse[0].numpy())
    assert not np.shares_memory(kept, call.lse.numpy())


def test_one_batch_element_is_kept_with_its_own_padding() -> None:
    call = made_call(Causal() & Padding(((2, 13), (0, 9))), batch=2)
    capture = capture_call(call)
    assert (capture.row.detail or {})["batch"] == "element 0 of 2"
    assert capture.row.mask == (Causal() & Padding(((2, 13),))).to_json()
    arrays = {name: array for name, array, _ in capture.arrays}
    np.testing.assert_array_equal(arrays["query"], call.query[0].numpy())
    np.testing.assert_allclose(
        arrays["value_norm"], np.linalg.norm(call.value[0].numpy(), axis=-1), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arrays_are_stored_bit_for_bit(dtype: torch.dtype) -> None:
    call = made_call(Causal(), dtype=dtype)
    (_, array, name), *_ = capture_call(call).arrays
    assert name == str(dtype).removeprefix("torch.")
    bits = torch.from_numpy(array.copy())
    assert torch.equal(bits.view(dtype) if dtype == torch.bfloat16 else bits, call.query[0])


def test_attention_error_is_the_distance_from_float64() -> None:
    call = made_call(Causal())
    off = replace(call, output=call.output + 0.125, lse=call.lse - 0.25)
    rows = attention_errors(off)
    assert {(row.name, row.head) for row in rows} == {
        (name, head) for name in ("attention_error", "lse_error") for head in (0, 2, 5)
    }
    for row in rows:
        assert row.value == pytest.approx(0.125 if row.name == "attention_error" else 0.25, abs=1e-4)
        assert row.layer == 2
    assert max(row.value for row in attention_errors(call)) < 1e-5


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_right_kernel_stays_within_twice_plain_pytorch(mask: Mask) -> None:
    for row in attention_errors(made_call(mask)):
        if row.name == "attention_error":
            assert row.value <= 2 * (row.detail or {})["plain_error"] + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_right_kernel_shows_its_speed(mask: Mask, dtype: torch.dtype) -> None:
    assert over_budget(attention_errors(made_call(mask, dtype=dtype))) is None


@pytest.mark.parametrize("off", [0.01, float("nan")])
def test_a_kernel_beyond_its_budget_shows_none_and_says_which_head(off: float) -> None:
    call = made_call(Causal())
    wrong = call.output.clone()
    wrong[0, 2, 5, 1] += off
    reason = over_budget(attention_errors(replace(call, output=wrong))) or ""
    assert reason.startswith("incorrect: the attention of layer 2, head 2 is off by")


def test_logits_are_compared_in_blocks_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(1)
    ours, reference = torch.randn(2, 13, 7, generator=random)
    weights, ids = torch.randn(11, 7, generator=random), torch.randint(11, (13,), generator=random)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ weights.T

    p, q = head(reference).double().softmax(-1), head(ours).double().softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    surprise = -q[:-1].log().gather(-1, ids[1:, None]).mean()
    for block in (128, 5, 1):
        monkeypatch.setattr("attnlab.probes.accuracy.LOGIT_ROWS", block)
        lost = compare_logits(ours, reference, head, ids)
        assert lost.kl == pytest.approx(float(kl), rel=1e-5)
        assert lost.perplexity == pytest.approx(math.exp(surprise), rel=1e-5)
        assert lost.logit_error == pytest.approx(float((head(ours) - head(reference)).abs().max()), rel=1e-5)
        assert perplexity(ours, head, ids) == pytest.approx(lost.perplexity, rel=1e-6)
        distance = compare_hidden(ours, reference, head)
        assert distance.absolute == pytest.approx(lost.logit_error)
        wanted = torch.linalg.norm(head(ours) - head(reference)) / torch.linalg.norm(head(reference))
        assert distance.relative == pytest.approx(float(wanted), rel=1e-5)
    same = compare_logits(ours, ours, head, ids)
    assert (same.kl, same.logit_error) == (0.0, 0.0)
    assert same.perplexity == same.reference_perplexity


def test_every_sample_is_kept_and_preparation_is_not_timed() -> None:
    done: list[str] = []
    told: list[int] = []
    row = latency(
        "latency",
        lambda: done.append("step"),
        7,
        CPU,
        prepare=lambda: done.append("prepare"),
        progress=told.append,
    )
    samples = row.samples or []
    assert len(samples) == 7
    assert row.value == sorted(samples)[3]
    warmed = (row.detail or {})["warm_up"]
    assert warmed >= 4
    assert done == ["prepare", "step"] * (7 + warmed)
    assert told == [1, 2, 3, 4, 5, 6, 7]
    assert (row.unit, (row.detail or {})["timer"]) == ("ms", "perf_counter")


def test_a_longer_step_takes_longer() -> None:
    small, large = torch.randn(8, 8), torch.randn(400, 400)
    quick = latency("latency", lambda: small @ small, 9, CPU)
    slow = latency("latency", lambda: [large @ large for _ in range(5)], 9, CPU)
    assert min(slow.samples or []) > min(quick.samples or [])


def test_the_kernels_named_are_those_that_ran() -> None:
    call = made_call(Causal())
    flash = KernelCall.of(replace(call, implementation="sdpa_flash"), backward=False)
    eager = KernelCall.of(call, backward=False)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in kernels_that_ran(flash.run, CPU)
    names = kernels_that_ran(eager.run, CPU)
    assert names
    assert not any("flash" in name for name in names)


def hold_two(megabytes: int) -> None:
    first = torch.ones(megabytes << 18)
    second = first + 1  # both are alive here
    del first
    third = second * 2
    del second, third


@pytest.mark.parametrize("megabytes", [3, 40])
def test_peak_memory_is_what_a_step_holds_at_once(megabytes: int) -> None:
    row = peak_memory("peak_memory", partial(hold_two, megabytes), CPU, floor=17).peak
    assert row.value == pytest.approx(2 * megabytes << 20, rel=0.02)
    assert (row.detail or {})["floor_bytes"] == 17


def test_a_process_of_its_own_grows_by_what_a_step_holds_at_once() -> None:
    """As every run has one: in an old heap a block can lie in a hole, where it stays after it is freed."""
    code = f"""
import torch
from attnlab.probes.memory import peak_memory
{inspect.getsource(hold_two)}
row = peak_memory("peak_memory", lambda: hold_two(40), torch.device("cpu"), floor=17).peak
print(row.detail["resident_peak_bytes"])
"""
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(grown) == pytest.approx(80 << 20, rel=0.2)


def test_what_is_freed_before_counts_not() -> None:
    held = [torch.ones(1 << 20)]

    def step() -> None:
        held.clear()
        held.append(torch.ones(1 << 20))

    assert peak_memory("peak_memory", step, CPU, floor=0).peak.value <= (4 << 20) + 4096


def test_a_kernel_call_repeats_forward_and_backward() -> None:
    call = made_call(Causal())
    KernelCall.of(call, backward=False).run()
    trained = KernelCall.of(call, backward=True)
    trained.run()
    assert all(operand.grad is None for operand in trained.operands)
    assert trained.floor_bytes == call.output.numel() * 4 + call.lse.numel() * 4
    assert not call.query.requires_grad


def test_memory_fields_are_read_in_bytes() -> None:
    assert resident("VmHWM") >= resident("VmRSS") - (1 << 20) > 1 << 20
    with pytest.raises(ValueError, match="VmNothing"):
        resident("VmNothing")


def _exhausted() -> BaseException:
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError("an exabyte was allocated")


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (Unsupported("no such kernel"), "unsupported", "no such kernel"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has"), "out_of_memory",
         "asked for 20.50 GiB (22011707392 bytes)"),
        (MemoryError("Unable to allocate 4.00 MiB for an array with shape (1,)"), "out_of_memory", "4194304 bytes"),
        (MemoryError(), "out_of_memory", "out of memory"),
        (RuntimeError("shape mismatch"), "failed", "RuntimeError: shape mismatch"),
        (ValueError("dim: must be 3"), "failed", "dim: must be 3"),
        (CheckFailed("logits differ"), "failed", "logits differ"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
    ],
)  # fmt: skip
def test_an_exception_means_one_outcome(error: BaseException, outcome: str, reason: str) -> None:
    ending = ending_of(error)
    assert ending.outcome == outcome
    assert reason in ending.reason


def test_a_host_without_memory_is_an_outcome_with_the_bytes_asked() -> None:
    ending = ending_of(_exhausted())
    assert (ending.outcome, ending.error_kind) == ("out_of_memory", "out_of_memory")
    assert str(1 << 62) in ending.reason
    assert "Traceback" in (ending.error_detail or "")


def test_a_long_reason_is_cut_and_its_traceback_is_not() -> None:
    ending = ending_of(RuntimeError("x" * 9000))
    assert len(ending.reason) == 500
    assert "x" * 9000 in (ending.error_detail or "")


def test_rows_are_what_the_store_takes() -> None:
    made: list[Any] = attention_errors(made_call(Causal()))
    assert all(isinstance(row, MeasurementRow) and type(row.value) is float for row in made)


def test_one_element_of_a_batch_keeps_its_own_documents():
    mask = Causal() & Documents(((5, 1, 17, 9), (3, 29))) & Padding(((0, 30), (2, 32)))
    rows = np.arange(32)
    for element in range(2):
        alone = element_mask(mask, element)
        assert alone.form().batch_size == 1
        np.testing.assert_array_equal(
            alone.allowed(rows, rows, num_queries=32, num_keys=32),
            mask.allowed(rows, rows, num_queries=32, num_keys=32, batch=element),
        )
