"""Laws of comparing: distances lead to the heads that changed most, and other inputs are compared by their tokens."""

import threading

import numpy as np
import pytest
from page_fixtures import IDLE

from attnlab.views import overview, wide_difference
from attnlab.views.distances import head_distances, run_distances

pytestmark = pytest.mark.browser


def top_heads(page):
    return [words.split()[0] for words in page.locator(".at-stats-top button").all_inner_texts()]


def name_of(change):
    return f"L{change.layer}H{change.head}"


def test_the_list_leads_to_the_heads_that_changed_most(compare, lengths):
    _, long, _ = lengths
    a, b = long.run_ids[:2]
    page = compare(f"runs={a},{b}&layer=0&head=0")
    grid = run_distances(long.store, a, b)
    assert top_heads(page) == [name_of(change) for change in grid.most_changed(count=5)]
    page.get_by_label("statistic").select_option(label=f"rank correlation, #{a} and #{b}")
    assert page.get_by_label("order").input_value() == "low"
    assert top_heads(page) == [name_of(change) for change in grid.most_changed("spearman", 5)]
    first = grid.most_changed("spearman", 1)[0]
    page.locator(".at-stats-top button").first.click()
    page.locator(".at-panel-title").first.get_by_text(f"{name_of(first)} ·").wait_for()


def test_the_distances_are_files_of_the_measure_that_is_shown(compare, lengths):
    _, long, _ = lengths
    a, b = long.run_ids[:2]
    page = compare(f"runs={a},{b}&layer=0&head=0")
    files = page.get_by_role("group", name="these distances")
    page.get_by_label("statistic").select_option(label=f"rank correlation, #{a} and #{b}")
    with page.expect_download() as download:
        files.get_by_role("link", name="SVG").click()
    drawn = download.value.path().read_text()
    assert f"rank correlation from #{b} " in drawn
    with page.expect_download() as download:
        files.get_by_role("link", name="NPZ").click()
    with np.load(download.value.path()) as found:
        np.testing.assert_array_equal(found["spearman"], run_distances(long.store, a, b).measures["spearman"])


def test_the_crosshair_stands_on_the_same_token_in_both_maps(compare, lengths):
    _, long, short = lengths
    a, b = long.run_ids[0], short.run_ids[0]
    page = compare(f"runs={a},{b}&layer=0&head=1&scale=linear")
    assert page.get_by_text("The inputs differ in their tokens").is_visible()
    panel = page.locator("canvas.at-map").first
    plot = page.evaluate("() => window.__attnlab.panels()[0].plot")
    row, col = 76, 75  # the last two tokens, 29 and 28 of the shorter
    x = plot["x"] + (col + 0.5) * plot["w"] / 77
    panel.hover(position={"x": x, "y": plot["y"] + (row + 0.5) * plot["h"] / 77})
    numbers = page.locator(".at-readout .at-weight b")
    other = short.reference(b, 0, 1)[29, 28]
    numbers.nth(2).wait_for()
    page.wait_for_function(IDLE)
    assert float(numbers.nth(1).inner_text()) == pytest.approx(other, abs=1e-5)
    ours = long.reference(a, 0, 1)[row, col]
    assert float(numbers.nth(0).inner_text()) == pytest.approx(ours, abs=1e-5)
    assert float(numbers.nth(2).inner_text()) == pytest.approx(ours - other, abs=1e-5)


def test_a_token_that_the_other_text_lacks_is_said_and_not_called_masked(compare, lengths):
    _, long, short = lengths
    page = compare(f"runs={long.run_ids[0]},{short.run_ids[0]}&layer=0&head=1&rows=0:77&cols=0:77")
    for at, words in ((40, "no such tokens"), (5, "masked")):
        page.evaluate("at => [...window.__attnlab.views][0].hold({ row: at, col: at + 1 })", at)
        page.wait_for_function(IDLE)
        read = page.locator(".at-readout .at-weight").all_inner_texts()
        assert [line.endswith(words) for line in read] == [words == "masked", True, True], read


@pytest.fixture
def two_models(sqlite_store, make_traced, serve_store):
    """(address, run of two layers, run of another model with one layer over the same text, cut in another way)."""
    words = [f"Ġword{at}" for at in range(12)]
    one = make_traced(sqlite_store, tokens=12, words=words)
    lower = ["[CLS]", *(word[1:] for word in words)]
    other = make_traced(sqlite_store, tokens=13, words=lower, layers=1, seed=2, model="another")
    return serve_store(sqlite_store), one.run_ids[0], other.run_ids[0]


def test_the_maps_of_two_models_are_named_and_compared_by_their_words(two_models, browse_idle):
    address, a, b = two_models
    page = browse_idle(f"{address}/compare?runs={a},{b}&layer=0&head=1")
    titles = page.locator(".at-panel-title").all_inner_texts()
    assert [title.split(" · ")[1] for title in titles] == [
        "made-up",
        "another",
        f"difference #{a} made-up − #{b} another",
    ]
    assert page.evaluate("() => Number.isFinite(window.__attnlab.panels()[2].tile.values[13])")
    assert page.get_by_text("no such token in one text").is_visible()


