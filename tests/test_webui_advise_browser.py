"""The Advise page in a browser: from the first answer to a recommendation, New experiment and the queue."""

import pytest
from playwright.sync_api import expect

from attnlab_storage.listing import count_runs, list_experiments

# Gradio's own statistics of its events use what pandas has deprecated
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
expect.set_options(timeout=60_000)  # a busy machine is no reason to fail

# what Gradio says of the event stream that a page leaves behind
LEAVING = ("AbortError", "Connection errored out")


def set_number(page, field, value):
    page.locator(f"#advise-{field} input").fill(value)
    page.locator(f"#advise-{field} input").press("Tab")


def test_from_an_answer_to_runs_in_the_queue(serve, browse, sqlite_store):
    page = browse(serve(sqlite_store) + "/advise", expect=LEAVING)
    expect(page.locator("#advise-main")).to_contain_text("PagedAttention")
    page.locator("#advise-goal").get_by_label("training a large language model").check()
    expect(page.locator("#advise-main .at-steps")).to_contain_text("training a large language model")
    expect(page.locator("#advise-scarce")).to_have_count(0)
    page.locator("#advise-goal").get_by_label("serving, inference").check()
    page.locator("#advise-scarce").get_by_label("time to each token").check()
    expect(page.locator("#advise-main .at-steps")).to_contain_text("time to each token")
    expect(page.locator("#advise-main .at-part").first).to_be_visible()

    cache = page.locator("#advise-cache")
    expect(cache).to_contain_text("4.3 GB")  # 2 * 32 layers * 32 heads * 128 * 2 bytes * 8,192 tokens
    set_number(page, "layers", "16")
    expect(cache).to_contain_text("2.1 GB")
    expect(cache).not_to_contain_text("4.3 GB")
    page.wait_for_url("**/advise?*scarce=latency*layers=16*")

    asked = page.locator("#advise-trial p").first.inner_text()
    words = page.locator("#advise-trial .at-muted").inner_text()
    runs = int(words.split()[0])
    page.get_by_role("link", name="Put it into New experiment").click()
    page.wait_for_url("**/?advice=1&*")
    expect(page.locator("#new-notice")).to_contain_text(asked)
    expect(page.locator("#new-name input")).to_have_value("advice: serving, latency")
    expect(page.locator("#new-problems")).to_be_empty()
    expect(page.locator("#new-cost")).to_contain_text(f"{runs}runs")
    page.locator("#new-queue").click()
    expect(page.locator("#new-result")).to_contain_text(f"{runs} runs are queued")
    assert count_runs(sqlite_store) == runs
    assert list_experiments(sqlite_store).rows[0].name == "advice: serving, latency"


def test_what_cannot_be_advised_is_said_and_not_queued(serve, browse, sqlite_store):
    page = browse(serve(sqlite_store) + "/advise?goal=<b>x</b>", dark=True)
    expect(page.locator("#advise-notice")).to_contain_text("got '<b>x</b>'")
    set_number(page, "context", "many")
    expect(page.locator("#advise-notice")).to_contain_text("many")
    expect(page.locator("#advise-queue")).to_be_disabled()
    set_number(page, "context", "32k")
    expect(page.locator("#advise-cache")).to_contain_text("32,768 tokens")
    expect(page.locator("#advise-notice")).to_be_empty()
    page.locator("#advise-queue").click()
    expect(page.locator("#advise-result")).to_contain_text("runs are queued")
    assert count_runs(sqlite_store) > 0


def test_a_question_that_an_address_leaves_open_is_asked_and_answered(serve, browse, sqlite_store):
    page = browse(serve(sqlite_store) + "/advise?goal=vision&context=4096", expect=LEAVING)
    expect(page.locator("#advise-notice")).to_contain_text("What is the task?")
    expect(page.locator("#advise-task input:checked")).to_have_count(0)
    expect(page.locator("#advise-main .at-part")).to_have_count(0)
    expect(page.locator("#advise-queue")).to_be_disabled()
    page.locator("#advise-task").get_by_label("detection", exact=False).check()
    expect(page.locator("#advise-main .at-part").first).to_contain_text("Cross-attention")
    expect(page.locator("#advise-notice")).not_to_contain_text("What is the task?")
    expect(page.locator("#advise-queue")).to_be_enabled()
