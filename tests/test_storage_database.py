"""Opening, migrating and filling up: each failure has one clear message, and nothing is half done."""

import contextlib
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import event, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from attnlab_storage import queue, results, tensors
from attnlab_storage.database import (
    REVISION_SHARDS,
    Store,
    migrate,
    migration_connection,
    open_store,
    revision,
)
from attnlab_storage.errors import (
    StoreBusy,
    StoreFull,
    StoreNewer,
    StoreOutdated,
    StoreUnreachable,
    StoreURLError,
)
from attnlab_storage.migrations import HEAD, alembic_config, current
from attnlab_storage.tables import Base, Experiment, Run, Setting

EXPRESSION_INDEX = "ignore:autogenerate skipping metadata-specified expression-based index:UserWarning"


@pytest.fixture
def filled(store: Store, make_traced: Callable[..., Any]) -> Any:
    return make_traced(store, tokens=13)


def set_revision(url: str, value: str) -> None:
    with migration_connection(url) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :value"), {"value": value})


@pytest.mark.filterwarnings(EXPRESSION_INDEX)
def test_the_migrations_make_the_tables_that_the_program_has(store_url: str):
    with migration_connection(store_url) as connection:
        options = {"compare_type": True, "include_object": lambda it, name, *_: name != "ix_run_queue"}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_the_index_of_the_queue_is_in_the_order_of_the_claim(store_url: str):
    """Its descending column is an expression, which the comparison above cannot read on SQLite."""
    with migration_connection(store_url) as connection:
        if connection.dialect.name == "sqlite":
            query = "SELECT sql FROM sqlite_master WHERE name = 'ix_run_queue'"
        else:
            query = "SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_run_queue'"
        definition = connection.execute(sa.text(query)).scalar_one()
    assert definition.endswith("(state, priority DESC, id)")


def test_the_migrations_make_every_constraint_and_index_by_its_name(store_url: str):
    with migration_connection(store_url) as connection:
        found = sa.inspect(connection)
        for table in Base.metadata.sorted_tables:
            checks = {check["name"] for check in found.get_check_constraints(table.name)}
            assert checks == {it.name for it in table.constraints if isinstance(it, sa.CheckConstraint)}
            uniques = {unique["name"] for unique in found.get_unique_constraints(table.name)}
            assert uniques == {it.name for it in table.constraints if isinstance(it, sa.UniqueConstraint)}
            foreign = {
                key["name"]: key.get("options", {}).get("ondelete")
                for key in found.get_foreign_keys(table.name)
            }
            assert foreign == {key.name: key.ondelete for key in table.foreign_key_constraints}


@pytest.mark.filterwarnings(
    "ignore:Skipped unsupported reflection of expression-based index:sqlalchemy.exc.SAWarning"
)
def test_partial_indexes_are_partial(store_url: str):
    with migration_connection(store_url) as connection:
        indexes = sa.inspect(connection).get_indexes("run")
        name = connection.dialect.name
        partial = {
            index["name"]
            for index in indexes
            if index.get("dialect_options", {}).get(f"{name}_where") is not None
        }
    expected = {
        index.name
        for index in Base.metadata.tables["run"].indexes
        if index.dialect_options[name]["where"] is not None
    }
    assert partial == expected
    assert "ix_run_latency_ms" in partial


def test_head_is_the_last_revision(sqlite_url: str):
    with migration_connection(sqlite_url) as connection:
        script = ScriptDirectory.from_config(alembic_config(connection))
    revisions = [it.revision for it in script.walk_revisions()]
    assert script.get_heads() == [HEAD]
    assert revisions == sorted(revisions, reverse=True)
    assert all(re.fullmatch(r"\d{4}", it) for it in revisions)


def test_the_last_revision_goes_down_and_up_again(store_url: str):
    with migration_connection(store_url) as connection:
        command.downgrade(alembic_config(connection), "-1")
        assert current(connection) != HEAD
    assert migrate(store_url) == HEAD
    with open_store(store_url) as store:
        assert revision(store) == 0


@pytest.mark.filterwarnings(
    "ignore:Skipped unsupported reflection of expression-based index:sqlalchemy.exc.SAWarning"
)
def test_a_table_full_of_data_can_be_rebuilt(filled: Any, store_url: str):
    """What a later migration will do: SQLite copies the table, and nothing may fall off it."""
    before = results.runs_of(filled.store, run_ids=filled.run_ids)
    values = tensors.read_tensor(filled.store, filled.run_ids[0], "query", 0, 1)
    filled.store.close()
    with migration_connection(store_url) as connection:
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("run") as batch:
            batch.add_column(sa.Column("extra", sa.Integer(), server_default="7", nullable=False))
            batch.alter_column("phase", existing_type=sa.Text(), nullable=True)
        checks = {check["name"] for check in sa.inspect(connection).get_check_constraints("run")}
        assert "ck_run_state" in checks
        assert connection.execute(sa.text("SELECT sum(extra) FROM run")).scalar() == 14
        if connection.dialect.name == "sqlite":
            assert connection.execute(sa.text("PRAGMA foreign_key_check")).all() == []
    assert results.runs_of(filled.store, run_ids=filled.run_ids) == before
    again = tensors.read_tensor(filled.store, filled.run_ids[0], "query", 0, 1)
    np.testing.assert_array_equal(again, values)


