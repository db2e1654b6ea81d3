"""Downloads and imports over HTTP: tables, arrays, pictures, the report and the bundle.

Every download is an attachment, so that nothing a person can write is ever rendered as a page of this server.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from attnlab.export import arrays, image, table
from attnlab.export.bundle import read_bundle, write_bundle
from attnlab.export.panel import SCALES, THEMES
from attnlab.export.report import write_report
from attnlab.views.colormaps import COLORMAPS
from attnlab.views.viewport import linked_regions
from attnlab_storage import results, settings
from attnlab_storage.database import Store
from attnlab_webui.answers import Refused, StoreDep, find_experiment, find_run, ids, span

router = APIRouter()
CHUNK = 2**20
MOST_RUNS = 16
MEDIA = {
    "csv": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
    "json": "application/json",
    "html": "text/html; charset=utf-8",
    "zip": "application/zip",
    "npz": "application/octet-stream",
    "safetensors": "application/octet-stream",
    "png": "image/png",
    "svg": "image/svg+xml",
    "pdf": "application/pdf",
}
RUN_FORMATS = (*table.FORMATS, *arrays.FORMATS, *image.FORMATS)
EXPERIMENT_FORMATS = (*table.FORMATS, "html", "zip")
HEAD_FORMATS = (*table.MAP_FORMATS, *arrays.FORMATS, *image.FORMATS)
LAYER_FORMATS = (*arrays.FORMATS, *image.FORMATS)
COMPARE_FORMATS = RUN_FORMATS

Layer = Annotated[int | None, Query(ge=0)]
Clip = Annotated[float, Query(gt=0, le=100)]
Text = Annotated[str | None, Query(max_length=40)]


@router.get("/runs/{run_id}/export/{form}")
def export_run(
    run_id: int,
    form: str,
    store: StoreDep,
    layer: Layer = None,
    head: Layer = None,
    rows: Text = None,
    cols: Text = None,
    scale: str = "linear",
    reduce: str = "max",
    clip: Clip = 100.0,
    colormap: str = "viridis",
    theme: str = "light",
    query: Layer = None,
) -> Response:
    """One run: its numbers, a layer or a map, as a table, as arrays or as a picture.

    With `layer` and `head`: the exact weights of the region (parquet, csv, npz, safetensors) or its picture. With
    `layer` alone: its Q, K and LSE (npz, safetensors) or a picture of all its heads; with a `query` too, what that
    one gives to the patches of a picture. With neither: all measurements (csv, parquet, json), or the statistics of
    all heads (npz, safetensors).
    """
    check_choice("format", form, RUN_FORMATS)
    find_run(store, run_id)
    name = f"attnlab-run-{run_id}"
    if layer is None:
        return file_answer(_run_numbers(store, run_id, form), name, form)
    look = _look(scale, colormap, theme, reduce)
    if query is not None:
        check_choice("format of one query", form, image.FORMATS)
        body = image.render_query(
            store, run_id, layer, query, form, scale=look["scale"], colormap=colormap, theme=theme
        )
        return file_answer(body, f"{name}-L{layer}-query-{query}", form)
    if head is None:
        return file_answer(_whole_layer(store, run_id, layer, form, look), f"{name}-L{layer}", form)
    region = span("rows", rows), span("cols", cols)
    if form in image.FORMATS:
        body = image.render_view(store, run_id, layer, head, *region, form, clip=clip, **look)
    elif form in arrays.FORMATS:
        body = arrays.write_map(store, run_id, layer, head, *region, form)
    else:
        check_choice("format of one head", form, HEAD_FORMATS)
        body = table.write_map_table(store, run_id, layer, head, *region, form)
    return file_answer(body, f"{name}-L{layer}H{head}", form)


@router.get("/compare/export/{form}")
def export_comparison(
    runs: Annotated[str, Query(max_length=400)],
    form: str,
    store: StoreDep,
    layer: Layer = None,
    head: Layer = None,
    rows: Text = None,
    cols: Text = None,
    scale: str = "linear",
    reduce: str = "max",
    clip: Clip = 100.0,
    colormap: str = "viridis",
    theme: str = "light",
    pair: Text = None,
    against: Text = None,
) -> Response:
    """Several runs: measurements in one table, the same region of their maps as arrays or as one picture.

    The picture of two maps has their difference, and so has that of more runs with a `pair` of them (`3,7`);
    `against` (`5:2`) is the layer and head of the only run that the given one is compared with.
    """
    check_choice("format", form, COMPARE_FORMATS)
    run_ids = ids("runs", runs)
    if len(run_ids) > MOST_RUNS:
        raise Refused(f"runs must be at most {MOST_RUNS} run ids, got {len(run_ids)}")
    for run_id in run_ids:
        find_run(store, run_id)
    name = "attnlab-runs-" + "-".join(str(run_id) for run_id in run_ids)
    if form in table.FORMATS:
        return file_answer(table.write_table(store, run_ids, form), name, form)
    if layer is None or head is None:
        raise Refused(f"layer and head must be given for {form}")
    region = span("rows", rows), span("cols", cols)
    name = f"{name}-L{layer}H{head}"
    own = own_head(against, run_ids)
    if form in arrays.FORMATS:
        return file_answer(_several_maps(store, run_ids, layer, head, own, *region, form), name, form)
    look: dict[str, Any] = {
        "pair": _pair(pair),
        "against": own,
        "clip": clip,
        **_look(scale, colormap, theme, reduce),
    }
    body = image.render_comparison(store, run_ids, layer, head, *region, form, **look)
    return file_answer(body, name, form)


@router.get("/experiments/{experiment_id}/export/{form}")
def export_experiment(experiment_id: int, form: str, store: StoreDep) -> Response:
    """A whole experiment: measurements (csv, parquet, json), an offline report (html), everything (zip)."""
    check_choice("format", form, EXPERIMENT_FORMATS)
    find_experiment(store, experiment_id)
    name = f"attnlab-experiment-{experiment_id}"
    if form == "html":
        return file_answer(write_report(store, experiment_id).encode(), name, form)
    if form == "zip":
        return _spooled(lambda file: write_bundle(store, experiment_id, file), name)
    run_ids = [run.id for run in results.runs_of(store, experiment_id=experiment_id)]
    return file_answer(table.write_table(store, run_ids, form), name, form)


@router.post("/import")
async def import_bundle(request: Request, store: StoreDep) -> JSONResponse:
    """Store the experiment in a zip of `export/zip` (the body); all of it or nothing."""
    limit = settings.max_upload_bytes()
    with tempfile.TemporaryFile() as file:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise Refused(
                    f"file must be at most {limit} bytes here (ATTNLAB_MAX_UPLOAD_BYTES); "
                    "`attnlab import FILE.zip` has no such limit",
                    413,
                )
            await run_in_threadpool(file.write, chunk)
        if size == 0:
            raise Refused("file must be a zip written by attnlab export, got 0 bytes")
        file.seek(0)
        experiment_id = await run_in_threadpool(read_bundle, store, file)
    run_ids = [run.id for run in results.runs_of(store, experiment_id=experiment_id)]
    return JSONResponse({"experiment": experiment_id, "runs": run_ids}, 201)


def _run_numbers(store: Store, run_id: int, form: str) -> bytes:
    if form in table.FORMATS:
        return table.write_table(store, [run_id], form)
    if form in image.FORMATS:
        raise Refused(f"layer must be given for {form}")
    return arrays.write_statistics(store, run_id, form)


def _whole_layer(store: Store, run_id: int, layer: int, form: str, look: dict[str, Any]) -> bytes:
    check_choice("format of a whole layer", form, LAYER_FORMATS)
    if form in arrays.FORMATS:
        return arrays.write_trace(store, run_id, layer, form)
    return image.render_heads(store, run_id, layer, form, **look)


def _several_maps(
    store: Store,
    run_ids: list[int],
    layer: int,
    head: int,
    against: tuple[int, int] | None,
    rows: Any,
    cols: Any,
    form: str,
) -> bytes:
    """``map_3``, ``map_7``, ... of one region, with the tokens of each run; ``map_3_L5H2`` is ``against``."""
    found = {}
    heads = image.compared_heads(run_ids, layer, head, against)
    names = [str(run_id) for run_id in run_ids]
    names += [f"{run_id}_L{at}H{of}" for run_id, at, of in heads[len(run_ids) :]]
    spans = linked_regions(store, heads, rows, cols)
    for which, at, region in zip(names, heads, spans, strict=True):
        part = arrays.map_arrays(store, *at, *region, max_bytes=arrays.MAX_BYTES // len(heads))
        found |= {f"{name}_{which}": array for name, array in part.items()}
    return arrays.pack(found, {"runs": run_ids, "layer": layer, "head": head}, form)


def _pair(text: str | None) -> tuple[int, int] | None:
    """``"3,7"`` as two runs."""
    if text is None:
        return None
    found = ids("pair", text)
    if len(found) != 2:
        raise Refused(f"pair must be two run ids separated by a comma, got {text!r}")
    return found[0], found[1]


def own_head(text: str | None, run_ids: list[int]) -> tuple[int, int] | None:
    """``"5:2"`` as layer and head of the only run."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    if match is None or len(run_ids) != 1:
        raise Refused(f"against must be LAYER:HEAD of a single run, got {text!r} of {len(run_ids)} runs")
    return int(match[1]), int(match[2])


