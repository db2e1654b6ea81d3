"""Heads are found by their numbers over all runs, once each, in order, from an index however many runs there are."""

import random
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text

from attnlab_storage.database import Store
from attnlab_storage.heads import HeadCondition, HeadRow, find_heads
from attnlab_storage.listing import ListingError
from attnlab_storage.tables import Experiment, Measurement, Run

LAYERS, HEADS = 2, 3
NAMES = ("sink_mass", "entropy")
SINKS = HeadCondition("sink_mass", ">", 0.5)


def fill(store: Store, runs: int, seed: int = 0) -> dict[tuple[int, int, int], dict[str, float]]:
    """Made-up runs; returns the numbers of every head that counts."""
    rng = random.Random(seed)
    made: dict[tuple[int, int, int], dict[str, float]] = {}
    with store.write() as session:
        experiment = {"name": "heads", "spec": {}, "spec_hash": "0", "tags": [], "created_at": 0.0}
        session.execute(insert(Experiment), [experiment])
        owner = session.scalars(select(Experiment.id)).one()
        session.execute(insert(Run), [_run(owner, index) for index in range(runs)])
        found = session.execute(select(Run.id, Run.deleted_at).order_by(Run.id)).all()
        rows: list[dict[str, Any]] = []
        for run_id, deleted in found:
            rows.append(_row(run_id, 2, "sink_mass", None, None, 0.9))
            rows.append(_row(run_id, 1, "sink_mass", 0, 0, 0.99))  # of an attempt that counts no more
            for layer in range(LAYERS):
                for head in range(HEADS):
                    values = {name: rng.randrange(100) / 100 for name in NAMES}
                    rows += [_row(run_id, 2, name, layer, head, value) for name, value in values.items()]
                    if deleted is None:
                        made[run_id, layer, head] = values
        rows.append(_row(found[0][0], 2, "sink_mass", 7, 7, None))
        session.execute(insert(Measurement), rows)
        if store.dialect == "postgresql":
            session.execute(text("ANALYZE"))
    return made


def _row(
    run_id: int, attempt: int, name: str, layer: int | None, head: int | None, value: float | None
) -> dict[str, Any]:
    place = {"layer": layer, "head": head, "value": value, "unit": "probability"}
    return {"run_id": run_id, "attempt": attempt, "name": name} | place


def _run(owner: int, index: int) -> dict[str, Any]:
    return {
        "experiment_id": owner, "position": index, "mechanism": "flash" if index % 7 == 3 else "multi_head",
        "parameters": {}, "implementation": "auto", "sequence_length": 512, "dtype": "float32", "batch_size": 1,
        "phase": "prefill", "model": "rare" if index == 5 else "common", "kind": "inspect", "gpus": 0,
        "state": "succeeded", "priority": 0, "run_after": 0.0, "attempt": 2, "max_attempts": 3,
        "timeout_seconds": 1.0, "created_at": 0.0, "deleted_at": 1.0 if index % 11 == 10 else None,
    }  # fmt: skip


def walk(store: Store, conditions: list[HeadCondition], limit: int, **options: Any) -> list[HeadRow]:
    page = find_heads(store, conditions, limit=limit, **options)
    found = list(page.rows)
    while page.next is not None:
        page = find_heads(store, conditions, limit=limit, after=page.next, **options)
        assert page.rows
        found += page.rows
    return found


