"""Laws of the generation view: a step is a row of the map over the cache as it was then, and keys go through them."""

import pytest
from page_fixtures import IDLE

from attnlab.views.head_tiles import head_tiles

pytestmark = pytest.mark.browser


@pytest.fixture
def open_steps(open_view):
    return lambda query="", **options: open_view(f"view=generation&{query}", **options)


def step_of(page):
    return page.locator('[data-part="query"]').inner_text()


def test_a_step_sees_the_cache_as_far_as_it_has_grown(open_steps, served):
    page = open_steps("layer=1&head=2&token=19")
    assert step_of(page).startswith("20 of 77 · ·token19")
    chips = page.locator('[data-part="text"] .at-token')
    assert chips.count() == 20
    weights = head_tiles(served.traced.store, served.traced.run_ids[0], 1, (19, 20))[2, 0, :20]
    for key in (0, 7, 19):
        said = chips.nth(key).get_attribute("title").split(": ")[1]
        assert float(said) == pytest.approx(weights[key], rel=1e-4)
    top = page.locator('[data-part="top"] .at-read').first.inner_text()
    assert top.startswith(f"·token{weights.argmax()}")


def test_the_token_of_the_step_is_in_view_and_no_token_is_broken_over_two_lines(open_steps):
    page = open_steps("layer=1&head=2&token=76")
    shown = page.evaluate(
        """() => {
          const text = document.querySelector('[data-part="text"]'), box = text.getBoundingClientRect();
          const chips = [...text.querySelectorAll(".at-token")], last = chips.at(-1).getBoundingClientRect();
          return {overflows: text.scrollHeight > text.clientHeight,
                  seen: last.top >= box.top && last.bottom <= box.bottom,
                  pieces: Math.max(...chips.map(chip => chip.getClientRects().length))};
        }"""
    )
    assert shown == {"overflows": True, "seen": True, "pieces": 1}


def test_keys_and_slider_go_through_the_steps_and_the_link_keeps_the_step(open_steps):
    page = open_steps("layer=0&head=0")
    assert step_of(page).startswith("77 of 77")
    page.locator('[data-part="steps"] canvas').focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**token=2*")
    page.wait_for_function(IDLE)
    assert step_of(page).startswith("3 of 77")
    page.keyboard.press("]")
    page.get_by_text("L0H1, all steps").wait_for()
    page.reload()
    page.wait_for_function(IDLE)
    assert step_of(page).startswith("3 of 77")


def test_space_plays_to_the_last_step_and_stops(open_steps):
    page = open_steps("layer=0&head=0&token=74")
    page.locator('[data-part="steps"] canvas').focus()
    page.keyboard.press(" ")
    page.get_by_role("button", name="Pause").wait_for()
    page.get_by_role("button", name="Play").wait_for()
    page.wait_for_function(IDLE)
    assert step_of(page).startswith("77 of 77")


def test_a_click_on_a_row_of_steps_chooses_it_and_a_head_by_its_row(open_steps):
    page = open_steps("layer=0&head=0")
    steps = page.locator('[data-part="steps"] canvas')
    box = steps.bounding_box()
    steps.click(position={"x": 200, "y": 64 + 40.5 * (box["height"] - 72) / 77})
    page.wait_for_function(IDLE)
    assert step_of(page).startswith("41 of 77")
    heads = page.locator('[data-part="heads"] canvas')
    box = heads.bounding_box()
    heads.click(position={"x": 200, "y": 64 + 2.5 * (box["height"] - 72) / 4})
    page.get_by_text("L0H2, all steps").wait_for()


def test_what_a_window_has_left_behind_is_masked(open_steps):
    page = open_steps("layer=0&head=0&token=40", run=1)
    chips = page.locator('[data-part="text"] .at-token')
    assert chips.nth(24).get_attribute("title").endswith("masked")
    assert not chips.nth(25).get_attribute("title").endswith("masked")


def test_a_map_that_is_not_causal_has_no_steps_and_says_why(serve_runs, browse):
    ran = serve_runs(
        bare={
            "module": {"dim": 24, "num_heads": 2, "causal": False},
            "vary": {"mechanism": ["multi_head"], "sequence_length": [5]},
        }
    )
    page = browse(ran.link("bare", "view=generation"))
    page.get_by_text("No step follows another in this run").wait_for()


DECODED = {
    "module": {"dim": 24, "num_heads": 2},
    "vary": {"mechanism": ["multi_head"], "sequence_length": [23]},
    "phase": "decode",
}


@pytest.fixture(scope="module")
def decoded(serve_runs):
    """A run of six decoding steps and one of a single step."""
    return serve_runs(six=DECODED | {"decode": {"steps": 6}}, one=DECODED)


def test_decoding_steps_stand_over_the_cache_as_it_grew(decoded, browse_idle):
    page = browse_idle(decoded.link("six", "view=generation&layer=0&head=1&token=2"))
    assert step_of(page).startswith("3 of 6 · 19")
    chips = page.locator('[data-part="text"] .at-token')
    assert chips.count() == 20  # 17 in the cache before the first step, and three steps
    assert page.locator(".at-decoded-token").count() == 3
    weights = head_tiles(decoded.store, decoded.runs["six"].id, 0, (2, 3))[1, 0]
    for key in (0, 11, 19):
        said = chips.nth(key).get_attribute("title").split(": ")[1]
        assert float(said) == pytest.approx(weights[key], rel=1e-4)
    page.get_by_text("a decoding step of its own").wait_for()
    chips.nth(18).click()
    page.wait_for_url("**token=1*")


def test_a_run_of_one_decoded_token_says_how_to_keep_more(decoded, browse):
    page = browse(decoded.link("one", "view=generation"))
    page.get_by_text("decode: {steps: 32}").wait_for()


def test_the_page_opens_at_its_top_and_the_log_scrolls_within_itself(open_steps):
    page = open_steps()
    log = page.locator("#experiment-log")
    assert (
        log.evaluate("log => getComputedStyle(log).overflowY") == "auto"
    )  # else Gradio scrolls the page to its end
    assert page.evaluate("() => scrollY") == 0
