"""What workers do with the queue of record: claim a job or a shard, keep it, and settle it.

Every public verb is one transaction. Verbs on a claim say whether it still counted.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Engine, Select, delete, func, select
from sqlalchemy.orm import Session

from d2lora.claims import (
    Claim,
    Outcome,
    Plan,
    ShardClaim,
    Stage,
    Standing,
    StoredFile,
    StoredStatistics,
    claim_of,
    shard_claim_of,
)
from d2lora.database import now, reading, writing
from d2lora.errors import Problem, WorkerLost
from d2lora.fencing import held, held_shard, is_held, is_of, is_shard_held, job_held_by, shard_of
from d2lora.initializations import Progress, Result, State
from d2lora.shards import EvaluationTask, ShardTask, StatisticsTask
from d2lora.tables import InitializationRow, ShardRow
from d2lora.transitions import add_event, free_job, free_shard, lock, move, wake

_LONGEST_PAUSE = timedelta(minutes=5)


class Leases:
    """The verbs of workers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # Claiming

    def claim(
        self,
        worker: str,
        *,
        lease: timedelta,
        max_attempts: int,
        queues: Sequence[str] = (),
        initialization_id: str | None = None,
    ) -> Claim | ShardClaim | None:
        """Take a free shard, else the oldest free job, of these queues (any if empty); None if there is none.

        On the way, jobs end that nobody will finish. A lease that ends without a word is a failure; ``max_attempts``
        of them, of one job or one shard, fail the job as ``worker_lost``.
        """
        return self.claim_shard(
            worker, lease=lease, max_attempts=max_attempts, queues=queues, initialization_id=initialization_id
        ) or self._claim_job(worker, lease, max_attempts, queues, initialization_id)

    def claim_shard(
        self,
        worker: str,
        *,
        lease: timedelta,
        max_attempts: int,
        queues: Sequence[str] = (),
        initialization_id: str | None = None,
    ) -> ShardClaim | None:
        """Take a free shard, of the oldest job that has one; see `claim`."""
        while True:
            with writing(self._engine) as session:
                candidates = select(InitializationRow.id).join(ShardRow).where(free_shard(now(session)))
                candidates = _among(candidates, queues, initialization_id)
                job_id = session.scalar(
                    candidates.order_by(InitializationRow.created_at, InitializationRow.id).limit(1)
                )
                if job_id is None:
                    return None
                job = lock(session, job_id)
                moment = now(session)
                free = select(ShardRow).join(InitializationRow).where(ShardRow.initialization_id == job_id)
                shard = session.scalar(
                    free.where(free_shard(moment)).order_by(ShardRow.number).limit(1).with_for_update(of=ShardRow)
                )
                if shard is None:
                    continue  # others took them while this one waited for the lock
                shard.failures += shard.worker is not None
                job.deaths += shard.worker is not None
                if shard.failures >= max_attempts:
                    _give_up(session, job, shard.failures)
                    continue
                try:
                    claim = shard_claim_of(job, shard)
                except ValidationError:  # a newer version's, which is for a newer worker
                    shard.worker, shard.lease_until = None, moment + lease / 3
                    continue
                shard.attempt += 1
                shard.worker, shard.lease_until, shard.rows_done = worker, moment + lease, 0
                return replace(claim, attempt=shard.attempt)

    def _claim_job(
        self,
        worker: str,
        lease: timedelta,
        max_attempts: int,
        queues: Sequence[str],
        initialization_id: str | None,
    ) -> Claim | None:
        while True:
            with writing(self._engine) as session:
                moment = now(session)
                query = _among(select(InitializationRow).where(free_job(moment)), queues, initialization_id)
                query = query.order_by(InitializationRow.created_at, InitializationRow.id).limit(1)
                # Whoever may take any job skips one that somebody else is just taking; whoever was told of this one
                # waits, since nobody will tell again. SQLite has one writer and needs neither.
                row = session.scalar(query.with_for_update(skip_locked=initialization_id is None))
                if row is None:
                    return None
                if row.state == State.CANCELLING:
                    move(session, row, State.CANCELLED)
                    continue
                row.failures += row.worker is not None
                row.deaths += row.worker is not None
                if row.failures >= max_attempts:
                    _give_up(session, row, row.failures)
                    continue
                try:
                    claim = claim_of(session, row)
                except ValidationError:  # a newer version's, which is for a newer worker
                    row.worker, row.lease_until = None, now(session) + lease / 3
                    continue
                row.attempt += 1
                # Not the moment above: the wait for the row must not shorten the lease.
                row.worker, row.lease_until, row.progress = worker, now(session) + lease, None
                move(session, row, State.RUNNING)
                return replace(claim, attempt=row.attempt)

    # Keeping

    def renew(self, claim: Claim | ShardClaim, *, lease: timedelta, progress: Progress | None = None) -> Standing:
        """Extend a claim's lease, store how far it is, and return what the worker should do."""
        with writing(self._engine) as session:
            if isinstance(claim, ShardClaim):
                shard = held_shard(session, claim)
                if shard is None:
                    return Standing.LOST
                shard.lease_until = now(session) + lease
                shard.rows_done = shard.rows_done if progress is None else progress.done
                return Standing.HELD
            row = held(session, claim)
            if row is None:
                return Standing.LOST
            row.lease_until = now(session) + lease
            if progress is not None:
                row.progress = progress.model_dump(mode="json")
            return Standing.CANCELLING if row.state == State.CANCELLING else Standing.HELD

    def standing(self, claim: Claim | ShardClaim) -> Standing:
        """Return what the worker should do, without renewing anything."""
        with reading(self._engine) as session:
            job = session.get(InitializationRow, claim.id)
            if isinstance(claim, ShardClaim):
                shard = session.get(ShardRow, (claim.id, claim.number))
                return Standing.HELD if is_shard_held(job, shard, claim) else Standing.LOST
            if not is_held(job, claim):
                return Standing.LOST
            assert job is not None
            return Standing.CANCELLING if job.state == State.CANCELLING else Standing.HELD

    # Settling

    def succeed(self, claim: Claim, result: Result, prefix: str, statistics: StoredStatistics | None = None) -> bool:
        """Settle a job with its result and the statistics that it keeps.

        False if the claim is lost, or the job was to be cancelled and now is.

        Saying it again is no error: a commit that broke off may have happened or not.
        """
        with writing(self._engine) as session:
            row = held(session, claim)
            if row is None:
                again = session.get_one(InitializationRow, claim.id)
                return again.state == State.SUCCEEDED and again.prefix == prefix
            if row.state == State.CANCELLING:
                move(session, row, State.CANCELLED)
                return False
            row.result, row.prefix = result.model_dump(mode="json"), prefix
            row.statistics = None if statistics is None else statistics.model_dump(mode="json")
            move(session, row, State.SUCCEEDED)
            return True

    def fail(self, claim: Claim | ShardClaim, problem: Problem) -> bool:
        """Settle a job with an error, its own or a shard's; False if the claim is lost."""
        with writing(self._engine) as session:
            row = job_held_by(session, claim)
            if row is None:
                return False
            if row.state == State.CANCELLING:
                move(session, row, State.CANCELLED)
                return True
            row.error = problem.model_dump(mode="json")
            move(session, row, State.FAILED)
            return True

    def cancelled(self, claim: Claim) -> bool:
        """Settle a job that was asked to stop and has; False if the claim is lost."""
        with writing(self._engine) as session:
            row = held(session, claim)
            if row is None or row.state != State.CANCELLING:
                return False
            move(session, row, State.CANCELLED)
            return True

    def hand_back(self, claim: Claim | ShardClaim, *, pause: timedelta = timedelta(0)) -> bool:
        """Free what a worker stops working on for a reason of its own; this is no failure."""
        with writing(self._engine) as session:
            row = job_held_by(session, claim)
            if row is not None:
                _free(session, row, claim, pause)
            return row is not None

    def retry(self, claim: Claim | ShardClaim, problem: Problem, *, max_attempts: int, pause: timedelta) -> bool:
        """Free a job or a shard after an outage, or fail with ``problem`` when it has met ``max_attempts`` of them.

        An outage is not the job's fault, so it does not count as a dead worker; the pause doubles with every one, up to
        five minutes.
        """
        with writing(self._engine) as session:
            row = job_held_by(session, claim)
            if row is None:
                return False
            unit = shard_of(session, claim) if isinstance(claim, ShardClaim) else row
            unit.outages += 1
            if unit.outages >= max_attempts and row.state != State.CANCELLING:
                row.error = problem.model_dump(mode="json")
                move(session, row, State.FAILED)
            else:
                _free(session, row, claim, min(pause * 2 ** min(unit.outages - 1, 16), _LONGEST_PAUSE))
            return True

    # Shards

    def split(self, claim: Claim, plan: Plan, shards: Sequence[tuple[StatisticsTask, StoredFile]]) -> bool:
        """Cut a job into shards, which any worker may take from now on; False if the claim is lost.

        Saying it again is no error, as with `succeed`.
        """
        with writing(self._engine) as session:
            row = held(session, claim)
            if row is None:
                return session.get_one(InitializationRow, claim.id).plan == plan.model_dump(mode="json")
            if row.state == State.CANCELLING:
                move(session, row, State.CANCELLED)
                return False
            row.stage, row.plan = Stage.SHARDS, plan.model_dump(mode="json")
            row.worker = row.lease_until = row.progress = None
            _add_shards(session, row, [(task, [file]) for task, file in shards])
            add_event(session, row, "split", {"attempt": row.attempt, "shards": len(shards)})
            wake(session, row, count=len(shards))
            return True

    def finish_shard(self, claim: ShardClaim, outcome: Outcome) -> bool:
        """Settle a shard; the last one makes its job free for the build. False if the claim is lost.

        Saying it again is no error, as with `succeed`.
        """
        with writing(self._engine) as session:
            row = job_held_by(session, claim)
            if row is None:
                again = session.get(ShardRow, (claim.id, claim.number))
                return again is not None and is_of(again, claim) and again.outcome is not None
            shard = shard_of(session, claim)
            shard.outcome = outcome.model_dump(mode="json")
            shard.worker = shard.lease_until = None
            if isinstance(claim.task, StatisticsTask):
                shard.rows_done = claim.task.rows
                session.flush()
                left = select(func.count()).select_from(ShardRow)
                left = left.where(ShardRow.initialization_id == row.id, ShardRow.kind == claim.task.type)
                if session.scalar(left.where(ShardRow.outcome.is_(None))) == 0:
                    row.stage, row.lease_until = Stage.BUILD, now(session)
                    add_event(session, row, "gathered", {"attempt": row.attempt})
                    wake(session, row)
            return True

    def share(self, claim: Claim, tasks: Sequence[tuple[EvaluationTask, list[StoredFile]]]) -> list[int] | None:
        """Let any worker take parts of a build; returns their numbers, or None if the claim is lost."""
        with writing(self._engine) as session:
            row = held(session, claim)
            if row is None:
                return None
            numbers = _add_shards(session, row, tasks)
            wake(session, row, count=len(tasks) - 1)  # the builder itself takes one without being told
            return numbers

    def outcomes(self, claim: Claim, numbers: Sequence[int]) -> list[Outcome | None]:
        """Return what the shards of these numbers left behind; None where one is not done."""
        with reading(self._engine) as session:
            rows = session.scalars(
                select(ShardRow).where(ShardRow.initialization_id == claim.id, ShardRow.number.in_(numbers))
            )
            by_number = {row.number: Outcome.model_validate(row.outcome) for row in rows if row.outcome is not None}
            return [by_number.get(number) for number in numbers]

    def restart(self, claim: Claim | ShardClaim) -> bool:
        """Let a job begin anew from its rows, because its shards are of no use to this version."""
        with writing(self._engine) as session:
            row = job_held_by(session, claim)
            if row is None:
                return False
            if row.state == State.CANCELLING:
                move(session, row, State.CANCELLED)
                return True
            session.execute(delete(ShardRow).where(ShardRow.initialization_id == row.id))
            row.stage, row.plan = Stage.WHOLE, None
            move(session, row, State.QUEUED)
            wake(session, row)
            return True


