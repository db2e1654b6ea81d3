"""Laws of the map views: exact regions, pooling, linked scales, memory, and what is refused."""

import re
import threading
from itertools import pairwise

import numpy as np
import pytest

from attnlab.export.arrays import trace_arrays
from attnlab.views import thumbnails, viewport
from attnlab.views.errors import NotFound, NothingRecorded, ViewError
from attnlab.views.memory import ArrayMemory
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_storage import queue
from attnlab_storage.tables import Run

EPSILON = 2e-7  # float32 of Q, K and the log-sum-exp


@pytest.mark.parametrize("which", [0, 1], ids=["causal", "window"])
@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 3)])
def test_the_whole_map_equals_plain_softmax_in_float64(traced, which, layer, head):
    run_id = traced.run_ids[which]
    view = viewport.viewport(traced.store, run_id, layer, head)
    assert view.exact
    assert view.values.dtype == np.float32
    np.testing.assert_allclose(view.values, traced.reference(run_id, layer, head), atol=EPSILON * 8)
    np.testing.assert_allclose(view.values.sum(axis=1), 1.0, atol=5e-6)


@pytest.mark.parametrize("rows", [(0, 77), (13, 60), (76, 77)])
@pytest.mark.parametrize("cols", [(0, 77), (5, 6), (40, 77)])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (13, 512)])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_a_pixel_is_the_reduction_of_its_cells(traced, rows, cols, size, reduce):
    run_id = traced.run_ids[0]
    view = viewport.viewport(traced.store, run_id, 1, 2, rows, cols, size[0], size[1], reduce)
    part = traced.reference(run_id, 1, 2)[slice(*rows), slice(*cols)]
    height, width = view.values.shape
    assert height == min(size[0], part.shape[0])
    assert width == min(size[1], part.shape[1])
    fold = np.max if reduce == "max" else np.mean
    for y in range(height):
        for x in range(width):
            down = slice(y * part.shape[0] // height, (y + 1) * part.shape[0] // height)
            across = slice(x * part.shape[1] // width, (x + 1) * part.shape[1] // width)
            assert view.values[y, x] == pytest.approx(fold(part[down, across]), abs=2e-6)
    assert view.maximum == view.values.max()
    assert view.minimum == view.values.min()
    assert (view.rows, view.cols, view.shape) == (rows, cols, (77, 77))


def test_a_region_equals_the_same_part_of_the_whole(traced):
    run_id = traced.run_ids[1]
    whole = viewport.viewport(traced.store, run_id, 0, 1).values
    part = viewport.viewport(traced.store, run_id, 0, 1, slice(11, 50), slice(None, 33)).values
    np.testing.assert_allclose(part, whole[11:50, :33], atol=1e-7)


def test_a_cell_is_the_weight_in_float64(traced):
    run_id = traced.run_ids[0]
    reference = traced.reference(run_id, 0, 3)
    for row, col in [(0, 0), (76, 3), (40, 40), (3, 70)]:
        found = viewport.cell(traced.store, run_id, 0, 3, row, col)
        assert found == pytest.approx(reference[row, col], abs=1e-6)
    assert viewport.cell(traced.store, run_id, 0, 3, 3, 70) == 0.0


def test_linked_panels_share_the_largest_maximum(traced):
    panels = [(run_id, 0, 1) for run_id in traced.run_ids]
    linked = viewport.linked_viewports(traced.store, panels, (30, 60), (0, 77), 9, 9)
    assert linked.maximum == max(view.values.max() for view in linked.panels)
    assert [view.rows for view in linked.panels] == [(30, 60)] * 2


def test_heads_of_one_group_share_their_keys(traced):
    run_id = traced.run_ids[0]
    first, second = (viewport.load_map(traced.store, run_id, 0, head) for head in (2, 3))
    assert isinstance(first, SoftmaxMap)
    assert isinstance(second, SoftmaxMap)
    assert first.key is second.key
    assert not np.array_equal(first.query, second.query)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer": 2}, "layer must be one of 0..1 of run"),
        ({"layer": -1}, "layer must be one of 0..1"),
        ({"head": 4}, "head must be in 0..3"),
        ({"head": -1}, "head must be in 0..3"),
        ({"rows": (5, 5)}, "rows must be a range"),
        ({"rows": (0, 78)}, "stop <= 77; got 0:78"),
        ({"cols": (-1, 4)}, "cols must be a range"),
        ({"cols": slice(0, 8, 2)}, "step 1"),
        ({"height": 0}, "height must be in 1..4096 pixels; got 0"),
        ({"width": 5000}, "width must be in 1..4096 pixels; got 5000"),
        ({"reduce": "sum"}, "reduce must be one of max, mean; got 'sum'"),
    ],
)
def test_what_a_map_does_not_have_is_refused_with_the_choices(traced, change, says):
    arguments = {"layer": 0, "head": 0} | change
    with pytest.raises(ViewError, match=re.escape(says)):
        viewport.viewport(traced.store, traced.run_ids[0], **arguments)


