"""The rollout of all positions as a picture, as arrays, or as a table."""

from __future__ import annotations

import numpy as np

from attnlab.describe import run_brief
from attnlab.export import arrays, image, table
from attnlab.export.colourbar import Scale
from attnlab.export.panel import PLOT_SIDE, Panel, draw_panels
from attnlab.export.scene import Scene
from attnlab.views.errors import ViewError
from attnlab.views.labels import ran_as, view_label
from attnlab.views.rollout import Rollout
from attnlab.views.tokens import token_labels
from attnlab.views.viewport import find_run
from attnlab_storage.database import Store

FORMATS = (*image.FORMATS, *arrays.FORMATS, *table.MAP_FORMATS)


def draw_rollout(
    store: Store,
    run_id: int,
    found: Rollout,
    residual: float,
    *,
    scale: Scale = "log",
    sink: bool = False,
    colormap: str = "viridis",
    theme: str = "light",
) -> Scene:
    """A `pooled_rollout` over the tokens; where they are more than the picture has columns, shares are added up.

    Args:
        sink: whether the colours reach up to what the first token gets.

    Raises ViewError for an unknown look or scale.
    """
    values, brief = found.values, run_brief(find_run(store, run_id))
    count, size = values.shape
    edges = np.arange(min(PLOT_SIDE, size) + 1) * size // min(PLOT_SIDE, size)
    pixels = np.add.reduceat(values, edges[:-1], axis=1)
    counted = pixels if sink or size == 1 else pixels[:, 1:]
    facts = [ran_as(brief), str(brief["dtype"]), f"residual share {residual:g}", f"{count} rows of positions"]
    if not sink and size > 1:
        facts.append("colours without the first token")
    # rows as tall as columns are wide, as in a map
    tall = np.repeat(pixels, max(1, round(pixels.shape[1] / count)), axis=0)
    names = token_labels(store, run_id).query
    panel = Panel(
        tall,
        (0, size),
        (0, size),
        float(counted.max()),
        title=view_label(brief, "rollout of all positions"),
        subtitle=" · ".join(facts),
        col_word="token",
        row_labels=names if count == size else (),
        col_labels=names,
        colormap=colormap,
        scale=scale,
        bar_title="share",
    )
    return draw_panels([panel], theme)


def rollout_arrays(store: Store, run_id: int, found: Rollout, residual: float) -> dict[str, np.ndarray]:
    """``rollout`` float64 [rows, tokens], ``rows`` int64 [rows, 2] (half-open, a row is their mean), ``tokens``."""
    return {
        "rollout": found.values,
        "rows": np.array(found.rows),
        "residual": np.array(residual),
        "tokens": np.array(token_labels(store, run_id).raw_query, dtype=np.str_),
    }


def write_rollout(
    store: Store,
    run_id: int,
    found: Rollout,
    residual: float,
    format: str,
    *,
    scale: Scale = "log",
    sink: bool = False,
    colormap: str = "viridis",
    theme: str = "light",
) -> bytes:
    """A `pooled_rollout` as the bytes of a PNG, SVG, PDF, NPZ, safetensors, Parquet or CSV file.

    A table has a row for each share: first and last position of the row, token and its position, share.

    Raises ViewError for an unknown format, look or scale.
    """
    if format in image.FORMATS:
        look = {"colormap": colormap, "theme": theme}
        return image.encode(
            draw_rollout(store, run_id, found, residual, scale=scale, sink=sink, **look), format
        )
    made = rollout_arrays(store, run_id, found, residual)
    if format in arrays.FORMATS:
        return arrays.pack(made, run_brief(find_run(store, run_id)), format)
    if format not in table.MAP_FORMATS:
        raise ViewError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    rows, tokens = np.divmod(np.arange(found.values.size), found.values.shape[1])
    columns = {
        "first_position": made["rows"][rows, 0],
        "last_position": made["rows"][rows, 1] - 1,
        "token_position": tokens,
        "token": table.named(made["tokens"], tokens),
        "share": found.values.ravel(),
    }
    return table.table_bytes(columns, format)
