"""The numbers behind the charts over HTTP: tables of runs, timelines of memory and of serving, snapshots."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from attnlab.describe import TIMELINES, memory_snapshot, memory_timeline
from attnlab.export.chart import FORMATS, write_chart
from attnlab.views.serving import load_timeline, timeline_document, timeline_table
from attnlab_webui.answers import Refused, StoreDep, find_run, ids
from attnlab_webui.api_files import MEDIA

router = APIRouter()
MOST_RUNS = 512


@router.get("/chart/{form}")
def chart(runs: Annotated[str, Query(max_length=4000)], form: str, store: StoreDep) -> Response:
    """Every number that a chart can draw of some runs, a row a run: csv, parquet or json."""
    if form not in FORMATS:
        raise Refused(f"format must be one of {', '.join(FORMATS)}, got {form[:40]!r}")
    run_ids = ids("runs", runs)
    if len(run_ids) > MOST_RUNS:
        raise Refused(f"runs must be at most {MOST_RUNS} run ids, got {len(run_ids)}")
    for run_id in run_ids:
        find_run(store, run_id)
    return _file(write_chart(store, run_ids, form), "attnlab-chart", form)


@router.get("/runs/{run_id}/serving/{what}")
def serving(run_id: int, what: str, store: StoreDep) -> Response:
    """What happened while a run served: ``timeline`` as JSON, or ``steps`` or ``requests`` as CSV."""
    choices = ("timeline", "steps", "requests")
    if what not in choices:
        raise Refused(f"what must be one of {', '.join(choices)}, got {what[:40]!r}")
    name = f"attnlab-run-{run_id}-{what}"
    made = load_timeline(store, run_id)
    if what == "timeline":
        return _file(json.dumps(timeline_document(made)).encode(), name, "json")
    return _file(timeline_table(made, what).encode(), name, "csv")


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
        return _file(body, f"attnlab-run-{run_id}-snapshot", "json")
    timeline: dict[str, Any] | None = memory_timeline(store, run_id, what)
    if timeline is None:
        raise Refused(f"run {run_id} recorded no memory", 404)
    return _file(json.dumps(timeline).encode(), f"attnlab-run-{run_id}-{what.replace('_', '-')}", "json")


def _file(body: bytes, name: str, form: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}.{form}"', "Cache-Control": "no-store"}
    return Response(body, media_type=MEDIA[form], headers=headers)
