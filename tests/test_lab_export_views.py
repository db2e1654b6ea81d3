"""Laws of the pictures of views: what stands on the page stands in the picture, and every format holds the same."""

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnlab.export import image, lines, panel, scene
from attnlab.export.distance_grid import draw_distances, write_distances
from attnlab.export.lines import draw_lines
from attnlab.export.shares import draw_shares
from attnlab.export.statistic_grid import draw_statistic
from attnlab.export.token_text import WIDTH, Passage, draw_passage, draw_token, ink_on
from attnlab.heads import statistics_document
from attnlab.views.colormaps import COLORMAPS, colorize, colormap
from attnlab.views.distances import distances_from, head_distances, run_distances
from attnlab.views.errors import ViewError
from attnlab.views.rollout import rollout
from attnlab.views.tokens import token_labels

ROOT = Path(__file__).parents[1]


def words_of(drawn: scene.Scene) -> list[str]:
    return [part.text for part in drawn.parts if isinstance(part, scene.Text)]


def all_formats_open(drawn: scene.Scene) -> None:
    """Each format is what it says it is, of the size of the scene; the PDF holds the words of the picture."""
    assert Image.open(io.BytesIO(image.encode(drawn, "png"))).size == (drawn.width, drawn.height)
    assert f'viewBox="0 0 {drawn.width} {drawn.height}"' in image.encode(drawn, "svg").decode()
    document = image.encode(drawn, "pdf")
    assert document.startswith(b"%PDF")
    pdfium = pytest.importorskip("pypdfium2", reason="needs pypdfium2: make oracles installs it")
    written = pdfium.PdfDocument(document)[0].get_textpage().get_text_range()
    assert scene.drawable(words_of(drawn)[0]) in written


def test_a_statistic_is_a_cell_a_head_with_title_axes_and_scale(traced):
    run_id = traced.run_ids[0]
    drawn = draw_statistic(traced.store, run_id, "entropy", colormap="magma")
    cells, _bar = (part for part in drawn.parts if isinstance(part, scene.Raster))
    values = np.array(statistics_document(traced.store, run_id)["entropy"]["values"])
    np.testing.assert_array_equal(cells.pixels, colorize(values.T / values.max(), "magma"))
    title = f"#{run_id} multi_head · entropy · made-up"
    assert {title, "layer", "head", "nats", "0", "1", "3", f"{values.max():.3g}"} <= set(words_of(drawn))
    all_formats_open(drawn)


def test_heads_without_a_value_are_grey_and_colours_reach_below_zero(traced, monkeypatch):
    kept = statistics_document(traced.store, traced.run_ids[0])
    kept["entropy"]["values"][1][2] = None
    kept["entropy"]["values"][0][0] = -2.0
    monkeypatch.setattr("attnlab.export.statistic_grid.statistics_document", lambda store, run_id: kept)
    drawn = draw_statistic(traced.store, traced.run_ids[0])
    cells = next(part for part in drawn.parts if isinstance(part, scene.Raster)).pixels
    assert (cells[2, 1] == panel.THEMES["light"].masked).all()
    np.testing.assert_array_equal(cells[0, 0], colorize(np.array(0.0), "viridis"))
    assert "-2" in words_of(drawn)


def test_a_statistic_that_is_not_kept_is_refused(traced):
    with pytest.raises(ViewError, match=re.escape("statistic must be one of entropy; got 'charm'")):
        draw_statistic(traced.store, traced.run_ids[0], "charm")


def test_distances_of_two_runs_are_a_cell_a_head_under_both_names(traced):
    a, b = traced.run_ids[:2]
    drawn = draw_distances(traced.store, a, b, measure="jensen_shannon")
    cells = next(part for part in drawn.parts if isinstance(part, scene.Raster))
    values = run_distances(traced.store, a, b).measures["jensen_shannon"].T
    np.testing.assert_array_equal(cells.pixels, colorize(values / values.max(), "viridis"))
    title, note, *words = words_of(drawn)
    assert (
        title
        == f"#{a} multi_head · Jensen-Shannon divergence from #{b} sliding_window(window_size=16) · made-up"
    )
    assert note.startswith("mean over ")
    assert {"layer", "head", "bits", f"{values.max():.3g}"} <= set(words)
    all_formats_open(drawn)


