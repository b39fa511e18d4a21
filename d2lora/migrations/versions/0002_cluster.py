"""Queues, shards, the outbox, and the leader lease."""

import sqlalchemy as sa
from alembic import op

from d2lora.tables import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add them; jobs that are there already are whole, and for any worker that takes the queue cpu."""
    # Not in a batch, which on SQLite makes the table anew: its events would still refer to the one that is dropped.
    for column in (
        sa.Column("deaths", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("outages", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("queue", sa.String(32), nullable=False, server_default="cpu"),
        sa.Column("stage", sa.String(16), nullable=False, server_default="whole"),
        sa.Column("plan", sa.JSON()),
        sa.Column("woken_at", UtcDateTime()),
        sa.Column("cleaned", sa.Boolean(), nullable=False, server_default="0"),
    ):
        op.add_column("initializations", column)
    op.create_index("ix_initializations_state_cleaned", "initializations", ["state", "cleaned"])
    op.create_table(
        "shards",
        sa.Column("initialization_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("made_by", sa.Integer(), nullable=False),
        sa.Column("task", sa.JSON(), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("outcome", sa.JSON()),
        sa.Column("rows_done", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("outages", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(255)),
        sa.Column("lease_until", UtcDateTime()),
        sa.PrimaryKeyConstraint("initialization_id", "number", name="pk_shards"),
        sa.ForeignKeyConstraint(
            ["initialization_id"], ["initializations.id"], name="fk_shards_initialization_id_initializations"
        ),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("initialization_id", sa.String(64), nullable=False),
        sa.Column("queue", sa.String(32), nullable=False),
        sa.Column("due_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        sa.ForeignKeyConstraint(
            ["initialization_id"], ["initializations.id"], name="fk_outbox_initialization_id_initializations"
        ),
    )
    op.create_index("ix_outbox_due_at", "outbox", ["due_at"])
    op.create_table(
        "leaders",
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("holder", sa.String(255), nullable=False),
        sa.Column("lease_until", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("role", name="pk_leaders"),
    )


def downgrade() -> None:
    """Remove them; jobs that were cut into shards begin anew."""
    for name in ("leaders", "outbox", "shards"):
        op.drop_table(name)
    op.drop_index("ix_initializations_state_cleaned", "initializations")
    for name in ("cleaned", "woken_at", "plan", "stage", "queue", "outages", "deaths"):
        op.drop_column("initializations", name)
