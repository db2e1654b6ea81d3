"""Laws of the experiment and compare pages in a real browser."""

import io
import re

import numpy as np
import pytest
from page_fixtures import wait

from attnlab_storage import queue, results

pytestmark = pytest.mark.browser


@pytest.fixture
def traced(served):
    return served.traced


def panels(page, expression: str):
    return page.evaluate(f"() => window.__attnlab.panels().map(panel => {expression})")


# ---- compare


@pytest.fixture
def compared(served, traced, browse):
    def open_comparison(query: str = "layer=1&head=2", **options):
        a, b = traced.run_ids[:2]
        page = browse(f"{served.address}/compare?runs={a},{b}&{query}", **options)
        wait(page)
        return page

    return open_comparison


def test_two_maps_and_their_difference_share_one_scale(compared, traced):
    page = compared()
    a, b = traced.run_ids[:2]
    assert panels(page, "panel.key") == [f"run {a}", f"run {b}", f"difference {a} {b}"]
    first, second, difference = panels(page, "panel.scale.top")
    expected = max(traced.reference(run, 1, 2).max() for run in (a, b))
    assert first == second == pytest.approx(expected, rel=1e-5)
    gap = np.abs(traced.reference(a, 1, 2) - traced.reference(b, 1, 2)).max()
    assert difference == pytest.approx(gap, rel=1e-4)
    shown = page.evaluate(
        "() => [...window.__attnlab.panels()[2].tile.values].map(v => Number.isNaN(v) ? 0 : v)"
    )
    wanted = traced.reference(a, 1, 2) - traced.reference(b, 1, 2)
    np.testing.assert_allclose(np.reshape(shown, (77, 77)), wanted, atol=4e-6)


def test_zoom_and_crosshair_are_linked(compared, traced):
    page = compared()
    box = page.locator("canvas.at-map").nth(1).bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 250)
    for _ in range(4):
        page.mouse.wheel(0, -200)
    wait(page)
    windows = panels(page, "panel.window")
    assert windows[0] == windows[1] == windows[2]
    assert windows[0]["r1"] - windows[0]["r0"] < 40
    page.mouse.move(box["x"] + 210, box["y"] + 260)
    values = page.locator(".at-panel-value")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.at-panel-value')].every(place => place.textContent !== '')"
    )
    words = page.locator("[data-part=readout]").inner_text()
    row, col = (int(number) for number in re.findall(r"\((\d+)\)", words)[:2])
    for index, run in enumerate(traced.run_ids[:2]):
        text = values.nth(index).inner_text()
        exact = traced.reference(run, 1, 2)[row, col]
        assert text == "masked" or float(text) == pytest.approx(exact, rel=1e-3, abs=1e-9)


def test_the_address_holds_runs_layer_head_and_region(compared, traced):
    page = compared("layer=0&head=3&rows=10:40&cols=5:35&scale=linear")
    assert panels(page, "panel.window")[0] == {"r0": 10, "r1": 40, "c0": 5, "c1": 35}
    assert panels(page, "panel.scale.kind") == ["linear"] * 3
    assert "L0H3" in page.locator(".at-panel-title").first.inner_text()
    page.locator("canvas.at-map").first.dblclick(position={"x": 250, "y": 250})
    page.wait_for_url(re.compile(rf"runs={traced.run_ids[0]},{traced.run_ids[1]}&(?!.*rows=)"))


def test_blink_shows_the_other_map_in_the_first_place(compared):
    page = compared()
    title = page.locator(".at-panel-title").first
    own = title.inner_text()
    page.get_by_role("button", name="Blink").click()
    page.wait_for_function("(own) => document.querySelector('.at-panel-title').textContent !== own", arg=own)
    page.get_by_role("button", name="Blink").click()
    assert title.inner_text() == own


