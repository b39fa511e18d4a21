"""Uploading an adapter's files: everything else first, the manifest last."""

from pathlib import Path

from d2lora.errors import Conflict
from d2lora.initializations import Result
from d2lora.storage import ObjectStorage

MANIFEST = "manifest.json"
"""Its existence says that all files it lists are complete."""


def publish(result: Result, directory: Path, storage: ObjectStorage, prefix: str) -> None:
    """Store the result's files below ``prefix``; when anything fails, nothing stays there.

    Raises:
        Conflict: a manifest is there already, which this attempt did not write.
        StorageFull, StorageUnavailable, ChecksumMismatch: from the storage.
    """
    manifest = next(file for file in result.files if file.name == MANIFEST)
    try:
        for file in result.files:
            if file is not manifest:
                storage.put_file(prefix + file.name, directory / file.name, file.sha256)
        path = directory / MANIFEST
        published = storage.put_file(prefix + MANIFEST, path, manifest.sha256, only_if_absent=True)
    except BaseException:
        storage.delete_prefix(prefix)
        raise
    if not published:
        raise Conflict(f"{prefix} holds a manifest already")
