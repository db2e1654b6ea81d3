"""How the HTTP API answers: errors as one sentence, documents as JSON, arguments that name their rule."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from attnlab.compare import CompareError
from attnlab.export.bundle import BundleError
from attnlab.problems import SpecError
from attnlab.views.errors import NotFound, NothingRecorded, ViewError
from attnlab_storage import results
from attnlab_storage.database import Store
from attnlab_storage.errors import StoreError
from attnlab_storage.listing import ListingError

OCTETS = "application/octet-stream"
MAX_ID = 2**63 - 1
_RANGE = re.compile(r"(\d{1,9}):(\d{1,9})")


class Refused(Exception):
    """An answer that is not a result: its status and the sentence for the person who asked."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


def the_store(request: Request) -> Store:
    """The store that the application was built over."""
    return request.app.state.store


StoreDep = Annotated[Store, Depends(the_store)]


def install_handlers(app: FastAPI) -> None:
    """Turn every error that a person can cause into {"error": text} with a 4xx status."""
    expected: dict[type[Exception], int] = {
        ViewError: 400,
        CompareError: 400,
        BundleError: 400,
        ListingError: 400,
        NothingRecorded: 404,
        NotFound: 404,
        StoreError: 503,
    }
    for kind, status in expected.items():
        app.add_exception_handler(kind, _handler(status))

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        return problem(str(error), error.status)

    @app.exception_handler(SpecError)
    def bad_spec(request: Request, error: SpecError) -> JSONResponse:
        problems = [one.to_dict() for one in error.problems]
        return JSONResponse({"error": str(error), "problems": problems}, 400)

    @app.exception_handler(RequestValidationError)
    def bad_argument(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem("; ".join(_argument_problem(one) for one in error.errors()), 400)

    @app.exception_handler(HTTPException)
    def bad_request(request: Request, error: HTTPException) -> JSONResponse:
        return problem(str(error.detail), error.status_code)

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        return problem("the server failed on this request; its log says more", 500)


def problem(text: str, status: int) -> JSONResponse:
    """{"error": text}"""
    return JSONResponse({"error": text}, status)


def octets(body: bytes, headers: dict[str, str], version: str | None) -> Response:
    """With a version in the address the bytes can never change; without one nobody may keep them."""
    caching = "private, max-age=86400, immutable" if version else "no-store"
    return Response(body, media_type=OCTETS, headers={**headers, "Cache-Control": caching})


def find_run(store: Store, run_id: int) -> results.RunRow:
    """The run; Refused (404) when there is none or it was deleted."""
    run = results.get_run(store, run_id) if 0 < run_id <= MAX_ID else None
    if run is None:
        raise Refused(f"run must be the id of a run, got {run_id}", 404)
    return run


def find_experiment(store: Store, experiment_id: int) -> results.ExperimentRow:
    """The experiment; Refused (404) when there is none."""
    found = results.get_experiment(store, experiment_id) if 0 < experiment_id <= MAX_ID else None
    if found is None:
        raise Refused(f"experiment must be the id of an experiment, got {experiment_id}", 404)
    return found


def span(name: str, text: str | None) -> tuple[int, int] | None:
    """``"0:128"`` as (0, 128), None for all; Refused names the argument and the rule."""
    if text is None:
        return None
    match = _RANGE.fullmatch(text)
    if not match:
        raise Refused(f"{name} must be a range START:STOP of token positions, got {text[:60]!r}")
    return int(match[1]), int(match[2])


def ids(name: str, text: str) -> list[int]:
    """``"3,7"`` as [3, 7]."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and len(part.strip()) < 19 for part in parts):
        raise Refused(f"{name} must be run ids separated by commas, got {text[:60]!r}")
    return [int(part) for part in parts]


def plain(value: Any) -> Any:
    """Dataclasses, tuples and numbers that JSON does not know as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _handler(status: int) -> Any:
    def handle(request: Request, error: Exception) -> JSONResponse:
        return problem(str(error), status)

    return handle


def _argument_problem(error: Mapping[str, Any]) -> str:
    name = str(error["loc"][-1]) if error["loc"] else "request"
    if error["type"] == "missing":
        return f"{name} must be given"
    rule = str(error["msg"]).removeprefix("Input ").replace("should be", "must be")
    rule = rule if rule.startswith("must") else f"must be valid: {rule}"
    return f"{name} {rule}, got {str(error.get('input'))[:60]!r}"