def test_a_layer_that_only_one_model_has_is_said_and_has_no_difference(two_models, browse_idle):
    address, a, b = two_models
    page = browse_idle(f"{address}/compare?runs={a},{b}&layer=1&head=1")
    said = page.locator(".at-none:visible").all_inner_texts()
    assert said == [f"#{b} has no map of layer 1, only of 0."] * 2
    scale = page.locator("[data-part='difference']")
    assert scale.is_hidden()
    page.locator(".at-picker").get_by_role("slider").press("ArrowLeft")
    page.wait_for_function(IDLE)
    assert page.locator(".at-none:visible").count() == 0
    assert scale.is_visible()
    page.evaluate("() => { [...window.__attnlab.views][0].sources[1].facts.layers[0].heads = 1; }")
    page.get_by_role("radio", name="head 2").click()
    page.wait_for_function(IDLE)
    said = page.locator(".at-none:visible").all_inner_texts()
    assert said == [f"#{b} has no head 2 in layer 0, only 0."] * 2


def test_the_difference_of_other_inputs_is_drawn_where_both_have_the_tokens(compare, lengths):
    _, long, short = lengths
    a, b = long.run_ids[0], short.run_ids[0]
    page = compare(f"runs={a},{b}&layer=0&head=1")
    shown = page.evaluate(
        "() => [...window.__attnlab.panels()[2].tile.values].map(v => Number.isNaN(v) ? null : v)"
    )
    values = np.array(shown, float).reshape(77, 77)
    assert np.isnan(values[40]).all()
    expected = long.reference(a, 0, 1)[20, :21] - short.reference(b, 0, 1)[20, :21]
    np.testing.assert_allclose(values[20, :21], expected, atol=4e-6)


def test_heads_of_one_run_are_compared_with_one_that_stays(compare, lengths):
    _, long, _ = lengths
    run = long.run_ids[0]
    page = compare(f"runs={run}&layer=0&head=1&against=1:3")
    titles = page.evaluate("() => window.__attnlab.panels().map(panel => panel.title)")
    assert [title.split(" · ")[0] for title in titles] == ["L0H1", "L1H3", "difference L0H1 − L1H3"]
    shown = page.evaluate("() => window.__attnlab.panels()[2].tile.values[20 * 77 + 5]")
    assert shown == pytest.approx(
        long.reference(run, 0, 1)[20, 5] - long.reference(run, 1, 3)[20, 5], abs=4e-6
    )
    grids = [head_distances(long.store, run, layer, 1, head_b=3) for layer in (0, 1)]
    changes = sorted((c for grid in grids for c in grid.most_changed()), key=lambda change: -change.value)
    assert top_heads(page) == [name_of(change) for change in changes[:5]]
    assert page.locator(".at-stats-words").inner_text().startswith("L0H1")
    page.get_by_role("radio", name="head 2").click()
    page.wait_for_function(IDLE)
    assert page.evaluate("() => window.__attnlab.panels()[1].title").startswith("L1H3")


def test_the_map_of_a_run_leads_to_the_comparison_of_its_heads(lengths, browse_idle):
    address, long, _ = lengths
    page = browse_idle(f"{address}/experiment?id={long.experiment_id}&run={long.run_ids[0]}&layer=1&head=2")
    page.get_by_role("link", name="Compare heads").click()
    page.wait_for_url("**/compare?*against=1:2*")
    page.get_by_text("against its own L1H2").wait_for()


def test_a_wide_difference_says_how_far_it_is_and_then_shows(lengths, browse, monkeypatch):
    address, long, _ = lengths
    monkeypatch.setattr(overview, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(overview, "EXACT_CELLS", 1000)
    go = threading.Event()

    def slow(full_map, progress, **options):
        progress(0.25)
        assert go.wait(30)
        return overview.build_pyramid(full_map, progress, **options)

    monkeypatch.setattr(wide_difference, "build_pyramid", slow)
    a, b = long.run_ids[:2]
    try:
        # B - A: what the other tests look at is kept by the browser
        page = browse(f"{address}/compare?runs={b},{a}&layer=0&head=2")
        page.get_by_text("Building the overview of this difference: 25 %").wait_for()
    finally:
        go.set()
    page.wait_for_function(IDLE)
    assert page.get_by_text("Building the overview").locator("visible=true").count() == 0
    tile = page.evaluate(
        "() => { const t = window.__attnlab.panels()[2].tile; return [t.exact, t.height, t.width]; }"
    )
    assert tile == [False, 20, 20]
    assert page.get_by_text("largest of the cells in a pixel").is_visible()


def test_a_run_of_one_layer_has_no_range_of_layers(serve_runs, browse_idle):
    ran = serve_runs(
        one={
            "module": {"dim": 24, "num_heads": 2},
            "vary": {"mechanism": ["multi_head"], "sequence_length": [5]},
        }
    )
    page = browse_idle(ran.link("one"))
    assert page.locator(".at-layer .at-of").inner_text() == "0, the only one"
    assert page.locator(".at-layer input").is_disabled()
