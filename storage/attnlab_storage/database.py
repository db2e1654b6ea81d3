"""Opens the store: one SQLite file or one PostgreSQL database, the same tables and the same behaviour.

SQLite gets two engines: writers start with ``BEGIN IMMEDIATE`` (an upgrade from reading to writing would fail
at once instead of waiting), readers with a plain ``BEGIN`` that never takes the write lock. A `Store` may be
shared by threads and is safe to use after a fork: each process makes connections of its own.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, bindparam, create_engine, event, select, update
from sqlalchemy import inspect as inspect_database
from sqlalchemy import text as sql
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from attnlab_storage import settings
from attnlab_storage.columns import dump_json
from attnlab_storage.errors import StoreOutdated, StoreUnreachable, StoreURLError, translated
from attnlab_storage.migrations import HEAD, upgrade
from attnlab_storage.tables import Revision

BUSY_SECONDS = 30
REVISION_SHARDS = 16

# built once: making it takes longer than running it
_ANNOUNCE = update(Revision).where(Revision.shard == bindparam("at")).values(value=Revision.value + 1)
_PLAIN = {"synchronize_session": False}


class Store:
    """One open database. ``read()`` and ``write()`` are the only ways in.

    Raises (from both): StoreFull, StoreBusy, StoreUnreachable.
    """

    def __init__(self, url: URL) -> None:
        self.url = url.render_as_string(hide_password=False)
        self.dialect = url.get_backend_name()
        self.label = url.render_as_string(hide_password=True)
        self._url = url
        self._lock = threading.Lock()
        self._engines: tuple[Engine, Engine] | None = None
        self._pid = os.getpid()

    @property
    def path(self) -> Path | None:
        """The database file; None on PostgreSQL."""
        return Path(self._url.database or "") if self.dialect == "sqlite" else None

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session on one consistent snapshot; it cannot write."""
        with translated(self.label), Session(self._engine(0), expire_on_commit=False) as session:
            yield session

    @contextlib.contextmanager
    def write(self, *, announce: bool = True) -> Iterator[Session]:
        """A session that is one transaction: committed at the end, rolled back on any exception.

        Keep it short: on SQLite it is the only writer. With ``announce`` the commit moves the change counter
        that live pages watch; a heartbeat does without.
        """
        with (
            translated(self.label),
            Session(self._engine(1), expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session
            if announce:
                session.flush()
                # the last statement before the commit, so that no one waits long for the row
                shard = (os.getpid() ^ threading.get_ident()) % REVISION_SHARDS
                session.execute(_ANNOUNCE, {"at": shard}, execution_options=_PLAIN)

    def settle(self) -> None:
        """Copies SQLite's log into the file now, at a moment of one's choosing; PostgreSQL does that by itself."""
        if self.dialect == "sqlite":
            connection = self._engine(1).raw_connection()
            with translated(self.label), contextlib.closing(connection):
                connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")

    def compact(self) -> None:
        """Gives unused space of an SQLite file back to the disk; PostgreSQL does that by itself."""
        if self.dialect == "sqlite":
            connection = self._engine(1).raw_connection()  # VACUUM must stand outside of a transaction
            with translated(self.label), contextlib.closing(connection):
                connection.cursor().execute("VACUUM")

    def close(self) -> None:
        """Closes every connection; the store may be used again and then opens new ones."""
        with self._lock:
            engines, self._engines = self._engines, None
        for engine in engines or ():
            engine.dispose(close=self._pid == os.getpid())

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _engine(self, which: int) -> Engine:
        with self._lock:
            if self._engines is not None and self._pid != os.getpid():
                for (
                    engine
                ) in self._engines:  # the parent's connections: drop them, closing would end them there
                    engine.dispose(close=False)
                self._engines = None
            if self._engines is None:
                self._pid = os.getpid()
                self._engines = _engines(self._url)
            return self._engines[which]


def open_store(url: str | None = None, *, check: bool = True) -> Store:
    """Opens the store at ``url`` (default: `settings.database_url()`).

    Raises:
        StoreURLError: the URL is not one of SQLite (a file) or PostgreSQL.
        StoreOutdated: the database is empty or older than this program.
        StoreNewer: the database was migrated by a newer attnlab.
    """
    store = Store(_parse(url or settings.database_url()))
    if check:
        try:
            check_revision(store)
        except BaseException:
            store.close()
            raise
    return store


def migrate(store_or_url: Store | str | None = None) -> str:
    """Creates or upgrades the tables and returns the revision; safe to call from many processes at once.

    Raises:
        StoreNewer: the database was migrated by a newer attnlab.
    """
    url = (
        store_or_url._url
        if isinstance(store_or_url, Store)
        else _parse(store_or_url or settings.database_url())
    )
    with migration_connection(url) as connection:
        return upgrade(connection, url.render_as_string(hide_password=True))


@contextlib.contextmanager
def migration_connection(url: URL | str) -> Iterator[Connection]:
    """One transaction that excludes every other migration, with foreign keys off (tables may be rebuilt)."""
    url = make_url(url)
    engine = _migration_engine(url)
    try:
        with translated(url.render_as_string(hide_password=True)), engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sql("SELECT pg_advisory_xact_lock(hashtext('attnlab migrations'))"))
            yield connection
    finally:
        engine.dispose()


def check_revision(store: Store) -> None:
    """Raises StoreOutdated or StoreNewer unless the database has exactly the tables of this program."""
    if store.path is not None and not store.path.exists():
        raise StoreOutdated(store.label, None, HEAD)
    with store.read() as session:
        connection = session.connection()
        found = None
        if inspect_database(connection).has_table("alembic_version"):
            found = connection.execute(sql("SELECT version_num FROM alembic_version")).scalar()
    if found != HEAD:
        raise StoreOutdated.or_newer(store.label, found, HEAD)


def revision(store: Store) -> int:
    """A counter that grows with every announced write: the same number means that nothing changed."""
    with store.read() as session:
        return sum(session.scalars(select(Revision.value)))


def _parse(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError:
        raise StoreURLError(
            f"database url must be an SQLAlchemy URL, got {text!r:.200}; {_CHOICES}"
        ) from None
    backend = url.get_backend_name()
    shown = url.render_as_string(hide_password=True)
    if backend == "postgresql" and url.drivername in ("postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and url.database not in (None, "", ":memory:"):
        return url
    raise StoreURLError(
        f"database url must name an SQLite file or a PostgreSQL database, got {shown!r}; {_CHOICES}"
    )


_CHOICES = "choices: sqlite:////absolute/path/attnlab.db, postgresql://user:password@host/database"


def _engines(url: URL) -> tuple[Engine, Engine]:
    """(reader, writer)"""
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, "BEGIN", query_only=True), _sqlite_engine(url, "BEGIN IMMEDIATE")
    engine = _postgres_engine(url)
    reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return reader, engine


def _postgres_engine(url: URL) -> Engine:
    # a process that was stopped inside a transaction must not hold its rows for ever
    options = f"-c lock_timeout={BUSY_SECONDS}s -c idle_in_transaction_session_timeout=120s"
    return create_engine(
        url,
        pool_pre_ping=True,
        pool_size=5,
        max_overflow=45,
        json_serializer=dump_json,
        connect_args={"options": options, "application_name": "attnlab"},
    )


def _sqlite_engine(url: URL, begin: str, *, query_only: bool = False) -> Engine:
    engine = create_engine(
        url,
        pool_size=5,
        max_overflow=45,
        json_serializer=dump_json,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the begin event below says how a transaction starts
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")
        # 1 GB: copying the log into the file waits for the disk; who writes much settles it when it suits.
        # It keeps that size while the store is open: written over it takes 14 ms where growing takes 21
        connection.execute("PRAGMA wal_autocheckpoint = 32768")
        connection.execute("PRAGMA journal_size_limit = 1073741824")
        # 32 MB: a transaction that fits is written once; of a larger one pages are written, changed and written
        # again, and then all checksums after them are made anew from what is read back. Who reads has many
        # connections, each with a cache of its own, and the system's below them
        connection.execute(f"PRAGMA cache_size = -{2048 if query_only else 32768}")
        # Debian's default writes zeros over each freed page, through the log: to remove 770 MB of tensors took as much
        # free disk again and 1.8 s, against 0.4 s. What is deleted from a page that stays is still overwritten
        connection.execute("PRAGMA secure_delete = FAST")
        connection.execute(f"PRAGMA query_only = {'ON' if query_only else 'OFF'}")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _migration_engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return _postgres_engine(url)
    path = Path(url.database or "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnreachable(f"cannot create the folder of the database {path}: {error.strerror}") from None
    engine = _sqlite_engine(url, "BEGIN EXCLUSIVE")

    @event.listens_for(engine, "connect")
    def once(connection: Any, record: Any) -> None:
        # takes effect in a new file only; the log has a write and a checksum of its own for every page
        connection.execute("PRAGMA page_size = 32768")
        _switch_to_wal(connection)
        connection.execute("PRAGMA foreign_keys = OFF")

    return engine


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Waits for others who do the same: this pragma, unlike statements, ignores the busy timeout."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


__all__ = [
    "Store",
    "check_revision",
    "migrate",
    "migration_connection",
    "open_store",
    "revision",
]
