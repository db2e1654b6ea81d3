"""What a run owes to a card that is not here: its faults, its memory, its driver, and the benchmarks of one."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from attnlab import frontier_search, run, trials
from attnlab.outcomes import ending_of
from attnlab.probes import windows
from attnlab.probes.accuracy import compare_logits
from attnlab.probes.card import CardWindow
from attnlab.probes.conditions import UnknownWindow
from attnlab.probes.score_rules import ScoreRules
from attnlab.run import device_is_lost, run_here
from attnlab.spec import parse_spec
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage import results
from attnlab_storage.database import Store

CUDA = torch.device("cuda")
FAULT = "CUDA error: an illegal memory access was encountered"
SPEC: dict[str, Any] = {
    "name": "three lengths",
    "module": {"dim": 16, "num_heads": 2},
    "vary": {"mechanism": ["multi_head"], "sequence_length": [4, 5, 6]},
    "record": ["memory"],
}


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ...",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_a_card_without_memory_is_an_outcome_whoever_says_it(words: str) -> None:
    for kind in (RuntimeError, torch.AcceleratorError):
        ending = ending_of(kind(words))
        assert (ending.outcome, ending.reason) == ("out_of_memory", "out of memory")
    assert ending_of(torch.AcceleratorError(FAULT)).outcome == "failed"
    assert ending_of(KeyError(words)).outcome == "failed"


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA context that the second run's fault ends: from then on every call of it raises the same."""
    done: list[str] = []

    class Faulty:
        def __init__(self, *given: Any) -> None:
            pass

        def perform(self) -> dict[str, Any]:
            done.append("run")
            if len(done) == 2:
                raise torch.AcceleratorError(FAULT)
            return {}

    def call() -> None:
        if len(done) >= 2:
            raise torch.AcceleratorError(FAULT)

    monkeypatch.setattr(run, "Procedure", Faulty)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", call)
    monkeypatch.setattr(torch.cuda, "synchronize", call)
    return done


def test_a_fault_ends_its_run_and_is_not_told_of_the_runs_after_it(
    sqlite_store: Store, faulty: list[str]
) -> None:
    experiment = run_here(sqlite_store, parse_spec(SPEC))
    runs = results.runs_of(sqlite_store, experiment_id=experiment)
    assert [one.state for one in runs] == ["succeeded", "failed", "failed"]
    assert FAULT in str(runs[1].reason)
    assert str(runs[2].reason).startswith(f"not started: run {runs[1].id} left this process without")
    assert faulty == ["run", "run"]


def test_a_run_that_fails_by_itself_costs_the_next_ones_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not device_is_lost()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    assert not device_is_lost()


@pytest.mark.parametrize(("asked", "share"), [(1 << 30, 0.25), (1 << 40, 1.0)])
def test_a_trial_is_held_to_its_memory_on_the_current_card(
    asked: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[float, int]] = []
    card = SimpleNamespace(total_memory=4 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    # torch's own function down to the call of the allocator
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    record = lambda fraction, index: held.append((fraction, index))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", record, raising=False)
    trials.hold_to(asked, CUDA)
    trials.hold_to(asked, torch.device("cuda", 1))
    assert held == [(share, 3), (share, 1)]


def test_a_search_may_ask_for_what_is_free_on_the_card_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 4 << 30))
    frontier_search.check_budget(3 << 30, CUDA)
    with pytest.raises(Unsupported, match=f"at most the {3 << 30} bytes that are free"):
        frontier_search.check_budget((3 << 30) + 1, CUDA)


def test_a_driver_that_stops_answering_costs_the_conditions_and_not_the_times() -> None:
    reading = {"sm_mhz": 1.0, "memory_mhz": 1.0, "watts": 1.0, "celsius": 1.0, "reasons": 0.0, "others": 0.0}
    asked = threading.Event()
    answers = iter([reading])

    def read() -> dict[str, float]:
        if (answer := next(answers, None)) is not None:
            return answer
        asked.set()
        raise OSError("NVML: nvmlDeviceGetPowerUsage answered 15")

    with CardWindow(read, every=0.001) as window:
        assert asked.wait(10)
    assert window.found["not_known"] == "NVML: nvmlDeviceGetPowerUsage answered 15"
    assert window.found["readings"] == 1


def test_a_driver_without_the_call_leaves_the_conditions_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))

    def reader(uuid: str) -> Any:
        raise AttributeError("undefined symbol: nvmlDeviceGetComputeRunningProcesses_v3")

    monkeypatch.setattr(windows, "nvml_reader", reader)
    window = windows.window_of(CUDA)
    assert isinstance(window, UnknownWindow)
    assert "undefined symbol" in window.found["not_known"]


class IndexedAtHome(TorchFunctionMode):
    """Refuses what CUDA refuses: a tensor of the host indexed by one of the card, which is meta's here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            away = any(isinstance(one, torch.Tensor) and one.is_meta for one in places)
            assert args[0].is_meta or not away, "indices should be on the same device as the indexed tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [{"bias": torch.zeros(2, 3, 4)}, {"table": torch.zeros(2, 6)}], ids=list)
def test_a_stored_bias_goes_to_the_card_that_a_map_is_refined_on(kept: dict[str, Any]) -> None:
    rules = ScoreRules(3, 4, **kept)
    rows, cols = (torch.arange(count, device="meta") for count in (2, 4))
    with IndexedAtHome():
        made = rules.apply(torch.zeros(2, 2, 4, device="meta"), rows, cols)
    assert made.shape == (2, 2, 4)


def test_logits_of_a_model_that_writes_nothing_are_compared_without_tokens() -> None:
    ours, theirs = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lost = compare_logits(ours, theirs, lambda states: states, None)
    wanted = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert lost.kl == pytest.approx(float(wanted), rel=1e-5)
    assert (lost.perplexity, lost.reference_perplexity) == (1.0, 1.0)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import softmax_attention  # pyright: ignore[reportMissingImports]
    import softmax_targets  # pyright: ignore[reportMissingImports]

    return softmax_attention, softmax_targets


class CompilerError(Exception):
    """As Triton's and CuTe's are: no RuntimeError."""


def test_what_fails_in_a_benchmark_is_a_row_also_after_a_fault(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, _ = benchmarks

    def fault() -> None:
        raise torch.AcceleratorError(FAULT)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fault)

    def compiles() -> None:
        raise CompilerError("out of resource: shared memory\nhint")

    for step, reason in ((compiles, "out of resource: shared memory"), (fault, FAULT)):
        row = attention.Row(attention.Shape(1, 1, 1, 1, 1, 64, "bfloat16", "full"), "triton")
        attention.guarded(row, step)
        assert (row.status, row.reason) == ("error", reason)


def test_a_target_that_cannot_be_measured_says_why_and_leaves_the_others(
    benchmarks: Any, capsys: Any
) -> None:
    _, targets = benchmarks
    row = targets.Target("decoding", ">= 1", 1.0)

    def fails() -> None:
        raise CompilerError("no kernel image\nmore")

    targets.attempt(row, fails)
    assert (row.measured, row.verdict, row.detail) == (None, "not measured", "CompilerError: no kernel image")
    q = torch.zeros(1, 1, 4, 8)
    assert targets.right(q, q, q, "eager")
    assert not targets.right(q, q, q, "flash_attn_2")
    assert "flash_attn_2 is left out: Unsupported" in capsys.readouterr().err
