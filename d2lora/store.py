"""The queue of record: datasets, initializations, who works on them, and what happened.

Every public verb is one transaction. A worker holds a job by a lease and an attempt number; each of its writes names
that attempt and counts only while it is the newest (fencing), so a worker that was given up on changes nothing.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Self

from sqlalchemy import and_, func, or_, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from d2lora.database import now, open_engine, reading, writing
from d2lora.datasets import Dataset
from d2lora.errors import Conflict, IdempotencyMismatch, NotFound, Problem, WorkerLost
from d2lora.initializations import Frozen, Initialization, InitializationSpec, Progress, Result, State
from d2lora.paging import page
from d2lora.settings import DatabaseSettings
from d2lora.tables import DatasetRow, EventRow, IdempotencyRow, InitializationRow


@dataclass(frozen=True)
class StoredDataset:
    """A dataset and where its bytes are."""

    dataset: Dataset
    key: str


@dataclass(frozen=True)
class Claim:
    """The right to work on a job, as long as the lease is renewed and no later attempt exists."""

    id: str
    tenant: str
    attempt: int
    spec: InitializationSpec
    dataset: StoredDataset
    eval_dataset: StoredDataset | None


class Standing(StrEnum):
    """What a worker learns when it renews its lease."""

    HELD = "held"
    CANCELLING = "cancelling"
    """Still held, but the job should stop."""
    LOST = "lost"
    """Another attempt, or an end, has taken the job away: publish nothing, settle nothing."""


class Event(Frozen):
    """One thing that happened to an initialization."""

    seq: int
    at: datetime
    type: str
    data: dict[str, Any]


class Store:
    """The database; close it, or use it as a context manager."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self._engine = open_engine(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def ping(self) -> None:
        """Return if the database answers and its schema is there."""
        with reading(self._engine) as session:
            session.execute(text("SELECT 1 FROM initializations LIMIT 1"))

    # Datasets

    def add_dataset(self, tenant: str, dataset: Dataset, key: str) -> None:
        """Remember a dataset whose bytes are stored under ``key``."""
        with writing(self._engine) as session:
            resource = dataset.model_dump(mode="json")
            session.add(
                DatasetRow(id=dataset.id, tenant=tenant, created_at=dataset.created_at, resource=resource, key=key)
            )

    def dataset(self, tenant: str, dataset_id: str) -> StoredDataset:
        """Return a dataset; NotFound if this tenant has none of that ID."""
        with reading(self._engine) as session:
            return _dataset(session, tenant, dataset_id)

    def datasets(self, tenant: str, *, limit: int, cursor: str | None = None) -> tuple[list[Dataset], str | None]:
        """Return a page of datasets, newest first, and the cursor of the next one."""
        with reading(self._engine) as session:
            query = select(DatasetRow).where(DatasetRow.tenant == tenant)
            rows, following = page(session, query, DatasetRow, limit, cursor)
            return [Dataset.model_validate(row.resource) for row in rows], following

    # What clients do

    def create(
        self, tenant: str, spec: InitializationSpec, *, idempotency_key: str | None = None
    ) -> tuple[Initialization, bool]:
        """Queue a job, and return it with whether it is new.

        The same key with the same request returns the first job again.

        Raises:
            IdempotencyMismatch: the key was used for another request.
            NotFound: a dataset is not this tenant's.
        """
        digest = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
        try:
            return self._create(tenant, spec, idempotency_key, digest)
        except IntegrityError:
            if idempotency_key is None:
                raise
            return self._create(tenant, spec, idempotency_key, digest)  # the key's other user has committed by now

    def _create(
        self, tenant: str, spec: InitializationSpec, idempotency_key: str | None, digest: str
    ) -> tuple[Initialization, bool]:
        with writing(self._engine) as session:
            if idempotency_key is not None:
                used = session.scalar(
                    select(IdempotencyRow).where(IdempotencyRow.tenant == tenant, IdempotencyRow.key == idempotency_key)
                )
                if used is not None:
                    if used.digest != digest:
                        raise IdempotencyMismatch("Idempotency-Key: it was used with another request; make a new one")
                    return _resource(_get(session, tenant, used.initialization_id)), False
            for dataset_id in filter(None, (spec.dataset_id, spec.eval_dataset_id)):
                _dataset(session, tenant, dataset_id)
            moment = now(session)
            row = InitializationRow(
                id=new_id("init", moment),
                tenant=tenant,
                state=State.QUEUED,
                spec=spec.model_dump(mode="json"),
                attempt=0,
                failures=0,
                created_at=moment,
            )
            session.add(row)
            session.flush()
            _add_event(session, row, moment)
            if idempotency_key is not None:
                session.add(
                    IdempotencyRow(
                        tenant=tenant, key=idempotency_key, digest=digest, initialization_id=row.id, created_at=moment
                    )
                )
                session.flush()
            return _resource(row), True

    def get(self, tenant: str, initialization_id: str) -> Initialization:
        """Return a job; NotFound if this tenant has none of that ID."""
        with reading(self._engine) as session:
            return _resource(_get(session, tenant, initialization_id))

    def page(
        self, tenant: str, *, limit: int, cursor: str | None = None, state: State | None = None
    ) -> tuple[list[Initialization], str | None]:
        """Return a page of jobs, newest first, and the cursor of the next one."""
        with reading(self._engine) as session:
            query = select(InitializationRow).where(InitializationRow.tenant == tenant)
            if state is not None:
                query = query.where(InitializationRow.state == state)
            rows, following = page(session, query, InitializationRow, limit, cursor)
            return [_resource(row) for row in rows], following

    def cancel(self, tenant: str, initialization_id: str) -> Initialization:
        """Cancel a queued job, or ask a running one to stop; again is no error.

        Raises:
            Conflict: the job has ended otherwise.
        """
        with writing(self._engine) as session:
            row = _get(session, tenant, initialization_id, lock=True)
            match State(row.state):
                case State.QUEUED:
                    _move(session, row, State.CANCELLED)
                case State.RUNNING:
                    _move(session, row, State.CANCELLING)
                case State.CANCELLING | State.CANCELLED:
                    pass
                case state:
                    raise Conflict(f"initialization {row.id} has {state}; only one that has not ended can be cancelled")
            return _resource(row)

    def events(self, tenant: str, initialization_id: str, *, after: int = 0) -> list[Event]:
        """Return what happened to a job after the event of that number."""
        with reading(self._engine) as session:
            _get(session, tenant, initialization_id)
            rows = session.scalars(
                select(EventRow)
                .where(EventRow.initialization_id == initialization_id, EventRow.seq > after)
                .order_by(EventRow.seq)
            )
            return [Event(seq=row.seq, at=row.at, type=row.type, data=row.data) for row in rows]

    def files_prefix(self, tenant: str, initialization_id: str) -> str:
        """Return what the keys of a succeeded job's files begin with.

        Raises:
            Conflict: it has not succeeded.
        """
        with reading(self._engine) as session:
            row = _get(session, tenant, initialization_id)
            if row.state != State.SUCCEEDED or row.prefix is None:
                raise Conflict(f"initialization {row.id} is {row.state}; files exist once it has succeeded")
            return row.prefix

    # What workers do

    def claim(
        self, worker: str, *, lease: timedelta, max_attempts: int, initialization_id: str | None = None
    ) -> Claim | None:
        """Take the oldest job that is free, or None; on the way, end jobs that nobody will finish.

        Free are queued jobs and running ones whose lease is over. A lease that ends without a word is a failure;
        ``max_attempts`` of them fail the job as ``worker_lost``.
        """
        while True:
            with writing(self._engine) as session:
                moment = now(session)
                row = session.scalar(_claimable(moment, initialization_id))
                if row is None:
                    return None
                match State(row.state):
                    case State.CANCELLING:
                        _move(session, row, State.CANCELLED)
                    case State.RUNNING if row.failures + 1 >= max_attempts:
                        row.failures += 1
                        error = WorkerLost(f"the worker died {row.failures} times on this job; it was given up")
                        row.error = error.problem().model_dump(mode="json")
                        _move(session, row, State.FAILED)
                    case state:
                        row.failures += state is State.RUNNING
                        row.attempt += 1
                        row.worker, row.lease_until, row.progress = worker, moment + lease, None
                        _move(session, row, State.RUNNING)
                        return _claim(session, row)

    def renew(self, claim: Claim, *, lease: timedelta, progress: Progress | None) -> Standing:
        """Extend a claim's lease, store how far the job is, and return what the worker should do."""
        with writing(self._engine) as session:
            row = _held(session, claim)
            if row is None:
                return Standing.LOST
            row.lease_until = now(session) + lease
            if progress is not None:
                row.progress = progress.model_dump(mode="json")
            return Standing.CANCELLING if row.state == State.CANCELLING else Standing.HELD

    def succeed(self, claim: Claim, result: Result, prefix: str) -> bool:
        """Settle a job with its result; False if the claim is lost, or the job was to be cancelled and now is."""
        with writing(self._engine) as session:
            row = _held(session, claim)
            if row is None:
                return False
            if row.state == State.CANCELLING:
                _move(session, row, State.CANCELLED)
                return False
            row.result, row.prefix = result.model_dump(mode="json"), prefix
            _move(session, row, State.SUCCEEDED)
            return True

    def fail(self, claim: Claim, problem: Problem) -> bool:
        """Settle a job with an error; False if the claim is lost."""
        with writing(self._engine) as session:
            row = _held(session, claim)
            if row is None:
                return False
            if row.state == State.CANCELLING:
                _move(session, row, State.CANCELLED)
                return True
            row.error = problem.model_dump(mode="json")
            _move(session, row, State.FAILED)
            return True

    def cancelled(self, claim: Claim) -> bool:
        """Settle a job that was asked to stop and has; False if the claim is lost."""
        with writing(self._engine) as session:
            row = _held(session, claim)
            if row is None or row.state != State.CANCELLING:
                return False
            _move(session, row, State.CANCELLED)
            return True

    def hand_back(self, claim: Claim) -> bool:
        """Queue a job again that its worker stops working on for a reason of its own; this is no failure of the job."""
        with writing(self._engine) as session:
            row = _held(session, claim)
            if row is None:
                return False
            _move(session, row, State.CANCELLED if row.state == State.CANCELLING else State.QUEUED)
            return True

    def retry(self, claim: Claim, problem: Problem, *, max_attempts: int, pause: timedelta) -> bool:
        """Queue a job again, free after ``pause``, or fail it with ``problem`` when its attempts are used up."""
        with writing(self._engine) as session:
            row = _held(session, claim)
            if row is None:
                return False
            row.failures += 1
            if row.state == State.CANCELLING:
                _move(session, row, State.CANCELLED)
            elif row.failures >= max_attempts:
                row.error = problem.model_dump(mode="json")
                _move(session, row, State.FAILED)
            else:
                _move(session, row, State.QUEUED)
                row.lease_until = now(session) + pause
            return True