def test_swapping_turns_the_sign_of_the_difference(compared, traced):
    page = compared()
    a, b = traced.run_ids[:2]
    before = page.evaluate(
        "() => [...window.__attnlab.panels()[2].tile.values].filter(v => !Number.isNaN(v))"
    )
    page.get_by_role("button", name="Swap A and B").click()
    page.wait_for_function("(key) => window.__attnlab.panels()[2]?.key === key", arg=f"difference {b} {a}")
    wait(page)
    after = page.evaluate("() => [...window.__attnlab.panels()[2].tile.values].filter(v => !Number.isNaN(v))")
    np.testing.assert_allclose(before, np.negative(after), atol=1e-7)
    page.wait_for_url(re.compile(f"runs={b},{a}"))


def test_charts_and_the_table_of_differences_stand_below_the_maps(compared):
    page = compared()
    page.locator("#compare-latency .js-plotly-plot").wait_for()
    page.locator("#compare-memory .js-plotly-plot").wait_for()
    table = page.get_by_role("table", name="What differs")
    assert "sliding_window" in table.inner_text()
    page.get_by_text("properties are equal").click()
    page.get_by_role("table", name="What is equal").wait_for()


def test_this_view_is_downloaded_exactly(compared, traced):
    page = compared("layer=1&head=0&rows=20:50&cols=10:40")
    files = page.get_by_role("group", name="this view")
    with page.expect_download() as download:
        files.get_by_role("link", name="NPZ").click()
    content = download.value.path().read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for run in traced.run_ids[:2]:
            expected = traced.reference(run, 1, 0)[20:50, 10:40]
            np.testing.assert_allclose(arrays[f"map_{run}"], expected, atol=2e-6)
    for name, start in (("PNG", b"\x89PNG"), ("SVG", b"<?xml")):
        with page.expect_download() as download:
            files.get_by_role("link", name=name, exact=True).click()
        assert download.value.path().read_bytes().startswith(start)


def test_runs_are_picked_from_an_empty_page(served, traced, browse):
    page = browse(f"{served.address}/compare")
    page.get_by_role("link", name="Compare the latest").wait_for()
    picker = page.get_by_label("Runs")
    for run in traced.run_ids[:2]:
        picker.click()
        page.get_by_role("option", name=re.compile(rf"#{run} ")).click()
    page.keyboard.press("Escape")
    page.wait_for_url(re.compile(f"runs={traced.run_ids[0]},{traced.run_ids[1]}"))
    page.wait_for_function("() => window.__attnlab?.panels().length === 3")
    wait(page)


def test_a_comparison_of_different_sizes_says_so_above_the_maps(serve, browse, sqlite_store, make_traced):
    long, short = make_traced(sqlite_store, layers=1), make_traced(sqlite_store, tokens=30, layers=1)
    page = browse(f"{serve(sqlite_store)}/compare?runs={long.run_ids[0]},{short.run_ids[0]}&layer=0&head=0")
    page.get_by_text("The inputs differ in their tokens").first.wait_for()
    page.get_by_text("The sequence lengths differ").first.wait_for()
    wait(page)
    assert panels(page, "panel.error") == [None, None, None]


# ---- experiment


def test_a_click_on_a_run_shows_its_map_and_goes_into_the_address(served, traced, browse):
    page = browse(f"{served.address}/experiment?id={traced.experiment_id}&layer=1&head=1")
    wait(page)
    assert panels(page, "panel.key") == [f"run {traced.run_ids[0]}"]
    page.get_by_role("row", name=re.compile("sliding_window")).click()
    page.wait_for_function(
        "(key) => window.__attnlab.panels()[0]?.key === key", arg=f"run {traced.run_ids[1]}"
    )
    wait(page)
    assert f"run={traced.run_ids[1]}" in page.url
    assert panels(page, "panel.title")[0].startswith("L1H1")
    page.get_by_role("row", name=re.compile("flash.*failed")).click()
    page.get_by_text("There are no maps: this run failed.").wait_for()
    page.locator("#experiment-facts").get_by_text("made to be failed").wait_for()


def test_checked_runs_are_compared(served, traced, browse):
    page = browse(f"{served.address}/experiment?id={traced.experiment_id}")
    wait(page)
    for run in traced.run_ids[:2]:
        page.get_by_label(f"compare run {run}").check()
    page.get_by_role("link", name="Compare 2 runs").click()
    page.wait_for_url(re.compile(f"/compare\\?runs={traced.run_ids[0]},{traced.run_ids[1]}"))
    page.wait_for_function("() => window.__attnlab?.panels().length === 3")


