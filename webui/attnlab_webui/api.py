"""The HTTP API under /api/v1: experiments, runs, the queue, the catalog, the system.

Maps are in `api_maps`, what the other views show in `api_views` and as pictures in `api_pictures`, downloads and
imports in `api_files`. Every error is {"error": text} with a 4xx status and names the argument, the rule, the value and
the choices.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from attnlab.describe import experiment_document, run_document
from attnlab.estimate import estimate
from attnlab.heads import find_heads, head_document
from attnlab.spec import MAX_SPEC_BYTES, ExperimentSpec, parse_spec
from attnlab_kernels.catalog import MECHANISMS
from attnlab_storage import queue, results, settings
from attnlab_storage.database import Store
from attnlab_storage.listing import FILTERS, count_runs
from attnlab_webui import api_charts, api_compare, api_files, api_inputs, api_maps, api_pictures, api_views
from attnlab_webui.answers import (
    Refused,
    StoreDep,
    find_experiment,
    find_run,
    install_handlers,
    plain,
)
from attnlab_webui.mechanism_facts import mechanism_document
from attnlab_webui.system_facts import system_document

PREFIX = "/api/v1"
router = APIRouter()


def max_upload_bytes() -> int:
    """The largest upload in bytes."""
    return settings.max_upload_bytes()


def install(app: FastAPI, store: Store) -> None:
    """Add every route of the API to `app`."""
    app.state.store = store
    install_handlers(app)
    app.include_router(router, prefix=PREFIX)
    app.include_router(api_maps.router, prefix=PREFIX)
    app.include_router(api_inputs.router, prefix=PREFIX)
    app.include_router(api_views.router, prefix=PREFIX)
    app.include_router(api_compare.router, prefix=PREFIX)
    app.include_router(api_files.router, prefix=PREFIX)
    app.include_router(api_pictures.router, prefix=PREFIX)
    app.include_router(api_charts.router, prefix=PREFIX)
    app.add_api_route(PREFIX + "/{rest:path}", _unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])


def _unknown(rest: str) -> None:
    raise Refused(f"there is no {PREFIX}/{rest[:60]}", 404)


async def body_text(request: Request, limit: int) -> str:
    """The request's body as text; Refused when it is empty, too large or not UTF-8."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(f"body must be at most {limit} bytes", 413)
    if not body.strip():
        raise Refused("body must be a spec as JSON or YAML, got nothing")
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise Refused(
            f"body must be UTF-8 text, got byte {body[error.start]:#04x} at {error.start}"
        ) from None


async def body_spec(request: Request) -> ExperimentSpec:
    """The spec in a request's body (JSON or YAML)."""
    text = await body_text(request, MAX_SPEC_BYTES)
    return await run_in_threadpool(parse_spec, text)


@router.get("/health")
def health(store: StoreDep) -> dict[str, str]:
    """200 when the store answers."""
    results.revision(store)
    return {"status": "ok"}


@router.get("/queue")
def queue_state(store: StoreDep) -> dict[str, Any]:
    """How many runs are in each state, and whether the queue is paused."""
    return {**results.counts_by_state(store), "paused": queue.paused(store)}


@router.post("/experiments")
async def submit(request: Request, store: StoreDep) -> JSONResponse:
    """Queue an experiment; the body is its spec as JSON or YAML."""
    spec = await body_spec(request)

    def write() -> queue.Submitted:
        return queue.submit(
            store,
            name=spec.name,
            spec=spec.to_dict(),
            spec_hash=spec.hash(),
            points=[point.to_dict() for point in spec.points()],
        )

    submitted = await run_in_threadpool(write)
    return JSONResponse({"experiment": submitted.experiment_id, "runs": submitted.run_ids}, 201)


@router.post("/estimate")
async def estimate_cost(request: Request, store: StoreDep) -> Any:
    """What an experiment would cost, before it is queued."""
    spec = await body_spec(request)
    return plain(await run_in_threadpool(estimate, spec))


