"""What runs yield: written under the claim's fence, read back for the attempt that counts.

``with recording(store, claim) as session:`` is one transaction that holds the run; the ``record_`` functions
and `tensors.write_tensor` are called inside. Nothing is visible before the block ends, nothing stays if it
raises. Keep it to a layer or so: the run's lease cannot be renewed meanwhile.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from attnlab_storage.columns import db_now, dump_json
from attnlab_storage.database import Store, revision
from attnlab_storage.errors import LostLease
from attnlab_storage.fencing import Claim, fence
from attnlab_storage.keeping import (
    change_experiment,
    delete_experiments,
    delete_runs,
    purge,
    restore_experiments,
    restore_runs,
)
from attnlab_storage.listing import (
    ExperimentPage,
    ExperimentRow,
    RunPage,
    RunRow,
    count_runs,
    counts_by_state,
    get_experiment,
    get_run,
    list_experiments,
    list_runs,
    run_ids,
    run_values,
    runs_of,
)
from attnlab_storage.tables import Attempt, Environment, Event, LogChunk, Measurement, Run, RunInput, Trace

__all__ = [
    "AttemptRow",
    "EventRow",
    "ExperimentPage",
    "ExperimentRow",
    "InputRow",
    "LostLease",
    "Measured",
    "MeasurementRow",
    "RunPage",
    "RunRow",
    "TraceRow",
    "attempts",
    "change_experiment",
    "count_runs",
    "counts_by_state",
    "delete_experiments",
    "delete_runs",
    "environment",
    "events",
    "fastest",
    "get_experiment",
    "get_run",
    "list_experiments",
    "list_runs",
    "log_tail",
    "measurements",
    "purge",
    "record_environment",
    "record_input",
    "record_measurements",
    "record_trace",
    "recording",
    "restore_experiments",
    "restore_runs",
    "revision",
    "run_ids",
    "run_input",
    "run_values",
    "runs_of",
    "traces",
]

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class MeasurementRow:
    """One number; the median where there are samples. Layer and head are None for the whole run."""

    name: str
    value: float
    unit: str
    layer: int | None = None
    head: int | None = None
    samples: list[float] | None = None
    detail: dict[str, Any] | None = None


@dataclass(frozen=True)
class Measured:
    """A run's number."""

    run_id: int
    value: float


@dataclass(frozen=True)
class TraceRow:
    """One layer's attention; its tensors have the same layer; ``mask`` is ``Mask.to_json()``."""

    layer: int
    name: str
    kind: str
    scale: float
    mask: dict[str, Any]
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    dtype: str
    row_sum_defect: float
    output_defect: float
    detail: dict[str, Any] | None = None


@dataclass(frozen=True)
class InputRow:
    """What went in: the text (None if there was none) and the token of every query and key position."""

    text: str | None
    query_tokens: list[str]
    key_tokens: list[str]
    detail: dict[str, Any] | None = None


@dataclass(frozen=True)
class AttemptRow:
    """One claim of a run; ``outcome`` is None while it runs and ``requeued`` if another attempt followed."""

    attempt: int
    owner: str
    started_at: float
    ended_at: float | None
    outcome: str | None
    error_kind: str | None
    reason: str | None


@dataclass(frozen=True)
class EventRow:
    """One line of the audit trail."""

    at: float
    kind: str
    attempt: int | None
    detail: dict[str, Any]


@contextlib.contextmanager
def recording(store: Store, claim: Claim) -> Iterator[Session]:
    """One fenced transaction. Raises LostLease before anything is written."""
    with store.write() as session:
        fence(session, claim)
        yield session


def record_measurements(session: Session, claim: Claim, rows: Sequence[MeasurementRow]) -> None:
    """Stores measurements of the claimed run."""
    _insert(session, claim, Measurement, rows)


def record_trace(session: Session, claim: Claim, row: TraceRow) -> None:
    """Stores what one layer's attention was; a layer and name may be stored once an attempt."""
    _insert(session, claim, Trace, [row])


def record_input(session: Session, claim: Claim, row: InputRow) -> None:
    """Stores what went into the claimed run, once an attempt."""
    _insert(session, claim, RunInput, [row])


def record_environment(session: Session, claim: Claim, document: dict[str, Any]) -> int:
    """Links the run to its environment; equal documents share a row. Returns the environment's id."""
    key = environment_id(session, document)
    session.execute(update(Run).where(Run.id == claim.run_id).values(environment_id=key))
    return key


def environment_id(session: Session, document: dict[str, Any]) -> int:
    """The id of the environment with this content, made if there is none."""
    digest = hashlib.sha256(dump_json(document, sort_keys=True).encode()).hexdigest()
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as upsert
    else:
        from sqlalchemy.dialects.sqlite import insert as upsert
    row = {"hash": digest, "document": document, "created_at": db_now()}
    session.execute(upsert(Environment).values(row).on_conflict_do_nothing())
    return session.scalars(select(Environment.id).where(Environment.hash == digest)).one()


