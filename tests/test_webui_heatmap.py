"""Laws of the map's bytes: what is masked travels as NaN, everything else as the exact number."""

import gzip
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from attnlab.views.viewport import Viewport, allowed_pixels, viewport
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Full, Padding, Window
from attnlab_webui import heatmap


def blank_map(mask, shape):
    return SoftmaxMap(np.zeros((shape[0], 2)), np.zeros((shape[1], 2)), np.zeros(shape[0]), 1.0, mask)


@pytest.mark.parametrize(
    "mask",
    [Full(), Causal(), Window(3), Window(2, 4), Padding(((2, 9),)), Causal() & Padding(((3, 20),))],
    ids=str,
)
@pytest.mark.parametrize(("rows", "cols"), [((0, 17), (0, 23)), ((5, 12), (3, 20)), ((16, 17), (0, 1))])
@pytest.mark.parametrize("pixels", [(17, 23), (4, 7), (1, 1), (3, 23)])
def test_a_pixel_is_allowed_exactly_when_some_pair_in_it_is_allowed(mask, rows, cols, pixels):
    shape = (17, 23)
    allowed = mask.allowed(np.arange(17), np.arange(23), num_queries=17, num_keys=23)
    height, width = min(pixels[0], rows[1] - rows[0]), min(pixels[1], cols[1] - cols[0])
    found = allowed_pixels(blank_map(mask, shape), rows, cols, height, width)
    assert found.shape == (height, width)
    part = allowed[slice(*rows), slice(*cols)]
    for y in range(height):
        for x in range(width):
            down = slice(y * part.shape[0] // height, (y + 1) * part.shape[0] // height)
            across = slice(x * part.shape[1] // width, (x + 1) * part.shape[1] // width)
            assert found[y, x] == part[down, across].any()


def test_the_bytes_are_the_viewport_with_nan_for_masked(traced):
    run_id = traced.run_ids[1]
    view = viewport(traced.store, run_id, 1, 3)
    body, headers = heatmap.encode(view, [blank_map(Window(15), view.shape)])
    values = np.frombuffer(body, "<f4").reshape(77, 77)
    allowed = traced.arrays[run_id, 1]["allowed"]
    assert np.isnan(values[~allowed]).all()
    np.testing.assert_array_equal(values[allowed], view.values[allowed])
    assert headers["X-Attnlab-Shape"] == "77,77"
    assert headers["X-Attnlab-Exact"] == "1"
    assert float(headers["X-Attnlab-Max"]) == view.maximum


@pytest.mark.parametrize("mask", [Full(), Causal()], ids=str)
@pytest.mark.parametrize("signed", [False, True], ids=["weights", "signed"])
def test_a_picture_is_as_short_as_asked_and_no_colour_off(mask, signed):
    rng = np.random.default_rng(3)
    values = np.exp(rng.normal(-8, 2, (512, 512))).astype(np.float32)
    values[::7] = 0
    if signed:
        values *= rng.choice([-1, 1], values.shape)
    view = Viewport.of(values, (0, 512), (0, 512), (512, 512), "max")
    maps = [blank_map(mask, view.shape)]
    whole = np.frombuffer(heatmap.encode(view, maps)[0], "<f4")
    body, headers = heatmap.encode(view, maps, most_bytes=300_000)
    assert len(body) <= 300_000 < whole.nbytes
    assert (headers["X-Attnlab-Dtype"], headers["Content-Encoding"]) == ("bfloat16", "gzip")
    high, low = np.frombuffer(gzip.decompress(body), np.uint8).reshape(2, -1).astype(np.uint32)
    found = (high << 24 | low << 16).view(np.float32)
    np.testing.assert_allclose(found, whole, rtol=2**-5 if signed else 2**-6)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(whole))


def test_a_picture_that_cannot_be_so_short_is_refused_with_the_least_that_holds_it():
    values = np.exp(np.random.default_rng(3).normal(-8, 2, (64, 64))).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"most_bytes must be at least [\d,]+ for these 64 x 64 pixels; got 100"
    ):
        heatmap.deflated(values, 100)


def test_a_picture_that_is_short_anyway_stays_exact(traced):
    view = viewport(traced.store, traced.run_ids[0], 0, 0)
    assert heatmap.encode(view, [], most_bytes=300_000) == heatmap.encode(view, [])


@pytest.mark.parametrize("mask", [Causal(), Window(3), Window(2, 4)], ids=str)
def test_pixels_of_uneven_size_are_masked_by_the_cells_under_them(mask):
    rows, cols = np.array([0, 8, 16, 17]), np.array([0, 8, 16, 23])
    values = np.ones((3, 3), np.float32)
    view = replace(Viewport.of(values, (0, 17), (0, 23), (17, 23), "max"), edges=(rows, cols))
    body, _ = heatmap.encode(view, [blank_map(mask, (17, 23))])
    allowed = mask.allowed(np.arange(17), np.arange(23), num_queries=17, num_keys=23)
    wanted = [[allowed[a:b, c:d].any() for c, d in pairwise(cols)] for a, b in pairwise(rows)]
    np.testing.assert_array_equal(np.isnan(np.frombuffer(body, "<f4").reshape(3, 3)), ~np.array(wanted))


def test_a_difference_is_masked_only_where_neither_map_allows_a_pair(traced):
    view = viewport(traced.store, traced.run_ids[0], 0, 0)
    body, _ = heatmap.encode(view, [blank_map(mask, view.shape) for mask in (Causal(), Window(15))])
    values = np.frombuffer(body, "<f4").reshape(77, 77)
    np.testing.assert_array_equal(np.isnan(values), ~np.tri(77, dtype=bool))


def test_the_value_of_the_component_is_json_that_a_run_cannot_break_out_of():
    text = heatmap.message("</script><script>alert(1)</script>")
    assert json.loads(text) == {"message": "</script><script>alert(1)</script>"}
    config = json.loads(heatmap.config([3, 7], mode="compare", pair=[3, 7], stamp="1"))
    assert config == {"mode": "compare", "runs": [3, 7], "pair": [3, 7], "stamp": "1"}
