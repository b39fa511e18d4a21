"""Opening the database of record, and bringing its schema up to date."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, func, make_url, select, text
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.orm import Session

from d2lora.errors import StoreUnavailable
from d2lora.settings import DatabaseSettings

_BUSY_MILLISECONDS = 30_000
_LIVELY = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""A server that vanishes is noticed within a minute; the system's own limits are 15 minutes and two hours."""
_LIMITS = text(
    "SELECT set_config('lock_timeout', '10s', true), set_config('statement_timeout', '30s', true),"
    " set_config('idle_in_transaction_session_timeout', '30s', true)"
)
"""A process that stops in the middle of a transaction holds the others up no longer than this."""
_MIGRATION_LOCK = 0x64326C6F7261
"""Key of PostgreSQL's advisory lock; any number that nothing else in the database uses."""


def open_engine(settings: DatabaseSettings) -> Engine:
    """Return an engine; a SQLite file and its directory are made if they do not exist."""
    url = make_url(settings.url)
    if url.get_backend_name() != "sqlite":
        engine = create_engine(url, pool_pre_ping=True, connect_args=_LIVELY, hide_parameters=True)

        @event.listens_for(engine, "begin")
        def _limit(connection: Connection) -> None:
            if connection.get_execution_options().get("limited", True):
                # In the transaction, since a connection may go through a pooler that forgets the session's settings.
                connection.execute(_LIMITS)

        return engine
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection, _record) -> None:  # type: ignore[no-untyped-def]  # a DB-API connection has no type  # noqa: ANN001
        connection.isolation_level = None  # the driver's own transactions begin too late to lock anything
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_BUSY_MILLISECONDS}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes the lock at once: a read that later turns into a write can fail however long it waits.
        immediate = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the driver's errors about a database that is away into ours; nobody else looks at them."""
    try:
        yield
    except (OperationalError, InterfaceError, InternalError, PoolExhausted) as error:
        raise StoreUnavailable("the database cannot be reached, or broke the transaction off") from error


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """Run a block in one transaction that may write; it commits at the end and rolls back when it raises.

    Raises:
        StoreUnavailable: the database is away; if it went during the commit, this may have happened or not.
    """
    with _translated(), Session(engine.execution_options(write=True)) as session, session.begin():
        yield session


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """Run a block in one transaction that only reads.

    Raises:
        StoreUnavailable: the database is away.
    """
    with _translated(), Session(engine) as session, session.begin():
        yield session


def now(session: Session) -> datetime:
    """Return the database's time: the one clock that all workers share."""
    if session.get_bind().dialect.name == "sqlite":
        text = session.scalar(select(func.strftime("%Y-%m-%d %H:%M:%f", "now")))
        return datetime.fromisoformat(str(text)).replace(tzinfo=UTC)
    # Not now(), which is the transaction's beginning: waiting for a row must not shorten a lease.
    moment = session.scalar(select(func.clock_timestamp()))
    assert isinstance(moment, datetime)
    return moment.astimezone(UTC)


def migrate(settings: DatabaseSettings) -> None:
    """Bring the schema to the newest revision; safe when several processes do it at once."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    engine = open_engine(settings)
    try:
        with engine.execution_options(write=True, limited=False).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            config.attributes["connection"] = connection
            current = MigrationContext.configure(connection).get_current_revision()
            known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
            if current in known | {None}:  # otherwise a newer version has been here, and revisions only add
                command.upgrade(config, "head")
    finally:
        engine.dispose()