def test_migrating_again_changes_nothing(filled: Any, store_url: str):
    before = revision(filled.store)
    assert migrate(store_url) == HEAD
    assert migrate(filled.store) == HEAD
    assert revision(filled.store) == before


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new/folder/attnlab.db"
    url = request.getfixturevalue("postgres_url")
    with migration_connection(url) as connection:
        command.downgrade(alembic_config(connection), "base")
        connection.execute(sa.text("DROP TABLE alembic_version"))
    return url


def test_many_processes_may_migrate_at_once(empty_url: str):
    code = f"from attnlab_storage.database import migrate; print(migrate({empty_url!r}))"
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == [HEAD] * 3
    with open_store(empty_url) as store:
        assert revision(store) == 0


def test_an_empty_database_asks_for_a_migration_and_is_left_alone(empty_url: str):
    with pytest.raises(StoreOutdated, match="has no attnlab tables yet; run `attnlab migrate`"):
        open_store(empty_url)
    if empty_url.startswith("sqlite"):
        assert not Path(make_url(empty_url).database or "").exists()


def test_an_older_database_asks_for_a_migration(store_url: str):
    set_revision(store_url, "0000")
    with pytest.raises(
        StoreOutdated, match=f"at revision 0000, this program needs {HEAD}; run `attnlab migrate`"
    ):
        open_store(store_url)


@pytest.mark.parametrize("found", ["9999", "feedbeef"])
def test_a_newer_database_is_neither_opened_nor_migrated(store_url: str, found: str):
    set_revision(store_url, found)
    for attempt in (open_store, migrate):
        with pytest.raises(
            StoreNewer, match=f"at revision {found}, newer than this program .*pip install --upgrade"
        ):
            attempt(store_url)
    with open_store(store_url, check=False) as store, store.read() as session:
        assert current(session.connection()) == found


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "must be an SQLAlchemy URL, got 'nonsense'; choices: sqlite:////absolute"),
        ("mysql://host/db", "must name an SQLite file or a PostgreSQL database, got 'mysql://host/db'"),
        ("sqlite://", "must name an SQLite file"),
        ("sqlite:///:memory:", "must name an SQLite file"),
        ("postgresql+asyncpg://u:secret@h/d", r"got 'postgresql\+asyncpg://u:\*\*\*@h/d'"),
    ],
)
def test_a_url_that_cannot_be_used_is_named_with_the_choices(url: str, says: str):
    with pytest.raises(StoreURLError, match=says) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_said_without_the_password():
    with pytest.raises(
        StoreUnreachable, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/lab cannot be reached"
    ) as caught:
        open_store("postgresql://me:secret@127.0.0.1:1/lab")
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_said(tmp_path: Path):
    path = tmp_path / "notes.db"
    path.write_text("dear diary, " * 1000)
    with pytest.raises(StoreUnreachable, match=r"notes\.db cannot be used: file is not a database"):
        open_store(f"sqlite:///{path}")
    with pytest.raises(StoreUnreachable, match=r"notes\.db cannot be used: file is not a database"):
        migrate(f"sqlite:///{path}")


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnreachable, match="cannot create the folder"):
        migrate(f"sqlite:///{tmp_path}/file/attnlab.db")


@pytest.fixture
def small_disk(sqlite_store: Store) -> Store:
    """A store that cannot grow by more than about 1 MB."""

    def limit(connection: Any, *_: Any) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 32}")

    event.listen(sqlite_store._engine(1), "connect", limit)
    return sqlite_store


def test_a_full_disk_stores_nothing_of_the_step_and_the_run_can_still_end(small_disk: Store, point: Any):
    queue.submit(small_disk, name="n", spec={}, spec_hash="h", points=[point()])
    claim = queue.claim(small_disk, "me")
    assert claim is not None

    def record() -> None:
        with results.recording(small_disk, claim) as session:
            results.record_measurements(session, claim, [results.MeasurementRow("latency", 1.0, "ms")])
            tensors.write_tensor(session, claim, "query", 0, np.zeros((4, 2048, 64), np.float32))

    with pytest.raises(StoreFull, match="is full; nothing of this step was stored"):
        record()
    assert results.measurements(small_disk, 1) == []
    assert tensors.tensor_info(small_disk, 1) == []
    assert queue.finish(small_disk, claim, "failed", error_kind="store_full")


@pytest.mark.postgres
def test_a_full_disk_of_postgres_is_said(postgres_url: str):
    raise_full = sa.text("DO $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = '53100'; END $$")
    with (
        open_store(postgres_url) as store,
        pytest.raises(StoreFull, match="is full"),
        store.write() as session,
    ):
        session.execute(raise_full)


def test_a_reader_cannot_write(store: Store):
    statement = sa.insert(Setting).values(key="a", value={})
    with pytest.raises(DBAPIError, match=r"(?i)read-?only"), store.read() as session:
        session.execute(statement)


