"""Heads by what was measured of them, over all runs: "sink_mass > 0.8", from an index."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import exists, select, tuple_
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql import ColumnElement

from attnlab_storage.database import Store
from attnlab_storage.listing import ListingError, check_limit, run_conditions, runs_of
from attnlab_storage.rows import RunRow
from attnlab_storage.tables import Measurement, Run

OPERATORS = (">", ">=", "<", "<=")
NARROW_RUNS = 200
"""with no more runs than this to look through, their own rows are read and sorted"""


class HeadCondition(NamedTuple):
    """A bound on one statistic: ``HeadCondition("sink_mass", ">", 0.8)``."""

    statistic: str
    operator: str
    value: float

    def __str__(self) -> str:
        return f"{self.statistic} {self.operator} {self.value:g}"


@dataclass(frozen=True)
class HeadRow:
    """A head that was found, with the statistics that were asked for."""

    run: RunRow
    layer: int
    head: int
    values: dict[str, float]


@dataclass(frozen=True)
class HeadPage:
    """One page of heads; ``next`` is the ``after`` of the page that follows, None on the last."""

    rows: list[HeadRow]
    next: str | None


def find_heads(
    store: Store,
    conditions: Sequence[HeadCondition],
    *,
    filters: Mapping[str, Any] | None = None,
    search: str = "",
    limit: int = 50,
    after: str | None = None,
) -> HeadPage:
    """Heads that meet all conditions, in the order of the first one's statistic: those furthest beyond its bound first.

    Args:
        conditions: at least one; each statistic a name of a measurement per head.
        filters, search: of the runs, as in `listing.list_runs`.
        after: ``HeadPage.next`` of the page before.

    Raises:
        ListingError: no condition, an unknown operator or filter, a bound that is no number, a wrong cursor or limit.
    """
    _check(conditions)
    check_limit(limit)
    first = conditions[0]
    descending = first.operator.startswith(">")
    with store.read() as session:
        query = _query(session, conditions, filters or {}, search)
        place = (Measurement.value, Measurement.run_id, Measurement.layer, Measurement.head)
        if after is not None:
            here, there = tuple_(*place), tuple_(*_cursor(after))
            query = query.where(here < there if descending else here > there)
        order = [column.desc() if descending else column.asc() for column in place]
        found: Sequence[Any] = session.execute(query.order_by(*order).limit(limit + 1)).all()
    runs = {run.id: run for run in runs_of(store, run_ids=sorted({row[0] for row in found}))}
    names = [condition.statistic for condition in conditions]
    rows = [
        HeadRow(runs[row[0]], row[1], row[2], dict(zip(names, row[3:], strict=True)))
        for row in found[:limit]
        if row[0] in runs
    ]
    last = found[limit - 1] if len(found) > limit else None
    return HeadPage(rows, None if last is None else json.dumps([last[3], last[0], last[1], last[2]]))


def _query(
    session: Session, conditions: Sequence[HeadCondition], filters: Mapping[str, Any], search: str
) -> Any:
    first, *others = conditions
    more = [_other(condition.statistic) for condition in others]
    columns = [Measurement.run_id, Measurement.layer, Measurement.head, Measurement.value, *more]
    bounds = [_bound(value, condition) for value, condition in zip(more, others, strict=True)]
    of_run = run_conditions(session, filters, search)
    few = _few_runs(session, of_run) if filters or search.strip() else None
    named = Measurement.name == first.statistic
    bounds.append(_bound(Measurement.value, first))
    if few is None:
        current = exists().where(Run.id == Measurement.run_id, Run.attempt == Measurement.attempt, *of_run)
        return select(*columns).where(named, Measurement.head.is_not(None), current, *bounds)
    current = (Measurement.run_id == Run.id) & (Measurement.attempt == Run.attempt)
    own = (named, (Measurement.head + 0).is_not(None), *bounds)  # hidden from the index of all heads
    return select(*columns).join(Run, current).where(Run.id.in_(few), *own)


def _few_runs(session: Session, conditions: Sequence[ColumnElement[bool]]) -> list[int] | None:
    found = list(session.scalars(select(Run.id).where(*conditions).limit(NARROW_RUNS + 1)))
    return found if len(found) <= NARROW_RUNS else None


def _other(statistic: str) -> Any:
    """Another number of the same head; a subquery, so that no database starts from its end.

    IS in place of = keeps SQLite from the index of all heads, which it would walk from end to end.
    """
    other = aliased(Measurement)
    same = [getattr(other, name) == getattr(Measurement, name) for name in ("run_id", "attempt", "layer")]
    same.append(other.head.is_not_distinct_from(Measurement.head))
    return select(other.value).where(other.name == statistic, *same).limit(1).scalar_subquery()


def _bound(value: Any, condition: HeadCondition) -> ColumnElement[bool]:
    match condition.operator:
        case ">":
            return value > condition.value
        case ">=":
            return value >= condition.value
        case "<":
            return value < condition.value
        case _:
            return value <= condition.value


def _check(conditions: Sequence[HeadCondition]) -> None:
    if not conditions:
        raise ListingError("conditions must hold at least one, such as sink_mass > 0.8; got none")
    for condition in conditions:
        if condition.operator not in OPERATORS:
            choices = ", ".join(OPERATORS)
            raise ListingError(f"operator must be one of {choices}; got {condition.operator!r:.20}")
        if not isinstance(condition.value, int | float) or not math.isfinite(condition.value):
            raise ListingError(
                f"value of {condition.statistic:.60} must be a number; got {condition.value!r:.60}"
            )


def _cursor(after: str) -> tuple[float, int, int, int]:
    try:
        value, run_id, layer, head = json.loads(after)
        place = (float(value), int(run_id), int(layer), int(head))
    except (ValueError, TypeError):
        raise ListingError(f"after must be the `next` of a page, got {after!r:.100}") from None
    if not math.isfinite(place[0]) or max(map(abs, place[1:])) >= 2**31:
        raise ListingError(f"after must be the `next` of a page, got {after!r:.100}")
    return place
