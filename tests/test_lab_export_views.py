"""Laws of the pictures of views: what stands on the page stands in the picture, and every format holds the same."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from attnlab.export import image, panel, scene
from attnlab.export.statistic_grid import draw_statistic
from attnlab.heads import statistics_document
from attnlab.views.colormaps import colorize
from attnlab.views.errors import ViewError


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
