"""Laws of the line view: lines are the weights from the threshold up, heads come and go, one token can stand alone."""

import re

import numpy as np
import pytest
from page_fixtures import IDLE

from attnlab.export.lines import head_colours
from attnlab_webui.theme import STATIC_URL

pytestmark = pytest.mark.browser

INKED = """() => {
  const canvas = document.querySelector('.at-lines canvas');
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let inked = 0;
  for (let at = 3; at < data.length; at += 4) inked += data[at] > 0;
  return inked;
}"""


@pytest.fixture
def lines(open_view):
    """Opens the line view of the made-up run and waits for its numbers."""

    def open_page(query: str = "", **options):
        page = open_view(f"view=lines&{query}", **options)
        page.evaluate(f"() => {{ window.__inked = {INKED}; }}")
        page.wait_for_function("() => window.__inked() > 0")
        return page

    return open_page


def numbers(page, side: str) -> list[float]:
    """The weights beside the tokens of a side, NaN where masked."""
    words = page.locator(f'[data-side="{side}"] .at-line-number').all_inner_texts()
    return [np.nan if word == "masked" else float(word) for word in words]


def token(page, side: str, at: int):
    return page.locator(f'[data-side="{side}"] .at-line-token').nth(at)


def test_a_held_token_shows_its_weights_in_numbers(lines, served):
    page = lines("layer=1&heads=2&rows=20:50&cols=10:60")
    reference = served.traced.reference(served.traced.run_ids[0], 1, 2)
    token(page, "query", 15).click()
    found = numbers(page, "key")
    wanted = np.where(np.arange(10, 60) <= 35, reference[35, 10:60], np.nan)
    np.testing.assert_allclose(found, wanted, rtol=6e-3)
    page.keyboard.press("Escape")
    token(page, "key", 5).click()
    received = np.where(np.arange(20, 50) >= 15, reference[20:50, 15], np.nan)
    np.testing.assert_allclose(numbers(page, "query"), received, rtol=6e-3)


def test_with_several_heads_the_numbers_are_their_mean(lines, served):
    page = lines("layer=0")
    token(page, "query", 9).click()
    maps = [served.traced.reference(served.traced.run_ids[0], 0, head)[9, :32] for head in range(4)]
    np.testing.assert_allclose(numbers(page, "key")[:10], np.mean(maps, axis=0)[:10], rtol=6e-3)
    page.get_by_role("button", name="head 1").dblclick()
    np.testing.assert_allclose(numbers(page, "key")[:10], maps[1][:10], rtol=6e-3)
    page.wait_for_url(re.compile("heads=1"))
    page.get_by_role("button", name="head 3").click()
    np.testing.assert_allclose(numbers(page, "key")[:10], (maps[1] + maps[3])[:10] / 2, rtol=6e-3)
    page.get_by_role("button", name="Mean", exact=True).click()
    np.testing.assert_allclose(numbers(page, "key")[:10], np.mean(maps, axis=0)[:10], rtol=6e-3)


def test_fewer_lines_remain_from_a_higher_threshold_and_none_from_one(lines):
    page = lines("layer=1&above=0")
    before = page.evaluate(INKED)
    slider = page.locator("[name=above]")
    slider.fill("0.3")
    some = page.evaluate(INKED)
    assert before > some > 0
    slider.fill("1")
    # a first token that sees itself alone has a weight of 1
    assert some > page.evaluate(INKED)
    page.wait_for_url(re.compile("above=1"))


def test_a_token_that_is_pointed_at_has_fewer_lines_than_all(lines):
    page = lines("layer=0&above=0", dark=True)
    whole = page.evaluate(INKED)
    token(page, "key", 3).hover()
    page.wait_for_function(f"() => window.__inked() < {whole / 2}")
    page.mouse.move(5, 5)
    page.wait_for_function(f"() => window.__inked() === {whole}")


def test_the_keyboard_walks_the_columns_and_holds(lines):
    page = lines("layer=0")
    token(page, "query", 0).focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate("() => document.activeElement.dataset.at") == "3"
    assert page.evaluate("() => document.activeElement.parentElement.dataset.side") == "key"
    page.keyboard.press("Enter")
    assert "held" in page.locator(".at-lines-view p.at-hint").inner_text()


def test_both_columns_move_together_and_never_hold_more_than_can_be_drawn(lines):
    page = lines("layer=0")
    page.get_by_role("spinbutton", name="queries from").fill("40")
    page.get_by_role("spinbutton", name="queries from").press("Enter")
    page.get_by_role("spinbutton", name="queries to").fill("77")
    page.get_by_role("spinbutton", name="queries to").press("Enter")
    page.wait_for_url(re.compile("rows=40:77&cols=40:77"))
    page.wait_for_function(IDLE)
    assert token(page, "key", 0).get_attribute("title").endswith("(40)")
    assert page.get_by_text("<script>alert(1)</script>").count() == 2
    page.goto(page.url.replace("rows=40:77&cols=40:77", "rows=2:77&cols=2:77"))
    page.wait_for_function(IDLE)
    assert page.locator('[data-side="query"] .at-line-token').count() == 64


def test_the_lines_are_downloaded_as_a_figure(lines, tmp_path):
    page = lines("layer=1&heads=2&rows=20:50&cols=10:60")
    with page.expect_download() as download:
        page.locator('[data-part="files"]').get_by_text("SVG", exact=True).click()
    download.value.save_as(tmp_path / "view")
    words = (tmp_path / "view").read_text()
    assert "layer 1, head 2" in words
    assert "queries 20:50 of 77 · keys 10:60 of 77" in words


def test_heads_that_are_shown_have_the_colours_of_the_file_on_the_page(lines):
    page = lines("layer=0", dark=True)
    for shown in ([*range(9)], [0, 8], [0, 32, 64], [*range(70)]):
        found = page.evaluate(
            f"""async (heads) => {{
              const {{ headColours }} = await import("{STATIC_URL}/js/head_colours.js");
              return [...headColours(heads).values()];
            }}""",
            shown,
        )
        assert found == head_colours(shown, "dark")
