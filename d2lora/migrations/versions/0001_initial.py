"""Datasets, initializations, their events, and idempotency keys."""

import sqlalchemy as sa
from alembic import op

from d2lora.tables import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the first tables."""
    op.create_table(
        "datasets",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("resource", sa.JSON(), nullable=False),
        sa.Column("key", sa.String(512), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_datasets"),
    )
    op.create_index("ix_datasets_tenant_created_at_id", "datasets", ["tenant", "created_at", "id"])
    op.create_table(
        "initializations",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(255)),
        sa.Column("lease_until", UtcDateTime()),
        sa.Column("progress", sa.JSON()),
        sa.Column("error", sa.JSON()),
        sa.Column("result", sa.JSON()),
        sa.Column("prefix", sa.String(512)),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("started_at", UtcDateTime()),
        sa.Column("cancelling_at", UtcDateTime()),
        sa.Column("succeeded_at", UtcDateTime()),
        sa.Column("failed_at", UtcDateTime()),
        sa.Column("cancelled_at", UtcDateTime()),
        sa.Column("expired_at", UtcDateTime()),
        sa.PrimaryKeyConstraint("id", name="pk_initializations"),
    )
    op.create_index("ix_initializations_tenant_created_at_id", "initializations", ["tenant", "created_at", "id"])
    op.create_index("ix_initializations_state_lease_until", "initializations", ["state", "lease_until"])
    op.create_table(
        "events",
        sa.Column("initialization_id", sa.String(64), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("initialization_id", "seq", name="pk_events"),
        sa.ForeignKeyConstraint(
            ["initialization_id"], ["initializations.id"], name="fk_events_initialization_id_initializations"
        ),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("initialization_id", sa.String(64), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_idempotency_keys"),
        sa.ForeignKeyConstraint(
            ["initialization_id"], ["initializations.id"], name="fk_idempotency_keys_initialization_id_initializations"
        ),
        sa.UniqueConstraint("tenant", "key", name="uq_idempotency_keys_tenant_key"),
    )


def downgrade() -> None:
    """Remove them."""
    for table in ("idempotency_keys", "events", "initializations", "datasets"):
        op.drop_table(table)
