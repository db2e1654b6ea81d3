"""Laws of the way through the layers: what stands behind the tokens is the rollout, or the maximum flow."""

import json
import re

import networkx
import numpy as np
import pytest
from page_fixtures import IDLE

pytestmark = pytest.mark.browser


@pytest.fixture
def view(open_view):
    return lambda query="", **options: open_view(f"view=rollout&{query}", **options)


@pytest.fixture
def layers(served):
    """The layers of the made-up run with a residual share: float64 [layers, 77, 77]."""

    def mixed(residual: float) -> np.ndarray:
        traced, run_id = served.traced, served.traced.run_ids[0]
        maps = [[traced.reference(run_id, layer, head) for head in range(4)] for layer in range(2)]
        return (1 - residual) * np.mean(maps, axis=1) + residual * np.eye(77)

    return mixed


def shown(page) -> list[float]:
    titles = [token.get_attribute("title") for token in page.locator(".at-token").all()]
    return [float(title.rsplit(": ", 1)[1]) for title in titles]


def wait_for_position(page, row: int) -> None:
    chosen = "document.querySelector('.at-token[aria-selected=true]')?.dataset.at"
    page.wait_for_function(f"() => window.__attnlab.idle && {chosen} === '{row}'")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_shares_are_the_product_of_the_layers(view, layers, dark):
    page = view("token=60&residual=0.3", dark=dark)
    first, second = layers(0.3)
    np.testing.assert_allclose(shown(page), (second @ first)[60, :61], rtol=1e-3, atol=1e-6)
    page.wait_for_function(
        "() => { const c = document.querySelector('canvas.at-layers'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; return new Set(new Uint32Array(d.buffer)).size > 50; }"
    )


def test_another_residual_share_is_another_rollout_and_a_link_holds_it(view, layers):
    page = view("token=40")
    page.locator("[name=residual]").fill("0.9")
    page.wait_for_url(re.compile(r"residual=0\.9"))
    page.wait_for_function(IDLE)
    first, second = layers(0.9)
    np.testing.assert_allclose(shown(page), (second @ first)[40, :41], rtol=1e-3, atol=1e-6)
    page.reload()
    page.wait_for_function(IDLE)
    assert page.locator("[name=residual]").input_value() == "0.9"


def test_the_flow_is_that_of_networkx_over_the_chosen_tokens(view, layers):
    page = view("token=40&through=flow&from=30")
    graph = networkx.DiGraph()
    for layer, weights in enumerate(layers(0.5)):
        for row in range(30, 41):
            for col in range(30, row + 1):
                graph.add_edge((layer + 1, row), (layer, col), capacity=weights[row, col])
    wanted = [networkx.maximum_flow_value(graph, (2, 40), (0, token)) for token in range(30, 41)]
    np.testing.assert_allclose(shown(page), wanted, rtol=1e-3, atol=1e-6)
    assert "error at most" in page.locator(".at-readout").inner_text()
    page.locator("[name=from]").fill("35")
    page.locator("[name=from]").press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.at-token').length === 6")
    page.wait_for_url(re.compile("from=35"))


def test_a_row_of_all_positions_leads_to_a_position_and_back_returns(view):
    page = view("through=all")
    box = page.locator("canvas.at-layers").bounding_box()
    page.mouse.click(box["x"] + 100, box["y"] + 60)
    page.wait_for_function(f"{IDLE} && document.querySelectorAll('.at-token').length > 0")
    assert "through=all" not in page.url
    assert re.search(r"token=\d+", page.url)
    page.go_back()
    page.wait_for_function("() => window.__attnlab.idle && document.querySelector('[data-part=text]').hidden")
    assert "through=all" in page.url


@pytest.mark.parametrize("way", ["rollout", "all"])
def test_no_name_of_a_row_is_cut_off(view, way):
    page = view(f"through={way}")
    places = page.evaluate(
        """() => {
          const write = CanvasRenderingContext2D.prototype.fillText, found = [];
          CanvasRenderingContext2D.prototype.fillText = function (words, x, y) {
            const {actualBoundingBoxAscent: up, actualBoundingBoxDescent: down} = this.measureText(words);
            found.push([y - up, y + down, this.canvas.clientHeight]);
            write.call(this, words, x, y);
          };
          [...window.__attnlab.views][0].view.drawLayers();
          CanvasRenderingContext2D.prototype.fillText = write;
          return found;
        }"""
    )
    assert len(places) > 3
    assert all(top >= 0 and bottom <= height for top, bottom, height in places), places


