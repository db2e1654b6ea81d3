"""Alembic's entry: runs the migrations on the connection that `migrations.alembic_config` carries."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import TypeDecorator

from attnlab_storage.tables import Base


def plain_type(kind: str, item: Any, autogen_context: Any) -> str | Literal[False]:
    """A revision is history: it names the stored types, not classes of today's program."""
    return f"sa.{item.impl_instance!r}" if kind == "type" and isinstance(item, TypeDecorator) else False


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    transactional_ddl=True,
    compare_server_default=True,
    render_item=plain_type,
)
with context.begin_transaction():
    context.run_migrations()
