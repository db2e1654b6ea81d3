"""The pyramid of a wide map: every pixel at every zoom is exact for the cells under it, and it is built once."""

import threading
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from attnlab.views import overview, viewport
from attnlab.views.overview import Layout, build_pyramid, is_wide, pyramid_pixels
from attnlab.views.pyramids import Pyramids
from attnlab.views.thumbnails import thumbnail_progress
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_storage import queue, tensors
from attnlab_webui import api

MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(40),
    "both ways": Window(30, 9),
    "padded": Causal() & Padding(((37, 190),)),
    "dead": Padding(((0, 0),)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 in place of 16, so that a map of two hundred tokens is wide."""
    monkeypatch.setattr(overview, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(overview, "COARSEST_SIDE", 8)
    monkeypatch.setattr(overview, "STRIP_ROWS", 32)
    monkeypatch.setattr(overview, "EXACT_CELLS", 1000)


def made_map(mask: Mask, queries: int = 203, keys: int = 211) -> tuple[SoftmaxMap, np.ndarray]:
    rng = np.random.default_rng(2)
    query, key = rng.standard_normal((queries, 8)) * 2, rng.standard_normal((keys, 8))
    scores = query @ key.T
    allowed = mask.allowed(np.arange(queries), np.arange(keys), num_queries=queries, num_keys=keys)
    weights = np.where(allowed, np.exp(scores), 0)
    total = weights.sum(1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    full = SoftmaxMap(query.astype(np.float32), key.astype(np.float32), lse, 1.0, mask)
    return full, weights / np.where(total == 0, 1, total)[:, None]


class Signed:
    """A map with weights of both signs; `pool` keeps the greatest size under a pixel."""

    def __init__(self) -> None:
        self.weights = np.random.default_rng(4).standard_normal((203, 211)).astype(np.float32)
        self.shape, self.mask = (203, 211), Full()

    def pool(self, rows: slice, cols: slice, height: int, width: int, reduce: str = "max") -> np.ndarray:
        part = self.weights[rows, cols]
        row_edges = np.arange(height + 1) * part.shape[0] // height
        col_edges = np.arange(width + 1) * part.shape[1] // width
        return fold(part, row_edges, col_edges, reduce)


def fold(weights: np.ndarray, row_edges: np.ndarray, col_edges: np.ndarray, reduce: str) -> np.ndarray:
    """By the book, pixel by pixel."""
    out = np.empty((len(row_edges) - 1, len(col_edges) - 1))
    for y in range(len(out)):
        for x in range(out.shape[1]):
            cells = weights[row_edges[y] : row_edges[y + 1], col_edges[x] : col_edges[x + 1]]
            out[y, x] = cells.mean() if reduce == "mean" else cells.flat[np.abs(cells).argmax()]
    return out


@pytest.mark.parametrize("most", [1 << 23, 700], ids=["fine", "coarse"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_pixel_at_every_zoom_is_exact(mask: Mask, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "MOST_BLOCKS", most)
    full, weights = made_map(mask)
    layout, flat = Layout(full.shape, mask), build_pyramid(full)
    assert all(array.shape == (layout.size,) for array in flat.values())
    check(layout, flat, weights)


def check(layout: Layout, flat: dict[str, np.ndarray], weights: np.ndarray) -> None:
    base = layout.levels[0].block
    for rows, cols in [
        ((0, 203), (0, 211)),
        ((17, 160), (30, 199)),
        ((150, 203), (0, 211)),
        ((5, 6), (0, 211)),
    ]:
        for height, width in [(64, 64), (9, 13), (3, 50), (1, 1)]:
            for reduce in ("max", "mean"):
                pixels = pyramid_pixels(layout, flat, rows, cols, height, width, reduce)
                assert pixels.values.shape[0] <= height
                assert pixels.values.shape[1] <= width
                for edges, span, size in ((pixels.row_edges, rows, 203), (pixels.col_edges, cols, 211)):
                    assert edges[0] <= span[0] < edges[1]
                    assert edges[-2] < span[1] <= edges[-1] <= size
                    assert all(edge % base == 0 or edge == size for edge in edges)
                wanted = fold(weights, pixels.row_edges, pixels.col_edges, reduce)
                np.testing.assert_allclose(pixels.values, wanted, atol=1e-5)


def test_little_is_unpacked_at_once_and_the_pixels_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "MOST_UNPACKED", 50)
    full, weights = made_map(Causal())
    check(Layout(full.shape, Causal()), build_pyramid(full), weights)


def test_of_a_signed_map_the_greatest_size_is_kept() -> None:
    signed = Signed()
    check(Layout(signed.shape, signed.mask), build_pyramid(signed), signed.weights)


def test_a_window_keeps_no_more_blocks_than_it_touches() -> None:
    assert Layout((2048, 2048), Window(100)).levels[0].last.max() <= 512
    assert Layout((2048, 2048), Window(100)).size < 512 * 29 * 2
    assert Layout((2048, 2048), Causal()).size == pytest.approx(512 * 512 / 2 * 4 / 3, rel=0.02)


def test_the_layout_of_a_long_map_is_worked_out_once_and_not_at_every_look() -> None:
    first, again = (Layout((70_001, 70_001), Causal() & Padding(((3, 60_000),))) for _ in range(2))
    assert first.levels is again.levels


def test_only_what_the_mask_allows_makes_a_region_wide() -> None:
    shape = (4000, 4000)
    assert is_wide(shape, Causal(), (0, 4000), (0, 4000))
    assert not is_wide(shape, Causal(), (0, 1000), (2000, 4000))
    assert not is_wide(shape, Full(), (0, 25), (0, 40))
    assert is_wide(shape, Window(3), (0, 4000), (0, 4000))


def test_a_wide_region_is_answered_from_a_pyramid_that_is_kept(
    traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id = traced.store, traced.run_ids[0]
    built: list[int] = []
    real = build_pyramid

    def counting(*arguments: Any) -> dict[str, np.ndarray]:
        built.append(1)
        return real(*arguments)

    monkeypatch.setattr("attnlab.views.pyramids.build_pyramid", counting)
    for _ in range(2):  # the second process reads what the first has kept
        monkeypatch.setattr(viewport, "PYRAMIDS", Pyramids(1 << 20))
        view = viewport.viewport(store, run_id, 1, 2, None, (0, 60), 16, 16)
        assert (view.rows, view.cols, view.values.shape, view.exact) == ((0, 77), (0, 60), (10, 15), False)
        assert view.edges is not None
        wanted = fold(traced.reference(run_id, 1, 2), *view.edges, "max")
        np.testing.assert_allclose(view.values, wanted, atol=1e-5)
    assert built == [1]
    names = {info.name for info in tensors.tensor_info(store, run_id) if info.layer == 1}
    assert {"overview_max.2", "overview_sum.2"} <= names
    small = viewport.viewport(store, run_id, 1, 2, (10, 30), (10, 30), 512, 512)
    assert small.exact


def test_the_web_says_how_far_the_building_is_and_does_not_wait(
    traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    real = build_pyramid

    def slow(full: Any, progress: Any) -> dict[str, np.ndarray]:
        progress(0.25)
        assert go.wait(30)
        return real(full, progress)

    monkeypatch.setattr("attnlab.views.pyramids.build_pyramid", slow)
    monkeypatch.setattr(viewport, "PYRAMIDS", Pyramids(1 << 20))
    app = FastAPI()
    api.install(app, traced.store)
    client = TestClient(app)
    path = f"/api/v1/runs/{traced.run_ids[0]}/viewport?layer=0&head=1&v=1"
    try:
        answers = [client.get(path) for _ in range(2)]
        assert {answer.status_code for answer in answers} == {202}
        assert answers[1].json() in ({"building": 0.25}, {"building": 0.0})
        assert answers[0].headers["cache-control"] == "no-store"
        assert client.get(path.replace("viewport", "thumbnails")).status_code == 202
        every = client.get(path.replace("viewport", "thumbnails").replace("&head=1", ""))
        assert every.status_code == 202
        assert len(viewport.PYRAMIDS._jobs) == 1  # pictures of many heads are in nobody's way
    finally:
        go.set()
    viewport.viewport(traced.store, traced.run_ids[0], 0, 1)
    assert client.get(path).status_code == 200
    assert client.get(path.replace("viewport", "thumbnails")).status_code == 200


def test_what_cannot_be_built_is_said_and_tried_again(traced, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, np.ndarray]:
        raise RuntimeError("made to fail")

    monkeypatch.setattr("attnlab.views.pyramids.build_pyramid", broken)
    monkeypatch.setattr(viewport, "PYRAMIDS", Pyramids(1 << 20))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="made to fail"):
            viewport.viewport(traced.store, traced.run_ids[0], 0, 0)


def test_what_fails_while_it_is_built_is_said_to_whoever_asks_next(
    traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def broken(*_: Any) -> dict[str, np.ndarray]:
        assert go.wait(30)
        raise RuntimeError("made to fail")

    monkeypatch.setattr("attnlab.views.pyramids.build_pyramid", broken)
    monkeypatch.setattr(viewport, "PYRAMIDS", Pyramids(1 << 20))
    asked = traced.store, traced.run_ids[0], 0, 0
    assert thumbnail_progress(*asked) == 0
    go.set()
    viewport.PYRAMIDS._patient.submit(lambda: None).result(30)  # the one thread has come to its end
    with pytest.raises(RuntimeError, match="made to fail"):
        thumbnail_progress(*asked)
    monkeypatch.setattr("attnlab.views.pyramids.build_pyramid", build_pyramid)
    thumbnail_progress(*asked)
    viewport.PYRAMIDS._patient.submit(lambda: None).result(30)
    assert thumbnail_progress(*asked) == 1


def test_a_map_that_is_looked_at_is_built_while_the_picture_of_another_head_rests(
    traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, looked_at, went_on = (threading.Event() for _ in range(3))
    overtaken = []
    real = build_pyramid

    def build(full: Any, progress: Any) -> dict[str, np.ndarray]:
        if threading.current_thread().name.startswith("attnlab-pictures"):
            started.set()
            assert looked_at.wait(30)
            progress(0.5)
            went_on.set()
        else:
            looked_at.set()
            overtaken.append(went_on.wait(0.3))
        return real(full, progress)

    monkeypatch.setattr("attnlab.views.pyramids.build_pyramid", build)
    monkeypatch.setattr(viewport, "PYRAMIDS", Pyramids(1 << 20))
    asked = traced.store, traced.run_ids[0], 0
    assert thumbnail_progress(*asked, 0) < 1
    assert started.wait(30)
    viewport.viewport(*asked, 1)
    assert overtaken == [False]
    assert went_on.wait(30)
    viewport.PYRAMIDS._patient.submit(lambda: None).result(30)
    assert thumbnail_progress(*asked, 0) == 1


def test_a_picture_that_rests_goes_on_when_its_own_map_is_looked_at(
    traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    resting, went_on, other_started, other_may_end = (threading.Event() for _ in range(4))
    real = build_pyramid

    def build(full: Any, progress: Any) -> dict[str, np.ndarray]:
        if threading.current_thread().name.startswith("attnlab-pictures"):
            assert other_started.wait(30)
            resting.set()
            progress(0.5)
            went_on.set()
        else:
            other_started.set()
            assert other_may_end.wait(30)
        return real(full, progress)

    monkeypatch.setattr("attnlab.views.pyramids.build_pyramid", build)
    monkeypatch.setattr(viewport, "PYRAMIDS", Pyramids(1 << 20))
    asked = traced.store, traced.run_ids[0], 0
    assert thumbnail_progress(*asked, 0) < 1
    assert viewport.overview_progress(*asked, 1) < 1
    assert resting.wait(30)
    assert not went_on.wait(0.2)
    assert viewport.overview_progress(*asked, 0) < 1
    assert went_on.wait(10)
    other_may_end.set()
    for builder in (viewport.PYRAMIDS._patient, viewport.PYRAMIDS._builder):
        builder.submit(lambda: None).result(30)


def test_a_derived_tensor_belongs_to_an_ended_attempt_and_is_kept_once(traced, point) -> None:
    store, run_id = traced.store, traced.run_ids[0]
    array = np.ones((1, 5), np.float32)
    assert tensors.keep_derived(store, run_id, 1, "extra", 0, array)
    assert not tensors.keep_derived(store, run_id, 1, "extra", 0, array * 2)
    assert not tensors.keep_derived(store, run_id, 2, "other", 0, array)
    assert not tensors.keep_derived(store, 4711, 1, "other", 0, array)
    np.testing.assert_array_equal(tensors.read_tensor(store, run_id, "extra", 0, 0), array[0])
    queued = queue.submit(store, name="n", spec={}, spec_hash="0", points=[point()])
    assert not tensors.keep_derived(store, queued.run_ids[0], 0, "extra", 0, array)
