"""A unit's files between its directory and the object storage."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2lora.claims import Claim, Plan, ShardClaim, StoredDataset, StoredFile, StoredStatistics
from d2lora.datasets import DatasetFile
from d2lora.errors import ChecksumMismatch, NotFound, ShardGone
from d2lora.roles import Role
from d2lora.shards import StatisticsTask
from d2lora.storage import ObjectStorage, shards_prefix, statistics_prefix
from worker.units import BASE, KEPT, KEPT_INDEX, ROWS, KeptHead, Split


@dataclass(frozen=True)
class Files:
    """Fetches and stores; every transfer is checked against its sha256."""

    storage: ObjectStorage
    directory: Path

    def dataset(self, stored: StoredDataset) -> DatasetFile:
        """Return a dataset's bytes as a file."""
        path = self._below("inputs") / stored.dataset.id
        self._fetch(stored.key, path, stored.dataset.sha256)
        return DatasetFile(path, stored.dataset.format, stored.dataset.columns)

    def extras(self, claim: Claim) -> dict[Role, DatasetFile]:
        """Return the bytes of the job's further datasets as files."""
        return {role: self.dataset(stored) for role, stored in claim.extras.items()}

    def evaluations(self, claim: Claim) -> dict[int, DatasetFile]:
        """Return the bytes of what measures on the objectives of one of several datasets as files."""
        return {index: self.dataset(stored) for index, stored in claim.evaluations.items()}

    def get(self, file: StoredFile, below: str = "") -> Path:
        """Fetch a file of a job in shards under its name.

        Raises:
            ShardGone: it is not there, as after a restore.
        """
        path = self._below(below) / file.name
        try:
            self._fetch(file.key, path, file.sha256)
        except NotFound as error:
            raise ShardGone(f"a shard's file {file.name} is gone; the job begins anew") from error
        return path

    def based_on(self, statistics: StoredStatistics, check: Callable[[], None]) -> None:
        """Fetch the statistics that a request is based on; ones that are gone or damaged are not there then."""
        try:
            for file in statistics.files:
                check()
                self._fetch(file.key, self._below(BASE) / file.name, file.sha256)
        except (NotFound, ChecksumMismatch):
            shutil.rmtree(self.directory / BASE)

    def kept(self, prefix: str) -> tuple[StoredStatistics, list[tuple[Path, StoredFile]]]:
        """Return what a job keeps beside its result, and what is to be stored for it."""
        directory = self.directory / KEPT
        head = KeptHead.model_validate_json((directory / KEPT_INDEX).read_bytes(), extra="ignore")
        paths = [directory / name for name in head.files]
        files = [(path, _stored(path, statistics_prefix(prefix))) for path in paths]
        size = sum(path.stat().st_size for path in paths)
        return StoredStatistics(r=head.r, rows=head.rows, size=size, files=[file for _, file in files]), files

    def put(self, path: Path, prefix: str, name: str | None = None) -> StoredFile:
        """Store a file below a prefix; ``name`` is the one that its reader expects, if it is another."""
        stored = _stored(path, prefix, name)
        self.storage.put_file(stored.key, path, stored.sha256)
        return stored

    def put_split(
        self, claim: Claim, split: Split, check: Callable[[], None]
    ) -> tuple[Plan, list[tuple[StatisticsTask, StoredFile]]]:
        """Store what a job was cut into; ``check`` is called before every file and may raise."""
        prefix = split_prefix(claim)
        shards = []
        for task, path in split.shards:
            check()
            shards.append((task, self.put(path, prefix, ROWS)))
        plan = self.put(split.plan, prefix)
        return Plan(**plan.model_dump(), rows=sum(task.rows for task, _ in split.shards)), shards

    def put_shard(self, claim: ShardClaim, paths: Sequence[Path], check: Callable[[], None]) -> list[StoredFile]:
        """Store what came out of a shard; ``check`` is called before every file and may raise."""
        stored = []
        for path in paths:
            check()
            stored.append(self.put(path, shard_prefix(claim)))
        return stored

    def put_shared(self, claim: Claim, name: str, path: Path) -> StoredFile:
        """Store what the parts of a build need."""
        return self.put(path, build_prefix(claim), name)

    def _fetch(self, key: str, path: Path, sha256: str) -> None:
        try:
            self.storage.get_file(key, path, sha256)
        except ChecksumMismatch:  # it may have happened on the way: what is stored is looked at once more
            self.storage.get_file(key, path, sha256)

    def _below(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path


def _stored(path: Path, prefix: str, name: str | None = None) -> StoredFile:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return StoredFile(name=name or path.name, key=prefix + path.name, sha256=sha256)


def split_prefix(claim: Claim) -> str:
    """Return what the keys of a cut begin with; no other attempt at the job writes there."""
    return f"{shards_prefix(claim.tenant, claim.id)}split-{claim.attempt}/"


def shard_prefix(claim: ShardClaim) -> str:
    """Return what the keys of a shard's output begin with; no other attempt at it writes there."""
    return f"{shards_prefix(claim.tenant, claim.id)}{claim.made_by}-{claim.number}-{claim.attempt}/"


def build_prefix(claim: Claim) -> str:
    """Return what the keys of a build's shared files begin with; no other attempt at the job writes there."""
    return f"{shards_prefix(claim.tenant, claim.id)}build-{claim.attempt}/"