@pytest.mark.parametrize("limit", [7, 1000])
@pytest.mark.parametrize("operator", [">", ">=", "<", "<="])
def test_heads_beyond_a_bound_are_found_once_and_in_order(store: Store, operator: str, limit: int):
    made = fill(store, 30)
    holds = {">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__}[operator]
    sign = -1 if operator.startswith(">") else 1
    places = [place for place, values in made.items() if holds(values["sink_mass"], 0.5)]
    places.sort(key=lambda place: (sign * made[place]["sink_mass"], *(sign * part for part in place)))
    found = walk(store, [HeadCondition("sink_mass", operator, 0.5)], limit)
    assert [(row.run.id, row.layer, row.head) for row in found] == places
    assert all(
        row.values == {"sink_mass": made[row.run.id, row.layer, row.head]["sink_mass"]} for row in found
    )


@pytest.mark.parametrize("few", [0, 200])
def test_conditions_and_filters_hold_together(store: Store, few: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("attnlab_storage.heads.NARROW_RUNS", few)
    made = fill(store, 40)
    both = [SINKS, HeadCondition("entropy", "<=", 0.3)]
    flash = {run.id for run in (row.run for row in walk(store, both, 1000)) if run.mechanism == "flash"}
    for filters in ({}, {"mechanism": "flash"}):
        found = walk(store, both, 3, filters=filters)
        places = {
            place
            for place, values in made.items()
            if values["sink_mass"] > 0.5 and values["entropy"] <= 0.3 and (not filters or place[0] in flash)
        }
        assert {(row.run.id, row.layer, row.head) for row in found} == places
        assert len(found) == len(places) > 0
        assert [row.values["sink_mass"] for row in found] == sorted(
            (made[place]["sink_mass"] for place in places), reverse=True
        )
        assert all(row.values == made[row.run.id, row.layer, row.head] for row in found)


@pytest.mark.parametrize(
    ("conditions", "options", "says"),
    [
        ([], {}, "at least one"),
        ([HeadCondition("entropy", "=", 1.0)], {}, "operator must be one of >, >=, <, <=; got '='"),
        ([HeadCondition("entropy", ">", float("nan"))], {}, "value of entropy must be a number; got nan"),
        ([SINKS], {"limit": 0}, "limit must be between"),
        ([SINKS], {"after": "[1,2]"}, "after must be"),
        ([SINKS], {"after": '["inf", 1, 1, 1]'}, "after must be"),
        ([SINKS], {"filters": {"colour": "red"}}, "filter must be a column"),
    ],
)
def test_a_wrong_question_is_answered_with_the_rule(
    sqlite_store: Store, conditions: list[HeadCondition], options: dict[str, Any], says: str
):
    with pytest.raises(ListingError, match=says):
        find_heads(sqlite_store, conditions, **options)


def test_twenty_times_the_runs_cost_no_more_steps(sqlite_store: Store):
    """SQLite's own steps, a hundred at a time, are what a query touches, on a busy machine too."""
    counted = [0]

    def more() -> int:
        counted[0] += 1
        return 0

    event.listen(sqlite_store._engine(0), "checkout", lambda raw, *_: raw.set_progress_handler(more, 100))
    wide = HeadCondition("sink_mass", ">", 0.2)
    asked = [
        ([wide], {}),
        ([wide, HeadCondition("entropy", ">", 0.2)], {}),
        ([wide], {"model": "common"}),
        ([wide], {"model": "rare"}),
    ]
    taken: list[list[int]] = []
    for runs in (250, 20 * 250):
        with sqlite_store.write() as session:
            session.execute(text("DELETE FROM experiment"))
        fill(sqlite_store, runs)
        taken.append([])
        for conditions, filters in asked:
            counted[0] = 0
            assert find_heads(sqlite_store, conditions, filters=filters, limit=5).rows
            taken[-1].append(counted[0])
    assert all(many <= 2 * few + 10 for few, many in zip(*taken, strict=True)), taken


def test_the_index_alone_is_read(sqlite_store: Store):
    fill(sqlite_store, 20)
    statements: list[tuple[str, Any]] = []
    engine = sqlite_store._engine(0)

    def remember(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", remember)
    both = [SINKS, HeadCondition("entropy", ">", 0.2)]
    page = find_heads(sqlite_store, both, limit=3)
    find_heads(sqlite_store, both, limit=3, after=page.next)
    event.remove(engine, "before_cursor_execute", remember)
    asked = [it for it in statements if "FROM measurement" in it[0]]
    assert len(asked) == 2
    with sqlite_store.read() as session:
        for statement, parameters in asked:
            plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            details = " / ".join(row[3] for row in plan)
            assert "COVERING INDEX ix_measurement_head (name=? AND value" in details, details
            assert (
                "INDEX ix_measurement_run (run_id=? AND attempt=? AND name=? AND layer=? AND head=?)"
                in details
            )
            assert "TEMP B-TREE" not in details, details
