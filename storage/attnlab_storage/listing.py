"""Lists of runs and experiments: filtered, searched, sorted and paged in SQL, by index."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Integer, RowMapping, Select, asc, desc, func, or_, select, tuple_
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from attnlab_storage.columns import CleanText, clean_text, json_list_has, mentions
from attnlab_storage.database import Store
from attnlab_storage.rows import ExperimentPage, ExperimentRow, RunPage, RunRow
from attnlab_storage.tables import STATES, Experiment, Run

FILTERS = (
    "state",
    "mechanism",
    "implementation",
    "model",
    "dtype",
    "phase",
    "sequence_length",
    "batch_size",
    "experiment",
    "tag",
)
SORTS = (
    "id",
    "state",
    "mechanism",
    "implementation",
    "model",
    "sequence_length",
    "dtype",
    "batch_size",
    "experiment_id",
    "latency_ms",
    "peak_memory_bytes",
    "created_at",
    "started_at",
    "finished_at",
)
MAX_LIMIT = 1000


class ListingError(ValueError):
    """A filter, a sort or a page cursor that cannot be used; the text names it and the choices."""


_OF_EXPERIMENT = ("experiment_name", "tags")
_COLUMNS = [getattr(Run, field.name) for field in fields(RunRow) if field.name not in _OF_EXPERIMENT]


def get_run(store: Store, run_id: int) -> RunRow | None:
    """The run, deleted or not; None if there is none with this id."""
    found = runs_of(store, run_ids=[run_id])
    return found[0] if found else None


def runs_of(
    store: Store, *, experiment_id: int | None = None, run_ids: Sequence[int] | None = None
) -> list[RunRow]:
    """All runs of an experiment in grid order, deleted ones left out; or runs by id, in that order."""
    query = select(*_COLUMNS)
    if experiment_id is not None:
        query = query.where(Run.experiment_id == experiment_id, Run.deleted_at.is_(None))
    if run_ids is not None:
        query = query.where(Run.id.in_([run_id for run_id in run_ids if _fits(Run.id, run_id)]))
    with store.read() as session:
        rows = _run_rows(session, session.execute(query.order_by(Run.position)).mappings().all())
    if run_ids is None:
        return rows
    by_id = {row.id: row for row in rows}
    return [by_id[run_id] for run_id in run_ids if run_id in by_id]


def list_runs(
    store: Store,
    *,
    filters: Mapping[str, Any] | None = None,
    search: str = "",
    sort: str = "-id",
    limit: int = 50,
    after: str | None = None,
    deleted: bool = False,
) -> RunPage:
    """One page of runs.

    Args:
        filters: values (or lists of values, any of which may match) of `FILTERS`; empty ones are left out.
        search: text in the experiment's name, note or tags, in mechanism, implementation or model; or an id.
        sort: one of `SORTS`, with a leading ``-`` for descending; runs without a value come last either way.
        after: ``RunPage.next`` of the page before, with the same filters and sort.
        deleted: list the deleted runs instead of the others.

    Raises:
        ListingError: an unknown filter, sort, cursor or limit.
    """
    name, descending = sort.removeprefix("-"), sort.startswith("-")
    if name not in SORTS:
        raise ListingError(
            f"sort must be a column, got {sort!r}; choices: {', '.join(SORTS)}, each also with -"
        )
    check_limit(limit)
    with store.read() as session:
        query = select(*_COLUMNS).where(*_conditions(session, filters or {}, search, deleted))
        rows = _page(
            session, query, getattr(Run, name), descending, limit + 1, _position(after, getattr(Run, name))
        )
    cursor = json.dumps([getattr(rows[limit - 1], name), rows[limit - 1].id]) if len(rows) > limit else None
    return RunPage(rows[:limit], cursor)


def count_runs(store: Store, *, filters: Mapping[str, Any] | None = None, search: str = "") -> int:
    """How many runs `list_runs` would page through."""
    with store.read() as session:
        conditions = _conditions(session, filters or {}, search, False)
        query = select(func.count()).select_from(Run).where(*conditions)
        return session.scalar(query) or 0


def run_ids(
    store: Store, *, filters: Mapping[str, Any] | None = None, search: str = "", deleted: bool = False
) -> list[int]:
    """The ids of all the runs that `list_runs` would page through, the latest first."""
    with store.read() as session:
        query = select(Run.id).where(*_conditions(session, filters or {}, search, deleted))
        query = query.order_by(Run.id.desc())
        return list(session.scalars(query))


def run_values(store: Store, column: str) -> list[Any]:
    """The values that a filter column has in the runs (deleted ones left out), sorted: a filter's menu."""
    if column not in FILTERS or column in ("experiment", "tag"):
        choices = [name for name in FILTERS if name not in ("experiment", "tag")]
        raise ListingError(f"column must be a filter of runs, got {column!r}; choices: {', '.join(choices)}")
    with store.read() as session:
        return _values(session, column)


