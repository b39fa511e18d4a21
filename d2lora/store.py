"""The queue of record as clients see it: datasets, initializations, and what happened.

Every public verb is one transaction. What workers do is in `d2lora.leases`, what the dispatcher does in
`d2lora.outbox`; all three work on the same tables.
"""

import hashlib
import json
import secrets
from datetime import datetime, timedelta
from typing import Any, Self

from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from d2lora.claims import Stage, StoredDataset, stored_dataset
from d2lora.database import now, open_engine, reading, writing
from d2lora.datasets import Dataset
from d2lora.errors import Conflict, IdempotencyMismatch, NotFound
from d2lora.initialization_spec import default_direction
from d2lora.initializations import Frozen, Initialization, InitializationSpec, Phase, Progress, State
from d2lora.kept_statistics import KeptStatistics
from d2lora.leases import Leases
from d2lora.outbox import Outbox
from d2lora.paging import page
from d2lora.roles import evaluation_dataset_ids, extra_dataset_ids
from d2lora.settings import DatabaseSettings
from d2lora.tables import DatasetRow, EventRow, IdempotencyRow, InitializationRow, ShardRow, find
from d2lora.transitions import add_event, lock, move, wake


class Event(Frozen):
    """One thing that happened to an initialization."""

    seq: int
    """Its number, from 1 and growing."""
    at: datetime
    """When it happened."""
    type: str
    """The state that it came to, or ``split`` and ``gathered`` of one in shards."""
    data: dict[str, Any]
    """Such as ``attempt``, and the error of one that failed."""


