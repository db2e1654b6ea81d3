"""Laws of what a run read: patches of a picture, steps of a cache, and the path through text over sound."""

from dataclasses import replace

import numpy as np

from attnlab.export.patches import draw_query
from attnlab.export.scene import Raster
from attnlab.pictures import open_picture
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.colormaps import colorize
from attnlab.views.head_tiles import head_tiles
from attnlab.views.monotonic_path import monotonic_path
from attnlab.views.read_inputs import grows, patch_grid, run_picture, run_sound
from attnlab.views.viewport import find_trace
from attnlab_kernels.masks import Causal, Full
from attnlab_storage import results


def recorded(store, **spec):
    document = {"name": "x", "record": ["maps"], "repeats": 1} | spec
    (run,) = results.runs_of(store, experiment_id=run_here(store, parse_spec(document)))
    assert run.state == "succeeded", run.reason
    return run.id


def test_a_picture_lies_in_patches_behind_its_class_token(sqlite_store):
    run_id = recorded(
        sqlite_store, model="vit-digits", input={"image": "digit-3"}, vary={"mechanism": ["multi_head"]}
    )
    trace = find_trace(sqlite_store, run_id, 0)[1]
    grid = patch_grid(trace)
    assert grid is not None
    assert grid["prefix"] + grid["rows"] * grid["columns"] == trace.num_keys
    assert not grows(trace)
    told = run_picture(sqlite_store, run_id)
    assert told["picture"].startswith("data:image/png;base64,")
    assert told["answer"]["label"] == "3"
    figure = draw_query(sqlite_store, run_id, 1, 11, scale="linear")
    *heads, _ = (part for part in figure.parts if isinstance(part, Raster))
    weights = head_tiles(sqlite_store, run_id, 1, (11, 12))[:, 0, 1:]
    grey = np.asarray(open_picture(told["picture"]).convert("L").resize((160, 160)), float)[..., None]
    for part, one in zip(heads, weights, strict=True):
        colours = colorize(one / weights.max(), "viridis").reshape(4, 4, 3).repeat(40, 0).repeat(40, 1)
        assert np.abs(part.pixels - (0.7 * colours + 0.3 * grey)).max() <= 4  # one of 256 colours by rounding
    assert run_sound(sqlite_store, run_id) == dict.fromkeys(("seconds", "seconds_per_position", "envelope"))


def test_a_neighborhood_of_two_dimensions_is_a_picture_without_one(sqlite_store):
    run_id = recorded(
        sqlite_store,
        module={"dim": 24, "num_heads": 2, "causal": False},
        vary={"mechanism": [{"neighborhood": {"dims": 2, "kernel_size": 3}}], "sequence_length": [35]},
    )
    trace = find_trace(sqlite_store, run_id, 0)[1]
    assert patch_grid(trace) == {"rows": 5, "columns": 7, "prefix": 0}
    assert run_picture(sqlite_store, run_id) == {"picture": None, "answer": None}
    query = 2 * 7 + 3
    window = ~np.isnan(head_tiles(sqlite_store, run_id, 0, (query, query + 1))[1].reshape(5, 7))
    assert np.argwhere(window).tolist() == [[row, col] for row in (1, 2, 3) for col in (2, 3, 4)]


def test_only_a_causal_map_with_all_its_keys_grows(traced):
    trace = find_trace(traced.store, traced.run_ids[0], 0)[1]
    assert grows(trace)
    assert patch_grid(trace) is None
    assert not grows(replace(trace, num_queries=1)), "one row follows no other"
    assert not grows(replace(trace, mask=Full().to_json()))
    assert not grows(replace(trace, mask=Causal().to_json(), num_keys=trace.num_queries - 1))


def every_path(rows, cols):
    """All forward paths from the first row to the last, each row entered at most one column further."""

    def further(path):
        row, col = path[-1]
        if row == rows - 1:
            yield path
        for step in ((0, 1), (1, 0), (1, 1)):
            at = (row + step[0], col + step[1])
            if at[0] < rows and at[1] < cols and at[0] > 0:
                yield from further([*path, at])

    for col in range(cols):
        yield from further([(0, col)])


def test_no_forward_path_is_better_than_the_one_that_is_drawn():
    weights = np.random.default_rng(5).random((3, 5))
    costs = (weights.mean(axis=0) - weights) / weights.std(axis=0)
    found = monotonic_path(weights)
    best = min(every_path(3, 5), key=lambda path: sum(costs[cell] for cell in path))
    assert found == best


def test_the_path_follows_a_diagonal_band():
    rows, cols = np.arange(20)[:, None], np.arange(200)[None]
    weights = np.exp(-0.5 * ((cols - 10 * rows - 5) / 4) ** 2)
    for row, col in monotonic_path(weights):
        assert abs(col - 10 * row - 5) <= 10
