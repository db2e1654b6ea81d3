"""The durable queue: every state of every run, and who may change it.

    queued -> running -> succeeded | failed | out_of_memory | unsupported | timed_out | cancelled
    running -> queued      the lease ran out or the run was given back; the next claim is a new attempt

A claim is a lease: ``(owner, attempt)`` with a time on the database's clock. Whatever the holder writes is
fenced: it happens only while the run is still running under that owner and attempt, else `LostLease`.
Statements are the same on SQLite and PostgreSQL. Those that lock several runs lock them in the order of their
ids, and the compare-and-swap in the outer UPDATE is what makes them right; SKIP LOCKED only spares waiting.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from sqlalchemy import case, exists, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from attnlab_storage import settings
from attnlab_storage.columns import db_now
from attnlab_storage.control import (
    PAUSED,
    DispatcherRow,
    dispatcher_beat,
    dispatchers,
    forget_dispatcher,
    move_to_front,
    pause,
    paused,
    resume,
)
from attnlab_storage.database import Store
from attnlab_storage.errors import LostLease
from attnlab_storage.fencing import Claim, change_runs, discard_results, fence, locked, lost, record_event
from attnlab_storage.submission import POINT_KEYS, Submitted, submit
from attnlab_storage.tables import OUTCOMES, Attempt, Experiment, LogChunk, Run, Setting

__all__ = [
    "Beat",
    "Claim",
    "DispatcherRow",
    "LostLease",
    "Submitted",
    "append_log",
    "beat",
    "cancel",
    "claim",
    "dispatcher_beat",
    "dispatchers",
    "finish",
    "forget_dispatcher",
    "give_back",
    "move_to_front",
    "pause",
    "paused",
    "progress",
    "reap",
    "resume",
    "retry",
    "submit",
]

RETRIABLE = tuple(outcome for outcome in OUTCOMES if outcome != "succeeded")
BACKOFF_FIRST, BACKOFF_MOST = 2.0, 60.0
MAX_LOG_CHARS = 64_000


@dataclass(frozen=True)
class Beat:
    """A lease that was renewed, and whether somebody asked to cancel the run."""

    run_id: int
    attempt: int
    cancel_requested: bool


def claim(store: Store, owner: str, *, free_gpus: int = 0, run_id: int | None = None) -> Claim | None:
    """Takes the first run that may start and fits ``free_gpus``: highest priority, then oldest; else None.

    With ``run_id`` only that run, whatever its GPUs and its delay, and also while the queue is paused.
    """
    candidates = _claimable(free_gpus, run_id)
    with (
        store.read() as session
    ):  # spares the write lock, and the pages a change, when there is nothing to do
        if session.scalar(candidates) is None:
            return None
    first = candidates.with_for_update(skip_locked=True, key_share=True).scalar_subquery()
    statement = (
        update(Run)
        .where(Run.id == first, Run.state == "queued")
        .values(
            _BLANK
            | {
                "state": "running",
                "owner": owner,
                "attempt": Run.attempt + 1,
                "lease_until": db_now() + settings.lease_seconds(),
                "started_at": db_now(),
                "progress_at": db_now(),
            }
        )
        .returning(Run)
    )
    with store.write() as session:
        run = session.scalars(statement).one_or_none()
        if run is None:
            return None
        session.add(Attempt(run_id=run.id, attempt=run.attempt, owner=owner, started_at=run.started_at))
        record_event(session, [run.id], "claimed", attempt=run.attempt, owner=owner)
        return Claim(
            run_id=run.id,
            experiment_id=run.experiment_id,
            attempt=run.attempt,
            owner=owner,
            spec=session.scalars(select(Experiment.spec).where(Experiment.id == run.experiment_id)).one(),
            point={key: getattr(run, key) for key in POINT_KEYS},
            timeout_seconds=run.timeout_seconds,
            gpus=run.gpus,
        )


def beat(store: Store, owner: str) -> list[Beat]:
    """Renews every lease of the owner. A run that is missing from the answer is not the owner's any more."""
    held = (Run.owner == owner, Run.state == "running")
    statement = (
        update(Run)
        .where(Run.id.in_(locked(*held)), *held)
        .values(lease_until=db_now() + settings.lease_seconds())
        .returning(Run.id, Run.attempt, Run.cancel_requested_at)
    )
    with store.write(announce=False) as session:
        rows = session.execute(statement).all()
    return [Beat(run_id, attempt, asked is not None) for run_id, attempt, asked in sorted(rows)]


