"""Every view of a run as a picture for a paper, by its name: what the notebook and the command line ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from attnlab.export import image
from attnlab.export.distance_grid import draw_distances
from attnlab.export.lines import draw_lines
from attnlab.export.patches import draw_query
from attnlab.export.rollout_map import draw_rollout
from attnlab.export.scene import Scene
from attnlab.export.shares import draw_shares
from attnlab.export.statistic_grid import draw_statistic
from attnlab.export.strips import draw_heads
from attnlab.export.token_text import draw_token
from attnlab.views.errors import ViewError
from attnlab.views.through_layers import (
    flow_facts,
    flow_way,
    rollout_facts,
    rollout_of,
    rollout_way,
)
from attnlab_storage.database import Store


def draw_way(
    store: Store,
    run_id: int,
    row: int | None = None,
    *,
    residual: float = 0.5,
    height: int = 64,
    scale: Any = "log",
    sink: bool = False,
    colormap: str = "viridis",
    theme: str = "light",
) -> Scene:
    """The rollout of position ``row`` over the text, or of all positions in ``height`` rows (None)."""
    way = rollout_way(store, run_id, row, residual, height)
    look: dict[str, Any] = {"scale": scale, "sink": sink, "colormap": colormap, "theme": theme}
    if row is None:
        return draw_rollout(store, run_id, rollout_of(way, way.get(), None, height), residual, **look)
    return draw_shares(store, run_id, rollout_facts(way, way.get(), row, residual), **look)


def draw_flow(
    store: Store,
    run_id: int,
    row: int,
    *,
    span: tuple[int, int] | None = None,
    residual: float = 0.5,
    sink: bool = False,
    colormap: str = "viridis",
    theme: str = "light",
) -> Scene:
    """The maximum flow from position ``row`` to the tokens of ``span`` (None: the 96 up to the row)."""
    way = flow_way(store, run_id, row, span, residual)
    facts = flow_facts(way, way.get(), row, span, residual)
    return draw_shares(store, run_id, facts, sink=sink, colormap=colormap, theme=theme)


SCENES: Mapping[str, Callable[..., Scene]] = {
    "grid": draw_statistic,
    "distances": draw_distances,
    "heads": draw_heads,
    "token": draw_token,
    "lines": draw_lines,
    "rollout": draw_way,
    "flow": draw_flow,
    "image": draw_query,
}
MAPS = ("map", "cross", "generation")
"""views whose picture is that of a region of one head's map"""
VIEWS = (*MAPS, *SCENES)
WHOLE_NUMBERS = frozenset({"layer", "head", "row", "height", "size", "other", "max_rows"})


def render_picture(store: Store, run_id: int, view: str, format: str = "png", **choices: Any) -> bytes:
    """A view as the bytes of a PNG, SVG or PDF file.

    Args:
        view: one of `VIEWS`.
        choices: what the view's own function takes (`SCENES`; of the `MAPS` `image.render_view`): layer, head, row,
            rows, cols, heads, colormap, theme and so on.

    Raises ViewError for an unknown view, format or choice, a choice that is missing, and what cannot be shown.
    """
    image.check_format(format)
    if view not in VIEWS:
        raise ViewError(f"view must be one of {', '.join(VIEWS)}; got {view[:40]!r}")
    if view in MAPS:
        _check_choices(image.render_view, view, choices)
        return image.render_view(store, run_id, format=format, **choices)
    _check_choices(SCENES[view], view, choices)
    return image.encode(SCENES[view](store, run_id, **choices), format)


def choices_of(view: str) -> list[str]:
    """What can be chosen of a view."""
    draw = image.render_view if view in MAPS else SCENES[view]
    return [name for name in signature(draw).parameters if name not in ("store", "run_id", "format")]


def _check_choices(draw: Callable[..., Any], view: str, choices: Mapping[str, Any]) -> None:
    known = choices_of(view)
    if unknown := sorted(choices.keys() - set(known)):
        raise ViewError(f"{unknown[0]} must be a choice of the view {view}: {', '.join(known)}")
    for name in WHOLE_NUMBERS & choices.keys():
        if choices[name] is not None and type(choices[name]) is not int:
            raise ViewError(f"{name} must be a whole number; got {choices[name]!r}")
    parameters = signature(draw).parameters
    missing = [name for name in known if parameters[name].default is parameters[name].empty]
    if lacking := [name for name in missing if name not in choices]:
        raise ViewError(f"{lacking[0]} must be given for the view {view}")