def test_a_reader_sees_one_moment(store: Store, point: Any):
    with store.read() as session:
        count = sa.select(sa.func.count()).select_from(Experiment)
        assert session.scalar(count) == 0
        queue.submit(store, name="n", spec={}, spec_hash="h", points=[point()])
        assert session.scalar(count) == 0
    with store.read() as session:
        assert session.scalar(count) == 1


def test_a_reader_does_not_keep_writers_waiting(store: Store, point: Any):
    queue.submit(store, name="n", spec={}, spec_hash="h", points=[point()])
    with store.read() as session:
        session.scalars(sa.select(Run.id)).all()
        claim = queue.claim(store, "me")
        assert claim is not None
        assert queue.finish(store, claim, "succeeded")


def test_foreign_keys_are_held(store: Store):
    with pytest.raises(IntegrityError), store.write() as session:
        session.execute(sa.text("INSERT INTO log_chunk (run_id, attempt, at, text) VALUES (4711, 1, 0, 'x')"))


def test_an_error_rolls_everything_back(store: Store, point: Any):
    before = revision(store)

    def fail() -> None:
        with store.write() as session:
            session.execute(sa.insert(Setting).values(key="a", value={}))
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    with store.read() as session:
        assert session.get(Setting, "a") is None
    assert revision(store) == before


def test_a_writer_that_blocks_too_long_is_said(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("attnlab_storage.database.BUSY_SECONDS", 0.2)
    with open_store(sqlite_store.url) as impatient, sqlite_store.write() as session:
        session.execute(sa.select(1))
        with pytest.raises(StoreBusy, match="held by another process; try again"):
            queue.pause(impatient)


def test_a_closed_store_opens_again(store: Store):
    store.close()
    queue.pause(store)
    assert queue.paused(store)


def test_writers_in_threads_never_lose_a_revision(store: Store):
    def write() -> None:
        for _ in range(10):
            with store.write():
                pass

    threads = [threading.Thread(target=write) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert revision(store) == 50


def test_the_revision_has_its_shards(store: Store):
    with store.read() as session:
        shards = session.scalars(sa.text("SELECT shard FROM revision ORDER BY shard")).all()
    assert shards == list(range(REVISION_SHARDS))


def test_compacting_gives_the_space_back(sqlite_store: Store, make_traced: Callable[..., Any]):
    traced = make_traced(sqlite_store, tokens=501, layers=3)
    assert sqlite_store.path is not None
    results.delete_experiments(sqlite_store, [traced.experiment_id])
    assert results.purge(sqlite_store, older_than_seconds=0) == 2

    def free_pages() -> int:
        with sqlite_store.read() as session:
            return session.execute(sa.text("PRAGMA freelist_count")).scalar_one()

    assert free_pages() > 10
    sqlite_store.compact()
    assert free_pages() == 0


def test_removed_tensors_are_not_written_again_as_zeros(sqlite_store: Store, make_traced: Callable[..., Any]):
    traced = make_traced(sqlite_store)
    large = np.ones((1, 1 << 21), np.float32)
    assert tensors.keep_derived(sqlite_store, traced.run_ids[0], 1, "large", 0, large)
    results.delete_experiments(sqlite_store, [traced.experiment_id])
    with contextlib.closing(sqlite3.connect(str(sqlite_store.path))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert results.purge(sqlite_store, older_than_seconds=0) == 2
    assert Path(f"{sqlite_store.path}-wal").stat().st_size < large.nbytes / 4


@pytest.mark.postgres
def test_postgres_leaves_chunks_uncompressed(postgres_url: str):
    with open_store(postgres_url) as store, store.read() as session:
        query = "SELECT attstorage FROM pg_attribute WHERE attrelid = 'tensor_chunk'::regclass AND attname = 'data'"
        assert session.execute(sa.text(query)).scalar() in ("e", b"e")


def test_sqlite_is_set_up_for_many_processes(sqlite_store: Store):
    expected = {
        "journal_mode": "wal",
        "foreign_keys": 1,
        "synchronous": 1,
        "busy_timeout": 30_000,
        "page_size": 32768,
        "secure_delete": 2,  # FAST
    }
    with sqlite_store.write() as session:
        found = {name: session.execute(sa.text(f"PRAGMA {name}")).scalar() for name in expected}
    assert found == expected


def test_only_who_writes_keeps_many_pages(sqlite_store: Store):
    with sqlite_store.read() as session:
        assert session.execute(sa.text("PRAGMA cache_size")).scalar_one() == -2048
    with sqlite_store.write() as session:
        assert session.execute(sa.text("PRAGMA cache_size")).scalar_one() == -32768


def test_storage_loads_without_torch_ray_alembic_or_the_floors_above():
    code = """
import sys
for name in ("torch", "ray", "gradio", "transformers", "triton"):
    sys.modules[name] = None
import attnlab_storage.queue, attnlab_storage.results, attnlab_storage.tensors, attnlab_storage.transfer
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"alembic", "attnlab", "attnlab_kernels", "attnlab_webui", "attnlab_workers", "pandas"}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
