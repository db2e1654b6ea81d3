"""What a run read besides text, over HTTP: the picture as the model saw it, the sound that it heard."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from attnlab.views.read_inputs import run_picture, run_sound
from attnlab_webui.answers import StoreDep, find_run

router = APIRouter()


@router.get("/runs/{run_id}/picture")
def picture(run_id: int, store: StoreDep) -> dict[str, Any]:
    """The picture as the model saw it (a data URI) and the model's answer, null for each that the run has not."""
    find_run(store, run_id)
    return run_picture(store, run_id)


@router.get("/runs/{run_id}/sound")
def sound(run_id: int, store: StoreDep) -> dict[str, Any]:
    """The length of the sound that a run heard and its envelope, null where it heard none."""
    find_run(store, run_id)
    return run_sound(store, run_id)