def test_an_unknown_run_is_not_found(sqlite_store):
    with pytest.raises(NotFound, match="got 99"):
        viewport.viewport(sqlite_store, 99, 0, 0)


def test_a_run_without_maps_says_why(sqlite_store, make_traced):
    made = make_traced(sqlite_store, outcomes=["out_of_memory"])
    with pytest.raises(NothingRecorded, match="it is out of memory"):
        viewport.viewport(sqlite_store, made.run_ids[2], 0, 0)
    with pytest.raises(ViewError, match=r"row must be in 0\.\.76; got 77"):
        viewport.cell(sqlite_store, made.run_ids[0], 0, 0, 77, 0)


def test_a_retried_run_never_shows_the_maps_of_its_earlier_attempt(traced, make_traced):
    store, run_id = traced.store, traced.run_ids[0]
    viewport.viewport(store, run_id, 0, 0)
    with store.write() as session:  # as if the run had failed after its maps were written
        session.get_one(Run, run_id).state = "failed"
    assert queue.retry(store, [run_id]) == [run_id]
    with pytest.raises(NothingRecorded):
        viewport.viewport(store, run_id, 0, 0)


def test_thumbnails_are_the_pooled_maps_of_every_head(traced):
    run_id = traced.run_ids[0]
    strip = thumbnails.thumbnails(traced.store, run_id, 1, 16)
    assert strip.values.shape == (4, 16, 16)
    for head in range(4):
        expected = viewport.viewport(traced.store, run_id, 1, head, height=16, width=16).values
        np.testing.assert_array_equal(strip.values[head], expected)
    assert strip.maximum == strip.values.max()
    with pytest.raises(ViewError, match="height must be in"):
        thumbnails.thumbnails(traced.store, run_id, 1, 0)


def test_a_picture_of_the_kept_size_is_made_once_and_masked_where_no_pair_is_allowed(traced, monkeypatch):
    run_id = traced.run_ids[1]
    first = thumbnails.thumbnail(traced.store, run_id, 1, 3)
    reference = traced.reference(run_id, 1, 3)
    edges = np.arange(49) * 77 // 48
    cells = [[reference[a:b, c:d] for c, d in pairwise(edges)] for a, b in pairwise(edges)]
    allowed = traced.arrays[run_id, 1]["allowed"]
    for y, x in ((0, 0), (20, 18), (47, 47), (47, 44)):
        assert first[y, x] == pytest.approx(cells[y][x].max(), abs=1e-6)
    for y, x in ((0, 47), (47, 0)):
        assert not allowed[edges[y] : edges[y + 1], edges[x] : edges[x + 1]].any()
        assert np.isnan(first[y, x])
    monkeypatch.setattr(thumbnails, "MEMORY", ArrayMemory(1 << 20))
    monkeypatch.setattr(thumbnails, "viewport", None)  # the next process reads what this one has kept
    np.testing.assert_array_equal(thumbnails.thumbnail(traced.store, run_id, 1, 3), first)
    assert thumbnails.thumbnail_progress(traced.store, run_id, 1, 3) == 1.0
    assert not any(name.startswith("thumbnail") for name in trace_arrays(traced.store, run_id, 1))


def test_memory_keeps_to_its_budget_and_forgets_the_least_recently_used():
    memory = ArrayMemory(3 * 800)
    loads = []

    def load(name):
        return memory.get(name, lambda: loads.append(name) or np.zeros(100))

    for name in ("a", "b", "c", "a", "d", "a", "b"):
        assert not load(name).flags.writeable
        assert memory.used <= memory.budget
    assert loads == ["a", "b", "c", "d", "b"]
    assert memory.get("huge", lambda: np.zeros(1000)).nbytes == 8000
    assert memory.used <= memory.budget


def test_memory_is_shared_by_threads_without_losing_count():
    memory = ArrayMemory(10 * 80)
    threads = [
        threading.Thread(target=lambda: [memory.get(i % 17, lambda: np.zeros(10)) for i in range(500)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.used == 800


@pytest.mark.parametrize("which", [0, 1], ids=["causal", "window"])
@pytest.mark.parametrize("region", [((0, 77), (0, 77)), ((20, 77), (3, 60))])
@pytest.mark.parametrize("size", [(77, 77), (9, 13), (1, 5)])
def test_a_pixel_is_allowed_if_any_of_its_cells_is(traced, which, region, size):
    run_id = traced.run_ids[which]
    rows, cols = region
    height, width = min(size[0], rows[1] - rows[0]), min(size[1], cols[1] - cols[0])
    one = viewport.load_map(traced.store, run_id, 0, 0)
    found = viewport.allowed_pixels(one, rows, cols, height, width)
    weights = traced.arrays[run_id, 0]["allowed"][slice(*rows), slice(*cols)]
    down = [slice(y * len(weights) // height, (y + 1) * len(weights) // height) for y in range(height)]
    across = weights.shape[1]
    for y in range(height):
        for x in range(width):
            part = weights[down[y], x * across // width : (x + 1) * across // width]
            assert found[y, x] == part.any()
