"""The queue page without a browser: what is shown, and what each button does to the store."""

import time

import pytest
from sqlalchemy import insert

from attnlab_storage import queue
from attnlab_storage.control import dispatcher_beat, paused
from attnlab_storage.database import revision
from attnlab_storage.keeping import change_experiment
from attnlab_storage.listing import count_runs, get_run
from attnlab_storage.tables import Experiment, Run
from attnlab_webui import queue_table, queue_view
from attnlab_webui.pages import queue as page
from attnlab_webui.queue_view import PAGE_RUNS, View, act, look, looking_at, view_of

UNSEEN = (-1, False, 0.0)
HOSTILE = "<script>alert(1)</script>{{x}}${y}"


@pytest.fixture
def submit(sqlite_store, point):
    def call(count=3, name="an experiment", **changed):
        points = [point(**changed) for _ in range(count)]
        return queue.submit(
            sqlite_store, name=name, spec={"name": name}, spec_hash="0" * 64, points=points
        ).run_ids

    return call


def click(store, view, action, run=0, shift=False):
    return act(store, view, action, run, shift)


def end(store, run_id, outcome, **given):
    claim = queue.claim(store, "tests", run_id=run_id)
    assert claim is not None
    assert queue.finish(store, claim, outcome, **given)


def state(store, run_id):
    run = get_run(store, run_id)
    assert run is not None
    return run.state


def test_an_empty_queue_says_what_to_do(sqlite_store):
    html = look(sqlite_store, View()).html
    assert "Nothing in the queue yet" in html
    assert 'href="/"' in html


def test_a_filter_that_matches_nothing_says_so(sqlite_store, submit):
    submit()
    assert "No run matches" in look(sqlite_store, View(search="zebra")).html


def test_everything_a_person_wrote_is_escaped(sqlite_store, submit):
    ids = submit(
        2, name=HOSTILE, implementation=HOSTILE, dtype=HOSTILE, model=HOSTILE, parameters={HOSTILE: HOSTILE}
    )
    end(sqlite_store, ids[0], "failed", reason=HOSTILE)
    claim = queue.claim(sqlite_store, "tests", run_id=ids[1])
    assert claim is not None
    queue.progress(sqlite_store, claim, HOSTILE, 1, 2)
    html = look(sqlite_store, View(search=HOSTILE)).html
    assert html.count("&lt;script&gt;") > 6
    assert "<script" not in html


def test_running_shows_phase_and_count(sqlite_store, submit):
    claim = queue.claim(sqlite_store, "tests", run_id=submit(1)[0])
    assert claim is not None
    queue.progress(sqlite_store, claim, "maps, layer", 12, 30)
    shown = look(sqlite_store, View())
    assert "maps, layer" in shown.html
    assert "12/30" in shown.html
    assert shown.moving


def test_time_left_is_what_runs_like_it_took(sqlite_store, submit, monkeypatch):
    first, second = submit(2)
    end(sqlite_store, first, "succeeded")
    with sqlite_store.write() as session:
        done = session.get_one(Run, first)
        done.started_at, done.finished_at = 1000.0, 1090.0
    claim = queue.claim(sqlite_store, "tests", run_id=second)
    assert claim is not None
    run = get_run(sqlite_store, second)
    assert run is not None
    assert run.started_at is not None
    left = queue_view.remaining(sqlite_store, run, run.started_at + 30)
    assert left == pytest.approx(60)
    assert "left" in queue_table.time_cell(queue_table.Row(run, False, left), run.started_at + 30)


def test_time_left_is_unknown_without_a_like_run(sqlite_store, submit):
    queue.claim(sqlite_store, "tests", run_id=submit(1)[0])
    run = get_run(sqlite_store, 1)
    assert run is not None
    assert queue_view.remaining(sqlite_store, run, time.time()) is None


def test_states_filter_and_leave_again(sqlite_store, submit):
    ids = submit(3)
    end(sqlite_store, ids[0], "failed")
    failed = looking_at(View(), {"state": "failed"})
    assert look(sqlite_store, failed).ids == (ids[0],)
    both = looking_at(failed, {"state": "queued,failed"})
    assert len(look(sqlite_store, both).ids) == 3
    assert looking_at(both, {}).states == ()


def test_the_address_holds_the_filters():
    address = {"state": "queued,failed,nonsense", "mechanism": "flash", "model": "owner/name", "q": "a b&c"}
    view = View(states=("queued", "failed"), mechanism="flash", model="owner/name", search="a b&c")
    assert view_of(address) == view
    assert looking_at(view, address) is view


