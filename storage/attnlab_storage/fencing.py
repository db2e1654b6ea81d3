"""What makes a write of an attempt safe: it happens only while that attempt holds the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from attnlab_storage.columns import db_now
from attnlab_storage.errors import LostLease
from attnlab_storage.tables import Event, Measurement, Run, RunInput, Tensor, Trace

RESULTS = (Measurement, Trace, RunInput, Tensor)


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


def fence(session: Session, claim: Claim, values: dict[str, Any] | None = None) -> None:
    """Holds the claimed run until the session commits, and updates it if values are given.

    Raises:
        LostLease: the run is not running under this owner and attempt; nothing has been written.
    """
    mine = (
        Run.id == claim.run_id,
        Run.attempt == claim.attempt,
        Run.owner == claim.owner,
        Run.state == "running",
    )
    if values is None:
        held = session.scalar(select(Run.id).where(*mine).with_for_update(key_share=True))
    else:
        held = session.scalar(update(Run).where(*mine).values(values).returning(Run.id))
    if held is None:
        raise LostLease(f"run {claim.run_id} is no longer held by {claim.owner} in attempt {claim.attempt}")


def discard_results(session: Session, run_ids: Sequence[int], *, keep_attempt: int | None = None) -> None:
    """Deletes what the runs' attempts stored (logs and history stay), but for one attempt if it is named."""
    for table in RESULTS:
        statement = delete(table).where(table.run_id.in_(run_ids))
        if keep_attempt is not None:
            statement = statement.where(table.attempt != keep_attempt)
        session.execute(statement, execution_options={"synchronize_session": False})


def record_event(
    session: Session, run_ids: Sequence[int | None], kind: str, *, attempt: int | None = None, **detail: Any
) -> None:
    """Appends to the audit trail: one event a run (None: the whole queue)."""
    told = {key: value for key, value in detail.items() if value is not None} or None
    rows = [
        {"run_id": run_id, "attempt": attempt, "at": db_now(), "kind": kind, "detail": told}
        for run_id in run_ids
    ]
    if rows:
        now = session.scalar(select(db_now()))
        session.execute(insert(Event), [row | {"at": now} for row in rows])