def measurements(
    store: Store, run_id: int, name: str | None = None, layer: int | None = None
) -> list[MeasurementRow]:
    """The run's measurements in the order they were stored, optionally of one name or one layer."""
    query = select(*_columns(Measurement, MeasurementRow)).where(*_counts(Measurement, run_id))
    if name is not None:
        query = query.where(Measurement.name == name)
    if layer is not None:
        query = query.where(Measurement.layer == layer)
    return _rows(store, query.order_by(Measurement.id), MeasurementRow)


def fastest(
    store: Store, name: str, alike: Mapping[str, Any], accept: Callable[[dict[str, Any]], bool]
) -> Measured | None:
    """The succeeded run with the least value of a measurement of the whole run.

    Args:
        alike: columns of the run and their values (None: without one).
        accept: whether the detail of the measurement is of the wanted kind.
    """
    query = (
        select(Measurement.run_id, Measurement.value, Measurement.detail)
        .join(Run, (Run.id == Measurement.run_id) & (Run.attempt == Measurement.attempt))
        .where(Run.state == "succeeded", Run.deleted_at.is_(None))
        .where(*(getattr(Run, column).is_not_distinct_from(value) for column, value in alike.items()))
        .where(Measurement.name == name, Measurement.layer.is_(None), Measurement.head.is_(None))
        .where(Measurement.value.is_not(None))
        .order_by(Measurement.value)
        .execution_options(yield_per=50)
    )
    with store.read() as session, session.execute(query) as rows:
        for run_id, value, detail in rows:
            if value is not None and accept(detail or {}):
                return Measured(run_id, value)
    return None


def traces(store: Store, run_id: int) -> list[TraceRow]:
    """The run's attention layers, by layer and name."""
    query = select(*_columns(Trace, TraceRow)).where(*_counts(Trace, run_id))
    return _rows(store, query.order_by(Trace.layer, Trace.name), TraceRow)


def run_input(store: Store, run_id: int) -> InputRow | None:
    """What went in; None until it is stored."""
    found = _rows(store, select(*_columns(RunInput, InputRow)).where(*_counts(RunInput, run_id)), InputRow)
    return found[0] if found else None


def environment(store: Store, run_id: int) -> dict[str, Any] | None:
    """The run's environment; None until it is stored."""
    query = select(Environment.document).join(Run, Run.environment_id == Environment.id)
    with store.read() as session:
        return session.scalar(query.where(Run.id == run_id))


def log_tail(store: Store, run_id: int, lines: int = 100, *, attempt: int | None = None) -> str:
    """The last lines that the run's current attempt (or another) printed."""
    which = LogChunk.attempt == (_current(run_id) if attempt is None else attempt)
    query = select(LogChunk.text).where(LogChunk.run_id == run_id, which).order_by(LogChunk.id.desc())
    pieces: list[str] = []
    breaks = 0
    query = query.execution_options(yield_per=20)
    with store.read() as session, session.execute(query) as rows:
        for piece in rows.scalars():
            pieces.append(piece)
            breaks += piece.count("\n")
            if breaks > lines:
                break
    return "".join("".join(reversed(pieces)).splitlines(keepends=True)[-lines:] if lines > 0 else [])


def events(store: Store, run_id: int) -> list[EventRow]:
    """The run's audit trail, oldest first."""
    query = select(Event.at, Event.kind, Event.attempt, Event.detail).where(Event.run_id == run_id)
    with store.read() as session:
        rows = session.execute(query.order_by(Event.id)).all()
    return [EventRow(at, kind, attempt, detail or {}) for at, kind, attempt, detail in rows]


def attempts(store: Store, run_id: int) -> list[AttemptRow]:
    """Every claim of the run, oldest first."""
    query = select(*_columns(Attempt, AttemptRow)).where(Attempt.run_id == run_id)
    return _rows(store, query.order_by(Attempt.attempt), AttemptRow)


def _insert(session: Session, claim: Claim, table: Any, rows: Sequence[Any]) -> None:
    if rows:
        mine = {"run_id": claim.run_id, "attempt": claim.attempt}
        session.execute(insert(table), [mine | _fields(row) for row in rows])


def _fields(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in type(row).__dataclass_fields__}


def _columns(table: Any, row: type) -> list[Any]:
    return [getattr(table, name) for name in row.__dataclass_fields__]  # type: ignore[attr-defined]


def _current(run_id: int) -> Any:
    return select(Run.attempt).where(Run.id == run_id).scalar_subquery()


def _counts(table: Any, run_id: int) -> tuple[Any, Any]:
    """Only rows of the attempt that counts: a queued run that was tried before has none."""
    return table.run_id == run_id, table.attempt == _current(run_id)


def _rows(store: Store, query: Any, row: type[RowT]) -> list[RowT]:
    with store.read() as session:
        return [row(*values) for values in session.execute(query).all()]
