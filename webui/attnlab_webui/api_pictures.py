"""The views beside the map as pictures for a paper; arguments are called what they are in the view's own address."""

from __future__ import annotations

from fastapi import APIRouter, Response

from attnlab.export import image
from attnlab.export.scene import Scene
from attnlab.export.statistic_grid import draw_statistic
from attnlab_webui.answers import StoreDep, find_run
from attnlab_webui.api_files import Text, check_choice, file_answer

router = APIRouter()


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


def _picture(scene: Scene, name: str, form: str) -> Response:
    return file_answer(image.encode(scene, form), f"attnlab-{name}", form)
