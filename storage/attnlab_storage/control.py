"""The switches of the queue as a whole, and who is serving it."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, insert, select, update

from attnlab_storage.columns import db_now
from attnlab_storage.database import Store
from attnlab_storage.fencing import record_event
from attnlab_storage.tables import Dispatcher, Run, Setting

PAUSED = "queue_paused"


@dataclass(frozen=True)
class DispatcherRow:
    """A dispatcher: the cluster it sees, when it was last heard of, and how many seconds ago that was."""

    owner: str
    started_at: float
    heartbeat_at: float
    silent_seconds: float
    cluster: dict[str, Any]


def pause(store: Store) -> None:
    """Nothing more is claimed until `resume`; what runs goes on."""
    with store.write() as session:
        if session.get(Setting, PAUSED) is None:
            session.add(Setting(key=PAUSED, value={}))
            record_event(session, [None], "paused")


def resume(store: Store) -> None:
    """Runs may be claimed again."""
    with store.write() as session:
        if session.scalar(delete(Setting).where(Setting.key == PAUSED).returning(Setting.key)):
            record_event(session, [None], "resumed")


def paused(store: Store) -> bool:
    """Whether the queue is paused."""
    with store.read() as session:
        return session.get(Setting, PAUSED) is not None


def move_to_front(store: Store, run_id: int) -> bool:
    """Makes a queued run the next one; False if it is not queued."""
    with store.write() as session:
        highest = (
            select(func.max(Run.priority)).where(Run.state == "queued", Run.id != run_id).scalar_subquery()
        )
        moved = session.scalar(
            update(Run)
            .where(Run.id == run_id, Run.state == "queued")
            .values(
                priority=func.coalesce(highest + 1, Run.priority),
                run_after=db_now(),
            )
            .returning(Run.id)
        )
        if moved is not None:
            record_event(session, [run_id], "moved_to_front")
        return moved is not None


def dispatcher_beat(store: Store, owner: str, cluster: dict[str, Any]) -> None:
    """Says that the dispatcher is alive; pages see a change only when the cluster changed."""
    with store.read() as session:
        known = session.get(Dispatcher, owner)
    with store.write(announce=known is None or known.cluster != cluster) as session:
        values = {"heartbeat_at": db_now(), "cluster": cluster}
        found = session.scalar(
            update(Dispatcher).where(Dispatcher.owner == owner).values(values).returning(Dispatcher.owner)
        )
        if found is None:
            session.execute(insert(Dispatcher).values(owner=owner, started_at=db_now(), **values))


def dispatchers(store: Store) -> list[DispatcherRow]:
    """Every dispatcher that was ever heard of, the latest first."""
    silent = (db_now() - Dispatcher.heartbeat_at).label("silent")
    columns = (Dispatcher.owner, Dispatcher.started_at, Dispatcher.heartbeat_at, silent, Dispatcher.cluster)
    with store.read() as session:
        rows = session.execute(select(*columns).order_by(Dispatcher.heartbeat_at.desc())).all()
    return [DispatcherRow(*row) for row in rows]


def forget_dispatcher(store: Store, owner: str) -> None:
    """Removes a dispatcher that stopped as it should."""
    with store.write() as session:
        session.execute(delete(Dispatcher).where(Dispatcher.owner == owner))
