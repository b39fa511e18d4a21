"""What a worker holds: a job, or a shard of one, by a lease and an attempt number.

Every write of a worker names the attempt of its claim and counts only while that is the newest (fencing), so a worker
that was given up on changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import Field, TypeAdapter
from sqlalchemy import select
from sqlalchemy.orm import Session

from d2lora.datasets import Dataset
from d2lora.errors import NotFound
from d2lora.initializations import Frozen, InitializationSpec, State
from d2lora.kept_statistics import KeptStatistics
from d2lora.roles import Role, evaluation_dataset_ids, extra_dataset_ids
from d2lora.shards import ShardTask
from d2lora.tables import DatasetRow, InitializationRow, ShardRow, find

_TASK: TypeAdapter[ShardTask] = TypeAdapter(ShardTask)


class Stage(StrEnum):
    """What a claim of a job means."""

    WHOLE = "whole"
    """From its rows to its files, or to its cut into shards."""
    SHARDS = "shards"
    """The job itself waits for its shards, and nobody holds it."""
    BUILD = "build"
    """From the shards' sums to its files."""


class Standing(StrEnum):
    """What a worker learns when it renews its lease."""

    HELD = "held"
    CANCELLING = "cancelling"
    """Still held, but the job should stop."""
    LOST = "lost"
    """Another attempt, or an end, has taken the unit away: publish nothing, settle nothing."""


class StoredFile(Frozen):
    """A file in the object storage, and the name under which its reader expects it."""

    name: str
    key: str
    sha256: str


class Outcome(Frozen):
    """What a shard leaves behind."""

    files: list[StoredFile] = Field(default=[])
    scores: dict[str, Any] | None = None


class StoredStatistics(KeptStatistics):
    """What a job keeps of its pass, and where."""

    files: list[StoredFile]


class Plan(StoredFile):
    """The object that says how a job was cut into shards."""

    rows: int
    """Of all shards together."""


@dataclass(frozen=True)
class StoredDataset:
    """A dataset and where its bytes are."""

    dataset: Dataset
    key: str


@dataclass(frozen=True)
class DoneShard:
    """Input and output of a finished shard."""

    inputs: list[StoredFile]
    outcome: Outcome


@dataclass(frozen=True)
class Claim:
    """The right to work on a job, as long as the lease is renewed and no later attempt exists."""

    id: str
    tenant: str
    attempt: int
    spec: InitializationSpec
    datasets: tuple[StoredDataset, ...]
    """What the adapter is made from."""
    extras: Mapping[Role, StoredDataset]
    """What else the request names."""
    evaluations: Mapping[int, StoredDataset]
    """What measures on the objectives of one of several datasets, by the place of that one."""
    statistics: StoredStatistics | None = None
    """Of the job that the request is based on, if they are still there."""
    plan: Plan | None = None
    """Set when what is left is the build, from ``shards``."""
    shards: tuple[DoneShard, ...] = ()


@dataclass(frozen=True)
class ShardClaim:
    """The right to work on a shard."""

    id: str
    """Of the job."""
    tenant: str
    made_by: int
    """Attempt of the job that made it."""
    number: int
    attempt: int
    spec: InitializationSpec
    task: ShardTask
    inputs: list[StoredFile]


def stored_dataset(session: Session, tenant: str, dataset_id: str, *, keep: bool = False) -> StoredDataset:
    """Return a dataset; NotFound if this tenant has none of that ID. ``keep`` it until the transaction ends."""
    # Shared with whoever else names the dataset, so that it is not deleted before this transaction ends.
    row = find(session, DatasetRow, dataset_id, with_for_update={"read": True} if keep else None)
    if row is None or row.tenant != tenant or row.deleted_at is not None:
        raise NotFound(f"there is no dataset {dataset_id!r}")
    return StoredDataset(Dataset.model_validate(row.resource), row.key)


def claim_of(session: Session, row: InitializationRow) -> Claim:
    """Return what the worker that holds a job needs."""
    spec = InitializationSpec.model_validate(row.request)
    done: list[DoneShard] = []
    if row.stage == Stage.BUILD:
        parts = select(ShardRow).where(ShardRow.initialization_id == row.id, ShardRow.kind == "statistics")
        done = [
            DoneShard(_files(shard), Outcome.model_validate(shard.outcome))
            for shard in session.scalars(parts.order_by(ShardRow.number))
        ]
    return Claim(
        id=row.id,
        tenant=row.tenant,
        attempt=row.attempt,
        spec=spec,
        datasets=tuple(stored_dataset(session, row.tenant, dataset.dataset_id) for dataset in spec.training.values()),
        extras={
            role: stored_dataset(session, row.tenant, dataset_id)
            for role, dataset_id in extra_dataset_ids(spec).items()
        },
        evaluations={
            index: stored_dataset(session, row.tenant, dataset_id)
            for index, dataset_id in evaluation_dataset_ids(spec).items()
        },
        statistics=_statistics(session, row.tenant, spec.based_on),
        plan=None if row.plan is None else Plan.model_validate(row.plan),
        shards=tuple(done),
    )


def shard_claim_of(row: InitializationRow, shard: ShardRow) -> ShardClaim:
    """Return what the worker that holds a shard needs."""
    return ShardClaim(
        id=row.id,
        tenant=row.tenant,
        made_by=shard.made_by,
        number=shard.number,
        attempt=shard.attempt,
        spec=InitializationSpec.model_validate(row.request),
        task=_TASK.validate_python(shard.task),
        inputs=_files(shard),
    )


def _statistics(session: Session, tenant: str, based_on: str | None) -> StoredStatistics | None:
    row = None if based_on is None else session.get(InitializationRow, based_on)
    if row is None or row.tenant != tenant or row.state != State.SUCCEEDED or row.statistics is None:
        return None
    return StoredStatistics.model_validate(row.statistics)


def _files(shard: ShardRow) -> list[StoredFile]:
    return [StoredFile.model_validate(file) for file in shard.inputs]
