"""Timing with clocks, cards and processors made up: what is stated of a figure is what happened."""

import ctypes
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attnlab.intervals import median_interval
from attnlab.probes.card import CardWindow, nvml_reader
from attnlab.probes.conditions import ProcessorWindow
from attnlab.probes.graphs import NotCaptured, Replay
from attnlab.probes.timers import EventTimer, WallTimer, cache_flusher
from attnlab.probes.timing import in_graph, latency
from attnlab.probes.warming import warm_up

CPU = torch.device("cpu")


class FakeClock:
    """Seconds that pass only where a step says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bootstrap_interval_covers_the_median_as_often_as_it_says():
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        low, high = median_interval(random.exponential(size=31).tolist()) or (0.0, 0.0)
        covered += low <= np.log(2) <= high
    assert 180 <= covered <= 199  # 190 expected, sd 3


def test_an_interval_needs_three_finite_samples():
    assert median_interval([1.0, 2.0]) is None
    assert median_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="samples must be finite"):
        median_interval([1.0, 2.0, float("nan")])


def test_warm_up_ends_when_three_calls_after_the_first_agree():
    times = iter([900.0, 12.0, 10.0, 10.1, 10.2, 10.0])
    found = warm_up(lambda: next(times), clock=lambda: 0.0)
    assert found == {"warm_up": 5, "warm_up_ms": pytest.approx(942.3), "first_ms": 900.0, "steady": True}


def test_warm_up_that_never_settles_ends_and_says_so():
    clock = FakeClock()
    made: list[float] = []

    def sample() -> float:
        clock.now += 0.001
        made.append(2.0 ** len(made))
        return made[-1]

    assert warm_up(sample, clock)["steady"] is False
    assert len(made) == 20

    def slow() -> float:
        clock.now += 10
        return 1e4

    assert warm_up(slow, clock)["warm_up"] == 2


def test_a_wall_timer_gives_the_milliseconds_of_its_clock_and_nothing_of_its_own():
    clock = FakeClock()

    def step() -> None:
        clock.now += 0.010

    row = latency("latency", step, 9, CPU, timer=WallTimer(clock))
    assert row.samples == pytest.approx([10.0] * 9)
    detail = row.detail or {}
    assert detail["interval"] == pytest.approx((10.0, 10.0))
    assert detail["steady"] is True
    assert detail["threads"] == torch.get_num_threads()
    assert detail["affinity"]
    assert detail["cache"] == "warm"
    assert detail["conditions"]["load_average"]


def proc_with(folder: Path, *, user: int, steal: int, load: float) -> None:
    (folder / "stat").write_text(f"cpu  {user} 0 0 5000 0 0 0 {steal} 0 0\n")
    (folder / "loadavg").write_text(f"{load} 0.1 0.1 1/100 1\n")


@pytest.mark.parametrize(
    ("user", "steal", "reason"),
    [(0, 0, None), (0, 90, "stolen by its host"), (900, 0, "other processes kept")],
)
def test_a_window_is_disturbed_by_theft_and_by_others(tmp_path, monkeypatch, user, steal, reason):
    clock = FakeClock()
    monkeypatch.setattr("attnlab.probes.conditions.time.monotonic", clock)
    proc_with(tmp_path, user=100, steal=0, load=0.5)
    with ProcessorWindow(tmp_path, cores=2) as window:
        clock.now += 5
        (tmp_path / "stat").write_text(f"cpu  {100 + user} 0 0 {6000 - user} 0 0 0 {steal} 0 0\n")
    disturbed = window.found["disturbed"]
    assert [reason in words for words in disturbed] == ([True] if reason else [])


def test_a_processor_whose_clock_fell_is_throttled(tmp_path):
    proc_with(tmp_path, user=1, steal=0, load=0.5)
    clocks = tmp_path / "cpuinfo"
    clocks.write_text("processor: 0\ncpu MHz\t\t: 3100.5\nprocessor: 1\ncpu MHz\t\t: 900.0\n")
    with ProcessorWindow(tmp_path, cores=2) as window:
        clocks.write_text("cpu MHz\t\t: 2900.0\n")
    assert window.found["throttled"] == window.found["disturbed"] == []
    with ProcessorWindow(tmp_path, cores=2) as window:
        clocks.write_text("cpu MHz\t\t: 1200.0\ncpu MHz\t\t: 1100.0\n")
    assert window.found["throttled"] == ["the processor's clock fell from 2900 to 1200 MHz"]
    assert window.found["disturbed"] == ["slowed down: the processor's clock fell from 2900 to 1200 MHz"]
    assert not window.is_cool()
    clocks.write_text("cpu MHz\t\t: 2800.0\n")
    assert window.is_cool()


def test_a_short_window_is_judged_by_the_load_average(tmp_path):
    proc_with(tmp_path, user=1, steal=0, load=7.5)
    with ProcessorWindow(tmp_path, cores=2) as window:
        pass
    assert window.found["disturbed"] == ["load average 7.5 on 2 cores"]
    assert window.found["steal"] is None


def test_a_system_without_counters_says_that_it_knows_nothing(tmp_path):
    with ProcessorWindow(tmp_path) as window:
        pass
    assert "has no stat" in window.found["not_known"]


def test_a_card_that_slowed_down_or_was_shared_is_disturbed():
    readings = iter([(1980, 0x0, 0), (1400, 0x4 | 0x1, 1), (1900, 0x40, 0)])
    last: dict[str, float] = {}
    enough = threading.Event()

    def read() -> dict[str, float]:
        nonlocal last
        for clock, reasons, others in readings:
            last = {"sm_mhz": clock, "memory_mhz": 1593, "watts": 650, "celsius": 70}
            last |= {"reasons": reasons, "others": others}
            return last
        enough.set()
        return last

    with CardWindow(read, every=0.001) as window:
        assert enough.wait(10)
    assert window.found["sm_mhz"] == [1400, 1900, 1980]
    assert window.found["throttled"] == ["power cap", "thermal slowdown (hardware)"]
    assert window.found["disturbed"][-1] == "1 other processes on the card"


def test_a_card_is_cool_when_nothing_slows_it_and_it_is_no_hotter_than_before():
    state = {"sm_mhz": 1900, "memory_mhz": 1593, "watts": 300, "celsius": 60, "reasons": 0x1, "others": 0}
    now = dict(state)
    with CardWindow(lambda: dict(now), every=10) as window:
        pass
    assert window.is_cool()
    now["celsius"] = 61
    assert not window.is_cool()
    now |= {"celsius": 60, "reasons": 0x40}
    assert not window.is_cool()


def test_the_driver_is_asked_for_the_card_by_its_uuid():
    asked: list[bytes] = []
    running = [4_000_001]  # the test itself, by the number that it has outside a container

    def store(value: int):
        def answer(*given) -> int:
            ctypes.cast(given[-1], ctypes.POINTER(ctypes.c_uint)).contents.value = value
            return 0

        return answer

    def handle(uuid: bytes, card: object) -> int:
        asked.append(uuid)
        return 0 if uuid == b"GPU-1" else 6

    def processes(card: object, count, found) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint)).contents.value = len(running)
        for place, pid in enumerate(running):
            found[place].pid = pid
        return 0

    nvml = SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetClockInfo=store(1500),
        nvmlDeviceGetPowerUsage=store(350_000),
        nvmlDeviceGetTemperature=store(61),
        nvmlDeviceGetCurrentClocksThrottleReasons=store(0x4),
        nvmlDeviceGetComputeRunningProcesses_v3=processes,
    )
    state = {"sm_mhz": 1500, "memory_mhz": 1500, "watts": 350, "celsius": 61, "reasons": 4, "others": 0}
    read = nvml_reader("GPU-1", nvml)
    assert read() == state
    running.append(4_000_002)
    assert read() == state | {"others": 1}
    running.clear()
    assert read() == state
    with pytest.raises(OSError, match="answered 6"):
        nvml_reader("GPU-2", nvml)


class FakeCuda:
    """Events that read a clock, and a card with a cache of 3 MiB."""

    def __init__(self, clock: FakeClock) -> None:
        def event(enable_timing: bool) -> SimpleNamespace:
            made = SimpleNamespace(at=0.0, synchronize=lambda: None)
            made.record = lambda: setattr(made, "at", clock())
            made.elapsed_time = lambda other: (other.at - made.at) * 1e3
            return made

        self.Event = event
        self.synchronize = lambda device: None
        self.get_device_properties = lambda device: SimpleNamespace(L2_cache_size=3 << 20)


def test_events_time_the_device_and_the_host_is_kept_apart():
    clock = FakeClock()
    timer = EventTimer(torch.device("cuda"), FakeCuda(clock))
    assert timer.sample(lambda: setattr(clock, "now", clock.now + 0.004)) == pytest.approx(4.0)
    assert len(timer.launches) == 1
    assert 0 <= timer.launches[0] < 1000


def test_the_flush_overwrites_twice_the_cards_own_cache():
    flush = cache_flusher(torch.device("cuda"), FakeCuda(FakeClock()))
    assert flush is not None
    scratch = flush()
    assert isinstance(scratch, torch.Tensor)
    assert scratch.numel() == 6 << 20
    assert cache_flusher(CPU) is None


def in_a_graph(monkeypatch, capture, clock=None, **changed):
    """Samples of 0.05 ms by events, of which 0.01 ms are of kernels; a replay holds ten calls."""
    monkeypatch.setattr("attnlab.probes.timing.capture", capture)
    seen = {"conditions": {"disturbed": ["later"]}}
    monkeypatch.setattr("attnlab.probes.timing.watched", lambda take, device: (take(), seen))
    clock = clock or FakeClock()
    detail = {
        "device_ms": 0.01,
        "cache": "L2 overwritten before each sample",
        "conditions": {"disturbed": []},
    }
    given = {"alone": True, "copies": None} | changed
    timer = WallTimer(clock)
    step = lambda: None  # noqa: E731
    return in_graph(step, [0.05, 0.06, 0.05], detail, timer, torch.device("cuda"), **given)


def test_a_short_call_is_worth_its_graph_and_the_events_and_the_gap_stand_beside(monkeypatch):
    clock = FakeClock()

    def capture(step, spent, device, *, copies, cuda):
        return Replay(lambda: setattr(clock, "now", clock.now + 1e-4), 10, "cold: 4 sets")

    samples, more = in_a_graph(monkeypatch, capture, clock)
    assert samples == pytest.approx([0.01] * 3)
    assert (more["timer"], more["cache"], more["graph"]) == ("CUDA graph", "cold: 4 sets", {"calls": 10})
    assert more["launch_gap_ms"] == pytest.approx(0.04)
    assert more["conditions"] == {"disturbed": ["later"]}
    assert more["events"]["samples"] == [0.05, 0.06, 0.05]
    assert more["events"]["conditions"] == {"disturbed": []}


def test_a_short_call_without_a_graph_keeps_its_events_and_says_why(monkeypatch):
    def capture(*given, **more):
        raise NotCaptured("it waits")

    samples, more = in_a_graph(monkeypatch, capture)
    assert samples == [0.05, 0.06, 0.05]
    assert more == {"graph": {"not_captured": "it waits"}}
    _, more = in_a_graph(monkeypatch, capture, alone=False)
    assert more == {"graph": {"not_captured": "something has to be prepared before each call"}}

    def empty(*given, **more):
        return Replay(lambda: None, 10, "warm")

    samples, more = in_a_graph(monkeypatch, empty)
    assert samples == [0.05, 0.06, 0.05]
    assert "takes 0 ms where the profiler saw 0.01 ms" in more["graph"]["not_captured"]
