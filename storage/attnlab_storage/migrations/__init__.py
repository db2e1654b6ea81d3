"""The one history of the tables, for both databases. Revisions are numbers that grow: 0001, 0002, ..."""

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from attnlab_storage.errors import StoreNewer

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0002"


def alembic_config(connection: Connection) -> "Config":
    """The Alembic configuration that works on this connection (and inside its transaction)."""
    from alembic.config import Config  # alembic is heavy; only a migration needs it

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection, label: str) -> str:
    """Upgrades to this program's revision inside the connection's transaction.

    Raises:
        StoreNewer: the database is ahead of this program.
    """
    from alembic import command

    found = current(connection)
    if found is not None and (not found.isdigit() or int(found) > int(HEAD)):
        raise StoreNewer(label, found, HEAD)
    if found != HEAD:
        command.upgrade(alembic_config(connection), HEAD)
    return HEAD


def current(connection: Connection) -> str | None:
    """The revision of the database; None without tables."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
