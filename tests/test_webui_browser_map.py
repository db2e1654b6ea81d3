"""Laws of the map in a real browser: the pixels are the weights, the gestures move them, the address keeps them."""

import itertools
import re

import numpy as np
import pytest
from page_fixtures import wait

from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.viewport import viewport
from attnlab_storage import results
from attnlab_webui.theme import STATIC_URL

pytestmark = pytest.mark.browser

EPSILON = 2e-6


@pytest.fixture
def traced(served):
    return served.traced


@pytest.fixture
def lab(open_view):
    """Opens the experiment page of the made-up experiment and waits for its map."""

    def open_map(run: int = 0, query: str = "", **options):
        page = open_view(query, run, **options)
        wait(page)
        page.locator("canvas.at-map").scroll_into_view_if_needed()
        return page

    return open_map


def panel(page, name: str, index: int = 0):
    return page.evaluate(f"() => window.__attnlab.panels()[{index}].{name}")


def tile(page, index: int = 0) -> np.ndarray:
    found = page.evaluate(
        f"() => {{ const t = window.__attnlab.panels()[{index}].tile;"
        " return {height: t.height, width: t.width, values: [...t.values].map(v => Number.isNaN(v) ? null : v)}; }"
    )
    return np.array(found["values"], dtype=float).reshape(found["height"], found["width"])


def place(page, row: float, col: float) -> tuple[float, float]:
    """Page coordinates of the middle of a cell."""
    box = page.locator("canvas.at-map").first.bounding_box()
    window, plot = panel(page, "window"), panel(page, "plot")
    x = plot["x"] + (col + 0.5 - window["c0"]) * plot["w"] / (window["c1"] - window["c0"])
    y = plot["y"] + (row + 0.5 - window["r0"]) * plot["h"] / (window["r1"] - window["r0"])
    return box["x"] + x, box["y"] + y


def colour_at(page, row: int, col: int, index: int = 0) -> list[int]:
    """The colour that is really on the canvas in the middle of a cell, away from its number and its grid."""
    return page.evaluate(
        """([row, col, index]) => {
          const panel = window.__attnlab.panels()[index];
          const canvas = document.querySelectorAll("canvas.at-map")[index];
          const scale = canvas.width / canvas.clientWidth;
          const {window: w, plot} = panel;
          const x = plot.x + (col + 0.25 - w.c0) * plot.w / (w.c1 - w.c0);
          const y = plot.y + (row + 0.25 - w.r0) * plot.h / (w.r1 - w.r0);
          return [...canvas.getContext("2d").getImageData(x * scale, y * scale, 1, 1).data.slice(0, 3)];
        }""",
        [row, col, index],
    )


def expected_colour(page, value: float, index: int = 0) -> list[int]:
    return page.evaluate(f"(value) => window.__attnlab.panels()[{index}].colourOf(value)", value)


def region(page) -> dict[str, float]:
    return panel(page, "window")


def test_the_canvas_shows_the_exact_weights_in_the_colours_of_the_scale(lab, traced):
    page = lab(query="layer=1&head=2&rows=40:60&cols=30:50")
    reference = traced.reference(traced.run_ids[0], 1, 2)
    values = tile(page)
    assert values.shape == (77, 77)  # a small map comes whole and exact
    seen = np.tri(77, dtype=bool)
    np.testing.assert_allclose(values[seen], reference[seen], atol=EPSILON)
    assert np.isnan(values[~seen]).all()
    colours = set()
    for row, col in [(41, 31), (45, 45), (59, 33), (50, 49), (59, 49)]:
        shown = colour_at(page, row, col)
        assert shown == expected_colour(page, float(values[row, col])), (row, col)
        colours.add(tuple(shown))
    assert len(colours) > 2


def test_a_masked_cell_does_not_look_like_a_weight_of_zero(lab):
    page = lab(query="layer=0&head=0&rows=10:30&cols=10:30")
    masked = {tuple(colour_at(page, row, col)) for row, col in [(10, 25), (12, 29), (14, 20), (11, 22)]}
    assert tuple(expected_colour(page, 0.0)) not in masked


