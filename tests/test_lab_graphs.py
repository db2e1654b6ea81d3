"""Short calls as graphs, on a card made up: a capture that works as torch's does, where it works and where it fails."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from attnlab.probes.graphs import MOST_CALLS, NotCaptured, capture, check_whole, plan, replayed

CARD = torch.device("cuda")
L2 = 1000
GAP_MS = 0.04


class FakeCuda:
    """Streams and graphs of a card: a launch inside a capture is kept, outside it takes the host's time besides."""

    def __init__(self) -> None:
        self.now = 0.0
        self.present = SimpleNamespace(name="default", waits=[])
        self.present.wait_stream = self.present.waits.append
        self.captured: list[tuple[str, float]] | None = None
        self.log: list[tuple[str, str]] = []
        self.mode = ""

    def launch(self, name: str, milliseconds: float) -> None:
        self.log.append((self.present.name, name))
        if self.captured is not None:
            self.captured.append((name, milliseconds))
        else:
            self.now += milliseconds + GAP_MS

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=L2)

    def Stream(self, device: torch.device) -> SimpleNamespace:
        made = SimpleNamespace(name="side", waits=[])
        made.wait_stream = made.waits.append
        return made

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return self.present

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.present = self.present, stream
        try:
            yield
        finally:
            self.present = before

    def synchronize(self, device: torch.device) -> None:
        if self.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    def CUDAGraph(self) -> SimpleNamespace:
        made = SimpleNamespace(work=[])
        made.replay = lambda: setattr(self, "now", self.now + GAP_MS + sum(ms for _, ms in made.work))
        return made

    @contextmanager
    def graph(self, graph: SimpleNamespace, *, stream: SimpleNamespace, capture_error_mode: str) -> Iterator:
        self.mode, self.present, self.captured = capture_error_mode, stream, []
        try:
            yield
        except RuntimeError:
            self.captured = None  # torch's own exit raises here, and leaves the stream of the capture current
            raise RuntimeError("capture was invalidated") from None
        graph.work, self.captured = self.captured, None
        self.present = SimpleNamespace(name="default", waits=[])


class FakeTimer:
    name = "events"

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def sample(self, step: Callable[[], object]) -> float:
        before = self._cuda.now
        step()
        return self._cuda.now - before


class Call:
    """A call of 0.01 ms on operands of 300 bytes."""

    operand_bytes = 300

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def copies(self, count: int) -> list[Callable[[], object]]:
        return [lambda place=place: self._cuda.launch(f"set {place}", 0.01) for place in range(count)]


def test_a_replayed_call_takes_the_cards_time_without_the_gap_before_it():
    cuda = FakeCuda()
    timer = FakeTimer(cuda)
    step = lambda: cuda.launch("kernel", 0.01)  # noqa: E731
    assert timer.sample(step) == pytest.approx(0.05)
    replay = capture(step, 0.01, CARD, cuda=cuda)
    assert (replay.calls, replay.cache, cuda.mode) == (100, "warm", "thread_local")
    assert replayed(replay, timer, 5) == pytest.approx([0.01 + GAP_MS / 100] * 5)


def test_a_call_warms_up_on_the_side_stream_that_waits_for_the_present_one_and_the_other_way_round():
    cuda = FakeCuda()
    default = cuda.present
    capture(lambda: cuda.launch("kernel", 0.5), 0.5, CARD, cuda=cuda)
    assert cuda.log == [("side", "kernel")] * (3 + 2)
    (side,) = default.waits
    assert side.waits == [default]


def test_sets_of_operands_in_turn_fill_twice_the_cards_own_cache_between_two_uses_of_one():
    cuda = FakeCuda()
    replay = capture(lambda: None, 0.01, CARD, copies=Call(cuda), cuda=cuda)
    assert replay.cache == "cold: 8 sets of operands in turn"
    order = [name for _, name in cuda.log][-replay.calls :]
    assert order[:9] == [f"set {place}" for place in (0, 1, 2, 3, 4, 5, 6, 7, 0)]
    assert replay.calls % 8 == 0
    assert replay.calls >= 100
    assert {order.count(f"set {place}") for place in range(8)} == {replay.calls // 8}


@pytest.mark.parametrize("spent", [1e-6, 0.004, 0.049, 0.2])
@pytest.mark.parametrize("operand_bytes", [0, 1, 37, 999, 10**9])
def test_a_plan_is_bounded_and_uses_every_set_alike(spent, operand_bytes):
    calls, sets = plan(spent, operand_bytes, L2)
    assert 1 <= sets <= calls <= MOST_CALLS
    assert calls % sets == 0
    if operand_bytes and sets < MOST_CALLS:
        assert (sets - 1) * operand_bytes >= 2 * L2


def test_too_small_operands_are_warm_in_part_and_say_so():
    cuda = FakeCuda()
    tiny = Call(cuda)
    tiny.operand_bytes = 1
    replay = capture(lambda: None, 0.01, CARD, copies=tiny, cuda=cuda)
    assert replay.cache.startswith(f"warm in part: {MOST_CALLS} sets")


def test_what_cannot_be_captured_says_why_and_leaves_the_stream_as_it_was():
    cuda = FakeCuda()
    default = cuda.present

    def waits() -> None:
        cuda.launch("kernel", 0.01)
        cuda.synchronize(CARD)

    with pytest.raises(
        NotCaptured, match=r"^RuntimeError: operation not permitted when stream is capturing$"
    ):
        capture(waits, 0.01, CARD, cuda=cuda)
    assert cuda.present is default


def test_a_graph_that_holds_less_than_the_call_is_no_time_of_it():
    check_whole([0.006, 0.007, 0.006], 0.01)
    with pytest.raises(NotCaptured, match=r"takes 0\.001 ms where the profiler saw 0\.01 ms"):
        check_whole([0.001, 0.001, 0.5], 0.01)


def test_the_arguments_of_the_capture_are_those_of_torch():
    import inspect

    accepted = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"cuda_graph", "stream", "capture_error_mode"} <= set(accepted)
    assert callable(torch.cuda.CUDAGraph.replay)
