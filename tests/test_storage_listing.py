"""Lists show every run once, in order, however they are filtered, searched, sorted and paged; and by index."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text

from attnlab_storage import results
from attnlab_storage.database import Store, migrate, open_store
from attnlab_storage.listing import FILTERS, SORTS, ListingError
from attnlab_storage.tables import STATES, Experiment, Run


def fill(store: Store, experiments: int = 12, runs: int = 60, seed: int = 0) -> None:
    """Made-up runs with many equal values, and many missing ones."""
    rng = random.Random(seed)
    names = ["window", "Fläche", "50% done", "a_b", "<b>bold</b>"]
    made = [
        {
            "name": f"{names[index % 5]} {index}",
            "spec": {},
            "spec_hash": str(index),
            "note": "the note of seven" if index == 7 else "",
            "tags": ["paper"] if index % 3 == 0 else ["naïve", 'quo"te'],
            "pinned": False,
            "created_at": float(index),
        }
        for index in range(experiments)
    ]
    with store.write() as session:
        session.execute(insert(Experiment), made)
        owners = session.scalars(select(Experiment.id).order_by(Experiment.id)).all()
        session.execute(insert(Run), [_run(index, owners, rng) for index in range(runs)])


def _run(index: int, owners: Any, rng: random.Random) -> dict[str, Any]:
    state = rng.choice(STATES)
    ended = state not in ("queued", "running")
    return {
        "experiment_id": owners[index % len(owners)],
        "position": index // len(owners),
        "mechanism": rng.choice(("multi_head", "flash", "sliding_window")),
        "parameters": {},
        "implementation": rng.choice(("auto", "eager")),
        "sequence_length": rng.choice((512, 2048)),
        "dtype": rng.choice(("float32", "bfloat16")),
        "batch_size": 1,
        "phase": "prefill",
        "model": rng.choice(("smollm2-135m", "rxnmapper", None)),
        "kind": "bench",
        "gpus": 0,
        "state": state,
        "priority": 0,
        "run_after": 0.0,
        "attempt": 1,
        "max_attempts": 3,
        "owner": "me" if state == "running" else None,
        "lease_until": 1.0 if state == "running" else None,
        "timeout_seconds": 3600.0,
        "created_at": float(index // 2),
        "started_at": rng.choice((1.0, 2.0, 1 / 3)) if ended else None,
        "finished_at": float(index) if ended else None,
        "latency_ms": rng.choice((0.1, 0.1 + 1e-16, 1 / 3, 7.0)) if state == "succeeded" else None,
        "peak_memory_bytes": rng.choice((0, 10, 2**40)) if state == "succeeded" else None,
        "deleted_at": 1.0 if index % 17 == 16 else None,
    }


# the tests below only read: one store a database is enough
@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def listed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('listing')}/attnlab.db"
        migrate(url)
    else:
        url = request.getfixturevalue("make_postgres_database")("listing")
    with open_store(url) as store:
        fill(store)
        yield store


@pytest.fixture(scope="module")
def rows(listed: Store) -> list[results.RunRow]:
    """Every run that is not deleted."""
    return results.list_runs(listed, limit=1000).rows


def walk(store: Store, limit: int, **options: Any) -> list[results.RunRow]:
    page = results.list_runs(store, limit=limit, **options)
    found = list(page.rows)
    while page.next is not None:
        page = results.list_runs(store, limit=limit, after=page.next, **options)
        assert page.rows
        found += page.rows
    return found


def ids(found: list[results.RunRow]) -> list[int]:
    return [row.id for row in found]


def test_all_that_is_not_deleted_is_listed(listed: Store, rows: list[results.RunRow]):
    assert len(rows) == 57
    assert len(results.list_runs(listed, deleted=True, limit=1000).rows) == 3
    assert rows[0].experiment_name
    assert rows[0].tags
    assert results.run_ids(listed) == sorted(ids(rows), reverse=True)
    assert len(results.run_ids(listed, deleted=True)) == 3


@pytest.mark.parametrize("name", SORTS)
def test_pages_of_any_size_join_to_the_whole_in_order(listed: Store, rows: list[results.RunRow], name: str):
    for sign in ("", "-"):
        for limit in (1, 7, 1000):
            found = walk(listed, limit, sort=sign + name)
            assert sorted(ids(found)) == sorted(ids(rows))
            keys = [(getattr(row, name), row.id) for row in found]
            valued = [key for key in keys if key[0] is not None]
            missing = [key[1] for key in keys if key[0] is None]
            assert keys == valued + [(None, key) for key in missing], "runs without a value come last"
            assert missing == sorted(missing, reverse=bool(sign))
            if not isinstance(valued[0][0], str):  # the order of texts is the database's
                assert valued == sorted(valued, reverse=bool(sign))


def test_filters_keep_what_they_name(listed: Store, rows: list[results.RunRow]):
    for name in set(FILTERS) - {"experiment", "tag"}:
        for value in {getattr(row, name) for row in rows} - {None}:
            expected = sorted(row.id for row in rows if getattr(row, name) == value)
            assert sorted(ids(walk(listed, 1000, filters={name: value}))) == expected
    both = {"mechanism": ["flash", "multi_head"], "dtype": "float32", "state": ("succeeded", "failed")}
    expected = [
        row.id
        for row in rows
        if row.mechanism in both["mechanism"] and row.dtype == "float32" and row.state in both["state"]
    ]
    assert ids(walk(listed, 3, filters=both)) == expected
    assert results.count_runs(listed, filters=both) == len(expected)
    assert ids(walk(listed, 1000, filters={"experiment": 3})) == [
        row.id for row in rows if row.experiment_id == 3
    ]


def test_numbers_may_come_as_the_texts_of_a_url(listed: Store, rows: list[results.RunRow]):
    expected = [row.id for row in rows if row.sequence_length == 512 and row.experiment_id in (2, 3)]
    assert ids(walk(listed, 9, filters={"sequence_length": "512", "experiment": ["2", "3", ""]})) == expected


@pytest.mark.parametrize("tag", ["paper", "naïve", 'quo"te', "pap", "nothing", "\ud800"])
def test_a_tag_is_matched_whole(listed: Store, rows: list[results.RunRow], tag: str):
    expected = [row.id for row in rows if tag in row.tags]
    assert ids(walk(listed, 1000, filters={"tag": tag})) == expected
    assert (expected == []) is (tag in ("pap", "nothing", "\ud800"))
    experiments = results.list_experiments(listed, tag=tag, limit=100).rows
    assert all(tag in row.tags for row in experiments)
    assert len(experiments) == len({row.experiment_id for row in rows if tag in row.tags})


def test_empty_filters_keep_everything(listed: Store, rows: list[results.RunRow]):
    for empty in ({}, {"state": []}, {"state": ""}, {"model": None}, None):
        assert ids(walk(listed, 1000, filters=empty, search="  ")) == ids(rows)


@pytest.mark.parametrize(
    "search",
    ["window", "WINDOW 5", "fläche", "50%", "a_b", "%", "_", "/", "<b>", "note of sev", "flash", "rxn", "no"],
)
def test_a_search_finds_text_anywhere_and_nothing_else(
    listed: Store, rows: list[results.RunRow], search: str
):
    def mentions(row: results.RunRow) -> bool:
        note = "the note of seven" if row.experiment_id == 8 else ""
        texts = [row.experiment_name, note, *row.tags, row.mechanism, row.implementation, row.model or ""]
        return any(search.lower() in it.lower() for it in texts)

    expected = [row.id for row in rows if mentions(row)]
    assert ids(walk(listed, 1000, search=search)) == expected
    assert results.count_runs(listed, search=search) == len(expected)
    assert results.run_ids(listed, search=search) == sorted(expected, reverse=True)


def test_a_search_for_a_number_finds_the_run(listed: Store, rows: list[results.RunRow]):
    wanted = rows[5].id
    assert wanted in ids(walk(listed, 1000, search=str(wanted)))


@pytest.mark.parametrize("search", ["'; DROP TABLE run; --", "\0", "\ud800", "x" * 10_000, "9" * 30])
def test_a_strange_search_finds_nothing_and_harms_nothing(
    listed: Store, rows: list[results.RunRow], search: str
):
    assert walk(listed, 1000, search=search) == []
    assert ids(results.list_runs(listed, limit=1000).rows) == ids(rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sort": "speed"}, "sort must be a column, got 'speed'; choices: id, state"),
        ({"filters": {"colour": 1}}, "filter must be a column, got 'colour'; choices: state, mechanism"),
        ({"filters": {"state": "done"}}, "filter state must be a state, got 'done'; choices: queued"),
        (
            {"filters": {"sequence_length": "long"}},
            "filter sequence_length must be a whole number, got 'long'",
        ),
        ({"filters": {"experiment": 2**70}}, "filter experiment must be a whole number, got 11805"),
        ({"filters": {"model": 7}}, "filter model must be a text, got 7"),
        ({"filters": {"tag": 7}}, "filter tag must be a text, got 7"),
        ({"limit": 0}, "limit must be between 1 and 1000, got 0"),
        ({"limit": 1001}, "limit must be between 1 and 1000, got 1001"),
        ({"after": "nonsense"}, "after must be the `next` of a page, got 'nonsense'"),
        ({"after": "[1]"}, "after must be the `next` of a page"),
        ({"after": '[{"a": 1}, 2]'}, "after must be the `next` of a page"),
        ({"after": "7"}, "after must be the `next` of a page"),
        ({"after": '["text", 3]', "sort": "latency_ms"}, "after must be the `next` of a page"),
        ({"after": f"[null, {2**70}]", "sort": "latency_ms"}, "after must be the `next` of a page"),
    ],
)
def test_a_wrong_question_is_answered_with_the_choices(listed: Store, options: dict[str, Any], says: str):
    with pytest.raises(ListingError, match=says):
        results.list_runs(listed, **options)


def test_menus_hold_each_value_once(listed: Store, rows: list[results.RunRow]):
    for name in ("mechanism", "model", "sequence_length", "state", "phase"):
        expected = {getattr(row, name) for row in rows} - {None}
        found = results.run_values(listed, name)
        assert len(found) == len(expected)
        assert set(found) == expected
    with pytest.raises(ListingError, match="column must be a filter of runs, got 'tag'"):
        results.run_values(listed, "tag")


def test_counts_name_every_state(listed: Store, rows: list[results.RunRow]):
    counts = results.counts_by_state(listed)
    assert list(counts) == list(STATES)
    assert counts == {state: sum(row.state == state for row in rows) for state in STATES}
    one = results.counts_by_state(listed, experiment_id=3)
    assert sum(one.values()) == sum(row.experiment_id == 3 for row in rows)


def test_experiments_are_paged_from_the_latest_with_their_states(listed: Store, rows: list[results.RunRow]):
    page = results.list_experiments(listed, limit=5)
    found = list(page.rows)
    while page.next is not None:
        page = results.list_experiments(listed, limit=5, after=page.next)
        found += page.rows
    assert [row.id for row in found] == sorted({row.experiment_id for row in rows}, reverse=True)
    for row in found:
        own = [run.state for run in rows if run.experiment_id == row.id]
        assert row.states == {state: own.count(state) for state in set(own)}
        assert row.runs == len(own)
        assert row.ended is not bool({"queued", "running"} & set(own))
    assert [row.id for row in results.list_experiments(listed, search="note of").rows] == [8]


def test_runs_by_id_come_in_the_order_asked_for(listed: Store):
    assert ids(results.runs_of(listed, run_ids=[9, 2, 4711, 5])) == [9, 2, 5]
    grid = results.runs_of(listed, experiment_id=3)
    assert [row.position for row in grid] == sorted(row.position for row in grid)


@pytest.mark.parametrize("name", SORTS)
def test_every_sort_reads_an_index_and_sorts_nothing(sqlite_store: Store, name: str):
    fill(sqlite_store, runs=20)
    statements: list[tuple[str, Any]] = []

    def remember(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    engine = sqlite_store._engine(0)
    event.listen(engine, "before_cursor_execute", remember)
    try:
        for sign in ("", "-"):
            page = results.list_runs(sqlite_store, sort=sign + name, limit=3)
            results.list_runs(sqlite_store, sort=sign + name, limit=3, after=page.next)
    finally:
        event.remove(engine, "before_cursor_execute", remember)
    listing = [it for it in statements if "FROM run" in it[0]]
    assert len(listing) >= 4
    with sqlite_store.read() as session:
        for statement, parameters in listing:
            plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            details = " / ".join(row[3] for row in plan)
            assert "INDEX ix_run_" in details or "PRIMARY KEY" in details, details
            assert "TEMP B-TREE" not in details, details


def test_counting_states_reads_only_an_index(sqlite_store: Store):
    with sqlite_store.read() as session:
        query = "EXPLAIN QUERY PLAN SELECT state, count(*) FROM run WHERE deleted_at IS NULL GROUP BY state"
        details = [row[3] for row in session.execute(text(query))]
    assert any("COVERING INDEX ix_run_state" in detail for detail in details), details


def test_the_pages_hold_while_runs_come_and_go(sqlite_store: Store):
    fill(sqlite_store)
    page = results.list_runs(sqlite_store, sort="-id", limit=10)
    results.delete_runs(sqlite_store, [page.rows[-1].id])
    following = results.list_runs(sqlite_store, sort="-id", limit=10, after=page.next)
    assert following.rows[0].id < page.rows[-1].id
    assert not set(ids(page.rows)) & set(ids(following.rows))