def test_another_head_and_another_layer_draw_another_picture(lab, traced):
    page = lab(query="layer=0&head=0")
    first = tile(page)
    page.get_by_role("radio", name="head 3").click()
    page.wait_for_function("() => window.__attnlab.panels()[0].title.startsWith('L0H3')")
    wait(page)
    np.testing.assert_allclose(
        np.nan_to_num(tile(page)), traced.reference(traced.run_ids[0], 0, 3), atol=EPSILON
    )
    page.get_by_role("button", name="next layer").click()
    page.wait_for_function("() => window.__attnlab.panels()[0].title.startsWith('L1H3')")
    wait(page)
    assert not np.array_equal(np.nan_to_num(first), np.nan_to_num(tile(page)))
    page.wait_for_url(re.compile(r"(?=.*[?&]layer=1(&|$)).*[?&]head=3(&|$)"))


def test_the_wheel_zooms_at_the_cursor_and_the_address_keeps_the_region(lab):
    page = lab(query="layer=0&head=0")
    page.mouse.move(*place(page, 50, 20))
    for _ in range(4):
        page.mouse.wheel(0, -200)
    wait(page)
    zoomed = region(page)
    assert zoomed["r1"] - zoomed["r0"] < 40
    assert zoomed["r0"] <= 50 < zoomed["r1"]
    assert zoomed["c0"] <= 20 < zoomed["c1"]
    rows = f"rows={zoomed['r0']:.0f}:{zoomed['r1']:.0f}"
    page.wait_for_url(re.compile(rows))
    page.reload()
    wait(page)
    assert region(page) == zoomed


def test_drag_pans_shift_drag_zooms_into_a_box_and_double_click_shows_everything(lab):
    page = lab(query="layer=0&head=0&rows=20:40&cols=20:40")
    x, y = place(page, 30, 30)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 120, y + 60, steps=6)
    page.mouse.up()
    wait(page)
    panned = region(page)
    assert panned["c0"] < 20
    assert panned["r0"] < 20
    assert panned["c1"] - panned["c0"] == 20
    page.mouse.dblclick(*place(page, panned["r0"] + 3, panned["c0"] + 3))
    wait(page)
    assert region(page) == {"r0": 0, "r1": 77, "c0": 0, "c1": 77}
    page.keyboard.down("Shift")
    page.mouse.move(*place(page, 30, 5))
    page.mouse.down()
    page.mouse.move(*place(page, 50, 25), steps=5)
    page.mouse.up()
    page.keyboard.up("Shift")
    wait(page)
    assert region(page) == {"r0": 30, "r1": 51, "c0": 5, "c1": 26}


def test_everything_can_be_done_with_the_keyboard(lab, traced):
    page = lab(query="layer=0&head=0")
    page.locator("canvas.at-map").focus()
    for _ in range(3):
        page.keyboard.press("+")
    wait(page)
    zoomed = region(page)
    assert zoomed["r1"] - zoomed["r0"] < 40
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    wait(page)
    moved = region(page)
    assert moved["r0"] > zoomed["r0"]
    assert moved["c0"] < zoomed["c0"]
    page.keyboard.press("0")
    wait(page)
    assert region(page)["r1"] == 77
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Shift+ArrowDown")
    readout = page.locator("[data-part=readout]")
    value = traced.reference(traced.run_ids[0], 0, 0)[39, 37]
    assert "·token39 (39)" in readout.inner_text()
    assert float(readout.locator(".at-weight b").inner_text()) == pytest.approx(value, rel=1e-4)
    page.keyboard.press("]")
    page.keyboard.press("}")
    page.wait_for_function("() => window.__attnlab.panels()[0].title.startsWith('L1H1')")
    page.keyboard.press("l")
    page.wait_for_function("() => window.__attnlab.panels()[0].scale.kind === 'linear'")


def test_pointing_reads_query_key_and_the_exact_weight(lab, traced):
    page = lab(query="layer=1&head=1")
    page.mouse.move(*place(page, 60, 12))
    readout = page.locator("[data-part=readout]")
    readout.get_by_text("·token60").wait_for()
    words = readout.inner_text()
    assert "query (from) ·token60 (60)" in words
    assert "key (to) ·token12 (12)" in words
    value = traced.reference(traced.run_ids[0], 1, 1)[60, 12]
    assert float(readout.locator(".at-weight b").inner_text()) == pytest.approx(value, rel=1e-4)
    page.mouse.move(*place(page, 12, 60))
    readout.get_by_text("masked").wait_for()