def test_distances_from_one_head_name_it_and_are_nothing_at_itself(traced):
    run_id = traced.run_ids[0]
    drawn = draw_distances(traced.store, run_id, against=(1, 2))
    cells = next(part for part in drawn.parts if isinstance(part, scene.Raster))
    grid = distances_from(traced.store, run_id, 1, 2)
    assert grid.measures["total_variation"][1, 2] == 0
    wanted = head_distances(traced.store, run_id, 0, 1, head_b=2).measures["total_variation"][:, 0]
    np.testing.assert_array_equal(grid.measures["total_variation"][0], wanted)
    values = grid.measures["total_variation"].T
    np.testing.assert_array_equal(cells.pixels, colorize(values / values.max(), "viridis"))
    assert words_of(drawn)[0].startswith(f"#{run_id} multi_head · total variation from L1H2")


def test_distances_are_the_same_numbers_in_every_file(traced):
    a, b = traced.run_ids[:2]
    grid = run_distances(traced.store, a, b)
    with np.load(io.BytesIO(write_distances(traced.store, a, b, "npz"))) as found:
        np.testing.assert_array_equal(found["pairs"], grid.pairs)
        assert json.loads(str(found["facts"]))["note"] == grid.note
        for name, values in grid.measures.items():
            np.testing.assert_array_equal(found[name], values)
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    table = parquet.read_table(io.BytesIO(write_distances(traced.store, a, b, "parquet")))
    assert table.column_names == ["layer", "head", "other_layer", "other_head", *grid.measures]
    np.testing.assert_array_equal(table["spearman"].to_numpy(), grid.measures["spearman"].ravel())


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "one of both"),
        ({"other": 2, "against": (0, 0)}, "one of both"),
        ({"other": 2, "measure": "charm"}, "measure must be one of total_variation, "),
        ({"against": (0, 9)}, "head_b must be in 0..3 for layer 0"),
    ],
)
def test_distances_that_cannot_be_drawn_say_why(traced, choices, words):
    if choices.get("other"):
        choices = choices | {"other": traced.run_ids[1]}
    with pytest.raises(ViewError, match=re.escape(words)):
        draw_distances(traced.store, traced.run_ids[0], **choices)


def drawn_weights(drawn: scene.Scene) -> list[tuple[int, int, str]]:
    """(row, column, colour) of every line between the columns, by where it begins and ends."""
    left, right = (
        next(p for p in drawn.parts if isinstance(p, scene.Text) and p.text == word) for word in ENDS
    )
    found = []
    for part in drawn.parts:
        if isinstance(part, scene.Line) and part.x0 == left.x + 6 and part.x1 == right.x - 6:
            row, col = ((y - left.y - 16) / 16 - 0.5 for y in (part.y0, part.y1))
            found.append((round(row), round(col), part.color))
    return found


ENDS = ("query (from)", "key (to)")


@pytest.mark.parametrize("heads", [(2,), (0, 3), ()])
def test_a_line_is_drawn_for_each_weight_from_the_threshold_up(traced, heads):
    run_id = traced.run_ids[1]
    drawn = draw_lines(traced.store, run_id, 1, (20, 51), (10, 33), heads=heads, above=0.07)
    wanted = set()
    for head in heads or range(4):
        weights = traced.reference(run_id, 1, head)[20:51, 10:33]
        wanted |= {
            (r, c, lines.HEAD_COLOURS["light"][head]) for r, c in np.argwhere(weights >= 0.07).tolist()
        }
    found = drawn_weights(drawn)
    assert len(found) == len(wanted) > 20
    assert set(found) == wanted
    name = {(): "all heads", (2,): "head 2", (0, 3): "heads 0, 3"}[heads]
    shown = {f"#{run_id} sliding_window(window_size=16) · layer 1, {name} · made-up", "weight", "·token22"}
    assert shown | {f"H{head}" for head in heads or range(4)} <= set(words_of(drawn))
    all_formats_open(drawn)