def counts_by_state(store: Store, *, experiment_id: int | None = None) -> dict[str, int]:
    """How many runs (deleted ones left out) are in each of the states, zero included."""
    query = select(Run.state, func.count()).where(Run.deleted_at.is_(None)).group_by(Run.state)
    if experiment_id is not None:
        query = query.where(Run.experiment_id == experiment_id)
    with store.read() as session:
        found = dict(session.execute(query).all())
    return {state: found.get(state, 0) for state in STATES}


def get_experiment(store: Store, experiment_id: int) -> ExperimentRow | None:
    """The experiment, deleted or not; None if there is none with this id."""
    if not _fits(Experiment.id, experiment_id):
        return None
    with store.read() as session:
        found = _experiments(session, select(Experiment).where(Experiment.id == experiment_id))
    return found[0] if found else None


def list_experiments(
    store: Store,
    *,
    search: str = "",
    tag: str | None = None,
    limit: int = 50,
    after: str | None = None,
    deleted: bool = False,
) -> ExperimentPage:
    """One page of experiments, the latest first. Raises ListingError."""
    check_limit(limit)
    query = select(Experiment).where(
        Experiment.deleted_at.is_not(None) if deleted else Experiment.deleted_at.is_(None)
    )
    if search:
        query = query.where(_mentioned(search))
    if tag:
        query = query.where(_tagged([tag]))
    if after is not None:
        query = query.where(Experiment.id < (_position(after, Experiment.id) or (None, 0))[1])
    with store.read() as session:
        rows = _experiments(session, query.order_by(Experiment.id.desc()).limit(limit + 1))
    cursor = json.dumps([None, rows[limit - 1].id]) if len(rows) > limit else None
    return ExperimentPage(rows[:limit], cursor)


def run_conditions(session: Session, filters: Mapping[str, Any], search: str) -> list[ColumnElement[bool]]:
    """What the runs that `list_runs` would page through have in common. Raises ListingError."""
    return _conditions(session, filters, search, False)


def _values(session: Session, column: str) -> list[Any]:
    """The distinct values, by leaping from one to the next in the index instead of reading all of it."""
    value = getattr(Run, column)
    smallest = select(func.min(value).label("value")).where(Run.deleted_at.is_(None))
    found = smallest.cte("found", recursive=True)
    following = smallest.where(value > found.c.value).scalar_subquery()
    found = found.union_all(select(following).where(found.c.value.is_not(None)))
    return list(session.scalars(select(found.c.value).where(found.c.value.is_not(None))))


def _conditions(
    session: Session, filters: Mapping[str, Any], search: str, deleted: bool
) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [
        Run.deleted_at.is_not(None) if deleted else Run.deleted_at.is_(None)
    ]
    for name, wanted in filters.items():
        if name not in FILTERS:
            raise ListingError(f"filter must be a column, got {name!r}; choices: {', '.join(FILTERS)}")
        values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        values = [value for value in values if value not in (None, "")]
        if values:
            conditions.append(_filter(name, values))
    if search.strip():
        conditions.append(_search(session, search.strip()))
    return conditions


def _filter(name: str, values: list[Any]) -> ColumnElement[bool]:
    if name == "state" and (unknown := [value for value in values if value not in STATES]):
        raise ListingError(f"filter state must be a state, got {unknown[0]!r}; choices: {', '.join(STATES)}")
    columns = {"experiment": Run.experiment_id, "tag": Experiment.name}
    column = columns[name] if name in columns else getattr(Run, name)
    whole = isinstance(column.type, Integer)
    if whole:  # as a URL brings it
        values = [int(it) if isinstance(it, str) and it.isdecimal() else it for it in values]
    if wrong := [value for value in values if not _fits(column, value)]:
        kind = "a whole number" if whole else "a text"
        raise ListingError(f"filter {name} must be {kind}, got {wrong[0]!r:.100}")
    if name == "tag":
        return Run.experiment_id.in_(select(Experiment.id).where(_tagged(values)))
    return column.in_(values)