def test_pages_lead_there_and_back_without_a_gap(sqlite_store, submit):
    ids = submit(PAGE_RUNS * 2 + 7)
    view, seen = View(), []
    for _ in range(3):
        seen += look(sqlite_store, view).ids
        view = click(sqlite_store, view, "after")
    assert seen == sorted(ids, reverse=True)
    assert click(sqlite_store, view, "after") == view
    first = click(sqlite_store, click(sqlite_store, view, "before"), "before")
    assert look(sqlite_store, first).ids == tuple(seen[:PAGE_RUNS])


def test_another_filter_starts_on_the_first_page(sqlite_store, submit):
    submit(PAGE_RUNS + 1)
    view = click(sqlite_store, View(), "after")
    assert view.cursors
    assert not looking_at(view, {"state": "queued"}).cursors
    assert not looking_at(view, {"q": "an"}).cursors


def test_selection_by_click_shift_page_and_all(sqlite_store, submit):
    ids = submit(PAGE_RUNS + 5)
    newest = sorted(ids, reverse=True)
    view = click(sqlite_store, View(), "pick", run=newest[2])
    view = click(sqlite_store, view, "pick", run=newest[5], shift=True)
    assert view.selected == set(newest[2:6])
    assert click(sqlite_store, view, "pick", run=newest[3]).selected == set(newest[2:6]) - {newest[3]}
    whole_page = click(sqlite_store, view, "page")
    assert whole_page.selected == set(newest[:PAGE_RUNS])
    assert click(sqlite_store, whole_page, "page").selected == set()
    assert click(sqlite_store, view, "all").selected == set(ids)
    assert click(sqlite_store, view, "none").selected == set()


def test_all_selects_what_matches_the_filter_only(sqlite_store, submit):
    submit(2, mechanism="flash")
    others = submit(3, mechanism="multi_head")
    view = looking_at(View(), {"mechanism": "multi_head"})
    assert click(sqlite_store, view, "all").selected == set(others)


def test_cancel_and_undo(sqlite_store, submit):
    ids = submit(3)
    queue.claim(sqlite_store, "tests", run_id=ids[0])
    view = click(sqlite_store, View(selected=frozenset(ids)), "cancel")
    assert "3 cancelled" in view.said
    assert [state(sqlite_store, run) for run in ids] == ["running", "cancelled", "cancelled"]
    html = look(sqlite_store, view).html
    assert "cancelling" in html
    assert "Undo: put 2 back in the queue" in html
    view = click(sqlite_store, view, "undo")
    assert [state(sqlite_store, run) for run in ids] == ["running", "queued", "queued"]
    assert view.undo is None


def test_delete_and_undo(sqlite_store, submit):
    ids = submit(3)
    for run in ids:
        end(sqlite_store, run, "failed")
    view = click(sqlite_store, View(selected=frozenset(ids)), "delete")
    assert count_runs(sqlite_store) == 0
    assert view.selected == set()
    view = click(sqlite_store, view, "undo")
    assert "3 are back" in view.said
    assert count_runs(sqlite_store) == 3


def test_delete_spares_pinned_experiments_and_says_so(sqlite_store, submit):
    ids = submit(2)
    change_experiment(sqlite_store, 1, pinned=True)
    view = click(sqlite_store, View(selected=frozenset(ids)), "delete")
    assert "0 of 2 deleted" in view.said
    assert "pinned" in view.said
    assert view.undo is None


def test_retry_queues_what_ended_badly(sqlite_store, submit):
    ids = submit(2)
    end(sqlite_store, ids[0], "failed")
    end(sqlite_store, ids[1], "succeeded")
    view = click(sqlite_store, View(selected=frozenset(ids)), "retry")
    assert "1 of 2 queued again" in view.said
    assert [state(sqlite_store, run) for run in ids] == ["queued", "succeeded"]


def test_run_next_keeps_the_order_of_the_selected(sqlite_store, submit):
    ids = submit(4)
    click(sqlite_store, View(selected=frozenset(ids[2:])), "first")
    order = []
    while (claim := queue.claim(sqlite_store, "tests")) is not None:
        order.append(claim.run_id)
    assert order == [ids[2], ids[3], ids[0], ids[1]]


def test_compare_links_to_the_selected_runs(sqlite_store, submit):
    ids = submit(3)
    html = look(sqlite_store, View(selected=frozenset({ids[2], ids[0]}))).html
    assert f'href="/compare?runs={ids[0]},{ids[2]}"' in html
    for count in (1, 17):
        assert "/compare?" not in queue_table.toolbar(range(count), 20, "", "")


