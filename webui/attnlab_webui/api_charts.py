"""Memory timelines and snapshots over HTTP."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Response

from attnlab.describe import TIMELINES, memory_snapshot, memory_timeline
from attnlab_webui.answers import Refused, StoreDep, find_run

router = APIRouter()


@router.get("/runs/{run_id}/memory/{what}")
def memory(run_id: int, what: str, store: StoreDep) -> Response:
    """What a run held over time: memory_timeline, attention_memory_timeline, or CUDA's own snapshot as JSON."""
    find_run(store, run_id)
    choices = (*TIMELINES, "snapshot")
    if what not in choices:
        raise Refused(f"what must be one of {', '.join(choices)}, got {what[:40]!r}")
    if what == "snapshot":
        body = memory_snapshot(store, run_id)
        if body is None:
            raise Refused(f"run {run_id} has no snapshot: only runs on CUDA that record memory have one", 404)
        return _json_file(body, f"attnlab-run-{run_id}-snapshot")
    timeline: dict[str, Any] | None = memory_timeline(store, run_id, what)
    if timeline is None:
        raise Refused(f"run {run_id} recorded no memory", 404)
    return _json_file(json.dumps(timeline).encode(), f"attnlab-run-{run_id}-{what.replace('_', '-')}")


def _json_file(body: bytes, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}.json"', "Cache-Control": "no-store"}
    return Response(body, media_type="application/json", headers=headers)
