"""The views beside the map as pictures for a paper; arguments are called what they are in the view's own address."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Response

from attnlab.export import distance_grid, image, rollout_map
from attnlab.export.lines import draw_lines
from attnlab.export.scene import Scene
from attnlab.export.shares import WAYS, draw_shares
from attnlab.export.statistic_grid import draw_statistic
from attnlab.export.token_text import SCALES, draw_token
from attnlab.views.distances import MEASURES
from attnlab.views.jobs import Answer
from attnlab.views.through_layers import flow_document, rollout_document, rollout_of, rollout_way
from attnlab_webui.answers import Refused, StoreDep, find_run, span
from attnlab_webui.api_files import Text, check_choice, file_answer, own_head
from attnlab_webui.api_views import Rows, Share

router = APIRouter()
Found = TypeVar("Found")


@router.get("/runs/{run_id}/grid/export/{form}")
def export_grid(
    run_id: int,
    form: str,
    store: StoreDep,
    statistic: Text = None,
    colormap: str = "viridis",
    theme: str = "light",
) -> Response:
    """A `statistic` of all layers and heads (without one: the first that the run keeps) as png, svg or pdf."""
    check_choice("format", form, image.FORMATS)
    find_run(store, run_id)
    scene = draw_statistic(store, run_id, statistic, colormap=colormap, theme=theme)
    return _picture(scene, f"run-{run_id}-{statistic or 'statistic'}", form)


@router.get("/compare/distances/export/{form}")
def export_distances(
    form: str,
    a: int,
    store: StoreDep,
    b: int | None = None,
    against: Text = None,
    measure: str = MEASURES[0],
    max_rows: Rows = 64,
    colormap: str = "viridis",
    theme: str = "light",
) -> Response:
    """How far the heads of run `a` are from those of `b`, or from its own head `against` (`5:2`).

    One `measure` of all layers and heads as png, svg or pdf; all of them as npz, safetensors or parquet.
    """
    check_choice("format", form, distance_grid.FORMATS)
    for run_id in (a, b):
        if run_id is not None:
            find_run(store, run_id)
    pair: dict[str, Any] = {"against": own_head(against, [a]), "max_rows": max_rows}
    name = f"runs-{a}-{b}-distances" if against is None else f"run-{a}-distances"
    if form in image.FORMATS:
        look: dict[str, Any] = {"measure": measure, "colormap": colormap, "theme": theme}
        return _picture(distance_grid.draw_distances(store, a, b, **pair, **look), name, form)
    return file_answer(distance_grid.write_distances(store, a, b, form, **pair), f"attnlab-{name}", form)


@router.get("/runs/{run_id}/lines/export/{form}")
def export_lines(
    run_id: int,
    form: str,
    layer: int,
    store: StoreDep,
    rows: Text = None,
    cols: Text = None,
    heads: Annotated[str, Query(max_length=1000)] = "",
    above: float = 0.05,
    theme: str = "light",
) -> Response:
    """The weights of a short range as lines, of `heads` (`1,3`, `mean`, or all) from `above` up, as png, svg or pdf."""
    check_choice("format", form, image.FORMATS)
    find_run(store, run_id)
    region = span("rows", rows), span("cols", cols)
    scene = draw_lines(store, run_id, layer, *region, heads=_heads(heads), above=above, theme=theme)
    return _picture(scene, f"run-{run_id}-L{layer}-lines", form)


@router.get("/runs/{run_id}/token/export/{form}")
def export_token(
    run_id: int,
    form: str,
    layer: int,
    store: StoreDep,
    head: int = 0,
    heads: Annotated[str, Query(max_length=1000)] = "",
    token: int | None = None,
    direction: Text = "sent",
    shown: Text = None,
    scale: str = "log",
    colormap: str = "viridis",
    theme: str = "light",
) -> Response:
    """What the query `token` (without one: the last) gives or receives over the text, as png, svg or pdf.

    Of one `head`, or of the mean of all with `heads=mean`; over the `shown` positions START:STOP, or all.
    """
    check_choice("format", form, image.FORMATS)
    check_choice("scale", scale, SCALES)
    find_run(store, run_id)
    scene = draw_token(
        store,
        run_id,
        layer,
        token,
        None if heads == "mean" else head,
        direction=direction or "sent",
        shown=span("shown", shown),
        scale="log" if scale == "log" else "linear",
        colormap=colormap,
        theme=theme,
    )
    return _picture(scene, f"run-{run_id}-L{layer}-token-{'last' if token is None else token}", form)


@router.get("/runs/{run_id}/rollout/export/{form}")
def export_rollout(
    run_id: int,
    form: str,
    store: StoreDep,
    token: int | None = None,
    through: str = "rollout",
    tokens: Text = None,
    residual: Share = 0.5,
    height: Rows = 64,
    scale: str = "log",
    sink: str = "without",
    colormap: str = "viridis",
    theme: str = "light",
) -> Response:
    """Where position `token` takes its input from, `through` rollout or flow, over the text, as png, svg or pdf.

    A flow reaches `tokens` START:STOP. `through=all` are all positions in `height` rows, also as npz, safetensors,
    parquet or csv. 409 while it is being worked out, as `/rollout` and `/flow` do it: ask again.
    """
    check_choice("through", through, (*WAYS, "all"))
    check_choice("format", form, rollout_map.FORMATS if through == "all" else image.FORMATS)
    check_choice("scale", scale, SCALES)
    check_choice("sink", sink, ("without", "with"))
    find_run(store, run_id)
    look: dict[str, Any] = {"scale": scale, "sink": sink == "with", "colormap": colormap, "theme": theme}
    if through == "all":
        way = rollout_way(store, run_id, None, residual, height)
        found = rollout_of(way, _there(way.ask(), "rollout"), None, height)
        body = rollout_map.write_rollout(store, run_id, found, residual, form, **look)
        return file_answer(body, f"attnlab-run-{run_id}-rollout-all", form)
    if token is None:
        raise Refused(f"token must be given through {through}")
    if through == "flow":
        answer = flow_document(store, run_id, token, span("tokens", tokens), residual)
    else:
        answer = rollout_document(store, run_id, token, residual)
    scene = draw_shares(store, run_id, _there(answer, through), **look)
    return _picture(scene, f"run-{run_id}-{through}-{token}", form)


def _there(answer: Answer[Found], what: str) -> Found:
    """What was worked out; Refused while it still is."""
    if answer.result is None:
        raise Refused(f"the {what} is still being worked out ({answer.done:.0%}): ask again", 409)
    return answer.result


def _heads(text: str) -> list[int] | Literal["mean"]:
    if text == "mean":
        return "mean"
    parts = text.split(",") if text else []
    if not all(re.fullmatch("[0-9]{1,4}", part) for part in parts):
        raise Refused(f"heads must be mean or head numbers separated by commas, got {text[:60]!r}")
    return [int(part) for part in parts]


def _picture(scene: Scene, name: str, form: str) -> Response:
    return file_answer(image.encode(scene, form), f"attnlab-{name}", form)
