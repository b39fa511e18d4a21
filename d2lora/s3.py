"""Objects in S3, or in a store that speaks its protocol."""

import base64
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from d2lora.errors import ChecksumMismatch, NotFound, StorageFull, StorageUnavailable
from d2lora.scratch import room_for
from d2lora.settings import StorageSettings

_ONE_REQUEST_BYTES = 64 * 2**20
"""Files up to this size go up in one request, which alone can be conditional; larger ones in parts."""


class S3Storage:
    """Objects in one bucket; see `d2lora.storage.ObjectStorage`."""

    def __init__(self, settings: StorageSettings) -> None:
        assert settings.bucket is not None
        self._bucket = settings.bucket
        self._client = _client(settings.endpoint_url, settings)
        # A signature covers the host, so addresses for clients are signed for the one that clients see.
        self._public = _client(settings.public_endpoint_url or settings.endpoint_url, settings)

    def put_file(self, key: str, path: Path, sha256: str, *, only_if_absent: bool = False) -> bool:
        """Store a file; see `ObjectStorage`."""
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ChecksumMismatch(f"the bytes for {key} changed while they were stored")
            file.seek(0)
            try:
                with _translated(key):
                    self._put(key, file, path.stat().st_size, sha256, only_if_absent=only_if_absent)
            except _Exists:
                return False
        return True

    def _put(self, key: str, file: BinaryIO, size: int, sha256: str, *, only_if_absent: bool) -> None:
        if size > _ONE_REQUEST_BYTES and not only_if_absent:
            extra = {"ChecksumAlgorithm": "SHA256"}
            transfer = TransferConfig(multipart_threshold=_ONE_REQUEST_BYTES, multipart_chunksize=_ONE_REQUEST_BYTES)
            self._client.upload_fileobj(file, self._bucket, key, ExtraArgs=extra, Config=transfer)
            return
        condition = {"IfNoneMatch": "*"} if only_if_absent else {}
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        self._client.put_object(Bucket=self._bucket, Key=key, Body=file, ChecksumSHA256=checksum, **condition)

    def get_file(self, key: str, path: Path, sha256: str) -> None:
        """Write an object's bytes to a file; see `ObjectStorage`."""
        digest = hashlib.sha256()
        try:
            with _translated(key), room_for(path.name), path.open("wb") as output:
                body = self._client.get_object(Bucket=self._bucket, Key=key)["Body"]
                for chunk in body.iter_chunks(2**20):
                    digest.update(chunk)
                    output.write(chunk)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if digest.hexdigest() != sha256:
            path.unlink()
            raise ChecksumMismatch(f"the stored bytes of {key} are not those that were written")

    def open(self, key: str) -> BinaryIO:
        """Return an object's bytes as a stream; see `ObjectStorage`."""
        with _translated(key):
            return cast("BinaryIO", self._client.get_object(Bucket=self._bucket, Key=key)["Body"])

    def delete_prefix(self, prefix: str) -> None:
        """Remove all objects below a prefix; see `ObjectStorage`."""
        with _translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            for page in pages:
                keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
                if keys:
                    done = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True})
                    if done.get("Errors"):
                        raise StorageUnavailable(f"the storage kept {len(done['Errors'])} objects below {prefix}")
            # An upload that was killed in the middle is no object yet, and is paid for all the same.
            started = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
            for page in started:
                for upload in page.get("Uploads", []):
                    self._client.abort_multipart_upload(
                        Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

    def sign(self, key: str, expires: timedelta) -> str | None:
        """Return an address that is good for ``expires``; see `ObjectStorage`."""
        parameters = {"Bucket": self._bucket, "Key": key}
        return str(
            self._public.generate_presigned_url("get_object", parameters, ExpiresIn=int(expires.total_seconds()))
        )

    def ping(self) -> None:
        """Return if the bucket can be reached."""
        with _translated("the bucket"):
            self._client.head_bucket(Bucket=self._bucket)


class _Exists(Exception):
    """An object is there already, and the request was to be the first."""


def _client(endpoint_url: str | None, settings: StorageSettings) -> Any:
    config = Config(
        # Without this, presigned addresses are of version 2, whose life has no limit and which few stores take.
        signature_version="s3v4",
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 3},
    )
    return boto3.client("s3", endpoint_url=endpoint_url, region_name=settings.region, config=config)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Turn botocore's errors into ours; nobody else looks at them."""
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code in {"NoSuchKey", "404"} or (status == 404 and code != "NoSuchBucket"):
            raise NotFound(f"there is no object {key}") from error
        if code == "PreconditionFailed" or status == 412:
            raise _Exists from error
        if code in {"BadDigest", "XAmzContentChecksumMismatch", "InvalidDigest"}:
            raise ChecksumMismatch(f"the store received other bytes for {key}") from error
        if status == 507 or "Full" in code or "Quota" in code:
            raise StorageFull(f"no room left to store {key}; free space and submit again") from error
        raise StorageUnavailable(f"the storage refused {key} with {code or status}") from error
    except BotoCoreError as error:
        raise StorageUnavailable(f"the storage failed on {key}") from error
