"""Laws of the grid: every head is there, order and filter follow the stored numbers, a click opens the map.

The strip of heads over the other views is filled as the grid is.
"""

import io
import re
import threading

import numpy as np
import pytest
from page_fixtures import IDLE
from safetensors.numpy import load

from attnlab.export.arrays import statistics_arrays
from attnlab.views import overview, pyramids
from attnlab.views.errors import ViewError
from attnlab_storage import results, tensors

pytestmark = pytest.mark.browser


@pytest.fixture
def grid(open_view):
    return lambda query="", **options: open_view(f"view=grid&{query}", **options)


@pytest.fixture
def entropy(served) -> dict[str, float]:
    """The stored entropy of every head by its name."""
    rows = results.measurements(served.traced.store, served.traced.run_ids[0], "entropy")
    return {f"L{row.layer}H{row.head}": row.value for row in rows}


def names(page) -> list[str]:
    tiles = page.locator(".at-tile:not(.at-faint)").all()
    return [f"L{tile.get_attribute('data-layer')}H{tile.get_attribute('data-head')}" for tile in tiles]


def test_every_head_has_a_picture_that_is_not_empty(grid):
    page = grid()
    assert names(page) == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    page.wait_for_function("() => document.querySelectorAll('.at-drawn').length === 8")
    colours = page.evaluate(
        "() => [...document.querySelectorAll('.at-tile canvas')].map(canvas =>"
        " new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, 48, 48).data.buffer)).size)"
    )
    assert min(colours) > 20


@pytest.mark.parametrize(("sort", "reverse"), [("high", True), ("low", False)])
def test_heads_are_sorted_by_the_chosen_statistic(grid, entropy, sort, reverse):
    page = grid()
    page.locator("[name=sort]").select_option(sort)
    assert names(page) == sorted(entropy, key=entropy.__getitem__, reverse=reverse)
    page.wait_for_url(re.compile(f"sort={sort}"))
    page.reload()
    page.wait_for_function(IDLE)
    assert names(page) == sorted(entropy, key=entropy.__getitem__, reverse=reverse)


def test_the_filter_keeps_the_heads_for_which_it_holds_and_a_link_carries_it(grid, entropy):
    middle = float(np.median(list(entropy.values())))
    page = grid(f"where=entropy > {middle:.6f} and entropy < 1")
    assert set(names(page)) == {name for name, value in entropy.items() if middle < value < 1}
    assert page.locator(".at-count").inner_text() == "4 of 8 heads"
    page.locator("[name=where]").fill("entropy > 9")
    page.locator("[name=sort]").select_option("high")
    page.get_by_text("No head of this run passes the filter.").wait_for()
    page.locator("[name=where]").fill("<img src=x> > 1")
    assert "a statistic, > or < and a number" in page.locator(".at-complaint").inner_text()
    page.locator("[name=where]").fill("sink > 1")
    assert page.locator(".at-complaint").inner_text() == 'no statistic "sink"; there are entropy'
    assert len(names(page)) == 8


def test_a_click_opens_the_map_of_that_head_and_back_returns_to_the_grid(grid):
    page = grid("sort=high")
    page.locator('.at-tile[data-layer="1"][data-head="2"]').click()
    page.wait_for_function("() => window.__attnlab.panels()[0]?.title.startsWith('L1H2')")
    assert re.search("layer=1&head=2", page.url)
    page.go_back()
    page.wait_for_function("() => document.querySelectorAll('.at-tile').length === 8")
    assert "view=grid" in page.url
    assert "sort=high" in page.url


def test_a_link_scrolls_to_its_head(grid):
    page = grid("layer=1&head=3", width=900, height=330)
    tile = page.locator(".at-tile.at-chosen")
    assert (tile.get_attribute("data-layer"), tile.get_attribute("data-head")) == ("1", "3")
    assert page.evaluate(
        "() => { const grid = document.querySelector('.at-grid').getBoundingClientRect();"
        " const tile = document.querySelector('.at-chosen').getBoundingClientRect();"
        " return tile.top >= grid.top && tile.bottom <= grid.bottom + 1; }"
    )


