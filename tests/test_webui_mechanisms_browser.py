"""The Mechanisms and System pages in a browser."""

import pytest
from playwright.sync_api import expect

from attnlab_storage.control import dispatcher_beat

# Gradio's own statistics of its events use what pandas has deprecated
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
expect.set_options(timeout=60_000)  # a busy machine is no reason to fail


def test_an_open_row_stays_open_when_the_shape_changes(serve, browse, sqlite_store):
    page = browse(serve(sqlite_store) + "/mechanisms")
    record = page.locator("details#grouped_query")
    record.locator("summary").click()
    expect(record.get_by_text("Use in an experiment")).to_be_visible()
    before = record.locator("summary").inner_text()
    page.get_by_label("Tokens").fill("16384")
    expect(page.locator("#mechanisms")).to_contain_text("16,384 tokens")
    expect(record.get_by_text("Use in an experiment")).to_be_visible()
    assert record.locator("summary").inner_text() != before
    page.get_by_label("KV heads").fill("2")
    expect(page.locator("#mechanisms")).to_contain_text("KV heads must divide heads (9), got 2")
    page.get_by_label("KV heads").fill("1")
    expect(record.get_by_text("Use in an experiment")).to_be_visible()


def test_a_link_opens_its_mechanism_and_leads_to_an_experiment_with_it(serve, browse, sqlite_store):
    page = browse(
        serve(sqlite_store) + "/mechanisms#sliding_window", expect=("AbortError", "Connection errored out")
    )
    page.locator("details#sliding_window").get_by_role("link", name="Use in an experiment").click()
    page.wait_for_url("**/?mechanism=sliding_window")
    expect(page.locator("#new-yaml .cm-content")).to_contain_text("- sliding_window")
    expect(page.locator("#new-mechanism-sliding_window input")).to_be_checked()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_system_page_follows_a_dispatcher(serve, browse, sqlite_store, dark):
    page = browse(serve(sqlite_store) + "/system", dark=dark)
    expect(page.locator("#system")).to_contain_text("No dispatcher is running")
    dispatcher_beat(sqlite_store, "here:1:a", {"host": "<b>here</b>", "slots": 2, "nodes": []})
    expect(page.locator("#system")).to_contain_text("alive", timeout=10_000)
    expect(page.locator("#system")).to_contain_text("<b>here</b>")