def test_a_pooled_map_asks_the_server_for_the_exact_weight(serve, browse, sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=700, layers=1)
    page = browse(f"{serve(made.store)}/experiment?id={made.experiment_id}")
    wait(page)
    assert panel(page, "tile.exact") is False
    assert panel(page, "tile.rounded") is True  # as many bits as fit into one step
    pooled = tile(page)
    wanted = viewport(made.store, made.run_ids[0], 0, 0, None, None, *pooled.shape).values
    np.testing.assert_allclose(np.nan_to_num(pooled), wanted, rtol=2**-5, atol=1e-30)
    page.locator("canvas.at-map").scroll_into_view_if_needed()
    page.mouse.move(*place(page, 500, 200))
    number = page.locator("[data-part=readout] .at-weight b")
    page.wait_for_function(
        "() => /^[0-9]/.test(document.querySelector('[data-part=readout] .at-weight b')?.textContent)"
    )
    row, col = page.evaluate(
        "() => { const c = [...window.__attnlab.views][0].view.hovered; return [c.row, c.col]; }"
    )
    reference = made.reference(made.run_ids[0], 0, 0)
    assert float(number.inner_text()) == pytest.approx(reference[row, col], rel=1e-3)
    for _ in range(8):
        page.mouse.wheel(0, -240)
    wait(page)
    assert panel(page, "tile.exact") is True
    part = {name: int(value) for name, value in region(page).items()}
    shown = np.nan_to_num(tile(page))
    expected = reference[part["r0"] : part["r1"], part["c0"] : part["c1"]]
    np.testing.assert_allclose(shown, expected, atol=EPSILON)


def test_a_token_that_looks_like_a_script_is_only_text(lab):
    page = lab(query="layer=0&head=0&rows=67:77&cols=67:77")
    page.mouse.move(*place(page, 75, 70))
    page.locator("[data-part=readout]").get_by_text("<script>alert(1)</script>").wait_for()
    assert page.evaluate("() => document.querySelectorAll('.at-view script').length") == 0


def test_scale_pooling_normalising_and_clipping_are_in_the_address(lab):
    page = lab(query="layer=0&head=1&scale=linear&norm=row&clip=99&colours=viridis")
    assert panel(page, "scale.kind") == "linear"
    assert panel(page, "scale.top") == 1
    page.get_by_label("normalise").select_option("none")
    page.wait_for_function("() => window.__attnlab.panels()[0].scale.top < 1")
    page.wait_for_url(re.compile(r"(?!.*norm=)scale=linear.*clip=99"))
    assert page.evaluate("() => document.querySelectorAll('.at-scale-ticks span').length") >= 5


# what is written on the canvas: the words, their colour and the colour under them
WRITTEN = """() => new Promise(done => {
  const write = CanvasRenderingContext2D.prototype.fillText, found = [];
  CanvasRenderingContext2D.prototype.fillText = function (words, x, y) {
    const scale = this.canvas.width / this.canvas.clientWidth;
    const at = (dx, dy) => [...this.getImageData((x + dx) * scale, (y + dy) * scale, 1, 1).data.slice(0, 3)];
    if (this.textAlign === "center" && this.canvas.className === "at-map")
      found.push([words, this.fillStyle, at(-18, -9)]);
    write.call(this, words, x, y);
  };
  [...window.__attnlab.views][0].view.panels[0].draw();
  requestAnimationFrame(() => requestAnimationFrame(() => done(found)));
})"""


def test_each_row_uses_the_whole_scale_for_what_is_in_view_and_its_numbers_can_be_read(lab, traced):
    page = lab(query="layer=1&head=2&rows=50:58&cols=10:18&scale=linear&norm=row")
    part = traced.reference(traced.run_ids[0], 1, 2)[50:58, 10:18]
    shares = part / part.max(axis=1, keepdims=True)
    for row, col in [(0, 0), (3, 5), (7, 7), *enumerate(shares.argmax(axis=1).tolist())]:
        shown, wanted = colour_at(page, 50 + row, 10 + col), expected_colour(page, float(shares[row, col]))
        np.testing.assert_allclose(shown, wanted, atol=2)
    assert "in view" in page.locator("[data-part=bar]").inner_text()
    page.evaluate("() => { [...window.__attnlab.views][0].view.controls.minimap.drawNow(); }")
    whole = page.evaluate("() => [...window.__attnlab.panels()[0].base.wholeBitmap.tops]")
    tops = traced.reference(traced.run_ids[0], 1, 2).max(axis=1)
    np.testing.assert_allclose(whole, tops, atol=EPSILON)
    numbers = [found for found in page.evaluate(WRITTEN) if re.match(r"[0-9]", found[0])]
    assert len(numbers) >= 64
    for words, ink, under in numbers:
        assert contrast([int(ink[at : at + 2], 16) for at in (1, 3, 5)], under) >= 4.5, (words, ink, under)
    page.locator("canvas.at-map").press("0")
    page.wait_for_function("() => !document.querySelector('[data-part=bar]').textContent.includes('in view')")


