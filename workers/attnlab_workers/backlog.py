"""What the workers read of the queue beside its statements: what is next, and whether a claim still holds."""

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import select

from attnlab_storage.columns import db_now
from attnlab_storage.database import Store
from attnlab_storage.queue import Claim
from attnlab_storage.tables import Run

Standing = Literal["held", "cancel_requested", "over", "lost"]


@dataclass(frozen=True)
class Waiting:
    """A queued run that may start now, and what it asks for."""

    run_id: int
    gpus: int
    timed: bool
    """A timed run shares nothing that another run could slow down."""


def next_runs(store: Store, limit: int = 50) -> list[Waiting]:
    """The runs that may start now, first to start first."""
    statement = (
        select(Run.id, Run.gpus, Run.kind)
        .where(
            Run.state == "queued",
            Run.run_after <= db_now(),
            Run.cancel_requested_at.is_(None),
            Run.deleted_at.is_(None),
        )
        .order_by(Run.priority.desc(), Run.id)
        .limit(limit)
    )
    with store.read() as session:
        rows = session.execute(statement).all()
    return [Waiting(run_id, gpus, kind == "bench") for run_id, gpus, kind in rows]


def standing(store: Store, claim: Claim) -> Standing:
    """Whether the claim still holds its run.

    Returns:
        "held"; "cancel_requested": held, and somebody asked for its end; "over": the run has ended in this
        attempt; "lost": another attempt holds it, or none.
    """
    columns = (Run.state, Run.owner, Run.attempt, Run.cancel_requested_at)
    with store.read() as session:
        row = session.execute(select(*columns).where(Run.id == claim.run_id)).one_or_none()
    if row is None or row.attempt != claim.attempt:
        return "lost"
    if row.state == "running" and row.owner == claim.owner:
        return "held" if row.cancel_requested_at is None else "cancel_requested"
    return "lost" if row.state in ("queued", "running") else "over"
