"""Laws of every page: an answer that comes late takes back nothing that was chosen while it was on its way."""

import re

import pytest
from playwright.sync_api import Page, Route, expect

from attnlab_storage import queue
from attnlab_storage.database import open_store

# Gradio's own statistics of its events use what pandas has deprecated
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
expect.set_options(timeout=60_000)  # a busy machine is no reason to fail

JOIN = "**/queue/join*"


class Held:
    """The next request of a page for an answer is kept back until it is let go; those after it pass."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.routes: list[Route] = []
        page.route(JOIN, self._keep)

    def _keep(self, route: Route) -> None:
        if self.routes:
            route.continue_()
        else:
            self.routes.append(route)

    def wait(self) -> None:
        for _ in range(1000):
            if self.routes:
                return
            self.page.wait_for_timeout(20)
        pytest.fail("the page asked for nothing within 20 s")

    def release(self) -> None:
        self.wait()
        self.routes[0].continue_()


@pytest.fixture(scope="module")
def lab(sqlite_template, tmp_path_factory, make_traced, serve_store):
    """The address of two succeeded runs, a failed one, and one that waits for ever, so that the pages keep asking."""
    path = tmp_path_factory.mktemp("late") / "attnlab.db"
    path.write_bytes(sqlite_template.read_bytes())
    with open_store(f"sqlite:///{path}") as store:
        made = make_traced(store, tokens=30, layers=1, outcomes=["failed"])
        queue.retry(store, made.run_ids[2:])
        yield serve_store(store)


def test_runs_tabs_and_charts_that_are_picked_during_a_tick_stay_picked(lab, browse):
    page = browse(f"{lab}/experiment?id=1")
    expect(page.locator("#experiment-facts")).to_contain_text("#1 ")
    held = Held(page)
    held.wait()  # a tick: one of the runs has not ended
    page.get_by_role("row", name=re.compile("sliding_window")).click()
    page.get_by_role("row", name=re.compile("queued")).click()
    page.get_by_role("tab", name="Memory over time").click()
    page.get_by_role("tab", name="Charts of all runs").click()
    held.release()
    expect(page.locator("#experiment-facts")).to_contain_text("#3 ")
    expect(page.locator("tr[aria-current=true]")).to_contain_text("#3")
    expect(page.locator("#experiment-chart-plot .js-plotly-plot")).to_be_visible()
    expect(page.get_by_role("tab", name="Charts of all runs")).to_have_attribute("aria-selected", "true")

    held = Held(page)
    page.get_by_label("Chart", exact=True).click()
    page.get_by_role("option", name="Memory", exact=True).click()
    held.wait()
    page.get_by_label("Chart", exact=True).click()
    page.get_by_role("option", name="Throughput", exact=True).click()
    held.release()
    expect(page.locator("#experiment-chart-plot .gtitle")).to_contain_text("Throughput")
    expect(page.get_by_label("Chart", exact=True)).to_have_value("Throughput")
    assert "chart=throughput" in page.url


def test_every_click_in_the_queue_counts_though_an_answer_is_on_its_way(lab, browse):
    page = browse(f"{lab}/queue")
    boxes = [page.locator(f"tr[data-run='{run}']").get_by_role("checkbox") for run in (1, 2, 3)]
    expect(boxes[0]).to_be_visible()
    held = Held(page)
    held.wait()
    for box in boxes:
        box.click()
    boxes[1].click()
    page.get_by_label("Search").fill("made up")
    held.release()
    expect(page.get_by_text("2 selected")).to_be_visible()
    expect(boxes[0]).to_be_checked()
    expect(boxes[1]).not_to_be_checked()
    expect(page.get_by_label("Search")).to_have_value("made up")

    held = Held(page)
    page.get_by_label("Search").fill("nothing like it")
    held.wait()
    page.get_by_label("Search").fill("")
    page.get_by_role("button", name=re.compile("^succeeded")).click()
    held.release()
    expect(boxes[2]).to_have_count(0)
    expect(boxes[0]).to_be_checked()
    assert page.url.endswith("/queue?state=succeeded")


def test_runs_and_pair_of_a_comparison_are_the_last_ones_picked(lab, browse):
    page = browse(f"{lab}/compare?runs=1,2")
    page.wait_for_function("() => window.__attnlab?.panels().length === 3")
    held = Held(page)
    page.get_by_role("button", name="Swap A and B").click()
    held.wait()
    page.get_by_role("button", name="Swap A and B").click()
    page.get_by_role("button", name="Swap A and B").click()
    held.release()
    page.wait_for_function("() => window.__attnlab.panels()[2]?.key === 'difference 2 1'")
    assert page.url.endswith("runs=2,1") or "runs=2,1&" in page.url


def test_all_filters_of_the_kernels_hold_together(lab, browse):
    page = browse(f"{lab}/kernels")
    rows = page.locator("#kernels-table tbody tr")
    expect(rows.first).to_be_visible()
    held = Held(page)
    page.get_by_label("Name or form has").fill("sparse")
    held.wait()
    page.get_by_label("Card").click()
    page.get_by_role("option").nth(1).click()
    page.get_by_label("Name or form has").fill("gradient")
    held.release()
    expect(page.locator("#kernels-table tbody tr", has_not_text="gradient")).to_have_count(0)
    card = page.get_by_label("Card").input_value().split(",")[0]
    expect(page.locator("#kernels-table tbody tr", has_not_text=card)).to_have_count(0)
    expect(rows.first).to_be_visible()


def test_the_catalog_shows_the_last_shape(lab, browse):
    page = browse(f"{lab}/mechanisms")
    expect(page.locator("#mechanisms")).to_contain_text("8,192 tokens")
    held = Held(page)
    page.get_by_label("Tokens").fill("4096")
    held.wait()
    page.get_by_label("Shape of").click()
    page.get_by_role("option", name="minilm-l6").click()
    page.get_by_label("Tokens").fill("300")
    held.release()
    expect(page.locator("#mechanisms")).to_contain_text("300 tokens")
    expect(page.get_by_label("Layers")).to_have_value("6")


def test_a_preset_that_is_chosen_while_another_is_drawn_is_shown(lab, browse):
    page = browse(f"{lab}/claims")
    expect(page.locator("#claims-head h1")).to_be_visible()
    radios = page.locator("#claims-preset input[type=radio]")
    held = Held(page)
    radios.nth(1).click()
    held.wait()
    radios.nth(2).click()
    held.release()
    words = page.locator("#claims-preset label").nth(2).inner_text().strip()
    expect(page.locator("#claims-head h1")).to_contain_text(words)
    expect(radios.nth(2)).to_be_checked()


def test_an_advice_is_about_the_last_answers(lab, browse):
    page = browse(f"{lab}/advise")
    expect(page.locator("#advise-main")).to_contain_text("PagedAttention")
    held = Held(page)
    page.locator("#advise-goal").get_by_label("training a large language model").check()
    held.wait()
    page.locator("#advise-goal").get_by_label("serving, inference").check()
    page.get_by_label("Take the shape of").click()
    page.get_by_role("option").nth(1).click()
    page.locator("#advise-layers input").fill("16")
    page.locator("#advise-layers input").press("Tab")
    held.release()
    expect(page.locator("#advise-main .at-steps")).to_contain_text("serving")
    page.wait_for_url("**/advise?*layers=16*")
    expect(page.locator("#advise-layers input")).to_have_value("16")
    expect(page.locator("#advise-trial a").first).to_have_attribute("href", re.compile("layers=16"))


def test_edits_on_both_sides_of_the_form_are_kept(lab, browse):
    page = browse(lab)
    yaml = page.locator("#new-yaml .cm-content")
    expect(page.locator("#new-cost")).to_contain_text("runs")
    held = Held(page)
    page.locator("#new-name input").fill("first")
    held.wait()
    page.locator("#new-lengths input").fill("5, 6")
    page.locator("#new-mechanism-grouped_query input").check()
    held.release()
    for part in ("name: first", "- grouped_query", "[5, 6]"):
        expect(yaml).to_contain_text(part)
    expect(page.locator("#new-lengths input")).to_have_value("5, 6")

    held = Held(page)
    page.locator("#new-name input").fill("second")
    held.wait()
    yaml.click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text("name: third\nmodel: minilm-l6\nvary:\n  mechanism: [multi_head]\n")
    held.release()
    expect(page.locator("#new-lengths input")).to_have_value("")
    expect(page.locator("#new-mechanism-grouped_query input")).not_to_be_checked()
    expect(yaml).to_contain_text("name: third")