def _among(query: Select[Any], queues: Sequence[str], initialization_id: str | None) -> Select[Any]:
    """Narrow a query over jobs to some queues, or to one job."""
    if queues:
        query = query.where(InitializationRow.queue.in_(queues))
    return query if initialization_id is None else query.where(InitializationRow.id == initialization_id)


def _give_up(session: Session, row: InitializationRow, failures: int) -> None:
    error = WorkerLost(f"the worker died {failures} times on this job; it was given up")
    row.error = error.problem().model_dump(mode="json")
    move(session, row, State.FAILED)


def _free(session: Session, row: InitializationRow, claim: Claim | ShardClaim, pause: timedelta) -> None:
    """Give a job or a shard up, to be taken again after ``pause``; a job that should stop ends instead."""
    free_at = now(session) + pause
    if isinstance(claim, ShardClaim):
        shard = shard_of(session, claim)
        shard.worker, shard.rows_done, shard.lease_until = None, 0, free_at
    elif row.state == State.CANCELLING:
        move(session, row, State.CANCELLED)
        return
    else:
        move(session, row, State.QUEUED)
        row.lease_until = free_at
    wake(session, row, due_at=free_at)


def _add_shards(
    session: Session, row: InitializationRow, tasks: Sequence[tuple[ShardTask, list[StoredFile]]]
) -> list[int]:
    last = session.scalar(select(func.max(ShardRow.number)).where(ShardRow.initialization_id == row.id))
    first = 0 if last is None else last + 1
    for number, (task, files) in enumerate(tasks, start=first):
        session.add(
            ShardRow(
                initialization_id=row.id,
                number=number,
                kind=task.type,
                made_by=row.attempt,
                task=task.model_dump(mode="json"),
                inputs=[file.model_dump(mode="json") for file in files],
                rows_done=0,
                attempt=0,
                failures=0,
                outages=0,
            )
        )
    return list(range(first, first + len(tasks)))
