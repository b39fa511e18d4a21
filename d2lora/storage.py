"""Where bytes live: datasets as they were sent, and the files of finished adapters.

Keys are made by the server, never by a client: ``t/{tenant}/datasets/{id}`` and
``t/{tenant}/initializations/{id}/{attempt}/{file}``, and ``.../{id}/shards/...`` while shards are worked on. An attempt
has a prefix of its own, so a worker that was given up on can never overwrite its successor's files.
"""

import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from d2lora.errors import ChecksumMismatch, NotFound, ScratchFull, StorageFull, StorageUnavailable
from d2lora.scratch import is_full, room_for
from d2lora.settings import StorageSettings


def dataset_key(tenant: str, dataset_id: str) -> str:
    """Return where a dataset's bytes are."""
    return f"t/{tenant}/datasets/{dataset_id}"


def initialization_prefix(tenant: str, initialization_id: str, attempt: int) -> str:
    """Return what the keys of one attempt's files begin with."""
    return f"t/{tenant}/initializations/{initialization_id}/{attempt}/"


def statistics_prefix(prefix: str) -> str:
    """Return what the keys of kept statistics begin with, for a result whose keys begin with ``prefix``."""
    return f"{prefix}statistics/"


def shards_prefix(tenant: str, initialization_id: str) -> str:
    """Return what the keys of a job's shards begin with: their inputs and sums, which go when the job ends."""
    return f"t/{tenant}/initializations/{initialization_id}/shards/"


@runtime_checkable
class ObjectStorage(Protocol):
    """Whole objects by key. Every verb may raise StorageUnavailable; a failed write leaves no object behind."""

    def put_file(self, key: str, path: Path, sha256: str, *, only_if_absent: bool = False) -> bool:
        """Store a file; False if ``only_if_absent`` and the key exists.

        Raises:
            StorageFull: there is no room.
            ChecksumMismatch: the file's bytes are not those of ``sha256``.
        """

    def get_file(self, key: str, path: Path, sha256: str) -> None:
        """Write an object's bytes to ``path``.

        Raises:
            NotFound: there is no such object.
            ChecksumMismatch: the stored bytes are not those of ``sha256``; ``path`` is not left behind.
        """

    def open(self, key: str) -> BinaryIO:
        """Return an object's bytes as a stream, which the caller closes; NotFound if there is no such object."""

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object whose key begins with ``prefix``; none is fine."""

    def sign(self, key: str, expires: timedelta) -> str | None:
        """Return an address that needs no other credentials; None where the service has to hand the bytes out."""

    def ping(self) -> None:
        """Return if the storage can be used."""


def open_storage(settings: StorageSettings) -> ObjectStorage:
    """Return the store that the settings name."""
    if settings.bucket is None:
        return LocalStorage(settings.root)
    from d2lora.s3 import S3Storage  # noqa: PLC0415  # its driver is large, and a single machine needs none

    return S3Storage(settings)


class LocalStorage:
    """Objects as files below a directory; each appears whole, by a rename, or not at all."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def put_file(self, key: str, path: Path, sha256: str, *, only_if_absent: bool = False) -> bool:
        """Store a file; see `ObjectStorage`."""
        target = self._path(key)
        with _translated(key):
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=_unfinished(target))
            temporary = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as output, path.open("rb") as source:
                    digest = _copy(source, output)
                    output.flush()
                    os.fsync(output.fileno())
                if digest != sha256:
                    raise ChecksumMismatch(f"the bytes for {key} changed while they were stored")
                if not only_if_absent:
                    temporary.replace(target)
                    return True
                try:
                    os.link(temporary, target)  # unlike a rename, it fails if the target exists
                except FileExistsError:
                    return False
                return True
            finally:
                temporary.unlink(missing_ok=True)

    def get_file(self, key: str, path: Path, sha256: str) -> None:
        """Write an object's bytes to a file; see `ObjectStorage`."""
        with self.open(key) as source, _translated(key):
            try:
                with room_for(path.name), path.open("wb") as output:
                    digest = _copy(source, output)
            except (OSError, ScratchFull):
                path.unlink(missing_ok=True)
                raise
        if digest != sha256:
            path.unlink()
            raise ChecksumMismatch(f"the stored bytes of {key} are not those that were written")

    def open(self, key: str) -> BinaryIO:
        """Return an object's bytes as a stream; see `ObjectStorage`."""
        try:
            return self._path(key).open("rb")
        except FileNotFoundError as error:
            raise NotFound(f"there is no object {key}") from error
        except OSError as error:
            raise StorageUnavailable(f"the object {key} cannot be read") from error

    def delete_prefix(self, prefix: str) -> None:
        """Remove all objects below a prefix; see `ObjectStorage`."""
        target = self._path(prefix.rstrip("/"))
        with _translated(prefix):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
                # What a writer that was killed in the middle has left is no object, and holds rows all the same.
                for left in target.parent.glob(f"{glob.escape(_unfinished(target))}*"):
                    left.unlink(missing_ok=True)

    def sign(self, key: str, expires: timedelta) -> str | None:  # noqa: ARG002  # the protocol's
        """Return None: files have no address of their own."""
        return None

    def ping(self) -> None:
        """Return if the directory can be written."""
        with _translated("the root"):
            self._root.mkdir(parents=True, exist_ok=True)
            if not os.access(self._root, os.W_OK):
                raise PermissionError(errno.EACCES, "not writable")

    def _path(self, key: str) -> Path:
        path = (self._root / key).resolve()
        assert path.is_relative_to(self._root.resolve()), f"key {key!r} leaves the root"
        return path


def _unfinished(target: Path) -> str:
    """Return what the names of a file begin with until all of it is there."""
    return f".{target.name}-"


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Turn the operating system's errors into ours; nobody else looks at errno."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StorageFull(f"no room left to store {key}; free space and submit again") from error
        raise StorageUnavailable(f"the storage failed on {key}") from error


def _copy(source: BinaryIO, target: BinaryIO) -> str:
    """Copy a stream and return the sha256 of what was copied."""
    digest = hashlib.sha256()
    while chunk := source.read(2**20):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()