def test_arrow_keys_and_clicks_move_the_position(view):
    page = view("token=20")
    page.locator("[data-part=text]").focus()
    page.keyboard.press("ArrowLeft")
    wait_for_position(page, 19)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    wait_for_position(page, 21)
    page.locator('.at-token[data-at="7"]').click()
    wait_for_position(page, 7)
    page.wait_for_url(re.compile("token=7"))


def changing_the_map(page, change) -> None:
    """Serves the facts of a run's maps changed: `change` gets the list of layers and gives another."""

    def answer(route):
        document = route.fetch().json()
        body = json.dumps(document | {"layers": change(document["layers"])})
        route.fulfill(body=body, content_type="application/json")

    page.route("**/api/v1/runs/*/map", answer)


def address(served) -> str:
    traced = served.traced
    return f"{served.address}/experiment?id={traced.experiment_id}&run={traced.run_ids[0]}&view=rollout"


def test_a_run_without_every_layer_says_why_there_is_none(served, browse):
    page = browse("about:blank")
    changing_the_map(page, lambda layers: layers[1:])
    page.goto(address(served))
    page.get_by_text("The way through the layers needs the maps of every layer").wait_for()
    page.get_by_role("button", name="Open the map").click()
    page.locator("canvas.at-map").wait_for()


def test_where_layers_look_ahead_later_tokens_are_shown_too(served, browse):
    page = browse("about:blank")
    changing_the_map(page, lambda layers: [layer | {"grows": False} for layer in layers])
    page.goto(f"{address(served)}&token=30")
    page.wait_for_function(IDLE)
    assert page.locator(".at-token").count() == 77
    assert shown(page)[31:] == [0.0] * 46


def test_what_cannot_be_worked_out_is_said_and_the_choices_stay(served, browse):
    page = browse("about:blank", expect=["status of 400"])
    page.route(
        "**/flow?**",
        lambda route: route.fulfill(status=400, json={"error": "a flow needs weights of at least 0"}),
    )
    page.goto(f"{address(served)}&token=30&through=flow")
    page.get_by_text("a flow needs weights of at least 0").wait_for()
    page.wait_for_function(IDLE)
    assert page.locator(".at-token:visible").count() == 0
    page.get_by_role("radio", name="rollout").click()
    wait_for_position(page, 30)
    assert page.locator(".at-complaint").is_hidden()


@pytest.mark.parametrize(("way", "words"), [("rollout", "rollout from"), ("flow", "maximum flow from")])
def test_the_text_is_downloaded_as_a_figure(view, tmp_path, way, words):
    page = view(f"token=20&residual=0.25&through={way}")
    with page.expect_download() as download:
        page.locator('[data-part="files"]').get_by_text("SVG", exact=True).click()
    download.value.save_as(tmp_path / "view")
    document = (tmp_path / "view").read_text()
    assert f"{words} ·token20 (20)" in document
    assert "residual share 0.25" in document


def test_what_is_worked_out_says_how_far_it_is_and_can_be_given_up(served, browse):
    page = browse("about:blank")
    stopped = []
    page.route("**/rollout?**", lambda route: route.fulfill(status=202, json={"building": 0.42}))
    page.route(
        "**/rollout/cancel?**",
        lambda route: (stopped.append(route.request.method), route.fulfill(json={"cancelled": True})),
    )
    page.goto(f"{address(served)}&through=all")
    page.get_by_text("Working through the layers: 42 %").wait_for()
    with page.expect_response("**/rollout/cancel?**"):
        page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_text("Given up.").wait_for()
    page.wait_for_function(IDLE)
    assert stopped == ["POST"]
    page.unroute("**/rollout?**")
    page.get_by_role("radio", name="rollout").click()
    wait_for_position(page, 76)
    assert page.locator(".at-complaint").is_hidden()


def test_all_positions_are_downloaded_as_picture_and_numbers(view):
    page = view("through=all&residual=0.25")
    links = page.locator('[data-part="files"] a')
    assert links.all_inner_texts() == ["PNG", "SVG", "PDF", "NPZ", "Parquet"]
    with page.expect_download() as download:
        links.get_by_text("NPZ", exact=True).click()
    assert download.value.suggested_filename.endswith("rollout-all.npz")
