"""A unit's files between its directory and the object storage."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from d2lora.claims import Claim, Plan, ShardClaim, StoredDataset, StoredFile
from d2lora.datasets import DatasetFile
from d2lora.shards import StatisticsTask
from d2lora.storage import ObjectStorage, shards_prefix
from worker.units import Split


@dataclass(frozen=True)
class Files:
    """Fetches and stores; every transfer is checked against its sha256."""

    storage: ObjectStorage
    directory: Path

    @overload
    def dataset(self, stored: StoredDataset) -> DatasetFile: ...
    @overload
    def dataset(self, stored: None) -> None: ...
    def dataset(self, stored: StoredDataset | None) -> DatasetFile | None:
        """Return a dataset's bytes as a file."""
        if stored is None:
            return None
        path = self._below("inputs") / stored.dataset.id
        self.storage.get_file(stored.key, path, stored.dataset.sha256)
        return DatasetFile(path, stored.dataset.format, stored.dataset.columns)

    def get(self, file: StoredFile, below: str = "") -> Path:
        """Fetch a file under its name."""
        path = self._below(below) / file.name
        self.storage.get_file(file.key, path, file.sha256)
        return path

    def put(self, path: Path, prefix: str, name: str | None = None) -> StoredFile:
        """Store a file below a prefix."""
        name = name or path.name
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        self.storage.put_file(prefix + path.name, path, sha256)
        return StoredFile(name=name, key=prefix + path.name, sha256=sha256)

    def put_split(self, claim: Claim, split: Split) -> tuple[Plan, list[tuple[StatisticsTask, StoredFile]]]:
        """Store what a job was cut into; its attempt's prefix keeps it apart from an earlier attempt's."""
        prefix = f"{shards_prefix(claim.tenant, claim.id)}split-{claim.attempt}/"
        shards = [(task, self.put(path, prefix, "rows.safetensors")) for task, path in split.shards]
        plan = self.put(split.plan, prefix)
        return Plan(**plan.model_dump(), rows=sum(task.rows for task, _ in split.shards)), shards

    def put_shard(self, claim: ShardClaim, paths: Sequence[Path]) -> list[StoredFile]:
        """Store what came out of a shard, apart from what another attempt at it may be writing."""
        prefix = f"{shards_prefix(claim.tenant, claim.id)}{claim.number}-{claim.attempt}/"
        return [self.put(path, prefix) for path in paths]

    def put_shared(self, claim: Claim, name: str, path: Path) -> StoredFile:
        """Store what the parts of a build need."""
        prefix = f"{shards_prefix(claim.tenant, claim.id)}build-{claim.attempt}/"
        return self.put(path, prefix, name)

    def _below(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path