def test_the_mean_of_all_heads_is_one_line_a_pair_and_stronger_where_it_is_larger(traced):
    run_id = traced.run_ids[0]
    drawn = draw_lines(traced.store, run_id, 0, heads="mean", above=0.0)
    mean = np.mean([traced.reference(run_id, 0, head)[:32, :32] for head in range(4)], axis=0)
    found = drawn_weights(drawn)
    assert {(row, col) for row, col, _ in found} == set(zip(*np.tril_indices(32), strict=True))
    assert len(found) == 32 * 33 // 2
    strengths = [
        part.opacity for part in drawn.parts if isinstance(part, scene.Line) and part.x1 - part.x0 > 99
    ]
    sizes = [mean[row, col] for row, col, _ in found]
    assert np.all(np.diff(sizes) > -1e-6)
    assert strengths == sorted(strengths)
    assert strengths[0] < 0.2 < 0.9 < strengths[-1]


def test_a_head_has_the_colour_that_it_has_on_the_page():
    source = (ROOT / "webui/attnlab_webui/static/js/head_colours.js").read_text()
    for name, colours in lines.HEAD_COLOURS.items():
        listed = re.search(rf"const {name.upper()} = \[(.*?)\]", source, re.DOTALL)
        assert listed
        assert re.findall("#[0-9a-f]{6}", listed[1]) == colours


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_two_heads_that_are_shown_never_share_a_colour(theme):
    for shown in (range(9), range(32), [0, 8], [0, 32, 64], [5, 37, 6, 38], range(96, 128)):
        assert len(set(lines.head_colours(shown, theme))) == len(shown)
    assert lines.head_colours([3], theme) == lines.head_colours(range(4), theme)[3:]
    assert len(lines.head_colours(range(70), theme)) == 70


