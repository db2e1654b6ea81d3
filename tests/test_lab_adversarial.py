"""Cheats that are faster than anything must be caught, and honest implementations of any rounding must not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnlab.describe import experiment_document
from attnlab.outcomes import CheckFailed
from attnlab.probes.adversarial import caught, is_too_fast, prove
from attnlab.probes.interleaved import interleaved
from attnlab.probes.kernel import KernelCall
from attnlab.probes.reference import causal_attention
from attnlab.probes.timers import WallTimer
from attnlab.problems import SpecError
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab_kernels.masks import Causal
from attnlab_kernels.operations.softmax.api import attend

SHAPE = (2, 3, 17, 8)


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=made).to(dtype) for _ in range(3)]


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, mask=Causal(), implementation="eager").output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["eager", "sdpa_math", "sdpa_flash"])
def test_honest_implementations_pass(name, dtype):
    def honest(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, mask=Causal(), implementation=name).output

    assert caught(honest, reference, operands(dtype)) == []


def test_an_output_that_was_kept_is_caught():
    kept: list[Tensor] = []

    def cheat(*given: Tensor) -> Tensor:
        if not kept:
            kept.append(reference(*given))
        return kept[0]

    found = caught(cheat, reference, operands())
    assert any(words.startswith("other inputs at the same addresses: off by") for words in found)
    assert any("the output is [2, 3, 17, 8], not [2, 3, 16, 8]" in words for words in found)


def test_an_output_kept_by_address_is_caught():
    kept: dict[int, Tensor] = {}

    def cheat(*given: Tensor) -> Tensor:
        address = given[0].data_ptr()
        if address not in kept:
            kept[address] = reference(*given)
        return kept[address]

    assert any(
        words.startswith("other inputs at the same addresses")
        for words in caught(cheat, reference, operands())
    )


def test_rows_that_are_skipped_are_caught():
    def cheat(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        half = query.shape[2] // 2
        output[:, :, :half] = reference(query[:, :, :half], key[:, :, :half], value[:, :, :half])
        return output

    assert len(caught(cheat, reference, operands())) == 5


def test_strides_that_are_ignored_are_caught():
    def cheat(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dense = [
            torch.as_strided(one, one.shape, torch.empty(one.shape).stride()) for one in (query, key, value)
        ]
        return reference(*dense)

    (words,) = caught(cheat, reference, operands())
    assert words.startswith("inputs that are not contiguous: off by")


def test_inputs_that_are_changed_are_caught():
    def cheat(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = reference(query, key, value)
        query.mul_(2)
        return output

    assert all("it changed its inputs" in words for words in caught(cheat, reference, operands()))


def test_only_what_is_more_than_a_tenth_faster_is_doubted():
    assert [is_too_fast(ratio) for ratio in (1.0, 0.95, 0.9, 0.5)] == [False, False, True, True]


def test_pairs_are_timed_in_turn_and_their_ratio_survives_a_machine_that_slows_down():
    now, speed, order = 0.0, 1.0, []

    def clock() -> float:
        return now

    def spending(name: str, seconds: float):
        def step() -> None:
            nonlocal now, speed
            order.append(name)
            now += seconds * speed
            speed *= 1.001

        return step

    row = interleaved(
        "r", spending("a", 0.02), spending("b", 0.01), 20, torch.device("cpu"), WallTimer(clock)
    )
    assert row.value == pytest.approx(2.0, rel=2e-3)
    low, high = (row.detail or {})["interval"]
    assert low <= 2.0 <= high
    assert high - low < 0.01
    assert "".join(order[-8:]) == "abbaabba"
    first, second = (row.detail or {})["times_ms"]
    assert first[-1] > 1.03 * first[0]  # the machine did slow down
    assert [a / b for a, b in zip(first, second, strict=True)] == row.samples


@pytest.mark.parametrize(("queries", "keys"), [(1, 13), (13, 13), (5, 13)])
def test_the_reference_is_causal_at_the_bottom_right_and_shares_heads_in_groups(queries, keys):
    made = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, queries, 8, generator=made)
    key, value = torch.randn(2, 2, 2, keys, 8, generator=made)
    expected = attend(query, key, value, mask=Causal(), implementation="eager").output
    torch.testing.assert_close(causal_attention(query, key, value), expected)


def kernel_call(compute) -> KernelCall:
    return KernelCall(0, tuple(operands()), compute, "cheat", 0, False, None, reference)


def test_a_figure_that_is_too_fast_is_refused_until_its_computation_is_proved():
    def cheat(*given: Tensor) -> Tensor:
        return torch.zeros_like(given[0])

    assert "nothing to prove" in prove(kernel_call(cheat), 0.95)
    with pytest.raises(
        CheckFailed, match=r"cheat is 2.00 x as fast as plain attention, and wrong: other inputs"
    ):
        prove(kernel_call(cheat), 0.5)
    assert "proved on other inputs" in prove(kernel_call(reference), 0.5)
    assert "unproved" in prove(replace(kernel_call(cheat), exact=None), 0.5)


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_a_run_is_timed_in_turn_with_its_reference(sqlite_store, phase):
    spec = {
        "name": "in turn",
        "module": {"dim": 32, "num_heads": 2},
        "phase": phase,
        "record": ["timing"],
        "repeats": 4,
        "reference": "sdpa",
        "vary": {"mechanism": ["multi_head"], "sequence_length": [24]},
    }
    experiment = run_here(sqlite_store, parse_spec(spec))
    (document,) = experiment_document(sqlite_store, experiment)["runs"]
    assert document["outcome"] == "succeeded", document["error_detail"]
    ratio = document["reference_ratio"]
    assert len(ratio["samples"]) == 4
    assert ratio["detail"]["reference"] == "sdpa"
    assert "unproved" not in ratio["detail"]["proof"]


def test_a_reference_needs_a_timed_run():
    spec = {
        "name": "x",
        "module": {"dim": 32, "num_heads": 2},
        "record": ["maps"],
        "reference": "sdpa",
        "vary": {"mechanism": ["multi_head"], "sequence_length": [24]},
    }
    with pytest.raises(SpecError, match="reference: needs timing in record"):
        parse_spec(spec)
    with pytest.raises(SpecError, match="reference"):
        parse_spec(spec | {"record": ["timing"], "reference": "fastest"})


def test_a_function_of_one_length_is_not_blamed_for_having_no_other():
    bias = torch.randn(1, 3, 17, 17)

    def biased(implementation: str):
        def compute(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rules = {"mask": Causal(), "bias": bias.to(query.dtype)}
            return attend(query, key, value, implementation=implementation, **rules).output

        return compute

    assert caught(biased("sdpa_math"), biased("eager"), operands()) == []
    with pytest.raises((ValueError, RuntimeError)):
        biased("eager")(*(tensor[:, :, :-1] for tensor in operands()))


def test_a_refused_run_leaves_no_time_behind(sqlite_store, monkeypatch):
    monkeypatch.setattr("attnlab.probes.adversarial.is_too_fast", lambda ratio: True)
    monkeypatch.setattr("attnlab.probes.adversarial.caught", lambda *given: ["other inputs: off by 3"])
    spec = {
        "name": "cheat", "module": {"dim": 32, "num_heads": 2}, "record": ["timing"], "repeats": 3,
        "reference": "sdpa", "vary": {"mechanism": ["multi_head"], "sequence_length": [24]},
    }  # fmt: skip
    experiment = run_here(sqlite_store, parse_spec(spec))
    (document,) = experiment_document(sqlite_store, experiment)["runs"]
    assert (document["outcome"], document["error_kind"]) == ("failed", "check_failed")
    assert "other inputs: off by 3" in document["reason"]
    assert document["latency_ms"] is document["attention_latency_ms"] is document["reference_ratio"] is None
