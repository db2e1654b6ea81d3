"""The difference of two wide maps: every pixel is what the cells under it say, whichever mask allows them."""

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from attnlab.views import aligned_difference, overview, viewport, wide_difference
from attnlab.views.difference import REDUCTIONS, difference, difference_progress
from attnlab.views.jobs import Jobs
from attnlab.views.overview import build_pyramid
from attnlab.views.pyramids import Pyramids
from attnlab.views.viewport import load_map
from attnlab.views.wide_difference import EitherMask, is_wide_pair
from attnlab_kernels.difference_map import DifferenceMap
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Documents, Full, Mask, Padding, Window
from attnlab_storage.database import Store
from attnlab_webui import api

REGIONS = [((0, 77), (0, 77)), ((13, 77), (2, 76)), ((3, 70), (11, 77))]
SIZES = [(64, 64), (9, 13), (3, 50), (1, 1)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 in place of 16, so that a map of 77 tokens is wide; nothing built before."""
    monkeypatch.setattr(overview, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(overview, "COARSEST_SIDE", 8)
    monkeypatch.setattr(overview, "STRIP_ROWS", 16)
    monkeypatch.setattr(overview, "EXACT_CELLS", 1000)
    for module in (viewport, wide_difference):
        monkeypatch.setattr(module, "PYRAMIDS", Pyramids(1 << 20))
    monkeypatch.setattr(wide_difference, "LARGEST", Jobs(keep=4))
    monkeypatch.setattr(aligned_difference, "BLOCKS", Jobs(keep=2))
    monkeypatch.setattr(aligned_difference, "MOST_BLOCKS", 20)
    monkeypatch.setattr(aligned_difference, "STRIP_CELLS", 600)


def by_the_book(gap: np.ndarray, edges: tuple[np.ndarray, np.ndarray], reduce: str) -> np.ndarray:
    """What the pixels of A - B are, from every cell; one that only one of the masks allows is 0 in the other."""
    rows, cols = edges
    out = np.empty((len(rows) - 1, len(cols) - 1))
    for y, x in np.ndindex(out.shape):
        cells = gap[rows[y] : rows[y + 1], cols[x] : cols[x + 1]]
        out[y, x] = cells.mean() if reduce == "mean" else cells.flat[np.abs(cells).argmax()]
    return out


def gap_of(traced: Any, a: int, b: int) -> np.ndarray:
    return traced.reference(a, 0, 1) - traced.reference(b, 0, 1)


@pytest.mark.parametrize("order", [1, -1], ids=["causal minus window", "window minus causal"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_every_pixel_of_a_wide_difference_is_exact(traced, reduce: str, order: int) -> None:
    a, b = traced.run_ids[::order]
    gap = gap_of(traced, a, b)
    for rows, cols in REGIONS:
        for height, width in SIZES:
            view = difference(traced.store, a, b, 0, 1, rows, cols, height, width, reduce)
            assert view.edges is not None
            assert (view.exact, view.reduce) == (False, reduce)
            assert view.values.shape[0] <= height
            assert view.values.shape[1] <= width
            assert (view.edges[0][0], view.edges[1][0]) <= (rows[0], cols[0])
            np.testing.assert_allclose(view.values, by_the_book(gap, view.edges, reduce), atol=4e-6)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_wide_difference_over_another_text_is_that_of_the_cells_both_have(
    sqlite_store: Store, make_traced: Callable[..., Any], reduce: str
) -> None:
    long, short = make_traced(sqlite_store, tokens=77), make_traced(sqlite_store, tokens=60, seed=1)
    a, b = long.run_ids[0], short.run_ids[0]
    # token0 to token57 come first in both, then two tokens of the end
    there = np.array([*range(58), 75, 76])
    gap = np.full((77, 77), np.nan)
    gap[np.ix_(there, there)] = long.reference(a, 0, 1)[np.ix_(there, there)] - short.reference(b, 0, 1)
    for rows, cols in REGIONS:
        for height, width in SIZES:
            view = difference(sqlite_store, a, b, 0, 1, rows, cols, height, width, reduce)
            assert view.edges is not None
            assert (view.edges[0][0], view.edges[1][0]) <= (rows[0], cols[0])
            assert (view.edges[0][-1], view.edges[1][-1]) >= (rows[1], cols[1])
            known = known_by_the_book(gap, view.edges, reduce)
            np.testing.assert_allclose(view.values, known, atol=4e-6)
    assert difference_progress(sqlite_store, a, b, 0, 1, reduce=reduce) == 1.0


def known_by_the_book(gap: np.ndarray, edges: tuple[np.ndarray, np.ndarray], reduce: str) -> np.ndarray:
    """As `by_the_book`, of the cells that are no NaN; NaN where there are none."""
    rows, cols = edges
    out = np.full((len(rows) - 1, len(cols) - 1), np.nan)
    for y, x in np.ndindex(out.shape):
        cells = gap[rows[y] : rows[y + 1], cols[x] : cols[x + 1]]
        cells = cells[~np.isnan(cells)]
        if cells.size:
            out[y, x] = cells.mean() if reduce == "mean" else cells[np.abs(cells).argmax()]
    return out


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_where_pixels_are_even_blocks_the_exact_path_shows_the_same(
    traced, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = traced.run_ids
    wide = difference(traced.store, a, b, 1, 2, (0, 72), (0, 72), 9, 9, reduce)
    monkeypatch.setattr(overview, "EXACT_CELLS", 1 << 22)
    exact = difference(traced.store, a, b, 1, 2, (0, 72), (0, 72), 9, 9, reduce)
    assert exact.edges is None
    assert (exact.rows, exact.cols) == (wide.rows, wide.cols) == ((0, 72), (0, 72))
    np.testing.assert_allclose(wide.values, exact.values, atol=1e-6)


def test_pyramids_with_blocks_of_different_sizes_give_one_picture(
    traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "MOST_BLOCKS", 110)  # the causal map needs coarser blocks than the window
    a, b = traced.run_ids
    blocks = [
        overview.Layout((77, 77), load_map(traced.store, run, 0, 1).mask).levels[0].block for run in (a, b)
    ]
    assert blocks[0] > blocks[1]
    for rows, cols in REGIONS:
        view = difference(traced.store, a, b, 0, 1, rows, cols, 64, 64, "mean")
        assert view.edges is not None
        np.testing.assert_allclose(
            view.values, by_the_book(gap_of(traced, a, b), view.edges, "mean"), atol=4e-6
        )


@pytest.mark.parametrize(
    "masks",
    [
        (Causal(), Window(9)),
        (Window(30, 9), Causal()),
        (Padding(((0, 0),)), Causal() & Padding(((7, 31),))),
        (Documents([20, 31]), Window(3)),
        (Padding(((0, 0),)), Padding(((0, 0),))),
        (Full(), Full()),
    ],
)
def test_the_range_of_either_mask_holds_the_keys_of_both_and_no_more(masks: tuple[Mask, Mask]) -> None:
    size = {"num_queries": 45, "num_keys": 51}
    edges = np.array([0, 1, 8, 30, 45])
    allowed = np.logical_or(*(mask.allowed(np.arange(45), np.arange(51), **size) for mask in masks))
    low, high = EitherMask(*masks).key_ranges(edges, **size)
    for i, (start, stop) in enumerate(pairwise(edges.tolist())):
        keys = np.flatnonzero(allowed[start:stop].any(axis=0))
        assert (low[i], high[i]) == ((keys[0], keys[-1] + 1) if len(keys) else (0, 0))


def test_signed_maps_have_no_mean_from_blocks_and_still_a_largest_difference(traced) -> None:
    plain = load_map(traced.store, traced.run_ids[0], 0, 1)
    assert isinstance(plain, SoftmaxMap)
    signed = DifferenceMap(plain, plain, 0.5)
    whole = (0, 77), (0, 77)
    assert not is_wide_pair(plain, signed, *whole, "mean")
    assert is_wide_pair(plain, signed, *whole, "signed_max")
    assert not is_wide_pair(plain, plain, (0, 30), (0, 30), "signed_max")


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_web_says_how_far_a_difference_is_and_then_sends_it(
    traced, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def slow(full: Any, progress: Any, **options: Any) -> dict[str, np.ndarray]:
        progress(0.25)
        assert go.wait(30)
        return build_pyramid(full, progress, **options)

    for module in ("pyramids", "wide_difference"):
        monkeypatch.setattr(f"attnlab.views.{module}.build_pyramid", slow)
    app = FastAPI()
    api.install(app, traced.store)
    client = TestClient(app)
    a, b = traced.run_ids
    path = f"/api/v1/compare/viewport?a={a}&b={b}&layer=0&head=1&height=20&width=20&reduce={reduce}"
    try:
        answer = client.get(path)
        assert (answer.status_code, answer.headers["cache-control"]) == (202, "no-store")
        assert 0 <= answer.json()["building"] <= 0.25
        assert client.get(path + "&rows=0:30&cols=0:30").status_code == 200
    finally:
        go.set()
    difference(traced.store, a, b, 0, 1, reduce=reduce)  # waits
    assert difference_progress(traced.store, a, b, 0, 1, reduce=reduce) == 1
    answer = client.get(path)
    assert answer.status_code == 200
    shape = [int(side) for side in answer.headers["x-attnlab-shape"].split(",")]
    values = np.frombuffer(answer.content, "<f4").reshape(shape)
    edges = np.minimum(np.arange(shape[0] + 1) * 4, 77)
    seen = np.tri(77, dtype=bool)
    masked = [
        [not seen[y : y + 4, x : x + 4].any() for x in edges[:-1].tolist()] for y in edges[:-1].tolist()
    ]
    np.testing.assert_array_equal(np.isnan(values), masked)
    wanted = by_the_book(gap_of(traced, a, b), (edges, edges), reduce)
    np.testing.assert_allclose(np.nan_to_num(values), wanted, atol=4e-6)


def test_what_cannot_be_built_is_said_and_tried_again(traced, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> dict[str, np.ndarray]:
        raise RuntimeError("made to fail")

    monkeypatch.setattr("attnlab.views.wide_difference.build_pyramid", broken)
    a, b = traced.run_ids
    for _ in range(2):
        with pytest.raises(RuntimeError, match="made to fail"):
            difference(traced.store, a, b, 0, 0)
    monkeypatch.undo()
    assert difference(traced.store, a, b, 0, 0).exact
