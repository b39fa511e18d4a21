"""The tables of the database of record; `d2lora.store` is the only reader and writer."""

from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    Boolean,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC, timezone-aware on both sides, also where the database forgets zones (SQLite)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  # SQLAlchemy's
        """Refuse naive times, which would mean another moment on every machine."""
        assert value is None or value.tzinfo is not None
        return value if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  # SQLAlchemy's
        """Return the moment with its zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Table(DeclarativeBase):
    """Base of all tables."""

    # Named constraints, so that migrations can drop what they made on every database.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class DatasetRow(Table):
    """An uploaded dataset."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    resource: Mapped[dict[str, Any]] = mapped_column(JSON)
    key: Mapped[str] = mapped_column(String(512))
    """Where its bytes are in the object storage."""
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Set when nobody may see it any longer; its bytes and this row are removed soon. In the future while they are on
    their way, and nobody may see it yet."""

    __table_args__ = (Index("ix_datasets_tenant_created_at_id", "tenant", "created_at", "id"),)


class InitializationRow(Table):
    """A job: its request, its state, who works on it and until when, and what came out."""

    __tablename__ = "initializations"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """The fencing number: raised by every claim; a worker's writes count only while it is still its own."""
    failures: Mapped[int] = mapped_column(Integer, default=0)
    """Claims that ended without a word; a job handed back on purpose has not failed."""
    deaths: Mapped[int] = mapped_column(Integer, default=0)
    """Workers that died on it or on a shard of it."""
    outages: Mapped[int] = mapped_column(Integer, default=0)
    """Claims that ended because the storage or the accelerator was away."""
    queue: Mapped[str] = mapped_column(String(32), default="cpu")
    """Class of workers that may take it."""
    stage: Mapped[str] = mapped_column(String(16), default="whole")
    """What a claim of it means; see `d2lora.claims.Stage`."""
    plan: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Of a job that was cut into shards: the object that says how."""
    worker: Mapped[str | None] = mapped_column(String(255))
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    prefix: Mapped[str | None] = mapped_column(String(512))
    """Where the files of a succeeded one are."""
    statistics: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """What it keeps of its pass, and where; see `d2lora.claims.StoredStatistics`."""
    woken_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When a wake-up for it was last put into the outbox."""
    cleaned: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether everything but the result has been removed from the storage after its end."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancelling_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    succeeded_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    failed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancelled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    expired_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        Index("ix_initializations_tenant_created_at_id", "tenant", "created_at", "id"),
        Index("ix_initializations_state_lease_until", "state", "lease_until"),
        Index("ix_initializations_state_cleaned", "state", "cleaned"),
    )

    @property
    def request(self) -> dict[str, Any]:
        """The request as it was meant before later versions: the gradient's own direction, lora_A's rows as PEFT's."""
        ours = "start" in self.spec  # requests for methods that take no step have none of these
        return {"direction": "gradient", "lora_a_scale": "rows", **self.spec} if ours else self.spec


class ShardRow(Table):
    """A part of a job that any worker can do: its task, who does it and until when, and what came out."""

    __tablename__ = "shards"

    initialization_id: Mapped[str] = mapped_column(ForeignKey("initializations.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    made_by: Mapped[int] = mapped_column(Integer)
    """Attempt of the job that made it; evaluations of an earlier attempt are of no use to a later one."""
    task: Mapped[dict[str, Any]] = mapped_column(JSON)
    inputs: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    outcome: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Set once it is done."""
    rows_done: Mapped[int] = mapped_column(Integer, default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    failures: Mapped[int] = mapped_column(Integer, default=0)
    outages: Mapped[int] = mapped_column(Integer, default=0)
    worker: Mapped[str | None] = mapped_column(String(255))
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """End of the claim if there is a worker; otherwise it is free from this moment on, or at once."""


class OutboxRow(Table):
    """A wake-up that has not been published yet."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    initialization_id: Mapped[str] = mapped_column(ForeignKey("initializations.id"))
    queue: Mapped[str] = mapped_column(String(32))
    due_at: Mapped[datetime] = mapped_column(UtcDateTime)

    __table_args__ = (Index("ix_outbox_due_at", "due_at"),)


class LeaderRow(Table):
    """Who does what only one replica should do, and until when."""

    __tablename__ = "leaders"

    role: Mapped[str] = mapped_column(String(32), primary_key=True)
    holder: Mapped[str] = mapped_column(String(255))
    lease_until: Mapped[datetime] = mapped_column(UtcDateTime)


class EventRow(Table):
    """One thing that happened to an initialization; numbered from 1 for each."""

    __tablename__ = "events"

    initialization_id: Mapped[str] = mapped_column(ForeignKey("initializations.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    type: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)


class IdempotencyRow(Table):
    """A client's key for a request, and the resource that the first such request made."""

    __tablename__ = "idempotency_keys"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    tenant: Mapped[str] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(String(255))
    digest: Mapped[str] = mapped_column(String(64))
    """sha256 of the request's body, as understood."""
    initialization_id: Mapped[str] = mapped_column(ForeignKey("initializations.id"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)

    __table_args__ = (UniqueConstraint("tenant", "key"),)


_Found = TypeVar("_Found", bound=Table)


def find(session: Session, table: type[_Found], identifier: str, **options: Any) -> _Found | None:
    """Return the row of an ID that a client has made up: one that PostgreSQL cannot hold is nobody's."""
    return None if "\0" in identifier else session.get(table, identifier, **options)
