"""Laws of a linked zoom over different texts: every panel shows the tokens that the first one shows."""

import itertools
import random

import pytest
from page_fixtures import IDLE

from attnlab.views import alignment
from attnlab.views.aligned_map import places
from attnlab.views.alignment import align_tokens
from attnlab_webui.theme import STATIC_URL

pytestmark = pytest.mark.browser

RANGES = f"""async ([matched, size, windows]) => {{
  const {{ Borders }} = await import("{STATIC_URL}/js/borders.js");
  const borders = Borders.of(matched, size);
  return windows.map(([from, to]) => borders.range(from, to));
}}"""


def window(page, index):
    found = page.evaluate(f"() => window.__attnlab.panels()[{index}].window")
    return found and tuple(found[edge] for edge in ("r0", "r1", "c0", "c1"))


def plot_point(page, index, share_x, share_y):
    box = page.locator("canvas.at-map").nth(index).bounding_box()
    plot = page.evaluate(f"() => window.__attnlab.panels()[{index}].plot")
    return box["x"] + plot["x"] + share_x * plot["w"], box["y"] + plot["y"] + share_y * plot["h"]


def test_a_range_is_that_of_the_tokens_between_its_ends(served, browse):
    """Against the matched tokens themselves, counted one by one, for random texts."""
    page = browse(f"{served.address}/claims")
    rng = random.Random(1)
    for _ in range(30):
        first, second = (rng.choices("abcd", k=rng.randrange(1, 12)) for _ in range(2))
        aligned = align_tokens(first, second)
        matched = places(aligned).tolist()
        windows = list(itertools.combinations(range(len(first) + 1), 2))
        found = page.evaluate(RANGES, [matched, len(second), windows])
        assert found[windows.index((0, len(first)))] == [0, len(second)]
        assert [tuple(span) if span else None for span in found] == [aligned.span(*ends) for ends in windows]
        for (start, end), shown in zip(windows, found, strict=True):
            wanted = [place for place in matched[start:end] if place >= 0]
            seen = range(*shown) if shown else range(0)
            assert set(wanted) <= set(seen), (first, second, start, end)
            others = {place for place in matched if place >= 0} - set(wanted)
            assert not others & set(seen), (first, second, start, end)
            if start and end < len(first) and all(place >= 0 for place in matched[start:end]):
                assert (seen[0], seen[-1]) == (wanted[0], wanted[-1])


def test_a_range_is_smooth_over_tokens_of_both_and_whole_over_others(served, browse):
    page = browse(f"{served.address}/claims")
    matched = [*range(28), *[-1] * 40, *range(48, 60)]  # 28..48 of the other stand for 28..68 of the first
    found = page.evaluate(RANGES, [matched, 60, [[3.25, 7.5], [20, 48], [29, 31], [60.5, 70.5]]])
    assert found == [[3.25, 7.5], [20, 38], [28, 30], [44, 50.5]]


def test_a_zoom_shows_the_same_tokens_in_every_panel(compare, lengths):
    _, long, short = lengths
    a, b = long.run_ids[0], short.run_ids[0]
    page = compare(f"runs={a},{b}&layer=0&head=1&rows=70:77&cols=20:30")
    assert [window(page, index) for index in range(3)] == [
        (70, 77, 20, 30),
        (28, 30, 20, 28),
        (70, 77, 20, 30),
    ]
    page.goto(f"{lengths[0]}/compare?runs={b},{a}&layer=0&head=1&rows=24:30&cols=24:29")
    page.wait_for_function(IDLE)
    # the longer one also shows what it has between the tokens of both
    assert [window(page, index) for index in range(2)] == [(24, 30, 24, 29), (24, 77, 24, 76)]
    page.get_by_role("button", name="Whole map").click()
    page.wait_for_function("() => window.__attnlab.panels()[0].window.r0 === 0")
    assert [window(page, index) for index in range(2)] == [(0, 30, 0, 30), (0, 77, 0, 77)]


def test_gestures_on_another_text_move_all_panels_by_its_tokens(compare, lengths):
    _, long, short = lengths
    a, b = long.run_ids[0], short.run_ids[0]
    page = compare(f"runs={a},{b}&layer=0&head=1")
    page.mouse.move(*plot_point(page, 1, 5 / 30, 10 / 30))
    for _ in range(7):
        page.mouse.wheel(0, -200)
    page.wait_for_function(IDLE)
    ours, theirs = window(page, 0), window(page, 1)
    assert ours == theirs, "among tokens of both a window is the same in both"
    assert ours[0] <= 10 < ours[1] < 28
    assert ours[2] <= 5 < ours[3] < 28
    page.wait_for_url(f"**rows={ours[0]:.0f}:{ours[1]:.0f}*")
    page.locator("canvas.at-map").nth(1).focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function(IDLE)
    assert window(page, 0)[0] > ours[0]
    assert window(page, 1) == window(page, 0)
    page.keyboard.press("0")
    page.wait_for_function(IDLE)
    page.keyboard.down("Shift")
    page.mouse.move(*plot_point(page, 1, 24.5 / 30, 20.5 / 30))
    page.mouse.down()
    page.mouse.move(*plot_point(page, 1, 29.5 / 30, 29.5 / 30), steps=4)
    page.mouse.up()
    page.keyboard.up("Shift")
    page.wait_for_function(IDLE)
    assert window(page, 1) == (20, 30, 24, 30)
    assert window(page, 0) == (20, 77, 24, 77)


def test_a_panel_without_any_token_in_view_says_so(compare, lengths):
    _, long, short = lengths
    a, b = long.run_ids[0], short.run_ids[0]
    page = compare(f"runs={a},{b}&layer=0&head=1&rows=40:60&cols=10:20")
    page.get_by_text(f"None of the tokens in view are in the input of run {b}.").wait_for()
    assert window(page, 1) is None
    page.mouse.move(*plot_point(page, 1, 0.5, 0.5))
    for _ in range(5):
        page.mouse.wheel(0, 200)
    page.wait_for_function("() => window.__attnlab.idle && window.__attnlab.panels()[1].window")
    assert page.locator(".at-none:visible").count() == 0


def test_tokens_that_cannot_be_matched_are_said_and_positions_shown(lengths, browse, monkeypatch):
    address, long, short = lengths
    a, b = short.run_ids[1], long.run_ids[1]
    monkeypatch.setattr(alignment, "MOST_COMPARED", 2)
    page = browse(f"{address}/compare?runs={a},{b}&layer=0&head=1&rows=4:9&cols=2:9", expect=["400"])
    page.get_by_text(f"The tokens of run {b} could not be matched with those of run {a}").wait_for()
    assert "at most 2 neighbouring tokens; got 0 and 47" in page.locator("[data-part=unaligned]").inner_text()
    page.wait_for_function(IDLE)
    assert window(page, 1) == window(page, 0) == (4, 9, 2, 9)
