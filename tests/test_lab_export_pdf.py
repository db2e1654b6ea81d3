"""Laws of PDF pictures: pdfium draws them as Pillow draws the PNG, and reads their words back."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from attnlab.export import panel, scene
from attnlab.export.pdf import to_pdf
from attnlab.export.truetype import TrueType

FONTS = ["built in", "DejaVuSans.ttf"]


def file_of(name: str) -> bytes:
    if name == "built in":
        font = ImageFont.load_default(12)
        assert isinstance(font, ImageFont.FreeTypeFont)
        assert isinstance(font.path, io.BytesIO)
        return font.path.getvalue()
    try:
        return Path(str(ImageFont.truetype(name, 12).path)).read_bytes()
    except OSError:
        pytest.skip(f"{name} is not installed")


def drawn(**changes) -> scene.Scene:
    values = np.random.default_rng(3).random((7, 5))
    words = [f"tok{i}" for i in range(5)] + ["naïve", "()\\<é>"]
    base = {
        "rows": (0, 7),
        "cols": (0, 5),
        "peak": 1.0,
        "title": "L5H2 of a (small) map",
        "row_labels": words,
    }
    one = panel.Panel(values, **(base | {"col_labels": words[2:], "subtitle": "exact weights"} | changes))
    return panel.draw_panels([one])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_another_program_draws_the_same_picture(theme):
    pdfium = pytest.importorskip("pypdfium2", reason="needs pypdfium2: make oracles installs it")
    picture = drawn()
    picture.background = panel.THEMES[theme].background
    page = pdfium.PdfDocument(to_pdf(picture))[0]
    assert page.get_size() == (picture.width * 0.75, picture.height * 0.75)
    seen = np.asarray(page.render(scale=4 / 3).to_pil().convert("RGB"), float)
    png = np.asarray(scene.Image.open(io.BytesIO(scene.to_png(picture))), float)
    assert seen.shape == png.shape
    off = np.abs(seen - png).max(axis=-1)
    cells = next(part for part in picture.parts if isinstance(part, scene.Raster))
    inside = np.s_[cells.y + 2 : cells.y + cells.height - 2, cells.x + 2 : cells.x + cells.width - 2]
    assert np.mean(off[inside] > 2) < 0.02  # an edge of a cell may be half a pixel off
    text = np.abs(smooth(seen) - smooth(png))  # glyphs differ in their edges, not in where they are
    assert text.max() < 70
    assert text.mean() < 1


def smooth(picture: np.ndarray, size: int = 5) -> np.ndarray:
    """The mean over squares, so that antialiasing is not compared."""
    sums = np.pad(picture.mean(axis=-1), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return (sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]) / size**2


def test_words_can_be_searched_and_copied():
    pdfium = pytest.importorskip("pypdfium2", reason="needs pypdfium2: make oracles installs it")
    document = pdfium.PdfDocument(to_pdf(drawn()))
    words = document[0].get_textpage().get_text_range()
    for word in ("L5H2 of a (small) map", "exact weights", "naïve", "()\\<é>", "query (from)", "0.75"):
        assert word in words
    assert document.get_metadata_value("Title") == "L5H2 of a (small) map"


def test_every_object_is_where_its_table_says():
    data = to_pdf(drawn())
    start = int(data.rsplit(b"startxref\n", 1)[1].split()[0])
    count = int(data[start:].split()[2])
    places = [int(line[:10]) for line in data[start:].splitlines()[3 : count + 2]]
    assert data[start:].startswith(b"xref\n0 ")
    for number, place in enumerate(places, 1):
        assert data[place:].startswith(f"{number} 0 obj\n".encode())


def test_the_same_picture_is_the_same_bytes():
    assert to_pdf(drawn()) == to_pdf(drawn())


@pytest.mark.parametrize("name", FONTS)
def test_advances_of_a_font_are_those_that_freetype_sees(name):
    data = file_of(name)
    font = TrueType(data)
    freetype = ImageFont.truetype(io.BytesIO(data), font.units, layout_engine=ImageFont.Layout.BASIC)
    for char in "aW i.0é(":
        assert font.advance(font.glyph(char)) == round(freetype.getlength(char))
    assert font.glyph("\U0010fffe") == 0


@pytest.mark.parametrize("name", FONTS)
def test_a_subset_has_its_glyphs_and_little_else(name):
    data = file_of(name)
    font = TrueType(data)
    glyphs = {font.glyph(char) for char in "aé"}
    small = font.subset(glyphs)
    cut = TrueType(small)
    for glyph in glyphs:
        outline = font._outline(glyph).rstrip(b"\0")
        assert cut._outline(glyph).rstrip(b"\0") == outline
        assert outline
    assert cut._outline(font.glyph("W")) == b""
    assert len(small) < len(data) / 2


def test_a_font_without_truetype_outlines_is_refused():
    data = bytearray(file_of("built in"))
    at = data.index(b"glyf")
    data[at : at + 4] = b"CFF "
    with pytest.raises(ValueError, match="must have TrueType outlines"):
        TrueType(bytes(data))
