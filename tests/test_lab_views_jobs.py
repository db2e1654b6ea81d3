"""Laws of background work: done once, asked for until it is there, what it raises is said and tried again."""

import threading

import pytest

from attnlab.views.jobs import Jobs


def test_who_asks_hears_how_far_it_is_and_then_gets_the_one_result():
    jobs: Jobs[str] = Jobs()
    go, begun = threading.Event(), threading.Event()
    calls = []

    def work(progress):
        calls.append(1)
        progress(0.25)
        begun.set()
        assert go.wait(30)
        return "made"

    assert jobs.ask("key", work, 0.0).result is None
    assert begun.wait(30)
    assert jobs.ask("key", work, 0.0) == (None, 0.25)
    go.set()
    assert jobs.ask("key", work, 30) == ("made", 1.0)
    assert jobs.ask("key", work, 0.0) == ("made", 1.0)
    assert calls == [1]


@pytest.mark.parametrize("error", [ValueError("made to fail"), TimeoutError("its own")])
def test_what_the_work_raises_is_raised_and_the_next_asker_tries_again(error):
    jobs: Jobs[int] = Jobs()

    def broken(progress):
        raise error

    with pytest.raises(type(error), match=str(error)):
        jobs.ask("key", broken, 30)
    assert jobs.ask("key", lambda progress: 3, 30) == (3, 1.0)


def test_only_the_newest_results_are_kept():
    jobs: Jobs[int] = Jobs(keep=2)
    made = []

    def work(value):
        return lambda progress: made.append(value) or value

    for value in (1, 2, 3, 3, 1):
        assert jobs.ask(value, work(value), 30).result == value
    assert made == [1, 2, 3, 1]


def test_a_cancelled_job_stops_where_it_next_says_how_far_it_is_and_can_be_asked_for_again():
    jobs: Jobs[str] = Jobs()
    go, begun, stopped = threading.Event(), threading.Event(), threading.Event()

    def endless(progress):
        begun.set()
        assert go.wait(30)
        try:
            progress(0.5)
        except BaseException:
            stopped.set()
            raise
        return "not stopped"

    assert jobs.ask("key", endless, 0.0).result is None
    assert begun.wait(30)
    assert jobs.ask("waiting", lambda progress: "never begun", 0.0).result is None
    assert jobs.cancel("key")
    assert jobs.cancel("waiting")
    assert not jobs.cancel("key")
    go.set()
    assert stopped.wait(30)
    assert jobs.ask("key", lambda progress: "again", 30) == ("again", 1.0)
    assert not jobs.cancel("key")


def test_who_waits_for_what_another_cancels_asks_again():
    jobs: Jobs[str] = Jobs()
    go, begun = threading.Event(), threading.Event()

    def work(progress):
        begun.set()
        assert go.wait(30)
        progress(0.5)
        return "made"

    heard = []
    other = threading.Thread(target=lambda: heard.append(jobs.ask("key", work, 30)))
    other.start()
    assert begun.wait(30)
    assert jobs.cancel("key")
    go.set()
    other.join(30)
    assert heard == [(None, 0.0)]
