"""Laws of the token view: the colours are the weights, they can be read, keys and clicks move the token."""

import re

import numpy as np
import pytest
from page_fixtures import IDLE

pytestmark = pytest.mark.browser

READ = """() => [...document.querySelectorAll('.at-token')].map(token => {
  const style = getComputedStyle(token);
  return {words: token.textContent, title: token.title, masked: token.classList.contains('at-masked'),
          back: style.backgroundColor, ink: style.color};
})"""


@pytest.fixture
def token_view(open_view):
    return lambda query="", **options: open_view(f"view=token&{query}", **options)


def shown(page) -> list[float | None]:
    """The weights that the tokens carry, None where masked."""
    titles = [token["title"].rsplit(": ", 1)[1] for token in page.evaluate(READ)]
    return [None if title == "masked" else float(title) for title in titles]


def luminance(colour: str) -> float:
    channels = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def wait_for_token(page, row: int) -> None:
    page.wait_for_function(
        f"() => window.__attnlab.idle && document.querySelector('.at-asked').textContent.includes('({row})')"
    )


def test_every_token_carries_its_weight_and_masked_ones_say_so(token_view, served):
    page = token_view("layer=1&head=2&token=40")
    reference = served.traced.reference(served.traced.run_ids[0], 1, 2)
    weights = shown(page)
    assert [weight is None for weight in weights] == [False] * 41 + [True] * 36
    np.testing.assert_allclose(
        [w for w in weights if w is not None], reference[40, :41], rtol=1e-3, atol=1e-6
    )
    assert page.evaluate(READ)[75]["words"] == "<script>alert(1)</script>"
    page.get_by_role("radio", name="attended by").click()
    received = shown(page)
    np.testing.assert_allclose(
        [w for w in received if w is not None], reference[40:, 40], rtol=1e-3, atol=1e-6
    )
    page.wait_for_url(re.compile("direction=received"))


def test_the_mean_of_all_heads_is_one_press_away(token_view, served):
    page = token_view("layer=0&head=1&token=30")
    page.get_by_role("button", name="Mean of heads").click()
    wait_for_token(page, 30)
    page.wait_for_function("() => document.querySelector('.at-name').textContent === 'L0 mean'")
    page.wait_for_function(IDLE)
    maps = [served.traced.reference(served.traced.run_ids[0], 0, head)[30, :31] for head in range(4)]
    found = [weight for weight in shown(page) if weight is not None]
    np.testing.assert_allclose(found, np.mean(maps, axis=0), rtol=1e-3, atol=1e-6)
    page.wait_for_url(re.compile("heads=mean"))
    page.get_by_role("radio", name="head 1").click()
    page.wait_for_function("() => document.querySelector('.at-name').textContent === 'L0H1'")


def test_heads_take_a_line_of_their_own_before_any_is_out_of_sight(token_view):
    page = token_view("layer=0&head=1&token=30")
    for width in (960, 1024, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        strip = page.locator(".at-heads").evaluate("(heads) => [heads.scrollWidth, heads.clientWidth]")
        assert strip[0] <= strip[1], f"heads are out of sight at {width} pixels"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("scale", ["log", "linear"])
def test_the_text_can_be_read_on_every_colour(token_view, dark, scale):
    page = token_view(f"layer=1&head=0&token=76&scale={scale}", dark=dark)
    tokens = page.evaluate(READ)
    assert len({token["back"] for token in tokens}) > 5
    for token in tokens:
        light, low = sorted((luminance(token["back"]), luminance(token["ink"])), reverse=True)
        assert (light + 0.05) / (low + 0.05) >= 4.5, token


def test_arrow_keys_move_the_token_and_a_click_is_a_step_back_undoes(token_view):
    page = token_view("layer=0&head=0&token=20")
    page.locator(".at-text").focus()
    page.keyboard.press("ArrowRight")
    wait_for_token(page, 21)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    wait_for_token(page, 19)
    page.keyboard.press("ArrowDown")
    page.wait_for_function(
        "() => Number(/\\((\\d+)\\)/.exec(document.querySelector('.at-asked').textContent)[1]) > 20"
    )
    page.keyboard.press("Home")
    wait_for_token(page, 0)
    page.locator('.at-token[data-at="50"]').click()
    wait_for_token(page, 50)
    page.wait_for_url(re.compile("token=50"))
    assert page.locator('.at-token[aria-selected="true"]').get_attribute("data-at") == "50"
    page.go_back()
    wait_for_token(page, 0)


def test_the_list_leads_with_the_largest_weights_and_goes_there(token_view, served):
    page = token_view("layer=1&head=3&token=60")
    reference = served.traced.reference(served.traced.run_ids[0], 1, 3)[60]
    first = page.locator('[data-part="sent"] .at-top-line').first
    assert f"({reference.argmax()})" in first.get_attribute("title")
    first.click()
    wait_for_token(page, int(reference.argmax()))


def test_the_text_is_downloaded_as_a_figure(token_view, tmp_path):
    page = token_view("layer=1&head=2&token=30&direction=received")
    with page.expect_download() as download:
        page.locator('[data-part="files"]').get_by_text("SVG", exact=True).click()
    download.value.save_as(tmp_path / "view")
    words = (tmp_path / "view").read_text()
    assert "L1H2" in words
    assert "(30) is attended by" in words
