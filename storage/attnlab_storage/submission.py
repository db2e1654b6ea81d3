"""How an experiment gets into the queue."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from attnlab_storage.columns import db_now
from attnlab_storage.database import Store
from attnlab_storage.fencing import record_event
from attnlab_storage.tables import Experiment, Run

POINT_KEYS = (
    "mechanism",
    "parameters",
    "implementation",
    "sequence_length",
    "dtype",
    "batch_size",
    "phase",
    "model",
    "kind",
    "gpus",
)


@dataclass(frozen=True)
class Submitted:
    """A queued experiment: its id and those of its runs, in grid order."""

    experiment_id: int
    run_ids: list[int]


def submit(
    store: Store,
    *,
    name: str,
    spec: dict[str, Any],
    spec_hash: str,
    points: Sequence[dict[str, Any]],
    created_by: str | None = None,
    note: str = "",
    tags: Sequence[str] = (),
    priority: int = 0,
    max_attempts: int = 3,
    timeout_seconds: float = 3600.0,
    delay_seconds: float = 0.0,
) -> Submitted:
    """Queues an experiment, all of its runs or none.

    Args:
        points: one dict a run with the keys of `POINT_KEYS`.
        delay_seconds: nobody claims the runs before that, except by ``claim(run_id=...)``: how a process
            keeps runs for itself without losing them if it dies.
    """
    _check_submission(points, max_attempts, timeout_seconds)
    with store.write() as session:
        now = session.scalars(select(db_now())).one()
        experiment = Experiment(
            name=name,
            spec=spec,
            spec_hash=spec_hash,
            note=note,
            tags=list(tags),
            pinned=False,
            created_by=created_by,
            created_at=now,
        )
        session.add(experiment)
        session.flush()
        runs = [
            Run(
                **point,
                experiment_id=experiment.id,
                position=position,
                state="queued",
                priority=priority,
                run_after=now + delay_seconds,
                attempt=0,
                max_attempts=max_attempts,
                timeout_seconds=timeout_seconds,
                created_at=now,
            )
            for position, point in enumerate(points)
        ]
        session.add_all(runs)
        session.flush()
        run_ids = [run.id for run in runs]
        record_event(session, run_ids, "submitted", by=created_by)
        return Submitted(experiment.id, run_ids)


def _check_submission(points: Sequence[dict[str, Any]], max_attempts: int, timeout_seconds: float) -> None:
    if not points:
        raise ValueError("points must hold at least one run, got none")
    for point in points:
        if set(point) != set(POINT_KEYS):
            wrong = sorted(set(point) ^ set(POINT_KEYS))
            raise ValueError(
                f"a point has exactly the keys {', '.join(POINT_KEYS)}; missing or unknown: {wrong}"
            )
    if max_attempts < 1:
        raise ValueError(f"max_attempts must be at least 1, got {max_attempts}")
    if not 0 < timeout_seconds < math.inf:
        raise ValueError(f"timeout_seconds must be a positive number, got {timeout_seconds}")
