"""Laws of the image view: its colours are the weights of the chosen patch, and a click or an arrow chooses another."""

import pytest
from page_fixtures import IDLE

from attnlab.views.head_tiles import head_tiles
from attnlab.views.viewport import find_trace

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pictured(serve_runs):
    """A digit that a vision transformer read, and a bare neighborhood in two dimensions."""
    return serve_runs(
        digit={
            "model": "vit-digits",
            "input": {"image": "digit-3"},
            "vary": {"mechanism": ["multi_head"]},
        },
        window={
            "module": {"dim": 24, "num_heads": 3, "causal": False},
            "vary": {"mechanism": [{"neighborhood": {"dims": 2, "kernel_size": 3}}], "sequence_length": [63]},
        },
    )


@pytest.fixture
def open_image(pictured, browse_idle):
    def open_page(name="digit", query="layer=1&head=2", **options):
        return browse_idle(pictured.link(name, f"view=image&{query}"), **options)

    return open_page


def query_words(page):
    return page.locator('[data-part="query"]').inner_text()


def test_the_readout_is_the_weight_of_the_patch_under_the_pointer(open_image, pictured):
    page = open_image(query="layer=1&head=2&token=11")
    weights = head_tiles(pictured.store, pictured.runs["digit"].id, 1, (11, 12))[2, 0]
    canvas = page.locator('canvas[data-part="large"]')
    box = canvas.bounding_box()
    side = round((len(weights) - 1) ** 0.5)
    row, col = 2, 1
    canvas.hover(position={"x": (col + 0.5) * box["width"] / side, "y": (row + 0.5) * box["height"] / side})
    page.get_by_text(f"patch {row},{col}", exact=False).first.wait_for()
    said = page.locator('[data-part="read"] b').inner_text()
    assert float(said.replace("−", "-")) == pytest.approx(weights[1 + row * side + col], rel=0.06)
    top = page.locator('[data-part="top"] .at-read b').first.inner_text()
    assert float(top) == pytest.approx(weights.max(), rel=1e-5)


def test_a_click_and_the_arrow_keys_choose_the_query_and_the_link_keeps_it(open_image):
    page = open_image()
    canvas = page.locator('canvas[data-part="large"]')
    box = canvas.bounding_box()
    canvas.click(position={"x": 2, "y": box["height"] - 2})
    page.wait_for_url("**token=*")
    page.wait_for_function(IDLE)
    last = query_words(page)
    assert last.startswith("patch ")
    assert last.endswith(",0")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(IDLE)
    row = int(last.split()[1].split(",")[0])
    page.get_by_text(f"what patch {row - 1},1 attends to").wait_for()
    page.wait_for_url(f"**token={1 + (row - 1) * 4 + 1}*")
    page.reload()
    page.wait_for_function(IDLE)
    assert query_words(page) == f"patch {row - 1},1"


def test_every_head_stands_beside_the_chosen_one_and_the_class_token_is_a_query(open_image, pictured):
    page = open_image()
    heads = page.locator(".at-image-head")
    assert heads.count() == find_trace(pictured.store, pictured.runs["digit"].id, 1)[1].heads
    heads.nth(0).click()
    page.get_by_text("L1H0 · what").wait_for()
    assert heads.nth(0).get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="[CLS]").click()
    page.get_by_text("L1H0 · what [CLS] attends to").wait_for()


def test_the_window_of_a_neighborhood_is_drawn_where_it_is(open_image):
    """A patch outside of the window is hatched, inside it has the colour of its weight."""
    page = open_image("window", "layer=0&head=1&token=31")
    canvas = page.locator('canvas[data-part="large"]')
    box = canvas.bounding_box()
    read = page.locator('[data-part="read"]')
    for (row, col), inside in {(3, 3): True, (2, 4): True, (1, 3): False, (3, 6): False}.items():
        canvas.hover(position={"x": (col + 0.5) * box["width"] / 9, "y": (row + 0.5) * box["height"] / 7})
        page.get_by_text(f"patch {row},{col}", exact=False).first.wait_for()
        assert ("masked" in read.inner_text()) is not inside


def test_a_text_has_no_image_view_and_says_why(served, browse):
    traced = served.traced
    page = browse(f"{served.address}/experiment?id={traced.experiment_id}&run={traced.run_ids[0]}&view=image")
    page.get_by_text("This run read no picture.").wait_for()


def test_the_view_is_downloaded_as_a_figure_with_every_head(open_image, tmp_path):
    page = open_image(query="layer=1&head=2&token=11&scale=linear")
    path = tmp_path / "view"
    for form, start in {"PDF": b"%PDF", "PNG": b"\x89PNG", "SVG": b"<?xml"}.items():
        with page.expect_download() as download:
            page.locator('[data-part="files"]').get_by_text(form, exact=True).click()
        download.value.save_as(path)
        assert path.read_bytes().startswith(start)
    words = path.read_text()
    assert "what patch (2, 2) attends to" in words
    assert "L1H3" in words