@pytest.mark.parametrize("query", ["clip=95&scale=linear", "clip=99&scale=log", "scale=linear", ""])
def test_the_numbers_of_the_colour_bar_do_not_touch(lab, query):
    page = lab(query=f"layer=1&head=2&{query}")
    spans = page.evaluate(
        """() => [...document.querySelectorAll('[data-part=bar] .at-scale-ticks span')]
          .map(tick => tick.getBoundingClientRect()).map(({left, right}) => [left, right])"""
    )
    assert len(spans) >= 3
    for (_, right), (left, _) in itertools.pairwise(sorted(spans)):
        assert left >= right + 2, spans


def contrast(ink: list[int], under: list[int]) -> float:
    """The contrast ratio of WCAG 2.2 between two sRGB colours."""
    channels = np.array([ink, under]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return float((high + 0.05) / (low + 0.05))


def test_the_statistics_lead_to_a_head(lab):
    page = lab(query="layer=0&head=0")
    page.locator(".at-stats-top button").first.wait_for()
    name = page.locator(".at-stats-top button").first.inner_text().split()[0]
    page.locator(".at-stats-top button").first.click()
    page.wait_for_function("(name) => window.__attnlab.panels()[0].title.startsWith(name + ' ')", arg=name)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_light_and_dark_draw_different_pictures_and_can_be_switched(lab, dark):
    page = lab(query="layer=0&head=0&rows=40:50&cols=30:40", dark=dark)
    assert page.evaluate("() => document.body.classList.contains('dark')") is dark
    before = colour_at(page, 45, 35)
    page.get_by_role("button", name="Switch between light and dark").click()
    page.wait_for_function("(dark) => document.body.classList.contains('dark') !== dark", arg=dark)
    wait(page)
    assert colour_at(page, 45, 35) != before


def test_a_broken_answer_is_said_in_place_and_can_be_tried_again(lab):
    page = lab(query="layer=0&head=0", expect=["500", "503"])
    problem = '{"error": "the disk is on fire"}'
    page.route(
        "**/viewport*", lambda route: route.fulfill(status=503, body=problem, content_type="application/json")
    )
    page.get_by_role("radio", name="head 2").click()
    page.get_by_text("the disk is on fire").wait_for()
    page.unroute("**/viewport*")
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("the disk is on fire").wait_for(state="hidden")
    wait(page)
    assert panel(page, "error") is None


def test_only_the_newest_region_is_waited_for(serve, browse, sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=900, layers=1)
    page = browse(f"{serve(made.store)}/experiment?id={made.experiment_id}")
    wait(page)
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/viewport" in request.url else None)
    page.locator("canvas.at-map").scroll_into_view_if_needed()
    page.mouse.move(*place(page, 450, 300))
    for _ in range(24):
        page.mouse.wheel(0, -30)
    wait(page)
    assert len(asked) < 16  # throttled while it moves
    tile_rows = panel(page, "tile.rows")
    window = region(page)
    assert tile_rows == [window["r0"], window["r1"]]


def test_the_layout_fits_a_small_laptop(lab):
    page = lab(query="layer=0&head=0")
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= 1280
    for name in ("canvas.at-map", ".at-side", ".at-facts-column"):
        box = page.locator(name).first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 1280


def test_no_control_reaches_out_of_the_column_beside_the_map(lab):
    page = lab(width=1280)
    page.locator(".at-stats-top button").first.wait_for()
    # as wide as the widest of its choices, unless it is told to be narrower
    page.get_by_label("statistic").evaluate(
        "e => e.append(new Option('mass on the 5 heaviest columns of a head'))"
    )
    ends = page.evaluate(
        "() => [...document.querySelectorAll('.at-side select, .at-side button, .at-side a')]"
        ".filter(e => e.offsetParent).map(e => [e.getBoundingClientRect().right, e.ariaLabel ?? e.textContent])"
    )
    column = page.locator(".at-side").bounding_box()
    assert "order" in {name for _, name in ends}
    assert [name for end, name in ends if end > column["x"] + column["width"] + 0.5] == []


def test_strips_lie_beside_the_map_and_signed_heads_are_drawn_around_zero(sqlite_store, serve, browse):
    spec = {
        "name": "strips",
        "module": {"dim": 24, "num_heads": 2},
        "vary": {"mechanism": [{"ring": {"ring_size": 3}}, "differential"], "sequence_length": [30]},
        "record": ["maps"],
        "repeats": 1,
    }
    experiment = run_here(sqlite_store, parse_spec(spec))
    runs = [run.id for run in results.runs_of(sqlite_store, experiment_id=experiment)]
    address = serve(sqlite_store)
    page = browse(f"{address}/experiment?id={experiment}&run={runs[0]}&rows=0:10&cols=0:10")
    wait(page)
    page.locator(".at-overlay").first.wait_for()
    over = """([dx, dy]) => {
      const {plot} = window.__attnlab.panels()[0], canvas = document.querySelector("canvas.at-over");
      const scale = canvas.width / canvas.clientWidth;
      return canvas.getContext("2d").getImageData((plot.x + dx) * scale, (plot.y + dy) * scale, 1, 1).data[3];
    }"""
    page.wait_for_function(f"() => ({over})([40, -4]) === 255")
    assert [page.evaluate(over, at) for at in ([-4, 40], [40, 3], [3, 40])] == [255, 0, 0]
    page.get_by_label("query owners").uncheck()
    page.wait_for_function(f"() => ({over})([-4, 40]) === 0")

    page.goto(f"{address}/experiment?id={experiment}&run={runs[1]}")
    wait(page)
    page.wait_for_function(
        """() => {
          const canvas = document.querySelector(".at-head canvas");
          const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const at = (from, to) => data.filter((_, i) => i % 4 === from && data[i] > data[i - from + to] + 60).length;
          return at(2, 0) > 20 && at(0, 2) > 20; // blue and red
        }"""
    )


def test_each_compared_map_has_the_overlays_of_its_own_mechanism(sqlite_store, serve, browse):
    spec = {
        "name": "strips",
        "module": {"dim": 24, "num_heads": 2},
        "vary": {
            "mechanism": ["multi_head", {"ring": {"ring_size": 3}}, "differential"],
            "sequence_length": [30],
        },
        "record": ["maps"],
        "repeats": 1,
    }
    experiment = run_here(sqlite_store, parse_spec(spec))
    runs = [run.id for run in results.runs_of(sqlite_store, experiment_id=experiment)]
    page = browse(f"{serve(sqlite_store)}/compare?runs={','.join(map(str, runs))}")
    wait(page)
    page.get_by_text("over the maps").wait_for()
    strips = """() => window.__attnlab.panels().map(({plot}, i) => {
      const canvas = document.querySelectorAll("canvas.at-over")[i], scale = canvas.width / canvas.clientWidth;
      return canvas.getContext("2d").getImageData((plot.x - 4) * scale, (plot.y + 40) * scale, 1, 1).data[3];
    })"""
    page.wait_for_function(f"() => ({strips})()[1] === 255")
    assert page.evaluate(strips) == [0, 255, 0, 0]
    assert page.get_by_text(f"run {runs[2]}: first map − λ").is_visible()
    page.get_by_label("query owners").uncheck()
    page.wait_for_function(f"() => ({strips})()[1] === 0")


def test_tiles_are_remembered_within_a_budget_of_memory(served, browse):
    page = browse(f"{served.address}/claims")
    kept = page.evaluate(
        f"""async () => {{
          const {{ TileCache }} = await import("{STATIC_URL}/js/request.js");
          const cache = new TileCache();
          const tile = () => ({{ values: new Float32Array(512 * 512) }});
          for (let at = 0; at < 40; at++) cache.put(`t${{at % 30}}`, tile());
          const held = [...cache.tiles.values()].reduce((sum, {{ values }}) => sum + values.byteLength, 0);
          return [held, cache.bytes, cache.get("t9") !== undefined, cache.get("t10") === undefined];
        }}"""
    )
    assert 8e6 < kept[0] == kept[1] <= 16e6
    assert kept[2:] == [True, True]
