"""What the verbs of the queue of record have in common: a job's moves, its events, and its wake-ups.

Whoever changes a job or its shards holds the lock on the job's row; only a lease's renewal does without.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from d2lora.claims import Stage
from d2lora.database import now
from d2lora.errors import NotFound
from d2lora.initializations import State
from d2lora.tables import EventRow, InitializationRow, OutboxRow, ShardRow, find


def lock(session: Session, initialization_id: str, tenant: str | None = None) -> InitializationRow:
    """Return a job's row, locked until the transaction ends; NotFound if this tenant has none of that ID."""
    row = find(session, InitializationRow, initialization_id, with_for_update=True, populate_existing=True)
    if row is None or tenant not in {None, row.tenant}:
        raise NotFound(f"there is no initialization {initialization_id!r}")
    return row


def move(session: Session, row: InitializationRow, state: State) -> None:
    """Change a job's state and say so in its events; the only place where a state changes."""
    assert State(row.state).can_become(state), f"{row.id}: {row.state} cannot become {state}"
    moment = now(session)
    row.state = state
    if state is State.RUNNING:
        row.started_at = row.started_at or moment
    elif state is not State.QUEUED:
        setattr(row, f"{state}_at", moment)
    if state is not State.RUNNING and state is not State.CANCELLING:
        row.worker = row.lease_until = row.progress = None
    data: dict[str, Any] = {"attempt": row.attempt}
    if row.error is not None:
        data["error"] = row.error
    add_event(session, row, state, data)


def add_event(session: Session, row: InitializationRow, kind: str, data: dict[str, Any]) -> None:
    """Write down what happened to a job."""
    last = session.scalar(select(func.max(EventRow.seq)).where(EventRow.initialization_id == row.id)) or 0
    session.add(EventRow(initialization_id=row.id, seq=last + 1, at=now(session), type=kind, data=data))
    session.flush()


def wake(session: Session, row: InitializationRow, *, count: int = 1, due_at: datetime | None = None) -> None:
    """Put wake-ups for a job into the outbox, in the transaction that makes it or its shards free."""
    moment = now(session)
    row.woken_at = moment
    session.add_all(OutboxRow(initialization_id=row.id, queue=row.queue, due_at=due_at or moment) for _ in range(count))


def free_job(moment: datetime) -> Any:
    """Return the condition under which a job may be claimed, or ended because nobody will."""
    row = InitializationRow
    return or_(
        and_(row.state == State.QUEUED, or_(row.lease_until.is_(None), row.lease_until <= moment)),
        and_(row.state.in_([State.RUNNING, State.CANCELLING]), row.lease_until <= moment),
    )


def free_shard(moment: datetime) -> Any:
    """Return the condition, over shards joined with their jobs, under which a shard may be claimed."""
    wanted = or_(
        and_(ShardRow.kind == "statistics", InitializationRow.stage == Stage.SHARDS),
        and_(
            ShardRow.kind == "evaluation",
            InitializationRow.stage == Stage.BUILD,
            ShardRow.made_by == InitializationRow.attempt,
        ),
    )
    return and_(
        InitializationRow.state == State.RUNNING,
        wanted,
        ShardRow.outcome.is_(None),
        or_(ShardRow.lease_until.is_(None), ShardRow.lease_until <= moment),
    )