class Store:
    """The database; close it, or use it as a context manager."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self._engine = open_engine(settings)
        self.leases = Leases(self._engine)
        self.outbox = Outbox(self._engine)

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

    def announce_dataset(
        self, tenant: str, dataset: Dataset, key: str, *, within: timedelta = timedelta(days=1)
    ) -> None:
        """Remember where the bytes of a dataset are about to be stored; nobody sees it before `add_dataset`.

        Without that ``within`` this time it counts as deleted, and whatever has been stored is removed.
        """
        with writing(self._engine) as session:
            row = _dataset_row(tenant, dataset, key)
            row.deleted_at = now(session) + within
            session.add(row)

    def withdraw_dataset(self, dataset_id: str) -> None:
        """Let a dataset that was announced, and that will not be added, count as deleted at once."""
        with writing(self._engine) as session:
            row = find(session, DatasetRow, dataset_id, with_for_update=True)
            if row is not None:
                row.deleted_at = now(session)

    def add_dataset(self, tenant: str, dataset: Dataset, key: str) -> None:
        """Remember a dataset whose bytes are stored under ``key``; from now on it is seen."""
        with writing(self._engine) as session:
            row = find(session, DatasetRow, dataset.id, with_for_update=True)
            if row is None:
                session.add(_dataset_row(tenant, dataset, key))
            else:
                row.deleted_at = None

    def dataset(self, tenant: str, dataset_id: str) -> StoredDataset:
        """Return a dataset; NotFound if this tenant has none of that ID."""
        with reading(self._engine) as session:
            return stored_dataset(session, tenant, dataset_id)

    def datasets(self, tenant: str, *, limit: int, cursor: str | None = None) -> tuple[list[Dataset], str | None]:
        """Return a page of datasets, newest first, and the cursor of the next one."""
        with reading(self._engine) as session:
            query = select(DatasetRow).where(DatasetRow.tenant == tenant, DatasetRow.deleted_at.is_(None))
            rows, following = page(session, query, DatasetRow, limit, cursor)
            return [Dataset.model_validate(row.resource) for row in rows], following

    def delete_dataset(self, tenant: str, dataset_id: str) -> None:
        """Delete a dataset, and with it all statistics that jobs have kept of it; their bytes are removed soon.

        Adapters stay until they expire.

        Raises:
            NotFound: this tenant has none of that ID.
            Conflict: a job that has not ended needs it.
        """
        with writing(self._engine) as session:
            row = find(session, DatasetRow, dataset_id, with_for_update=True, populate_existing=True)
            if row is None or row.tenant != tenant or row.deleted_at is not None:
                raise NotFound(f"there is no dataset {dataset_id!r}")
            job = InitializationRow
            jobs = select(job).where(job.tenant == tenant)
            # These first: one that ends meanwhile is then seen here, or there with what it keeps.
            live = list(session.scalars(jobs.where(job.state.not_in([state for state in State if state.is_terminal]))))
            keeping = jobs.where(job.statistics.is_not(None)).order_by(job.id).with_for_update()
            affected = {one.id: one for one in session.scalars(keeping) if _mentions(one.spec, dataset_id)}
            for one in live:
                if _mentions(one.spec, dataset_id) or one.spec.get("based_on") in affected:
                    raise Conflict(f"dataset {dataset_id} is in use by {one.id}; cancel that one, or wait for its end")
            for one in affected.values():
                one.statistics, one.cleaned = None, False
            row.deleted_at = now(session)

    # What clients do

    def create(
        self, tenant: str, spec: InitializationSpec, *, queue: str = "cpu", idempotency_key: str | None = None
    ) -> tuple[Initialization, bool]:
        """Queue a job for the workers of a class, and return it with whether it is new.

        The same key with the same request returns the first job again.

        Raises:
            IdempotencyMismatch: the key was used for another request.
            NotFound: a dataset is not this tenant's.
        """
        digest = _digest(spec)
        try:
            return self._create(tenant, spec, queue, idempotency_key, digest)
        except IntegrityError:
            if idempotency_key is None:
                raise
            return self._create(
                tenant, spec, queue, idempotency_key, digest
            )  # the key's other user has committed by now

    def _create(
        self, tenant: str, spec: InitializationSpec, queue: str, idempotency_key: str | None, digest: str
    ) -> tuple[Initialization, bool]:
        with writing(self._engine) as session:
            first = _repeated(session, tenant, digest, idempotency_key)
            if first is not None:
                return first, False
            named = [dataset.dataset_id for dataset in spec.training.values()]
            others = [*extra_dataset_ids(spec).values(), *evaluation_dataset_ids(spec).values()]
            for dataset_id in (*named, *others):
                stored_dataset(session, tenant, dataset_id, keep=True)
            moment = now(session)
            row = InitializationRow(
                id=new_id("init", moment),
                tenant=tenant,
                state=State.QUEUED,
                spec=_stored(spec),
                queue=queue,
                stage=Stage.WHOLE,
                attempt=0,
                failures=0,
                deaths=0,
                outages=0,
                cleaned=False,
                created_at=moment,
            )
            session.add(row)
            session.flush()
            add_event(session, row, State.QUEUED, {"attempt": 0})
            wake(session, row)
            if idempotency_key is not None:
                session.add(
                    IdempotencyRow(
                        tenant=tenant, key=idempotency_key, digest=digest, initialization_id=row.id, created_at=moment
                    )
                )
                session.flush()
            return _resource(session, row), True

    def repeated(self, tenant: str, spec: InitializationSpec, idempotency_key: str | None) -> Initialization | None:
        """Return the job that a key was first used for, if it was; what the request names may be gone by now.

        Raises:
            IdempotencyMismatch: the key was used for another request.
        """
        with reading(self._engine) as session:
            return _repeated(session, tenant, _digest(spec), idempotency_key)

    def get(self, tenant: str, initialization_id: str) -> Initialization:
        """Return a job; NotFound if this tenant has none of that ID."""
        with reading(self._engine) as session:
            return _resource(session, _get(session, tenant, initialization_id))

    def page(
        self, tenant: str, *, limit: int, cursor: str | None = None, state: State | None = None
    ) -> tuple[list[Initialization], str | None]:
        """Return a page of jobs, newest first, and the cursor of the next one."""
        with reading(self._engine) as session:
            query = select(InitializationRow).where(InitializationRow.tenant == tenant)
            if state is not None:
                query = query.where(InitializationRow.state == state)
            rows, following = page(session, query, InitializationRow, limit, cursor)
            return [_resource(session, row) for row in rows], following

    def cancel(self, tenant: str, initialization_id: str) -> Initialization:
        """Cancel a queued job, or ask a running one to stop; again is no error.

        Raises:
            Conflict: the job has ended otherwise.
        """
        with writing(self._engine) as session:
            row = lock(session, initialization_id, tenant)
            match State(row.state):
                case State.QUEUED:
                    move(session, row, State.CANCELLED)
                case State.RUNNING:
                    move(session, row, State.CANCELLING)
                    if row.worker is None:  # it is in shards, whose workers notice for themselves
                        move(session, row, State.CANCELLED)
                case State.CANCELLING | State.CANCELLED:
                    pass
                case state:
                    raise Conflict(f"initialization {row.id} has {state}; only one that has not ended can be cancelled")
            return _resource(session, row)

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


_OFF: tuple[tuple[str, object], ...] = (("rounds", 1), ("keep_statistics", False))
"""Options that a stored request leaves out while they are off."""


def _stored(spec: InitializationSpec) -> dict[str, Any]:
    """Return a request with its defaults, but for options that are off: a worker of an earlier version lacks them."""
    off = {name for name, value in _OFF if getattr(spec, name) == value}
    return spec.model_dump(mode="json", exclude_none=True, exclude=off)


def _digest(spec: InitializationSpec) -> str:
    """Return the digest of a request, by which an idempotency key knows it again."""
    # Without defaults, so that fields of a later version leave the digest of an earlier request as it was; but of what
    # kind an object is, is a default of its class.
    request = spec.model_dump(mode="json", exclude_defaults=True)
    if request.get("direction") == default_direction(request):
        del request["direction"]
    named = {"request": request, "kinds": _kinds(spec.model_dump())}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _kinds(value: object) -> object:
    """Return what is left of nested fields when all but those named ``type`` are taken away."""
    if isinstance(value, list):
        return [_kinds(item) for item in value]
    if not isinstance(value, dict):
        return None
    inner = {name: _kinds(item) for name, item in value.items() if isinstance(item, dict | list)}
    return {name: kinds for name, kinds in inner.items() if kinds} | {"type": value.get("type")}


def _dataset_row(tenant: str, dataset: Dataset, key: str) -> DatasetRow:
    resource = dataset.model_dump(mode="json")
    return DatasetRow(id=dataset.id, tenant=tenant, created_at=dataset.created_at, resource=resource, key=key)


def new_id(kind: str, moment: datetime) -> str:
    """Return an ID that nobody can guess and that sorts by time."""
    return f"{kind}_{int(moment.timestamp() * 1000):012x}{secrets.token_hex(10)}"


def _repeated(session: Session, tenant: str, digest: str, idempotency_key: str | None) -> Initialization | None:
    if idempotency_key is None:
        return None
    used = session.scalar(
        select(IdempotencyRow).where(IdempotencyRow.tenant == tenant, IdempotencyRow.key == idempotency_key)
    )
    if used is None:
        return None
    if used.digest != digest:
        raise IdempotencyMismatch("Idempotency-Key: it was used with another request; make a new one")
    return _resource(session, _get(session, tenant, used.initialization_id))


def _resource(session: Session, row: InitializationRow) -> Initialization:
    names = Initialization.model_fields.keys() - {"object", "progress", "statistics"}
    progress = _gathered(session, row) if row.stage == Stage.SHARDS else row.progress
    # A newer version may know of fields that this one does not; during an upgrade both serve.
    return Initialization.model_validate(
        {"progress": progress, "statistics": _without_places(row)}
        | {name: getattr(row, name) for name in names}
        | {"spec": row.request},
        extra="ignore",
    )


def _without_places(row: InitializationRow) -> dict[str, Any] | None:
    """Return what clients see of kept statistics."""
    return row.statistics and {name: row.statistics[name] for name in KeptStatistics.model_fields}


def _mentions(value: object, dataset_id: str) -> bool:
    """Whether a request names a dataset, in whichever field, also one that a later version has added."""
    if isinstance(value, dict):
        return any(_mentions(inner, dataset_id) for name, inner in value.items() if name != "metadata")
    if isinstance(value, list):
        return any(_mentions(inner, dataset_id) for inner in value)
    return value == dataset_id


def _gathered(session: Session, row: InitializationRow) -> dict[str, Any] | None:
    """Return how far the shards of a running job are together."""
    if row.state != State.RUNNING or row.plan is None:
        return None
    done = select(func.sum(ShardRow.rows_done)).where(ShardRow.initialization_id == row.id)
    progress = Progress(phase=Phase.STATISTICS, done=session.scalar(done) or 0, total=row.plan["rows"])
    return progress.model_dump(mode="json")


def _get(session: Session, tenant: str, initialization_id: str) -> InitializationRow:
    row = find(session, InitializationRow, initialization_id)
    if row is None or row.tenant != tenant:
        raise NotFound(f"there is no initialization {initialization_id!r}")
    return row
