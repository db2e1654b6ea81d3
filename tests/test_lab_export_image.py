"""Laws of pictures: right pixels, true labels, one scale, no markup from users, honest captions."""

import base64
import io
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from attnlab.export import image, panel, scene, strips
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.colormaps import DIVERGING, colorize
from attnlab.views.errors import ViewError
from attnlab.views.viewport import load_map
from attnlab_storage import results

SVG = "{http://www.w3.org/2000/svg}"


def made_panel(values, **changes):
    height, width = values.shape
    base = {"rows": (0, height), "cols": (0, width), "peak": float(values.max()), "title": "a title"}
    return panel.Panel(values, **(base | changes))


def pixels_of(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def texts_of(document):
    return [node.text for node in ElementTree.fromstring(document).iter(f"{SVG}text")]


def rasters_of(document):
    uris = [node.attrib["href"] for node in ElementTree.fromstring(document).iter(f"{SVG}image")]
    return [pixels_of(base64.b64decode(uri.removeprefix("data:image/png;base64,"))) for uri in uris]


def test_every_cell_is_drawn_in_the_colour_of_its_weight():
    values = np.linspace(0, 1, 7 * 5, dtype=np.float32).reshape(7, 5)
    drawn = panel.draw_panels([made_panel(values)])
    cells = next(part for part in drawn.parts if isinstance(part, scene.Raster))
    picture = pixels_of(scene.to_png(drawn))
    for row in range(7):
        for col in range(5):
            y = cells.y + int((row + 0.5) * cells.height / 7)
            x = cells.x + int((col + 0.5) * cells.width / 5)
            np.testing.assert_array_equal(picture[y, x], colorize(values[row, col] / values.max(), "viridis"))
    np.testing.assert_array_equal(rasters_of(scene.to_svg(drawn))[0], colorize(values, "viridis"))


def test_forbidden_cells_are_grey_and_not_a_weight_of_zero():
    allowed = np.tril(np.ones((5, 5), bool))
    document = scene.to_svg(panel.draw_panels([made_panel(np.zeros((5, 5)), peak=1.0, allowed=allowed)]))
    cells = rasters_of(document)[0]
    assert (cells[~allowed] == panel.THEMES["light"].masked).all()
    assert (cells[allowed] == colorize(np.array(0.0), "viridis")).all()


@pytest.mark.parametrize("cells", [1, 7, 46, 47, 512])
def test_token_labels_are_written_where_they_fit_and_numbers_elsewhere(cells):
    labels = [f"word{i}" for i in range(cells)]
    one = made_panel(np.ones((cells, cells)), row_labels=labels, col_labels=labels)
    written = texts_of(scene.to_svg(panel.draw_panels([one])))
    fits = cells <= 46  # 11 of 512 pixels
    assert [word for word in ("word0", "0") if word in written[2:4]] == ["word0" if fits else "0"]
    assert "query (from)" in written
    assert "key (to)" in written


def test_few_tokens_over_many_columns_are_all_named():
    labels = [f"word{i}" for i in range(31)]
    one = made_panel(np.ones((31, 380)), row_labels=labels)
    assert set(labels) <= set(texts_of(scene.to_svg(panel.draw_panels([one]))))


def test_labels_that_do_not_belong_to_the_region_are_never_shown():
    one = made_panel(np.ones((5, 5)), row_labels=["wrong"] * 4, col_labels=["wrong"] * 6)
    assert "wrong" not in texts_of(scene.to_svg(panel.draw_panels([one])))


@pytest.mark.parametrize(
    ("span", "ticks"),
    [
        ((0, 2048), [0, 500, 1000, 1500, 2000]),
        ((100, 108), list(range(100, 108))),
        ((5, 6), [5]),
        ((3, 20), [5, 10, 15]),
    ],
)
def test_ticks_are_round_token_indices_inside_the_region(span, ticks):
    assert panel.nice_ticks(*span) == ticks


@pytest.mark.parametrize("length", [1, 9, 77, 1000, 131_072])
def test_ticks_are_few(length):
    assert 1 <= len(panel.nice_ticks(17, 17 + length)) <= 9


def test_scales_map_zero_and_the_peak_to_the_ends():
    values = np.array([[0.0, 0.5, 1e-3], [0.25, 0.05, 0.0]])
    linear = panel.unit_values(values, 0.5, "linear", signed=False)
    log = panel.unit_values(values, 0.5, "log", signed=False)
    row = panel.unit_values(values, 0.5, "row", signed=False)
    signed = panel.unit_values(values - 0.25, 0.25, "linear", signed=True)
    assert (linear[0, 0], linear[0, 1], linear[1, 0]) == (0, 1, 0.5)
    assert (log[0, 0], log[0, 1]) == (0, 1)
    assert log[0, 2] == pytest.approx(1 + np.log10(2e-3) / 5)
    np.testing.assert_array_equal(row.max(axis=1), [1, 1])
    assert (signed[0, 0], signed[0, 1], signed[1, 0]) == (0, 1, 0.5)
    assert np.isfinite(panel.unit_values(np.zeros((2, 2)), 0.0, "log", signed=False)).all()


def test_the_picture_of_a_view_names_run_head_kernel_and_what_a_pixel_is(traced):
    run_id = traced.run_ids[1]
    whole = texts_of(image.render_view(traced.store, run_id, 1, 3, format="svg"))
    assert f"#{run_id} sliding_window(window_size=16) · L1H3 · made-up" in whole
    assert "banded · float32 · exact weights" in whole
    part = texts_of(image.render_view(traced.store, run_id, 1, 3, (75, 77), (70, 77), "svg"))
    assert any(word and word.startswith("<script>aler") for word in part)
    assert "⏎" in part
    assert "·token70" in part


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("scale", ["linear", "log", "row"])
def test_png_and_svg_have_the_same_size_and_cells(traced, theme, scale):
    arguments = (traced.store, traced.run_ids[0], 0, 1, (0, 13), (0, 9))
    png = image.render_view(*arguments, "png", theme=theme, scale=scale)
    svg = image.render_view(*arguments, "svg", theme=theme, scale=scale)
    root = ElementTree.fromstring(svg)
    assert Image.open(io.BytesIO(png)).size == (int(root.attrib["width"]), int(root.attrib["height"]))
    ground = scene.Scene(1, 1, panel.THEMES[theme].background)
    np.testing.assert_array_equal(pixels_of(png)[-1, -1], pixels_of(scene.to_png(ground))[0, 0])


def test_compared_panels_share_one_scale_and_two_runs_get_their_difference(traced):
    a, b = traced.run_ids
    document = image.render_comparison(traced.store, [a, b], 0, 2, (40, 77), (0, 9), "svg")
    written = texts_of(document)
    assert f"#{a} − #{b} · L0H2" in written
    assert (written.count("weight"), written.count(f"#{a} − #{b}")) == (2, 1)  # beside the bars
    peak = max(traced.reference(run, 0, 2)[40:77, :9].max() for run in (a, b))
    assert written.count(f"{peak:.3g}") == 2
    assert len(rasters_of(document)) == 6
    three = texts_of(image.render_comparison(traced.store, [a, b, a], 0, 2, (40, 77), (0, 9), "svg"))
    assert not any(word and "−" in word for word in three)


def test_the_difference_of_two_models_names_them(traced, make_traced):
    a, b = traced.run_ids[0], make_traced(traced.store, model="another").run_ids[0]
    written = texts_of(image.render_comparison(traced.store, [a, b], 0, 2, format="svg"))
    assert f"#{a} made-up − #{b} another · L0H2" in written


@pytest.mark.parametrize("clip", [95, 60.5])
def test_a_clipped_scale_ends_at_the_percentile_of_the_weights_above_zero(traced, clip):
    run_id = traced.run_ids[0]
    weights = load_map(traced.store, run_id, 0, 2).tile(slice(40, 77), slice(0, 9))
    end = np.percentile(weights[weights > 0], clip, method="higher")
    assert end < weights.max()
    document = image.render_view(traced.store, run_id, 0, 2, (40, 77), (0, 9), "svg", clip=clip)
    assert f"≥ {end:.3g}" in texts_of(document)
    colours = colorize(np.clip(weights / end, 0, 1), "viridis")
    allowed = weights > 0
    np.testing.assert_allclose(
        rasters_of(document)[0][allowed].astype(int), colours[allowed].astype(int), atol=1
    )
    other = traced.run_ids[1]
    gaps = image.render_comparison(traced.store, [run_id, other], 0, 2, (40, 77), (0, 9), "svg", clip=clip)
    assert len([text for text in texts_of(gaps) if text and text.startswith("≤ -")]) == 1
    same = image.render_comparison(traced.store, [run_id, run_id], 0, 2, format="svg", clip=clip)
    assert "0 everywhere" in texts_of(same)
    whole = image.render_view(traced.store, run_id, 0, 2, (40, 77), (0, 9), "svg", clip=100)
    assert not [text for text in texts_of(whole) if text and "≥" in text]


def test_of_more_runs_the_pair_that_is_asked_for_gets_its_difference(traced, make_traced):
    (a, b), c = traced.run_ids, make_traced(traced.store, seed=5).run_ids[0]
    heads: Any = {"layer": 0, "head": 2, "rows": (40, 77), "cols": (0, 9), "format": "svg"}
    document = image.render_comparison(traced.store, [a, b, c], **heads, pair=(c, b), scale="log")
    gap = make_difference(traced.store, c, b)
    assert {f"#{c} − #{b} · L0H2", f"{np.abs(gap).max():+.3g}"} <= set(texts_of(document))
    unit = panel.unit_values(gap, np.abs(gap).max(), "log", signed=True)
    cells = rasters_of(document)[6].astype(int)  # after three maps, each with its bar
    assert np.abs(cells - colorize(unit, DIVERGING))[np.tri(77, dtype=bool)[40:, :9]].max() <= 4
    three = pixels_of(image.render_comparison(traced.store, [a, b], **heads | {"format": "png"})).shape
    four = pixels_of(
        image.render_comparison(traced.store, [a, b, c], **heads | {"format": "png"}, pair=(c, b))
    ).shape
    assert four == (2 * three[0], three[1], 3)  # the fourth stands below
    with pytest.raises(
        ViewError, match=re.escape(f"pair must be two of the runs [{a}, {b}]; got [{a}, {c}]")
    ):
        image.render_comparison(traced.store, [a, b], **heads, pair=(a, c))


def make_difference(store, a, b):
    one, other = (load_map(store, run, 0, 2).tile(slice(40, 77), slice(0, 9)) for run in (a, b))
    return one - other


def test_a_head_of_one_run_is_drawn_beside_the_one_that_it_is_compared_with(traced):
    run = traced.run_ids[0]
    document = image.render_comparison(traced.store, [run], 0, 2, format="svg", against=(1, 3))
    written = texts_of(document)
    assert f"#{run} · L0H2 − L1H3" in written
    gap = traced.reference(run, 0, 2) - traced.reference(run, 1, 3)
    unit = 0.5 + gap / np.abs(gap).max() / 2
    cells = rasters_of(document)[4].astype(int)
    assert np.abs(cells - colorize(unit, DIVERGING))[np.tri(77, dtype=bool)].max() <= 4


def ran(store, mechanism, parameters):
    spec = {
        "name": mechanism,
        "module": {"dim": 24, "num_heads": 2},
        "vary": {"mechanism": [{mechanism: parameters}], "sequence_length": [13]},
        "record": ["maps"],
        "repeats": 1,
    }
    (run,) = results.runs_of(store, experiment_id=run_here(store, parse_spec(spec)))
    return run.id


@pytest.mark.parametrize("scale", ["linear", "log", "row"])
def test_signed_weights_are_drawn_around_zero_in_the_diverging_colours(sqlite_store, scale):
    run_id = ran(sqlite_store, "differential", {})
    weights = load_map(sqlite_store, run_id, 0, 1).tile(slice(None), slice(None))
    assert weights.min() < 0 < weights.max()
    peak, allowed = np.abs(weights).max(), np.tri(13, dtype=bool)
    document = image.render_view(sqlite_store, run_id, 0, 1, format="svg", scale=scale)
    unit = 0.5 + weights / peak / 2
    if scale == "log":
        unit = 0.5 + np.sign(weights) * np.log10(1 + 1e3 * np.abs(weights) / peak) / np.log10(1001) / 2
    cells = rasters_of(document)[0].astype(int)
    assert np.abs(cells - colorize(unit, DIVERGING))[allowed].max() <= 4  # one step of 256 by rounding
    assert {f"{-peak:.3g}", "0", f"{peak:+.3g}"} <= set(texts_of(document))
    pictured = pixels_of(strips.head_strip(sqlite_store, run_id, 0, 13))
    assert (pictured == colorize(np.array(0.5), DIVERGING)).all(-1).any()


def test_signed_and_plain_weights_side_by_side_have_a_scale_each(sqlite_store):
    runs = [ran(sqlite_store, "differential", {}), ran(sqlite_store, "multi_head", {})]
    written = texts_of(image.render_comparison(sqlite_store, runs, 0, 0, format="svg"))
    signed, plain = (load_map(sqlite_store, run, 0, 0).tile(slice(None), slice(None)) for run in runs)
    assert {f"{-np.abs(signed).max():.3g}", f"{plain.max():.3g}"} <= set(written)


@pytest.mark.parametrize(
    ("mechanism", "parameters", "word"),
    [
        ("linear", {"variant": "linformer", "num_slots": 5}, "slot (to)"),
        ("efficient", {"variant": "spatial_reduction", "grid_height": 13, "reduction": 1}, "cell (to)"),
    ],
)
def test_columns_that_are_no_keys_are_called_what_they_are(sqlite_store, mechanism, parameters, word):
    written = texts_of(
        image.render_view(sqlite_store, ran(sqlite_store, mechanism, parameters), 0, 0, format="svg")
    )
    assert word in written
    assert not any(text and text.startswith("key") for text in written)


def test_a_pooled_picture_says_that_it_is_pooled(traced, monkeypatch):
    monkeypatch.setattr(image, "PLOT_SIDE", 11)
    for reduce, word in (("max", "maximum"), ("mean", "mean")):
        picture = image.render_view(traced.store, traced.run_ids[0], 0, 0, format="svg", reduce=reduce)
        assert f"sdpa_flash · float32 · {word} of 7 x 7 weights a pixel" in texts_of(picture)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "gif"}, "format must be one of png, svg, pdf; got 'gif'"),
        ({"colormap": "jet"}, "colormap must be one of"),
        ({"scale": "cube"}, "scale must be one of linear, log, row; got 'cube'"),
        ({"theme": "pink"}, "theme must be one of light, dark; got 'pink'"),
        ({"clip": 0}, "clip must be a percentile above 0 and at most 100; got 0"),
        ({"head": 9}, "head must be in 0..3"),
        ({"rows": (9, 99)}, "rows must be a range"),
    ],
)
def test_what_cannot_be_drawn_is_refused(traced, change, says):
    arguments = {"store": traced.store, "run_id": traced.run_ids[0], "layer": 0, "head": 0} | change
    with pytest.raises(ViewError, match=re.escape(says)):
        image.render_view(**arguments)


