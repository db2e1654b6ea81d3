"""How far heads are from those of another run, or from one of their own: a picture of a cell a head, and numbers."""

from __future__ import annotations

from attnlab.describe import run_brief
from attnlab.export import arrays, image
from attnlab.export.panel import check_look
from attnlab.export.scene import Scene
from attnlab.export.statistic_grid import draw_cells
from attnlab.export.table import table_bytes
from attnlab.views.distances import MEASURES, DistanceGrid, distances_from, run_distances
from attnlab.views.errors import ViewError
from attnlab.views.labels import mechanism_label, view_label
from attnlab.views.viewport import find_run
from attnlab_storage.database import Store

FORMATS = (*image.FORMATS, *arrays.FORMATS, "parquet")
TITLES = {
    "total_variation": ("total variation", ""),
    "jensen_shannon": ("Jensen-Shannon divergence", "bits"),
    "spearman": ("rank correlation", ""),
}
"""of each measure its name and unit"""


def draw_distances(
    store: Store,
    run_id: int,
    other: int | None = None,
    *,
    against: tuple[int, int] | None = None,
    measure: str = MEASURES[0],
    max_rows: int = 64,
    colormap: str = "viridis",
    theme: str = "light",
) -> Scene:
    """How far every head of a run is from the same head of another, by one measure: layers across and heads down.

    Args:
        other: the run that it is compared with; or
        against: (layer, head) of its own that all others are compared with.
        measure: one of `attnlab.views.distances.MEASURES`; heads that have none are grey.
        max_rows: queries that are sampled of each map.

    Raises ViewError for both or neither of the two, for an unknown measure, and where the runs share no layer.
    """
    check_look(theme, colormap)
    if measure not in MEASURES:
        raise ViewError(f"measure must be one of {', '.join(MEASURES)}; got {measure[:40]!r}")
    grid = _grid(store, run_id, other, against, max_rows)
    title, unit = TITLES[measure]
    return draw_cells(
        view_label(run_brief(find_run(store, run_id)), f"{title} from {_named(store, other, against)}"),
        [grid.note],
        grid.measures[measure].T,
        layers=grid.pairs[:, 0, 0].tolist(),
        heads=grid.pairs[0, :, 1].tolist(),
        unit=unit,
        colormap=colormap,
        theme=theme,
    )


def write_distances(
    store: Store,
    run_id: int,
    other: int | None = None,
    format: str = "npz",
    *,
    against: tuple[int, int] | None = None,
    max_rows: int = 64,
) -> bytes:
    """The same numbers, all measures: NPZ and safetensors [layers, heads] with ``pairs``, Parquet with a row a head."""
    grid = _grid(store, run_id, other, against, max_rows)
    if format == "parquet":
        places = grid.pairs.reshape(-1, 4).T
        columns = dict(zip(("layer", "head", "other_layer", "other_head"), places, strict=True))
        return table_bytes(columns | {name: table.ravel() for name, table in grid.measures.items()}, format)
    facts = {"run": run_id, "other": other, "against": against, "note": grid.note}
    return arrays.pack({"pairs": grid.pairs, **grid.measures}, facts, format)


def _grid(
    store: Store, run_id: int, other: int | None, against: tuple[int, int] | None, max_rows: int
) -> DistanceGrid:
    if (other is None) == (against is None):
        raise ViewError(
            "other must be a run to compare with, or against a layer and head of this run; one of both"
        )
    if against is not None:
        return distances_from(store, run_id, *against, max_rows)
    assert other is not None
    return run_distances(store, run_id, other, max_rows=max_rows)


def _named(store: Store, other: int | None, against: tuple[int, int] | None) -> str:
    if against is not None:
        return f"L{against[0]}H{against[1]}"
    assert other is not None
    return f"#{other} {mechanism_label(run_brief(find_run(store, other)))}"