def _look(scale: str, colormap: str, theme: str, reduce: str) -> dict[str, Any]:
    check_choice("scale", scale, SCALES)
    check_choice("colormap", colormap, COLORMAPS)
    check_choice("theme", theme, tuple(THEMES))
    return {"scale": scale, "colormap": colormap, "theme": theme, "reduce": reduce}


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refused names the argument, the choices and the value."""
    if value not in choices:
        raise Refused(f"{name} must be one of {', '.join(choices)}, got {value[:40]!r}")


def file_answer(body: bytes, name: str, form: str) -> Response:
    """A download called ``name.form`` that no browser renders."""
    return Response(body, media_type=MEDIA[form], headers=_attachment(name, form))


def _spooled(write: Callable[[IO[bytes]], None], name: str) -> Response:
    """Written whole before the first byte is sent: an error is still an error, and memory stays small."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the background task closes it
    try:
        write(file)
        size = file.tell()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    headers = {**_attachment(name, "zip"), "Content-Length": str(size)}
    body = iter(lambda: file.read(CHUNK), b"")
    return StreamingResponse(
        body, media_type=MEDIA["zip"], headers=headers, background=BackgroundTask(file.close)
    )


def _attachment(name: str, form: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}.{form}"', "Cache-Control": "no-store"}