def test_equal_maps_have_a_difference_of_zero_everywhere(traced):
    run_id = traced.run_ids[0]
    same = image.render_comparison(traced.store, [run_id, run_id], 0, 0, (0, 9), (0, 9), "svg")
    assert "0 everywhere" in texts_of(same)


def test_a_title_from_a_user_is_text_in_svg():
    evil = '"><script>alert(1)</script>\x00\ud800'
    document = scene.to_svg(panel.draw_panels([made_panel(np.ones((3, 3)), title=evil)]))
    assert b"<script" not in document
    assert any("<script>alert(1)</script>" in (word or "") for word in texts_of(document))


def test_characters_without_a_glyph_are_spelled_out_in_png():
    assert scene.drawable("abc é") == "abc é"
    assert scene.drawable("\U0001fae8") in ("\U0001fae8", "\\u1FAE8")
    assert scene.shorten("a very long title", 40, 12).endswith("…")
    assert scene.text_width(scene.shorten("a very long title", 40, 12), 12) <= 40


def test_a_layer_is_every_head_with_title_axes_and_scale(traced):
    run_id = traced.run_ids[1]
    drawn = strips.draw_heads(traced.store, run_id, 1, 77)
    *heads, bar = (part for part in drawn.parts if isinstance(part, scene.Raster))
    words = [part.text for part in drawn.parts if isinstance(part, scene.Text)]
    assert {"L1H0", "L1H3", "down: query (from), 77 · across: key (to), 77"} <= set(words)
    assert any("sliding_window(window_size=16)" in word and "layer 1" in word for word in words)
    peak = max(traced.reference(run_id, 1, head).max() for head in range(4))
    assert {f"{peak:.2g}", f"≤ {peak * 1e-5:.2g}", "weight"} <= set(words)
    np.testing.assert_array_equal(bar.pixels[0, 0], colorize(np.array(1.0), "viridis"))
    forbidden = ~traced.arrays[run_id, 1]["allowed"]
    for head, cells in enumerate(heads):
        unit = 1 + np.log10(np.maximum(traced.reference(run_id, 1, head) / peak, 1e-5)) / 5
        steps = np.abs(cells.pixels.astype(int) - colorize(unit, "viridis"))
        assert steps[~forbidden].max() <= 4  # one of 256 colours by rounding
        assert (cells.pixels[forbidden] == panel.THEMES["light"].masked).all()
    assert image.render_heads(traced.store, run_id, 1, "pdf").startswith(b"%PDF")
