"""Uploading an adapter's files: everything else first, the manifest last."""

from collections.abc import Sequence
from pathlib import Path

from d2lora.claims import StoredFile
from d2lora.errors import ChecksumMismatch, Conflict
from d2lora.initializations import Result
from d2lora.storage import ObjectStorage

MANIFEST = "manifest.json"
"""Its existence says that all files it lists are complete."""


def publish(
    result: Result,
    directory: Path,
    storage: ObjectStorage,
    prefix: str,
    beside: Sequence[tuple[Path, StoredFile]] = (),
) -> None:
    """Store the result's files below ``prefix``; when anything fails, nothing stays there.

    ``beside`` are files with keys of their own below the prefix, which are no part of the result.

    A manifest that is there already is our own, if an answer was lost and the storage's client sent it again; or it is
    of another history, if the database was restored from a backup that did not know of it, and gives way.

    Raises:
        Conflict: another manifest comes again and again.
        StorageFull, StorageUnavailable, ChecksumMismatch: from the storage.
    """
    for _ in range(2):
        try:
            for path, file in beside:
                storage.put_file(file.key, path, file.sha256)
            if _store(result, directory, storage, prefix):
                return
        except BaseException:
            storage.delete_prefix(prefix)
            raise
        storage.delete_prefix(prefix)
    raise Conflict(f"{prefix} held another manifest, twice")


def _store(result: Result, directory: Path, storage: ObjectStorage, prefix: str) -> bool:
    """Store the files, the manifest last; False if another manifest is there."""
    manifest = next(file for file in result.files if file.name == MANIFEST)
    for file in result.files:
        if file is not manifest:
            storage.put_file(prefix + file.name, directory / file.name, file.sha256)
    if storage.put_file(prefix + MANIFEST, directory / MANIFEST, manifest.sha256, only_if_absent=True):
        return True
    try:
        storage.get_file(prefix + MANIFEST, directory / "stored-manifest", manifest.sha256)
    except ChecksumMismatch:
        return False
    return True
