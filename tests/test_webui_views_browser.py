"""Laws of the tabs over a run's views: each is a link, "back" goes to the last one, the keyboard reaches all."""

import re

import pytest

pytestmark = pytest.mark.browser


def test_the_map_is_the_view_that_a_link_without_one_opens(open_view):
    page = open_view("layer=1&head=2")
    assert page.get_by_role("tab", name="Map").get_attribute("aria-selected") == "true"
    assert page.locator("canvas.at-map").is_visible()
    assert "view=" not in page.url


def test_an_unknown_view_says_so_and_leads_to_the_map_and_back(open_view):
    page = open_view("view=nowhere&layer=1&head=2")
    assert page.get_by_role("status").get_by_text('There is no view called "nowhere".').is_visible()
    page.get_by_role("button", name="Open the map").click()
    page.locator("canvas.at-map").wait_for()
    page.wait_for_url(re.compile("layer=1&head=2"))
    assert "view=" not in page.url
    page.go_back()
    page.get_by_text("There is no view called").wait_for()
    assert "view=nowhere" in page.url