def test_log_charts_environment_and_spec_are_one_click_away(served, traced, browse):
    page = browse(f"{served.address}/experiment?id={traced.experiment_id}")
    wait(page)
    page.get_by_role("tab", name="Environment").click()
    page.get_by_text("2.13.0").wait_for()
    page.get_by_role("tab", name="Spec").click()
    page.get_by_label("spec").wait_for()
    page.get_by_role("tab", name="Charts of all runs").click()
    page.locator("#experiment-chart-plot .js-plotly-plot").wait_for()


def test_an_unknown_experiment_offers_ways_out(served, traced, browse):
    page = browse(f"{served.address}/experiment?id=4711")
    page.get_by_role("heading", name="There is no experiment 4711").wait_for()
    page.get_by_role("link", name=f"#{traced.experiment_id}").click()
    wait(page)


def test_a_run_is_followed_while_it_runs_and_cancelled(serve, browse, sqlite_store, point):
    made = queue.submit(
        sqlite_store, name="live", spec={}, spec_hash="1", points=[point(sequence_length=30)] * 2
    )
    page = browse(f"{serve(sqlite_store)}/experiment?id={made.experiment_id}")
    page.get_by_text("Waiting in the queue.").wait_for()
    claim = queue.claim(sqlite_store, "tests")
    assert claim is not None
    queue.progress(sqlite_store, claim, "capture", 4, 16)
    queue.append_log(sqlite_store, claim, "layer 4 of 16 <b>done</b>\n")
    page.get_by_text("capture 4/16").first.wait_for()
    page.get_by_label("log").get_by_text("layer 4 of 16 <b>done</b>").wait_for()
    queue.progress(sqlite_store, claim, "capture", 12, 16)
    page.get_by_text("capture 12/16").first.wait_for()
    page.get_by_role("button", name="Cancel 2 runs").click()
    page.get_by_text("2 runs asked to end.").wait_for()
    page.get_by_text("ending, as asked").first.wait_for()
    queue.finish(sqlite_store, claim, "cancelled", reason="cancelled while capturing")
    page.get_by_text("cancelled while capturing").first.wait_for()
    page.get_by_role("button", name="Retry 2 runs").click()
    page.get_by_text("2 runs queued again.").wait_for()


def test_the_map_appears_when_the_run_has_ended(serve, browse, sqlite_store, make_traced):
    address = serve(sqlite_store)
    made = make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])
    queue.retry(sqlite_store, made.run_ids)
    page = browse(f"{address}/experiment?id={made.experiment_id}&run={made.run_ids[2]}")
    page.get_by_text("The maps appear here when the run has been through the queue.").wait_for()
    claim = queue.claim(sqlite_store, "tests", run_id=made.run_ids[2])
    assert claim is not None
    queue.finish(sqlite_store, claim, "out_of_memory", reason="needs 4.8 GB")
    page.get_by_text("There are no maps: this run ran out of memory.").wait_for()
    page.get_by_text("needs 4.8 GB").first.wait_for()


def test_deleting_can_be_undone(serve, browse, sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=30, layers=1)
    page = browse(f"{serve(sqlite_store)}/experiment?id={made.experiment_id}")
    wait(page)
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_text("Undo brings it back").wait_for()
    assert results.runs_of(sqlite_store, experiment_id=made.experiment_id) == []
    page.get_by_role("button", name="Undo delete").click()
    page.get_by_text("Restored.").wait_for()
    assert len(results.runs_of(sqlite_store, experiment_id=made.experiment_id)) == 2
    page.get_by_role("row", name=re.compile("sliding_window")).wait_for()


def test_clone_leads_to_the_form(served, traced, browse):
    page = browse(f"{served.address}/experiment?id={traced.experiment_id}")
    wait(page)
    page.locator("#clone").wait_for()
    target = page.evaluate(
        "() => document.querySelector('#clone').closest('a')?.href ?? document.querySelector('a#clone')?.href"
    )
    assert target.endswith(f"/?clone={traced.experiment_id}")