def new_id(kind: str, moment: datetime) -> str:
    """Return an ID that nobody can guess and that sorts by time."""
    return f"{kind}_{int(moment.timestamp() * 1000):012x}{secrets.token_hex(10)}"


def _move(session: Session, row: InitializationRow, state: State) -> None:
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
    _add_event(session, row, moment)


def _add_event(session: Session, row: InitializationRow, moment: datetime) -> None:
    last = session.scalar(select(func.max(EventRow.seq)).where(EventRow.initialization_id == row.id)) or 0
    data: dict[str, Any] = {"attempt": row.attempt}
    if row.error is not None:
        data["error"] = row.error
    session.add(EventRow(initialization_id=row.id, seq=last + 1, at=moment, type=row.state, data=data))
    session.flush()


def _claimable(moment: datetime, initialization_id: str | None) -> Any:
    row = InitializationRow
    free = or_(
        and_(row.state == State.QUEUED, or_(row.lease_until.is_(None), row.lease_until <= moment)),
        and_(row.state.in_([State.RUNNING, State.CANCELLING]), row.lease_until <= moment),
    )
    query = select(row).where(free)
    if initialization_id is not None:
        query = query.where(row.id == initialization_id)
    # Another claimer's row is skipped, not waited for; SQLite has one writer and needs neither.
    return query.order_by(row.created_at, row.id).limit(1).with_for_update(skip_locked=True)