def test_too_many_lines_are_refused_with_their_number(traced, monkeypatch):
    monkeypatch.setattr(lines, "MOST_LINES", 9)
    with pytest.raises(ViewError, match=r"above must leave at most 9 lines; 0\.01 leaves [0-9]+"):
        draw_lines(traced.store, traced.run_ids[0], 0, above=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_of_any_strength_look_alike_in_png_and_pdf(theme):
    pdfium = pytest.importorskip("pypdfium2", reason="needs pypdfium2: make oracles installs it")
    look = panel.THEMES[theme]
    drawn = scene.Scene(120, 60, look.background, [scene.Rect(8, 4, 20, 9, "#d55e00")])
    for i, opacity in enumerate((0.1, 0.5, 1.0)):
        drawn.add(scene.Line(10, 20 + 12 * i, 110, 24 + 12 * i, "#0072b2", 4, opacity, dashed=i == 1))
    png = np.asarray(Image.open(io.BytesIO(scene.to_png(drawn))), float)
    page = pdfium.PdfDocument(image.encode(drawn, "pdf"))[0].render(scale=4 / 3)
    pdf = np.asarray(page.to_pil().convert("RGB"), float)
    assert np.abs(png - pdf).mean() < 4
    for row in (22, 34, 46):
        strokes = [np.abs(one[row - 5 : row + 6, 30:90] - one[-1, -1]).sum() for one in (png, pdf)]
        assert strokes[0] == pytest.approx(strokes[1], rel=0.1)


def test_a_dashed_line_is_drawn_in_pieces_of_four_pixels_three_apart():
    pieces = scene.dashes(scene.Line(0, 0, 12, 16, dashed=True))
    lengths = [np.hypot(x1 - x0, y1 - y0) for x0, y0, x1, y1 in pieces]
    np.testing.assert_allclose(lengths, [4, 4, 4])
    np.testing.assert_allclose(pieces[1][:2], (12 * 7 / 20, 16 * 7 / 20))
    assert scene.dashes(scene.Line(0, 0, 12, 16)) == [(0, 0, 12, 16)]


def tokens_of(drawn: scene.Scene) -> list[tuple[scene.Rect, scene.Text]]:
    """The box and the word of each token, in order."""
    parts = drawn.parts
    return [
        (box, word)
        for box, word in pairwise(parts)
        if isinstance(box, scene.Rect) and isinstance(word, scene.Text)
    ]


@pytest.mark.parametrize(("direction", "head"), [("sent", 3), ("received", 3), ("sent", None)])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_every_token_stands_on_the_colour_of_its_weight(traced, direction, head, scale):
    run_id, row = traced.run_ids[0], 41
    drawn = draw_token(traced.store, run_id, 1, row, head, direction=direction, scale=scale)
    heads = range(4) if head is None else [head]
    full = np.mean([traced.reference(run_id, 1, one) for one in heads], axis=0)
    weights = full[row] if direction == "sent" else full[:, row]
    allowed = np.arange(77) <= row if direction == "sent" else np.arange(77) >= row
    unit = weights / weights.max()
    if scale == "log":
        unit = 1 + np.log10(np.maximum(unit, 1e-3)) / 3
    wanted = np.where(allowed[:, None], colorize(unit, "viridis"), panel.THEMES["light"].masked)
    tokens = tokens_of(drawn)
    found = np.array([list(bytes.fromhex(box.color[1:])) for box, _ in tokens])
    assert np.abs(found - wanted.astype(int)).max() <= 4  # one of 256 colours by rounding
    assert [word.text.strip() for _, word in tokens] == [label.strip("·Ġ") for label in shown_labels(traced)]
    assert (
        f"what ·token41 (41) {'attends to' if direction == 'sent' else 'is attended by'}"
        in words_of(drawn)[1]
    )
    assert "grey: masked" in words_of(drawn)[1]
    all_formats_open(drawn)


def shown_labels(traced) -> list[str]:
    return token_labels(traced.store, traced.run_ids[0]).query


def test_tokens_are_wrapped_into_lines_and_never_overlap(traced):
    boxes = [box for box, _ in tokens_of(draw_token(traced.store, traced.run_ids[0], 0))]
    assert len({box.y for box in boxes}) > 3
    for before, box in pairwise(boxes):
        assert box.x >= before.x + before.width if box.y == before.y else box.y >= before.y + before.height
    assert max(box.x + box.width for box in boxes) <= boxes[0].x + WIDTH


def test_a_line_of_the_text_ends_where_its_newline_is_and_a_long_token_is_cut():
    labels = ["one", "·two", ".⏎", "three", "x" * 900]
    drawn = draw_passage(Passage("a", "b", labels, np.ones(5), 1.0, chosen=1))
    (one, _), (two, _), (stop, _), (three, _), (long, word) = tokens_of(drawn)
    assert one.y == two.y == stop.y < three.y < long.y
    assert one.x == three.x == long.x
    assert word.text.endswith("…")
    frame = [
        part
        for part in drawn.parts
        if isinstance(part, scene.Line) and part.x0 in (two.x - 1, two.x + two.width)
    ]
    assert len(frame) == 4
    assert drawn.parts.index(frame[0]) > drawn.parts.index(word)


@pytest.mark.parametrize("name", COLORMAPS)
def test_words_have_a_contrast_of_at_least_four_and_a_half_on_every_colour(name):
    for colour in colormap(name):
        luminance = relative_luminance(colour)
        ink = ink_on(*colour.tolist())
        assert (luminance + 0.05) / 0.05 >= 4.5 if ink == "#000000" else 1.05 / (luminance + 0.05) >= 4.5


def relative_luminance(colour: np.ndarray) -> float:
    """WCAG 2.2, as it is written there."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour / 255)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("sink", [False, True])
def test_every_token_stands_on_the_colour_of_its_share(traced, sink):
    run_id, row = traced.run_ids[0], 40
    shares = rollout(traced.store, run_id, row).values[0]
    document = {"row": row, "residual": 0.5, "shares": shares.tolist()}
    drawn = draw_shares(traced.store, run_id, document, scale="linear", sink=sink)
    peak = shares.max() if sink else shares[1:].max()
    tokens = tokens_of(drawn)
    assert len(tokens) == row + 1
    found = np.array([list(bytes.fromhex(box.color[1:])) for box, _ in tokens])
    np.testing.assert_array_equal(found, colorize(shares[: row + 1] / peak, "viridis"))
    assert f"#{run_id} multi_head · rollout from ·token40 (40) · made-up" in words_of(drawn)
    assert f"{peak:.3g}" in words_of(drawn)
    all_formats_open(drawn)


def test_flows_are_coloured_from_the_least_to_the_most(traced):
    shares = [0.3, 0.35, 0.2, 0.4]
    document = {"row": 33, "residual": 0.25, "start": 30, "shares": shares, "inside": [1.0]}
    drawn = draw_shares(traced.store, traced.run_ids[0], document)
    found = np.array([list(bytes.fromhex(box.color[1:])) for box, _ in tokens_of(drawn)])
    np.testing.assert_array_equal(found, colorize((np.array(shares) - 0.2) / 0.2, "viridis"))
    assert {"0.2", "0.4"} <= set(words_of(drawn))
    assert "tokens 30:34 · residual share 0.25" in words_of(drawn)[1]