@router.get("/experiments")
def experiments(
    store: StoreDep,
    search: Annotated[str, Query(max_length=200)] = "",
    tag: str | None = None,
    limit: int = 50,
    after: str | None = None,
) -> dict[str, Any]:
    """One page of experiments, newest first."""
    page = results.list_experiments(store, search=search, tag=tag, limit=limit, after=after)
    return {"experiments": plain(page.rows), "next": page.next}


@router.get("/experiments/{experiment_id}")
def experiment(experiment_id: int, store: StoreDep) -> Any:
    """An experiment with its runs."""
    find_experiment(store, experiment_id)
    return plain(experiment_document(store, experiment_id))


@router.get("/runs")
def runs(
    request: Request,
    store: StoreDep,
    search: Annotated[str, Query(max_length=200)] = "",
    sort: str = "-id",
    limit: int = 50,
    after: str | None = None,
) -> dict[str, Any]:
    """One page of runs; every filter of the list may be given, several times for "any of these"."""
    filters = _filters(request, {"search", "sort", "limit", "after"})
    page = results.list_runs(store, filters=filters, search=search, sort=sort, limit=limit, after=after)
    total = count_runs(store, filters=filters, search=search)
    return {"runs": plain(page.rows), "next": page.next, "total": total}


def _filters(request: Request, known: set[str]) -> dict[str, list[str]]:
    """The filters of runs in a query; Refused where it holds anything else that is not known."""
    unknown = [name for name in request.query_params if name not in known and name not in FILTERS]
    if unknown:
        choices = ", ".join((*FILTERS, *sorted(known)))
        raise Refused(f"{unknown[0][:60]} must be a known parameter; choices: {choices}")
    return {name: request.query_params.getlist(name) for name in FILTERS if name in request.query_params}


@router.get("/heads")
def heads(
    request: Request,
    store: StoreDep,
    where: Annotated[str, Query(max_length=500)],
    search: Annotated[str, Query(max_length=200)] = "",
    limit: int = 50,
    after: str | None = None,
) -> dict[str, Any]:
    """Heads of all runs by their statistics: `where=sink_mass > 0.8 and entropy < 1`; filters as for runs."""
    filters = _filters(request, {"where", "search", "limit", "after"})
    page = find_heads(store, where, filters=filters, search=search, limit=limit, after=after)
    return {"heads": plain([head_document(row) for row in page.rows]), "next": page.next}


@router.get("/runs/{run_id}")
def run(run_id: int, store: StoreDep) -> Any:
    """A run: what it was, how it ended, what it measured."""
    find_run(store, run_id)
    return plain(run_document(store, run_id))


@router.post("/runs/{run_id}/cancel")
def cancel(run_id: int, store: StoreDep) -> dict[str, Any]:
    """Cancel a queued run, or ask a running one to end."""
    state = find_run(store, run_id).state
    if not queue.cancel(store, [run_id]):
        raise Refused(f"run {run_id} cannot be cancelled: it is {state}, or was asked to end already", 409)
    return {"run": run_id, "state": find_run(store, run_id).state}


@router.post("/runs/{run_id}/retry")
def retry(run_id: int, store: StoreDep) -> dict[str, Any]:
    """Queue a run again that ended without success."""
    state = find_run(store, run_id).state
    if not queue.retry(store, [run_id]):
        raise Refused(f"run {run_id} cannot be retried: it is {state}", 409)
    return {"run": run_id, "state": find_run(store, run_id).state}


@router.get("/mechanisms")
def mechanisms() -> dict[str, Any]:
    """The catalog of mechanisms."""
    return {"mechanisms": [mechanism_document(one) for one in MECHANISMS.values()]}


@router.get("/system")
def system(store: StoreDep) -> Any:
    """Who serves the queue, on which devices, with which implementations."""
    return plain(system_document(store))
