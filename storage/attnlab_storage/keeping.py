"""Naming, tagging, deleting and bringing back. Deleting hides; only `purge` removes for good."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import CursorResult, case, delete, exists, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from attnlab_storage.columns import db_now
from attnlab_storage.database import Store
from attnlab_storage.fencing import change_runs, in_batches, record_event
from attnlab_storage.tables import Environment, Experiment, Run

KEPT_SECONDS = 30 * 24 * 3600.0


def change_experiment(
    store: Store,
    experiment_id: int,
    *,
    name: str | None = None,
    note: str | None = None,
    tags: Sequence[str] | None = None,
    pinned: bool | None = None,
) -> bool:
    """Changes what is given; False if there is no such experiment. A pinned one cannot be deleted."""
    if tags is not None:
        tags = list(dict.fromkeys(tag.strip() for tag in tags if tag.strip()))
    given = {"name": name, "note": note, "tags": tags, "pinned": pinned}
    values = {key: value for key, value in given.items() if value is not None}
    if not values:
        raise ValueError("change_experiment needs one of name, note, tags, pinned; got none of them")
    statement = update(Experiment).where(Experiment.id == experiment_id).values(values)
    with store.write() as session:
        return session.scalar(statement.returning(Experiment.id)) is not None


def delete_runs(store: Store, run_ids: Iterable[int]) -> list[int]:
    """Hides runs, except running ones and those of a pinned experiment; a queued one is cancelled by it.

    Returns the ids of those it hid.
    """
    pinned = select(Experiment.id).where(Experiment.pinned)
    with store.write() as session:
        return _hide(session, _now(session), run_ids, Run.experiment_id.not_in(pinned))


def delete_experiments(store: Store, experiment_ids: Iterable[int]) -> list[int]:
    """Hides experiments with their runs, but none that is pinned or has a running run; returns the ids."""
    running = exists().where(Run.experiment_id == Experiment.id, Run.state == "running")
    with store.write() as session:
        now = _now(session)
        deletable = (Experiment.pinned.is_(False), Experiment.deleted_at.is_(None), ~running)
        ids: list[int] = []
        for some in in_batches(sorted(set(experiment_ids))):
            statement = update(Experiment).where(Experiment.id.in_(some), *deletable)
            ids += session.scalars(statement.values(deleted_at=now).returning(Experiment.id))
            runs = session.scalars(select(Run.id).where(Run.experiment_id.in_(some))).all()
            _hide(session, now, runs, Run.experiment_id.in_(ids))
        return sorted(ids)


def restore_runs(store: Store, run_ids: Iterable[int]) -> list[int]:
    """Shows deleted runs again, and their experiments with them; returns the ids."""
    with store.write() as session:
        ids = change_runs(session, run_ids, [Run.deleted_at.is_not(None)], {"deleted_at": None})
        for some in in_batches(ids):
            owners = select(Run.experiment_id).where(Run.id.in_(some))
            session.execute(update(Experiment).where(Experiment.id.in_(owners)).values(deleted_at=None))
        record_event(session, ids, "restored")
        return ids


def restore_experiments(store: Store, experiment_ids: Iterable[int]) -> list[int]:
    """Shows deleted experiments again, with the runs that went with them; returns the ids."""
    with store.write() as session:
        deleted = select(Experiment.id, Experiment.deleted_at).where(
            Experiment.id.in_(list(experiment_ids)), Experiment.deleted_at.is_not(None)
        )
        found = session.execute(deleted.order_by(Experiment.id)).all()
        for experiment_id, deleted_at in found:
            together = (Run.experiment_id == experiment_id, Run.deleted_at == deleted_at)
            ids = sorted(
                session.scalars(update(Run).where(*together).values(deleted_at=None).returning(Run.id))
            )
            session.execute(update(Experiment).where(Experiment.id == experiment_id).values(deleted_at=None))
            record_event(session, ids, "restored")
        return [experiment_id for experiment_id, _ in found]


def purge(store: Store, *, older_than_seconds: float = KEPT_SECONDS) -> int:
    """Removes for good what was deleted that long ago, with everything that hangs on it.

    Returns how many runs went. An SQLite file uses the space again; `Store.compact` gives it to the disk.
    """
    with store.write() as session:
        before = _now(session) - older_than_seconds
        gone = _count(session, delete(Run).where(Run.deleted_at <= before, Run.state != "running"))
        emptied = ~exists().where(Run.experiment_id == Experiment.id)
        _count(session, delete(Experiment).where(Experiment.deleted_at <= before, emptied))
        unused = ~exists().where(Run.environment_id == Environment.id)
        _count(session, delete(Environment).where(unused, Environment.created_at <= before))
        return gone


def _hide(session: Session, now: float, run_ids: Iterable[int], condition: ColumnElement[bool]) -> list[int]:
    queued = Run.state == "queued"
    values = {
        "deleted_at": now,
        "state": case((queued, "cancelled"), else_=Run.state),
        "reason": case((queued, "deleted before it started"), else_=Run.reason),
        "finished_at": case((queued, now), else_=Run.finished_at),
    }
    ids = change_runs(session, run_ids, [condition, Run.state != "running", Run.deleted_at.is_(None)], values)
    record_event(session, ids, "deleted")
    return ids


def _now(session: Session) -> float:
    return session.scalars(select(db_now())).one()


def _count(session: Session, statement: Any) -> int:
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return result.rowcount if isinstance(result, CursorResult) else 0