def progress(
    store: Store, claim: Claim, phase: str, done: float | None = None, total: float | None = None
) -> None:
    """Says what the run is doing. Raises LostLease."""
    values = {"phase_name": phase, "progress_done": done, "progress_total": total, "progress_at": db_now()}
    with store.write() as session:
        fence(session, claim, values)


def append_log(store: Store, claim: Claim, text: str) -> None:
    """Adds to the attempt's log, even just after its end; over `MAX_LOG_CHARS` it loses its middle, visibly.

    Raises:
        LostLease: the run was queued again or is another attempt's.
    """
    if not text:
        return
    mine = (Run.id == claim.run_id, Run.attempt == claim.attempt, Run.state != "queued")
    with store.write() as session:
        if session.scalar(select(Run.id).where(*mine)) is None:  # not locked: a log is no result
            raise lost(claim)
        session.add(LogChunk(run_id=claim.run_id, attempt=claim.attempt, at=db_now(), text=_shortened(text)))


def finish(
    store: Store,
    claim: Claim,
    outcome: str,
    *,
    reason: str | None = None,
    error_kind: str | None = None,
    error_detail: str | None = None,
    summary: dict[str, Any] | None = None,
) -> bool:
    """Ends the run with one of `OUTCOMES`, and drops what losing attempts had stored, in one transaction.

    Returns False, and changes nothing, if the run is no longer this attempt's.
    """
    if outcome not in OUTCOMES:
        raise ValueError(f"outcome must be an end state, got {outcome!r}; choices: {', '.join(OUTCOMES)}")
    values = _ended(outcome, reason, error_kind, error_detail) | {
        "summary": summary,
        "latency_ms": _number(summary, "latency_ms", float),
        "peak_memory_bytes": _number(summary, "peak_memory_bytes", int),
    }
    try:
        with store.write() as session:
            fence(session, claim, values)
            discard_results(session, [claim.run_id], keep_attempt=claim.attempt)
            _end_attempt(session, claim.run_id, claim.attempt, outcome, error_kind, reason)
            told = {"outcome": outcome, "error_kind": error_kind, "reason": reason}
            record_event(session, [claim.run_id], "finished", attempt=claim.attempt, **told)
    except LostLease:
        return False
    return True


def give_back(
    store: Store,
    claim: Claim,
    *,
    error_kind: str,
    reason: str,
    error_detail: str | None = None,
    backoff_seconds: float | None = None,
    extra_attempts: int = 0,
) -> str:
    """Ends the attempt: the run is queued again, or failed with attempts used up, or cancelled if asked for.

    Args:
        backoff_seconds: None doubles from 2 to 60 seconds with the attempts.
        extra_attempts: how many more attempts the run may have than before; 1 if this one was not its fault.

    Returns:
        The new state.

    Raises:
        LostLease: the run is no longer this attempt's.
    """
    with store.write() as session:
        fence(session, claim, {"max_attempts": Run.max_attempts + extra_attempts})
        run = session.get_one(Run, claim.run_id)
        return _close(session, run, error_kind, reason, error_detail, backoff_seconds)


def reap(store: Store) -> list[int]:
    """Ends every attempt whose lease ran out, like `give_back`. Returns the ids of the runs."""
    expired = select(Run).where(Run.state == "running", Run.lease_until < db_now()).order_by(Run.id)
    with store.read() as session:
        if session.scalars(expired.limit(1)).first() is None:
            return []
    with store.write() as session:
        runs = session.scalars(expired.with_for_update(skip_locked=True, key_share=True)).all()
        for run in runs:
            reason = f"the lease of {run.owner} ran out in attempt {run.attempt}"
            _close(session, run, "lease_lost", reason)
        return [run.id for run in runs]


