"""What the dispatcher does with the queue of record: publish wake-ups, wake again what was forgotten, tidy up.

Every public verb is one transaction. Losing a wake-up, or publishing one twice, costs time and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Engine, delete, exists, func, or_, select
from sqlalchemy.exc import IntegrityError

from d2lora.database import now, reading, writing
from d2lora.initializations import State
from d2lora.tables import DatasetRow, InitializationRow, LeaderRow, OutboxRow, ShardRow
from d2lora.transitions import free_job, free_shard, lock, move, wake

_MOST = 500
"""Jobs that are woken again at one look; the next one comes soon."""
_TERMINAL = [state for state in State if state.is_terminal]


@dataclass(frozen=True)
class WakeUp:
    """A message that is due: which queue is to be told of which initialization."""

    number: int
    queue: str
    initialization_id: str


@dataclass(frozen=True)
class Leftover:
    """An ended job whose files, but for its result, are to be removed."""

    id: str
    tenant: str
    attempts: int
    kept: str | None
    """Prefix of the result."""
    keeps_statistics: bool = False
    """Whether those beside the result are kept too."""


@dataclass(frozen=True)
class DeletedDataset:
    """A dataset that nobody may see any longer."""

    id: str
    key: str


@dataclass(frozen=True)
class Census:
    """What the metrics tell."""

    units: dict[tuple[str, str], int]
    """(queue, state) -> jobs that have not ended; and (queue, "shards") -> shards that are not done."""
    oldest_free_seconds: dict[str, float]
    pending: int
    """Wake-ups in the outbox that are due."""
    failed: dict[str, int]
    """Code of the error -> failed jobs."""
    deaths: int
    """Workers that died on a job or a shard."""


class Outbox:
    """The verbs of the dispatcher."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def lead(self, holder: str, *, lease: timedelta, role: str = "dispatcher") -> bool:
        """Become or stay the leader; False while another one is."""
        try:
            with writing(self._engine) as session:
                moment = now(session)
                row = session.get(LeaderRow, role, with_for_update=True)
                if row is None:
                    session.add(LeaderRow(role=role, holder=holder, lease_until=moment + lease))
                    return True
                if row.holder != holder and row.lease_until > moment:
                    return False
                row.holder, row.lease_until = holder, moment + lease
                return True
        except IntegrityError:  # another replica was the first to lead
            return False

    def resign(self, holder: str, *, role: str = "dispatcher") -> None:
        """Let another replica lead at once."""
        with writing(self._engine) as session:
            session.execute(delete(LeaderRow).where(LeaderRow.role == role, LeaderRow.holder == holder))

    def due(self, *, limit: int = 500) -> list[WakeUp]:
        """Return wake-ups to publish now, oldest first."""
        with reading(self._engine) as session:
            query = select(OutboxRow).where(OutboxRow.due_at <= now(session)).order_by(OutboxRow.id).limit(limit)
            return [WakeUp(row.id, row.queue, row.initialization_id) for row in session.scalars(query)]

    def published(self, wake_ups: Sequence[WakeUp]) -> None:
        """Forget wake-ups that the broker has."""
        with writing(self._engine) as session:
            session.execute(delete(OutboxRow).where(OutboxRow.id.in_([one.number for one in wake_ups])))

    def forgotten(self, queue: str, *, waiting: int, silent_for: timedelta) -> int:
        """Wake again what is free, if the broker's queue holds fewer messages than there are free units.

        ``waiting`` is what the broker holds. Jobs that were woken less than ``silent_for`` ago are left alone: their
        message may be on its way. Returns the number of wake-ups.
        """
        with writing(self._engine) as session:
            moment = now(session)
            row = InitializationRow
            pending = select(func.count()).select_from(OutboxRow)
            pending = pending.where(OutboxRow.queue == queue, OutboxRow.due_at <= moment)
            own_shards = exists().where(ShardRow.initialization_id == row.id, free_shard(moment)).correlate(row)
            jobs = select(func.count()).select_from(row).where(row.queue == queue, free_job(moment))
            shards = select(func.count()).select_from(ShardRow).join(row).where(row.queue == queue, free_shard(moment))
            missing = sum(session.scalar(query) or 0 for query in (jobs, shards))
            missing -= waiting + (session.scalar(pending) or 0)
            if missing <= 0:
                return 0
            is_silent = or_(row.woken_at.is_(None), row.woken_at <= moment - silent_for)
            silent = select(row).where(row.queue == queue, is_silent, or_(free_job(moment), own_shards))
            # Whoever is just changing a job may have woken somebody, or hang; neither is waited for.
            silent = (
                silent.order_by(row.created_at, row.id).limit(min(missing, _MOST)).with_for_update(skip_locked=True)
            )
            woken = 0
            for job in session.scalars(silent.with_for_update(skip_locked=True)):
                if woken >= missing:
                    break
                free = select(func.count()).select_from(ShardRow).join(row).where(row.id == job.id, free_shard(moment))
                count = session.scalar(free) or 1
                wake(session, job, count=count)
                woken += count
            return woken

    def queues(self) -> list[str]:
        """Return the queues that have jobs which have not ended."""
        with reading(self._engine) as session:
            live = InitializationRow.state.not_in(_TERMINAL)
            return list(session.scalars(select(InitializationRow.queue).where(live).distinct()))

    def end_cancelling(self) -> int:
        """End jobs that should stop and that nobody holds any longer."""
        with writing(self._engine) as session:
            moment = now(session)
            stuck = select(InitializationRow).where(
                InitializationRow.state == State.CANCELLING, InitializationRow.lease_until <= moment
            )
            rows = list(session.scalars(stuck.with_for_update(skip_locked=True)))
            for row in rows:
                move(session, row, State.CANCELLED)
            return len(rows)

    def expire(self, *, retention: timedelta, limit: int = 100) -> int:
        """Expire results that are older than ``retention``; their files are removed as leftovers."""
        with writing(self._engine) as session:
            old = select(InitializationRow).where(
                InitializationRow.state == State.SUCCEEDED, InitializationRow.succeeded_at <= now(session) - retention
            )
            rows = list(session.scalars(old.limit(limit).with_for_update(skip_locked=True)))
            for row in rows:
                move(session, row, State.EXPIRED)
                row.prefix, row.statistics, row.cleaned = None, None, False
            return len(rows)

    def leftovers(self, *, settled_for: timedelta, limit: int = 100) -> list[Leftover]:
        """Return ended jobs whose storage has not been tidied; only once no worker of theirs can still be writing."""
        with reading(self._engine) as session:
            row = InitializationRow
            ended = func.coalesce(row.expired_at, row.succeeded_at, row.failed_at, row.cancelled_at)
            query = select(row).where(row.state.in_(_TERMINAL), row.cleaned.is_(False))
            query = query.where(or_(row.state == State.EXPIRED, ended <= now(session) - settled_for))
            return [
                Leftover(one.id, one.tenant, one.attempt, one.prefix, one.statistics is not None)
                for one in session.scalars(query.limit(limit))
            ]

    def cleaned(self, leftover: Leftover) -> None:
        """Remember that an ended job's storage is tidy, and forget its shards."""
        with writing(self._engine) as session:
            row = lock(session, leftover.id)
            session.execute(delete(ShardRow).where(ShardRow.initialization_id == leftover.id))
            # Otherwise it has expired meanwhile, or its dataset was deleted.
            row.cleaned = (row.prefix, row.statistics is not None) == (leftover.kept, leftover.keeps_statistics)

    def deleted_datasets(self, *, limit: int = 100) -> list[DeletedDataset]:
        """Return datasets that were deleted, or announced and never added, and whose bytes are to be removed."""
        with reading(self._engine) as session:
            query = select(DatasetRow).where(DatasetRow.deleted_at <= now(session)).order_by(DatasetRow.id).limit(limit)
            return [DeletedDataset(row.id, row.key) for row in session.scalars(query)]

    def forget(self, dataset: DeletedDataset) -> None:
        """Forget a deleted dataset whose bytes have been removed."""
        with writing(self._engine) as session:
            gone = delete(DatasetRow).where(DatasetRow.id == dataset.id, DatasetRow.deleted_at <= now(session))
            session.execute(gone)

    def census(self) -> Census:
        """Return the counts that the metrics tell."""
        with reading(self._engine) as session:
            moment = now(session)
            row = InitializationRow
            jobs = select(row.queue, row.state, func.count()).where(row.state.not_in(_TERMINAL))
            units = {
                (queue, state): count for queue, state, count in session.execute(jobs.group_by(row.queue, row.state))
            }
            shards = select(row.queue, func.count()).join(ShardRow)
            shards = shards.where(row.state == State.RUNNING, ShardRow.outcome.is_(None)).group_by(row.queue)
            units |= {(queue, "shards"): count for queue, count in session.execute(shards)}
            oldest: dict[str, float] = {}
            for since, of in (
                (func.coalesce(row.lease_until, row.created_at), select(row.queue).where(free_job(moment))),
                (
                    func.coalesce(ShardRow.lease_until, row.woken_at),
                    select(row.queue).join(ShardRow).where(free_shard(moment)),
                ),
            ):
                for queue, oldest_at in session.execute(of.add_columns(func.min(since)).group_by(row.queue)):
                    oldest[queue] = max(oldest.get(queue, 0.0), (moment - oldest_at).total_seconds())
            pending = select(func.count()).select_from(OutboxRow).where(OutboxRow.due_at <= moment)
            code = row.error["code"].as_string()
            failed = select(code, func.count()).where(row.state == State.FAILED).group_by(code)
            return Census(
                units=units,
                oldest_free_seconds=oldest,
                pending=session.scalar(pending) or 0,
                failed={row[0]: row[1] for row in session.execute(failed)},
                deaths=session.scalar(select(func.sum(row.deaths))) or 0,
            )