def _held(session: Session, claim: Claim) -> InitializationRow | None:
    """Return the claimed job, locked, unless a later attempt or an end has taken it."""
    row = session.get(InitializationRow, claim.id, with_for_update=True)
    live = row is not None and row.state in {State.RUNNING, State.CANCELLING} and row.attempt == claim.attempt
    return row if live else None


def _claim(session: Session, row: InitializationRow) -> Claim:
    spec = InitializationSpec.model_validate(row.spec)
    evaluation = spec.eval_dataset_id and _dataset(session, row.tenant, spec.eval_dataset_id)
    return Claim(
        row.id, row.tenant, row.attempt, spec, _dataset(session, row.tenant, spec.dataset_id), evaluation or None
    )


def _get(session: Session, tenant: str, initialization_id: str, *, lock: bool = False) -> InitializationRow:
    row = session.get(InitializationRow, initialization_id, with_for_update=lock)
    if row is None or row.tenant != tenant:
        raise NotFound(f"there is no initialization {initialization_id!r}")
    return row


def _dataset(session: Session, tenant: str, dataset_id: str) -> StoredDataset:
    row = session.get(DatasetRow, dataset_id)
    if row is None or row.tenant != tenant:
        raise NotFound(f"there is no dataset {dataset_id!r}")
    return StoredDataset(Dataset.model_validate(row.resource), row.key)


def _resource(row: InitializationRow) -> Initialization:
    names = Initialization.model_fields.keys() - {"object"}
    return Initialization.model_validate({name: getattr(row, name) for name in names})
