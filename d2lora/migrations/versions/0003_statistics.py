"""Kept statistics, and datasets that are to be removed."""

import sqlalchemy as sa
from alembic import op

from d2lora.tables import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add them; nothing is kept or removed so far."""
    op.add_column("initializations", sa.Column("statistics", sa.JSON()))
    op.add_column("datasets", sa.Column("deleted_at", UtcDateTime()))


def downgrade() -> None:
    """Remove them; statistics that are kept then go with their adapters."""
    op.drop_column("datasets", "deleted_at")
    op.drop_column("initializations", "statistics")