@pytest.mark.parametrize("action", ["cancel", "retry", "delete", "first", "undo", "nonsense", "None"])
def test_actions_without_a_selection_change_nothing(sqlite_store, submit, action):
    submit(2)
    before = revision(sqlite_store)
    assert click(sqlite_store, View(), action) == View()
    assert revision(sqlite_store) == before


@pytest.mark.parametrize(
    "sent", [None, [], "x", {"do": 7}, {"do": "pick", "run": "1; DROP"}, {"do": "pick", "run": True}]
)
def test_what_a_browser_may_never_send_is_harmless(sqlite_store, submit, sent):
    submit(1)
    html, _, view, _ = page.on_draw(sqlite_store, "", [sent], View(), UNSEEN)
    assert "an experiment" in html
    assert view.selected <= {0, 1}


def test_no_dispatcher_says_how_to_start_one(sqlite_store, submit):
    submit(2)
    assert "so 2 queued runs wait. Start one with: attnlab dispatch" in look(sqlite_store, View()).html
    dispatcher_beat(sqlite_store, "here:1:a", {})
    assert "No dispatcher" not in look(sqlite_store, View()).html


def test_what_no_machine_can_take_says_why(sqlite_store, submit):
    ids = submit(1, gpus=4)
    dispatcher_beat(
        sqlite_store, "here:1:a", {"waiting_for": {str(ids[0]): "needs 4 GPUs, the largest node has 1"}}
    )
    assert "needs 4 GPUs, the largest node has 1" in look(sqlite_store, View()).html


def test_pause_and_resume(sqlite_store, submit):
    submit(1)
    page.on_pause(sqlite_store)
    assert paused(sqlite_store)
    html, button, *_ = page.on_draw(sqlite_store, "", [], View(), UNSEEN)
    assert button["value"] == "Resume queue"
    assert "The queue is paused" in html
    page.on_pause(sqlite_store)
    assert not paused(sqlite_store)
    html, button, *_ = page.on_draw(sqlite_store, "", [], View(), UNSEEN)
    assert button["value"] == "Pause queue"
    assert "paused" not in html


def test_only_what_changed_is_drawn(sqlite_store, submit):
    end(sqlite_store, submit(1)[0], "succeeded")
    _, _, view, seen = page.on_draw(sqlite_store, "", [], View(), UNSEEN)
    assert all("__type__" in answer for answer in page.on_draw(sqlite_store, "", None, view, seen))
    submit(1)
    html, _, view, seen = page.on_draw(sqlite_store, "", [], view, seen)
    assert "2 runs" in html
    html, *_ = page.on_draw(sqlite_store, "", [], view, seen)
    assert isinstance(html, str), "a queued run's waiting time goes on"


def test_clicks_are_taken_in_order_each_on_what_its_reader_saw(sqlite_store, submit):
    ids = submit(3)
    end(sqlite_store, ids[0], "failed")
    clicks = [
        {"do": "page", "run": 0, "shift": False, "query": "?state=failed"},
        {"do": "pick", "run": ids[2], "shift": False, "query": "?state=queued"},
    ]
    html, _, view, _ = page.on_draw(sqlite_store, "?state=queued", clicks, View(), UNSEEN)
    assert view.selected == {ids[0], ids[2]}
    assert view.states == ("queued",)
    assert "2 selected" in html


def test_load_offers_the_mechanisms_and_models_there_are(sqlite_store, submit):
    submit(1, mechanism="flash", model=HOSTILE)
    mechanism, model = page.on_load(sqlite_store)
    assert mechanism["choices"] == ["any", "flash"]
    assert model["choices"] == ["any", HOSTILE]


@pytest.mark.slow
def test_all_of_fifty_thousand_runs_can_be_selected_and_shown(sqlite_store, point):
    facts = {"state": "succeeded", "priority": 0, "run_after": 0.0, "attempt": 1, "max_attempts": 3}
    facts |= {
        "timeout_seconds": 60.0,
        "created_at": 1.0,
        "started_at": 2.0,
        "finished_at": 3.0,
        "latency_ms": 4.0,
    }
    with sqlite_store.write() as session:
        for number in range(1, 501):
            session.add(Experiment(name=f"experiment {number}", spec={}, spec_hash="0", created_at=1.0))
        session.flush()
        rows = [point(position=i % 100, experiment_id=1 + i // 100, **facts) for i in range(50_000)]
        session.execute(insert(Run), rows)
    everything = click(sqlite_store, View(), "all")
    assert len(everything.selected) == 50_000
    look(sqlite_store, everything)
