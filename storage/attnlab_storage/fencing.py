"""What makes a write of an attempt safe: it happens only while that attempt holds the run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from attnlab_storage.columns import db_now
from attnlab_storage.errors import LostLease
from attnlab_storage.tables import Event, Measurement, Run, RunInput, Tensor, Trace

RESULTS = (Measurement, Trace, RunInput, Tensor)
BATCH = 10_000  # twice in one statement, below the 32,766 bind variables of SQLite


@dataclass(frozen=True)
class Claim:
    """One attempt at one run. Plain data: travels as JSON (``dataclasses.asdict``, ``Claim(**data)``)."""

    run_id: int
    experiment_id: int
    attempt: int
    owner: str
    spec: dict[str, Any]
    point: dict[str, Any]
    timeout_seconds: float
    gpus: int


_MINE = (
    Run.id == bindparam("claimed"),
    Run.attempt == bindparam("in_attempt"),
    Run.owner == bindparam("by"),
    Run.state == "running",
)
# built once: making it takes longer than running it
_HOLD = select(Run.id).where(*_MINE).with_for_update(key_share=True)


def fence(session: Session, claim: Claim, values: dict[str, Any] | None = None) -> None:
    """Holds the claimed run until the session commits, and updates it if values are given.

    Raises:
        LostLease: the run is not running under this owner and attempt; nothing has been written.
    """
    mine = {"claimed": claim.run_id, "in_attempt": claim.attempt, "by": claim.owner}
    if values is None:
        held = session.scalar(_HOLD, mine)
    else:
        held = session.scalar(update(Run).where(*_MINE).values(values).returning(Run.id), mine)
    if held is None:
        raise lost(claim)


def lost(claim: Claim) -> LostLease:
    """The error of a claim that holds no more."""
    return LostLease(f"run {claim.run_id} is no longer held by {claim.owner} in attempt {claim.attempt}")


def locked(*conditions: ColumnElement[bool]) -> Any:
    """The ids of runs, locked in their order (PostgreSQL), so that two statements cannot deadlock."""
    return select(Run.id).where(*conditions).order_by(Run.id).with_for_update(key_share=True)


def change_runs(
    session: Session,
    run_ids: Iterable[int],
    conditions: Sequence[ColumnElement[bool]],
    values: dict[str, Any],
) -> list[int]:
    """Updates those of the runs that meet the conditions; returns their ids in order."""
    changed: list[int] = []
    for some in in_batches(sorted({run_id for run_id in run_ids if 0 < run_id < 2**63})):
        those = (Run.id.in_(some), *conditions)
        statement = update(Run).where(Run.id.in_(locked(*those)), *those).values(values).returning(Run.id)
        changed += session.scalars(statement, execution_options={"synchronize_session": False})
    return sorted(changed)


def in_batches(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """The ids in pieces that fit the bind variables of one statement."""
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]


def discard_results(session: Session, run_ids: Sequence[int], *, keep_attempt: int | None = None) -> None:
    """Deletes what the runs' attempts stored (logs and history stay), but for one attempt if it is named."""
    for some in in_batches(run_ids):
        for table in RESULTS:
            statement = delete(table).where(table.run_id.in_(some))
            if keep_attempt is not None:
                statement = statement.where(table.attempt != keep_attempt)
            session.execute(statement, execution_options={"synchronize_session": False})


def record_event(
    session: Session, run_ids: Sequence[int | None], kind: str, *, attempt: int | None = None, **detail: Any
) -> None:
    """Appends to the audit trail: one event a run (None: the whole queue)."""
    told = {key: value for key, value in detail.items() if value is not None} or None
    if not run_ids:
        return
    event = {"attempt": attempt, "at": session.scalar(select(db_now())), "kind": kind, "detail": told}
    session.execute(insert(Event), [event | {"run_id": run_id} for run_id in run_ids])