def test_arrow_keys_walk_over_the_heads_and_enter_opens_one(grid):
    page = grid("layer=0&head=1")
    page.locator('.at-tile[data-layer="0"][data-head="1"]').focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    page.wait_for_url(re.compile("layer=1&head=1"))
    page.keyboard.press("Enter")
    page.wait_for_function("() => window.__attnlab.panels()[0]?.title.startsWith('L1H1')")


def test_the_curve_has_a_dot_for_every_head_and_a_point_for_every_layer(grid, entropy):
    page = grid("layer=1&head=3", dark=True)
    assert page.locator(".at-curves circle").count() == 8
    points = page.locator(".at-curves-mean").get_attribute("points").split()
    heights = [float(point.split(",")[1]) for point in points]
    means = [np.mean([entropy[f"L{layer}H{head}"] for head in range(4)]) for layer in range(2)]
    assert (heights[0] < heights[1]) == (means[0] > means[1])  # y runs down
    assert page.locator(".at-curves-chosen title").text_content().startswith("L1H3 ")


def test_what_a_run_keeps_along_the_positions_is_drawn_for_the_chosen_head(serve, browse_idle, traced):
    run_id = traced.run_ids[0]
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    for layer in range(2):
        assert tensors.keep_derived(traced.store, run_id, 1, "row_entropy", layer, rows + layer)
    page = browse_idle(
        f"{serve(traced.store)}/experiment?id={traced.experiment_id}&run={run_id}&view=grid&layer=1&head=2"
    )
    place = page.locator('[data-part="positions"]')
    assert "L1H2 · entropy of each query, nats" in place.inner_text()
    line = place.locator("polyline").get_attribute("points").split()
    heights = [float(point.split(",")[1]) for point in line]
    assert heights == sorted(heights, reverse=True)  # 7, 8, 9: y runs down
    assert len(line) == 3
    page.locator(".at-stats-grid").focus()
    page.keyboard.press("ArrowUp")
    page.wait_for_function(
        "() => document.querySelector('[data-part=positions]').textContent.includes('L1H1')"
    )


def test_the_statistic_is_downloaded_as_a_figure(grid, tmp_path):
    page = grid("statistic=entropy")
    with page.expect_download() as download:
        page.locator('[data-part="files"]').get_by_text("SVG", exact=True).click()
    download.value.save_as(tmp_path / "view")
    assert "multi_head · entropy · made-up" in (tmp_path / "view").read_text()