def cancel(store: Store, run_ids: Iterable[int]) -> int:
    """Cancels queued runs and asks running ones to end. Returns how many runs that newly concerned."""
    queued = Run.state == "queued"
    values = {
        "cancel_requested_at": db_now(),
        "state": case((queued, "cancelled"), else_=Run.state),
        "finished_at": case((queued, db_now()), else_=Run.finished_at),
        "reason": case((queued, "cancelled before it started"), else_=Run.reason),
    }
    live = (Run.state.in_(("queued", "running")), Run.cancel_requested_at.is_(None))
    with store.write() as session:
        ids = change_runs(session, run_ids, live, values)
        record_event(session, ids, "cancel_requested")
        return len(ids)


def retry(store: Store, run_ids: Iterable[int], *, extra_attempts: int = 3) -> list[int]:
    """Queues ended runs again, but none that succeeded; returns the ids. What they had stored is dropped."""
    values = _BLANK | {
        "state": "queued",
        "max_attempts": Run.attempt + extra_attempts,
        "run_after": db_now(),
        "cancel_requested_at": None,
        "started_at": None,
    }
    with store.write() as session:
        ids = change_runs(session, run_ids, (Run.state.in_(RETRIABLE), Run.deleted_at.is_(None)), values)
        discard_results(session, ids)
        record_event(session, ids, "retried")
        return ids


# what an attempt leaves in its run's row, wiped before the next one
_BLANK: dict[str, Any] = dict.fromkeys(
    (
        "owner",
        "lease_until",
        "phase_name",
        "progress_done",
        "progress_total",
        "progress_at",
        "finished_at",
        "reason",
        "error_kind",
        "error_detail",
        "summary",
        "latency_ms",
        "peak_memory_bytes",
    )
)


def _claimable(free_gpus: int, run_id: int | None) -> Any:
    fits: list[ColumnElement[bool]] = [
        Run.state == "queued",
        Run.cancel_requested_at.is_(None),
        Run.deleted_at.is_(None),
    ]
    if run_id is not None:
        fits.append(Run.id == run_id)
    else:
        fits += [Run.run_after <= db_now(), Run.gpus <= free_gpus, ~exists().where(Setting.key == PAUSED)]
    return select(Run.id).where(*fits).order_by(Run.priority.desc(), Run.id).limit(1)


def _ended(
    outcome: str, reason: str | None, error_kind: str | None, error_detail: str | None
) -> dict[str, Any]:
    return {
        "state": outcome,
        "reason": reason,
        "error_kind": error_kind,
        "error_detail": error_detail,
        "finished_at": db_now(),
        "owner": None,
        "lease_until": None,
    }


def _close(
    session: Session,
    run: Run,
    error_kind: str,
    reason: str,
    error_detail: str | None = None,
    backoff_seconds: float | None = None,
) -> str:
    """Ends the run's attempt; what it had stored stays only if the run failed with it, to explain that."""
    outcome = (
        "cancelled"
        if run.cancel_requested_at is not None
        else "failed"
        if run.attempt >= run.max_attempts
        else "queued"
    )
    told = {"reason": reason, "error_kind": error_kind}
    if outcome == "queued":
        wait = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(run.attempt - 1, 16))
        wait = wait if backoff_seconds is None else backoff_seconds
        values = (
            _BLANK | told | {"state": "queued", "run_after": db_now() + wait, "error_detail": error_detail}
        )
    else:
        values = _ended(outcome, reason, error_kind, error_detail)
    session.execute(
        update(Run).where(Run.id == run.id).values(values),
        execution_options={"synchronize_session": False},
    )
    discard_results(session, [run.id], keep_attempt=run.attempt if outcome == "failed" else None)
    kind = "requeued" if outcome == "queued" else outcome
    _end_attempt(session, run.id, run.attempt, kind, error_kind, reason)
    record_event(session, [run.id], kind, attempt=run.attempt, **told)
    return outcome


def _end_attempt(
    session: Session, run_id: int, attempt: int, outcome: str, error_kind: str | None, reason: str | None
) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.run_id == run_id, Attempt.attempt == attempt)
        .values(ended_at=db_now(), outcome=outcome, error_kind=error_kind, reason=reason)
    )


def _number(summary: dict[str, Any] | None, key: str, kind: type) -> Any:
    value = (summary or {}).get(key)
    return kind(value) if isinstance(value, Real) and math.isfinite(value) else None


def _shortened(text: str) -> str:
    if len(text) <= MAX_LOG_CHARS:
        return text
    half = MAX_LOG_CHARS // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
