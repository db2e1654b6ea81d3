"""The queue page in a browser: live, selectable, and its address shows what it shows."""

import re

import pytest
from playwright.sync_api import expect

from attnlab_storage import queue
from attnlab_storage.listing import runs_of

# Gradio's own statistics of its events use what pandas has deprecated
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
expect.set_options(timeout=60_000)  # a busy machine is no reason to fail


# what Gradio says of the event stream that a page leaves behind
LEAVING = ("AbortError", "Connection errored out")


@pytest.fixture
def runs(sqlite_store, point):
    points = [point(mechanism=name) for name in ("multi_head", "flash", "sliding_window", "grouped_query")]
    spec = {"name": "<img src=x onerror=alert(1)>"}
    return queue.submit(sqlite_store, name=spec["name"], spec=spec, spec_hash="0" * 64, points=points).run_ids


@pytest.fixture
def page(serve, browse, sqlite_store, runs):
    opened = browse(serve(sqlite_store) + "/queue", expect=LEAVING)
    expect(row(opened, runs[0])).to_be_visible()
    return opened


def row(page, run):
    return page.locator(f"tr[data-run='{run}']")


def test_the_page_follows_a_run_by_itself(page, runs, sqlite_store):
    expect(row(page, runs[1])).to_contain_text("queued")
    claim = queue.claim(sqlite_store, "tests", run_id=runs[1])
    assert claim is not None
    queue.progress(sqlite_store, claim, "measuring", 3, 7)
    expect(row(page, runs[1])).to_contain_text("measuring 3/7")
    queue.finish(
        sqlite_store, claim, "succeeded", summary={"latency_ms": 12.5, "implementation": "sdpa_flash"}
    )
    expect(row(page, runs[1])).to_contain_text("12.5 ms")
    expect(row(page, runs[1])).to_contain_text("auto → sdpa_flash")


def test_select_cancel_and_undo(page, runs, sqlite_store):
    row(page, runs[0]).get_by_role("checkbox").click()
    expect(page.get_by_text("1 selected")).to_be_visible()
    row(page, runs[2]).get_by_role("checkbox").click(modifiers=["Shift"])
    expect(page.get_by_text("3 selected")).to_be_visible()
    expect(row(page, runs[1]).get_by_role("checkbox")).to_be_checked()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.get_by_text("3 cancelled.")).to_be_visible()
    assert [run.state for run in runs_of(sqlite_store, run_ids=runs)] == ["cancelled"] * 3 + ["queued"]
    page.get_by_role("button", name="Undo: put 3 back in the queue").click()
    expect(page.get_by_text("3 are back.")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Clear").click()
    expect(row(page, runs[1]).get_by_role("checkbox")).not_to_be_checked()


def test_a_row_opens_its_run(page, runs):
    row(page, runs[3]).get_by_text("grouped_query").click()
    page.wait_for_url(f"**/experiment?id=1&run={runs[3]}")


def test_compare_opens_the_selected_runs(page, runs):
    for run in runs[:2]:
        row(page, run).get_by_role("checkbox").click()
    expect(page.get_by_text("2 selected")).to_be_visible()
    page.get_by_role("toolbar").get_by_role("link", name="Compare").click()
    page.wait_for_url(f"**/compare?runs={runs[0]},{runs[1]}")


def test_filters_are_in_the_address_and_come_back_from_it(page, runs):
    page.get_by_label("Search").fill("flash")
    page.get_by_label("Search").press("Enter")
    expect(row(page, runs[0])).to_have_count(0)
    page.wait_for_url("**/queue?q=flash")
    page.get_by_role("button", name=re.compile("^queued")).click()
    page.wait_for_url("**/queue?q=flash&state=queued")
    page.reload()
    expect(row(page, runs[1])).to_be_visible()
    expect(row(page, runs[0])).to_have_count(0)
    expect(page.get_by_label("Search")).to_have_value("flash")
    expect(page.get_by_role("button", name=re.compile("^queued"))).to_have_attribute("aria-pressed", "true")


def test_pause_stops_the_queue_and_says_so(page, sqlite_store):
    page.get_by_role("button", name="Pause queue").click()
    expect(page.get_by_text("The queue is paused")).to_be_visible()
    assert queue.paused(sqlite_store)
    page.get_by_role("button", name="Resume queue").click()
    expect(page.get_by_text("The queue is paused")).to_have_count(0)


def test_a_search_that_is_typed_stays_with_the_click_that_follows(page, runs):
    page.get_by_label("Search").press_sequentially("flash")
    expect(row(page, runs[0])).to_have_count(0)
    page.get_by_role("button", name=re.compile("^queued")).click()
    page.wait_for_url("**/queue?q=flash&state=queued")
    expect(page.get_by_role("button", name=re.compile("^queued"))).to_have_attribute("aria-pressed", "true")
