"""Cheats that are faster than anything must be caught, and honest implementations of any rounding must not."""

import contextlib
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attnlab.describe import experiment_document
from attnlab.outcomes import CheckFailed
from attnlab.probes.adversarial import Rival, caught, is_too_fast, prove
from attnlab.probes.elsewhere import hides_work, left_running, run_elsewhere
from attnlab.probes.interleaved import interleaved
from attnlab.probes.kernel import KernelCall
from attnlab.probes.reference import causal_attention
from attnlab.probes.timers import WallTimer
from attnlab.problems import SpecError
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.chart_table import chart_rows
from attnlab_kernels.masks import Causal
from attnlab_kernels.operations.softmax.api import attend

SHAPE = (2, 3, 17, 8)


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=made).to(dtype) for _ in range(3)]


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, mask=Causal(), implementation="eager").output


def reference(*given: Tensor) -> tuple[Tensor]:
    return (plain(*given),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["eager", "sdpa_math", "sdpa_flash"])
def test_honest_implementations_pass(name, dtype):
    def honest(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        return (attend(query, key, value, mask=Causal(), implementation=name).output,)

    assert caught(honest, reference, operands(dtype)) == []


def test_an_output_that_was_kept_is_caught():
    kept: list[tuple[Tensor]] = []

    def cheat(*given: Tensor) -> tuple[Tensor]:
        if not kept:
            kept.append(reference(*given))
        return kept[0]

    found = caught(cheat, reference, operands())
    assert any(words.startswith("other inputs at the same addresses: off by") for words in found)
    assert any("the output is [2, 3, 17, 8], not [2, 3, 16, 8]" in words for words in found)


def test_an_output_kept_by_address_is_caught():
    kept: dict[int, tuple[Tensor]] = {}

    def cheat(*given: Tensor) -> tuple[Tensor]:
        address = given[0].data_ptr()
        if address not in kept:
            kept[address] = reference(*given)
        return kept[address]

    assert any(
        words.startswith("other inputs at the same addresses")
        for words in caught(cheat, reference, operands())
    )


def test_no_answer_that_the_proof_made_before_is_right():
    made: list[Tensor] = []

    def remembered(*given: Tensor) -> tuple[Tensor]:
        made[:] = reference(*given)
        return (made[0],)

    def cheat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        found = made[0] if made and made[0].shape == query.shape else torch.zeros_like(query)
        return (found.to(query.dtype).clone(),)

    assert len(caught(cheat, remembered, operands())) == 6


def test_rows_that_are_skipped_are_caught():
    def cheat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        output = torch.empty_like(query)
        half = query.shape[2] // 2
        output[:, :, :half] = plain(query[:, :, :half], key[:, :, :half], value[:, :, :half])
        return (output,)

    assert len(caught(cheat, reference, operands())) == 6


def test_strides_that_are_ignored_are_caught():
    def cheat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        dense = [
            torch.as_strided(one, one.shape, torch.empty(one.shape).stride()) for one in (query, key, value)
        ]
        return reference(*dense)

    (words,) = caught(cheat, reference, operands())
    assert words.startswith("inputs that are not contiguous: off by")


def test_inputs_that_are_changed_are_caught():
    def cheat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
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


def kernel_call(compute, *, backward: bool = False) -> KernelCall:
    given = tuple(operands())
    return KernelCall(0, given, compute, "cheat", 0, backward, None, plain(*given), plain)


def against(ratio: float) -> list[Rival]:
    return [Rival(0.97, "another"), Rival(ratio, "plain attention")]


def test_a_figure_that_is_too_fast_is_refused_until_its_computation_is_proved():
    def cheat(*given: Tensor) -> Tensor:
        return torch.zeros_like(given[0])

    assert "nothing to prove" in prove(kernel_call(cheat), against(0.95)).words
    assert "nothing to prove" in prove(kernel_call(cheat), []).words
    with pytest.raises(
        CheckFailed, match=r"cheat is 2.00 x as fast as plain attention, and wrong: other inputs"
    ):
        prove(kernel_call(cheat), against(0.5))
    assert "proved on other inputs" in prove(kernel_call(plain), against(0.5)).words


def test_what_no_reference_can_prove_is_not_shown():
    large = replace(kernel_call(plain), too_large_to_prove="its plain reference needs 70 GB of scores")
    proof = prove(large, against(0.5))
    assert not proof.stands
    assert proof.words.startswith(
        "unproved: 2.00 x as fast as plain attention, and its plain reference needs"
    )
    assert prove(large, against(0.95)).stands


def test_a_gradient_that_is_wrong_is_caught_where_it_is_timed():
    class Forged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            ctx.save_for_backward(query, key, value)
            return plain(query, key, value)

        @staticmethod
        def backward(ctx, *gradients):
            return tuple(map(torch.zeros_like, ctx.saved_tensors))

    cheat = kernel_call(Forged.apply, backward=True)
    with pytest.raises(CheckFailed, match="other inputs: off by"):
        prove(cheat, against(0.5))
    assert prove(replace(cheat, backward=False), against(0.5)).stands
    assert prove(kernel_call(plain, backward=True), against(0.5)).stands


def test_an_output_that_is_written_after_the_call_returns_is_caught():
    waiting: list[threading.Thread] = []

    def cheat(*given: Tensor) -> tuple[Tensor]:
        output = torch.full_like(given[0], torch.nan)
        copies = [tensor.clone() for tensor in given]
        waiting.append(threading.Thread(target=lambda: output.copy_(plain(*copies))))
        return (output,)  # the thread starts when the caller has already looked

    assert all("not finite" in words for words in caught(cheat, reference, operands())[:3])


def test_an_output_that_is_computed_when_it_is_read_is_no_tensor():
    class Lazy(Tensor):
        pass

    with pytest.raises(CheckFailed, match="must be a plain tensor, got Lazy"):
        prove(kernel_call(lambda *given: plain(*given).as_subclass(Lazy)), against(0.5))


def test_what_works_only_on_the_thread_that_knows_it_is_caught():
    home = threading.get_ident()

    def cheat(*given: Tensor) -> tuple[Tensor]:
        return reference(*given) if threading.get_ident() == home else (torch.zeros_like(given[0]),)

    (words,) = caught(cheat, reference, operands())
    assert words.startswith("elsewhere: off by")


def test_a_computation_without_operands_has_to_make_its_checked_output_anew():
    honest = replace(kernel_call(None), operands=(), exact=None)
    given = operands()
    right = plain(*given)
    kept = right.clone()
    proof = prove(replace(honest, compute=lambda: plain(*given), output=right), against(0.5))
    assert proof.stands
    assert "its own inputs" in proof.words
    with pytest.raises(CheckFailed, match="once more: off by nan"):
        prove(replace(honest, compute=lambda: kept, output=right), against(0.5))


class FakeStreams:
    """A card whose events see one stream, and that works on for as long as ``hidden`` says after them."""

    def __init__(self) -> None:
        self.now, self.hidden, self.current = 0.0, 0.0, "main"
        self.Stream = lambda device: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = lambda device: None
        self._sleep = lambda cycles: None

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        made = SimpleNamespace(at=0.0, synchronize=lambda: None)
        made.record = lambda: setattr(made, "at", self.now)
        made.elapsed_time = lambda other: (other.at - made.at) * 1e3
        return made

    def synchronize(self, device: torch.device) -> None:
        self.now += self.hidden
        self.hidden = 0.0

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, "side"
        yield
        self.current = before


def test_work_on_another_stream_is_seen_by_waiting_for_the_whole_device():
    cuda, device = FakeStreams(), torch.device("cuda")

    def honest() -> None:
        cuda.now += 0.004

    def cheat() -> None:
        cuda.hidden = 0.004

    assert left_running(honest, device, (), cuda, lambda: cuda.now) == pytest.approx((4.0, 0.0))
    assert not hides_work(*left_running(honest, device, (), cuda, lambda: cuda.now))
    assert left_running(cheat, device, (), cuda, lambda: cuda.now) == pytest.approx((0.0, 4.0))
    assert hides_work(*left_running(cheat, device, (), cuda, lambda: cuda.now))


def test_a_kernel_that_stays_on_its_own_stream_reads_what_is_not_there_yet():
    cuda, given = FakeStreams(), operands()

    def cheat(*late: Tensor) -> tuple[Tensor]:
        # the main stream does not wait for the copies of the side stream: it reads NaN
        read = late if cuda.current == "main" else [torch.full_like(tensor, torch.nan) for tensor in late]
        return reference(*read)

    assert cheat(*given)[0].isfinite().all()
    assert run_elsewhere(cheat, given, cuda)[0].isnan().all()
    torch.testing.assert_close(run_elsewhere(reference, given, cuda)[0], plain(*given))


SPEC = {
    "name": "in turn",
    "module": {"dim": 32, "num_heads": 2},
    "record": ["timing"],
    "repeats": 4,
    "vary": {"mechanism": ["multi_head"], "sequence_length": [24]},
}


def timed(store, **changes):
    experiment = run_here(store, parse_spec(SPEC | changes))
    return experiment_document(store, experiment)["runs"]


def test_a_run_is_set_against_the_fastest_stored_one_that_did_the_same(sqlite_store, monkeypatch):
    (first,) = timed(sqlite_store)
    assert "nothing to prove" in first["attention_latency_ms"]["detail"]["proof"]
    seen: list[float] = []
    monkeypatch.setattr("attnlab.probes.adversarial.is_too_fast", lambda ratio: seen.append(ratio) or True)
    (second,) = timed(sqlite_store)
    proof = second["attention_latency_ms"]["detail"]["proof"]
    assert f"as fast as run {first['id']}, " in proof
    assert "and proved on other inputs" in proof
    assert seen == [second["attention_latency_ms"]["median"] / first["attention_latency_ms"]["median"]]
    vary = {"mechanism": ["flash"], "sequence_length": [24]}
    (flash,) = timed(sqlite_store, vary=vary)  # the same softmax attention by another name
    assert (
        f"as fast as run {min((first, second), key=speed)['id']}, "
        in flash["attention_latency_ms"]["detail"]["proof"]
    )
    seen.clear()
    window = {"sliding_window": {"window_size": 5}}
    others = timed(sqlite_store, vary={"mechanism": [window], "sequence_length": [24]})
    others += timed(sqlite_store, module={"dim": 48, "num_heads": 2})
    assert all("nothing to prove" in run["attention_latency_ms"]["detail"]["proof"] for run in others)
    assert seen == []


def speed(document) -> float:
    return document["attention_latency_ms"]["median"]


def test_a_time_that_cannot_be_proved_is_withheld(sqlite_store, monkeypatch):
    vary = {"mechanism": ["linear"], "sequence_length": [24]}
    timed(sqlite_store, vary=vary)
    monkeypatch.setattr("attnlab.probes.adversarial.is_too_fast", lambda ratio: True)
    monkeypatch.setattr("attnlab.probes.kernel.PROVED_BYTES", 1)
    (document,) = timed(sqlite_store, vary=vary)
    assert document["speed_withheld"].startswith("unproved: ")
    assert document["latency_ms"] is document["attention_latency_ms"] is document["roofline"] is None
    (row,) = chart_rows([document])
    assert row["outcome"] == "unproved"


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_a_run_is_timed_in_turn_with_its_reference(sqlite_store, phase):
    (document,) = timed(sqlite_store, phase=phase, reference="sdpa")
    assert document["outcome"] == "succeeded", document["error_detail"]
    ratio = document["reference_ratio"]
    assert len(ratio["samples"]) == 4
    assert ratio["detail"]["reference"] == "sdpa"
    assert "unproved" not in document["attention_latency_ms"]["detail"]["proof"]


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
        def compute(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
            rules = {"mask": Causal(), "bias": bias.to(query.dtype)}
            return (attend(query, key, value, implementation=implementation, **rules).output,)

        return compute

    assert caught(biased("sdpa_math"), biased("eager"), operands()) == []
    with pytest.raises((ValueError, RuntimeError)):
        biased("eager")(*(tensor[:, :, :-1] for tensor in operands()))


def test_a_refused_run_leaves_no_time_behind(sqlite_store, monkeypatch):
    monkeypatch.setattr("attnlab.probes.adversarial.is_too_fast", lambda ratio: True)
    monkeypatch.setattr("attnlab.probes.adversarial.caught", lambda *given, **how: ["other inputs: off by 3"])
    spec = {
        "name": "cheat", "module": {"dim": 32, "num_heads": 2}, "record": ["timing"], "repeats": 3,
        "reference": "sdpa", "vary": {"mechanism": ["multi_head"], "sequence_length": [24]},
    }  # fmt: skip
    experiment = run_here(sqlite_store, parse_spec(spec))
    (document,) = experiment_document(sqlite_store, experiment)["runs"]
    assert (document["outcome"], document["error_kind"]) == ("failed", "check_failed")
    assert "other inputs: off by 3" in document["reason"]
    assert document["latency_ms"] is document["attention_latency_ms"] is document["reference_ratio"] is None
