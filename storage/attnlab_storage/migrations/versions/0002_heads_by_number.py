"""Find heads by a number that was measured of them, over all runs, from an index alone."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    of_heads = sa.text("head IS NOT NULL")
    op.create_index(
        "ix_measurement_head",
        "measurement",
        ["name", "value", "run_id", "layer", "head", "attempt"],
        sqlite_where=of_heads,
        postgresql_where=of_heads,
    )


def downgrade() -> None:
    op.drop_index("ix_measurement_head", "measurement")