@pytest.fixture
def long_maps(serve, browse, traced, monkeypatch):
    """Opens a view of maps that count as too long to be computed at a look: blocks of 4, made by ``build``."""
    monkeypatch.setattr(overview, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(overview, "EXACT_CELLS", 1000)

    def open_page(build, view="grid", **options):
        monkeypatch.setattr(pyramids, "build_pyramid", build)
        address = f"{serve(traced.store)}/experiment?id={traced.experiment_id}"
        return browse(f"{address}&run={traced.run_ids[0]}&layer=0&head=2&view={view}", **options)

    return open_page


def test_pictures_of_long_maps_are_built_on_first_look_with_progress_and_kept(long_maps, traced):
    go = threading.Event()

    def slow(full_map, progress):
        progress(0.25)
        assert go.wait(30)
        return overview.build_pyramid(full_map, progress)

    page = long_maps(slow)
    try:
        page.locator(".at-tile small").get_by_text("25 %").first.wait_for()
        words = page.locator("[data-part=building]")
        words.get_by_text("0 of 8 are there").wait_for()
        assert page.locator(".at-drawn").count() == 0
    finally:
        go.set()
    page.wait_for_function("() => document.querySelectorAll('.at-drawn').length === 8")
    page.wait_for_function(IDLE)
    assert words.inner_text() == ""
    assert set(page.locator(".at-tile :is(small, span)").all_inner_texts()) == {""}
    run = traced.run_ids[0]
    kept = tensors.read_tensor(traced.store, run, "thumbnail_max.2", 1, 0)
    dense = np.pad(traced.reference(run, 1, 2), (0, 3)).reshape(20, 4, 20, 4).max(axis=(1, 3))
    np.testing.assert_allclose(np.nan_to_num(kept), dense, atol=2e-6)


def test_a_picture_that_cannot_be_made_says_why_and_the_others_come(long_maps):
    broken = threading.Lock()

    def build(full_map, progress):
        if broken.acquire(blocking=False):
            raise ViewError("made to fail")
        return overview.build_pyramid(full_map, progress)

    page = long_maps(build, expect=["400"])
    page.wait_for_function("() => document.querySelectorAll('.at-drawn').length === 7")
    page.wait_for_function(IDLE)
    assert re.fullmatch(
        "No picture of L[01]H[0-3]: made to fail", page.locator("[data-part=building]").inner_text()
    )
    assert page.locator(".at-tile span").get_by_text("failed").count() == 1


CHIPS_DRAWN = """() => [...document.querySelectorAll(".at-head canvas")].map((canvas) =>
  new Set(new Uint32Array(canvas.getContext("2d").getImageData(0, 0, 80, 80).data.buffer)).size > 20)"""


@pytest.mark.parametrize("view", ["map", "token"])
def test_the_strip_of_a_long_layer_fills_head_by_head_and_holds_nobody_up(long_maps, view):
    go = threading.Event()

    def slow(full_map, progress):
        if threading.current_thread().name.startswith("attnlab-pictures"):
            progress(0.25)
            assert go.wait(30)
        return overview.build_pyramid(full_map, progress)

    page = long_maps(slow, view)
    words = page.locator(".at-heads-words")
    try:
        page.wait_for_function(IDLE)
        page.locator(".at-head small").get_by_text("25 %").wait_for()
        there = 1 if view == "map" else 0  # the map that is looked at is built at once
        words.get_by_text(f"{there} of 4 pictures").wait_for()
        assert page.evaluate(CHIPS_DRAWN) == [False, False, there == 1, False]
    finally:
        go.set()
    page.wait_for_function(f"() => ({CHIPS_DRAWN})().every(Boolean)")
    page.wait_for_function("() => document.querySelector('.at-heads-words').textContent === ''")
    assert set(page.locator(".at-head small").all_inner_texts()) == {""}


def test_a_head_of_the_strip_without_a_picture_says_why(long_maps, traced):
    broken = traced.reference(traced.run_ids[0], 0, 1)

    def build(full_map, progress):
        if np.allclose(full_map.tile(slice(0, 77), slice(0, 77)), broken, atol=1e-5):
            raise ViewError("made to fail")
        return overview.build_pyramid(full_map, progress)

    page = long_maps(build, "map", expect=["400"])
    page.locator(".at-heads-words").get_by_text("No picture of H1: made to fail").wait_for()
    page.wait_for_function(f"() => ({CHIPS_DRAWN})().filter(Boolean).length === 3")
    assert page.locator(".at-head small").all_inner_texts() == ["", "failed", "", ""]
    assert page.locator(".at-head").nth(1).get_attribute("title") == "L0H1: made to fail"


def test_the_pictures_of_a_short_layer_are_one_answer_for_the_strip_and_the_grid(serve, browse, traced):
    page = browse("about:blank")
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/thumbnails" in request.url else None)
    address = f"{serve(traced.store)}/experiment?id={traced.experiment_id}&run={traced.run_ids[0]}&layer=1"
    page.goto(address)
    page.wait_for_function(f"() => window.__attnlab?.idle && ({CHIPS_DRAWN})().every(Boolean)")
    assert len(asked) == 1
    page.get_by_role("tab", name="Grid").click()
    page.wait_for_function("() => document.querySelectorAll('.at-drawn').length === 8")
    assert [url for url in asked[1:] if "layer=0" not in url] == []


@pytest.mark.parametrize("form", ["NPZ", "safetensors"])
def test_the_numbers_of_every_head_are_downloaded_as_the_notebook_has_them(grid, served, tmp_path, form):
    page = grid()
    with page.expect_download() as download:
        page.get_by_role("link", name=form).click()
    download.value.save_as(tmp_path / "numbers")
    data = (tmp_path / "numbers").read_bytes()
    kept = np.load(io.BytesIO(data)) if form == "NPZ" else load(data)
    found = statistics_arrays(served.traced.store, served.traced.run_ids[0])
    for name, values in found.items():
        np.testing.assert_array_equal(kept[name], values)