def _tagged(tags: Sequence[str]) -> ColumnElement[bool]:
    return or_(*(json_list_has(Experiment.tags, clean_text(tag)) for tag in tags))


def _fits(column: Any, value: Any) -> bool:
    """Whether the database can compare the value with the column."""
    if isinstance(column.type, CleanText):
        return isinstance(value, str)
    kind = int if isinstance(column.type, Integer) else int | float
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < 2**63


def _search(session: Session, text: str) -> ColumnElement[bool]:
    named = select(Experiment.id).where(_mentioned(text))
    found: list[ColumnElement[bool]] = [Run.experiment_id.in_(named)]
    for column in ("mechanism", "implementation", "model"):
        known = _values(session, column)
        matching = [value for value in known if text.casefold() in value.casefold()]
        if matching:
            found.append(getattr(Run, column).in_(matching))
    if text.isdecimal() and len(text) < 10:
        found.append(Run.id == int(text))
    return or_(*found)


def _mentioned(text: str) -> ColumnElement[bool]:
    return or_(*(mentions(column, text) for column in (Experiment.name, Experiment.note, Experiment.tags)))


def _page(
    session: Session,
    query: Any,
    column: Any,
    descending: bool,
    count: int,
    position: tuple[Any, int] | None,
) -> list[RunRow]:
    """Up to ``count`` rows: first those with a value, in its order; then those without, by id.

    In two queries, because each then follows an index on both databases; NULLS LAST does so on neither.
    """
    direction = desc if descending else asc
    rows: list[RowMapping] = []
    if position is None or position[0] is not None:
        valued = query.where(column.is_not(None)).order_by(direction(column), direction(Run.id))
        if position is not None:
            here, there = tuple_(column, Run.id), tuple_(*position)
            valued = valued.where(here < there if descending else here > there)
            position = None
        rows += session.execute(valued.limit(count)).mappings()
    if len(rows) < count and column.nullable:
        rest = query.where(column.is_(None)).order_by(direction(Run.id))
        if position is not None:
            rest = rest.where(Run.id < position[1] if descending else Run.id > position[1])
        rows += session.execute(rest.limit(count - len(rows))).mappings()
    return _run_rows(session, rows)


def _run_rows(session: Session, rows: Sequence[RowMapping]) -> list[RunRow]:
    """Adds name and tags of the experiments; a join would be planned before the page is cut."""
    ids = {row["experiment_id"] for row in rows}
    query = select(Experiment.id, Experiment.name, Experiment.tags).where(Experiment.id.in_(ids))
    named = {key: {"experiment_name": name, "tags": tags} for key, name, tags in session.execute(query)}
    return [RunRow(**row, **named[row["experiment_id"]]) for row in rows]


def _position(after: str | None, column: Any) -> tuple[Any, int] | None:
    """(value of the column, id) where the page before ended."""
    if after is None:
        return None
    position: tuple[Any, Any] = (None, None)
    with contextlib.suppress(ValueError, TypeError):
        value, key = json.loads(after)
        position = value, key
    if not (_fits(Run.id, position[1]) and (position[0] is None or _fits(column, position[0]))):
        raise ListingError(f"after must be the `next` of a page, got {after!r:.100}")
    return position


def check_limit(limit: int) -> None:
    """ListingError unless a page may have this many rows."""
    if not 1 <= limit <= MAX_LIMIT:
        raise ListingError(f"limit must be between 1 and {MAX_LIMIT}, got {limit}")


def _experiments(session: Session, query: Select[Experiment]) -> list[ExperimentRow]:
    found = session.scalars(query).all()
    counts = session.execute(
        select(Run.experiment_id, Run.state, func.count())
        .where(Run.experiment_id.in_([row.id for row in found]), Run.deleted_at.is_(None))
        .group_by(Run.experiment_id, Run.state)
    )
    states: dict[int, dict[str, int]] = {row.id: {} for row in found}
    for experiment_id, state, count in counts:
        states[experiment_id][state] = count
    names = [field.name for field in fields(ExperimentRow)[:-1]]
    return [
        ExperimentRow(**{name: getattr(row, name) for name in names}, states=states[row.id]) for row in found
    ]
