"""The harness beside torch's own timer, on a clock that moves only when read or told: nothing here can flake."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("harness_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CostlyClock:
    """Seconds that pass in steps, and two microseconds whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        self.now += 2e-6
        return self.now

    def spend(self, seconds: float):
        def step() -> None:
            self.now += seconds

        return step


def test_the_lab_and_torch_agree_on_the_same_callable(harness):
    clock = CostlyClock()
    found = harness.against_torch(clock.spend(0.010), rounds=21, clock=clock)
    assert found["ratios"] == pytest.approx([1.0] * 5, abs=1e-3)
    assert found["milliseconds"] == pytest.approx(10, rel=1e-3)
    assert found["agrees"]


def test_calls_that_wait_for_the_processor_leave_the_agreement_narrow(harness):
    clock, random = CostlyClock(), np.random.default_rng(4)

    def step() -> None:
        waiting = 0.030 * random.exponential() if random.random() < 0.2 else 0.0
        clock.now += 0.010 * (1 + 0.02 * random.standard_normal()) + waiting

    found = harness.against_torch(step, rounds=800, clock=clock)
    low, high = found["interval"]
    assert 0.99 < low <= found["ratio"] <= high < 1.01


def test_of_four_pairs_the_least_of_each_counts(harness):
    pairs = [(9.0, 1.0), (2.0, 8.0), (2.5, 1.5), (3.0, 3.0), (1.0, 1.0)]
    assert harness.least_ratios(pairs) == [2.0]


def test_every_call_is_timed_by_both_and_who_is_first_alternates(harness):
    order: list[str] = []

    class Ours:
        name = "ours"

        def sample(self, step) -> float:
            order.append("a")
            return 2.0

    timer = harness.PairedTimer(Ours(), lambda: order.append("b") or 4.0)
    assert [timer.sample(lambda: None) for _ in range(3)] == [2.0] * 3
    assert timer.pairs == [(2.0, 4.0)] * 3
    assert "".join(order) == "abbaab"


def test_a_timer_that_is_off_by_more_than_three_per_cent_does_not_agree(harness):
    assert not harness.paired(lambda: 1.04, lambda: 1.0, rounds=5)["agrees"]
    assert harness.paired(lambda: 1.02, lambda: 1.0, rounds=5)["agrees"]


def test_pairs_alternate_who_is_first(harness):
    order: list[str] = []

    def timed(name: str):
        def measure() -> float:
            order.append(name)
            return 1.0

        return measure

    harness.paired(timed("a"), timed("b"), rounds=3)
    assert "".join(order) == "abbaab"


def test_the_harness_reads_its_clock_so_rarely_that_a_kernel_of_10_ms_hides_it(harness):
    clock = CostlyClock()
    found = harness.overhead(50, clock)
    assert found["inside_ms"] == pytest.approx(0.002)  # one look at the clock
    assert found["between_ms"] <= 0.006
    assert found["holds"]
