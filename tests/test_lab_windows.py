"""A clock that falls: waiting until it is back, timing once more, and peaks at the clock that was seen."""

import pytest
import torch

from attnlab.probes.cooling import COOL_SECONDS, cool_down
from attnlab.probes.peaks import peak_flops
from attnlab.probes.windows import clock_of, watched

CPU = torch.device("cpu")


class Windows:
    """A window for each turn; its findings are given."""

    def __init__(self, *found: dict) -> None:
        self._found = iter(found)
        self.found: dict = {}

    def __call__(self, device: torch.device):
        return self

    def __enter__(self):
        self.found = next(self._found)
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def is_cool(self) -> bool:
        return True


def test_a_window_in_which_the_clock_fell_is_taken_once_more_and_nothing_is_left_out():
    takes = iter([[9.0, 9.5], [5.0, 5.1]])
    hot, cool = {"throttled": ["power cap"]}, {"throttled": []}
    samples, detail = watched(
        lambda: next(takes), CPU, watch=Windows(hot, cool), cool=lambda cooled: {"cooled": cooled()}
    )
    assert samples == [5.0, 5.1]
    assert detail["conditions"] is cool
    assert detail["before_cool_down"] == {"samples": [9.0, 9.5], "conditions": hot, "cooled": True}


def test_a_device_that_stays_hot_keeps_the_second_window_with_its_reason():
    takes = iter([[9.0], [9.1]])
    hot = {"throttled": ["power cap"]}
    samples, detail = watched(lambda: next(takes), CPU, watch=Windows(hot, hot), cool=lambda cooled: {})
    assert samples == [9.1]
    assert detail["conditions"]["throttled"] == ["power cap"]


def test_a_cool_window_is_taken_once():
    takes = iter([[1.0]])
    samples, detail = watched(lambda: next(takes), CPU, watch=Windows({"throttled": []}))
    assert samples == [1.0]
    assert set(detail) == {"conditions"}


def test_a_wait_ends_when_it_is_cool_and_after_its_time_at_most():
    now, answers = 0.0, iter([False, False, True])

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    cooled = cool_down(lambda: next(answers), clock=lambda: now, wait=wait)
    assert cooled == {"cooled": True, "waited_s": pytest.approx(0.5)}
    now = 0.0
    hot = cool_down(lambda: False, clock=lambda: now, wait=wait)
    assert hot["cooled"] is False
    assert hot["waited_s"] == pytest.approx(COOL_SECONDS)


def test_the_clock_of_a_window_is_a_cards_median_or_a_processors_last():
    assert clock_of({"sm_mhz": [1200, 1755, 1980]}) == 1755
    assert clock_of({"mhz": [3100.0, 2900.0]}) == 2900
    assert clock_of({"mhz": [None, None]}) is None
    assert clock_of({"not_known": "no counters"}) is None


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "boost", "datasheet"),
    [((8, 0), 108, 1410, 312e12), ((9, 0), 132, 1830, 989e12), ((10, 0), 148, 1850, 2250e12)],
)
def test_a_peak_at_the_boost_clock_is_the_datasheets(capability, multiprocessors, boost, datasheet):
    assert peak_flops(capability, multiprocessors, torch.bfloat16, boost) == pytest.approx(
        datasheet, rel=0.01
    )
    half = peak_flops(capability, multiprocessors, torch.float16, boost / 2)
    assert half == pytest.approx(datasheet / 2, rel=0.01)


def test_no_peak_is_made_up_for_what_is_not_known():
    assert peak_flops((8, 6), 84, torch.float16, 1700) is None
    assert peak_flops((9, 0), 132, torch.float64, 1700) is None
