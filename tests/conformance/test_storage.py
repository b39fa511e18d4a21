import hashlib
import subprocess
import sys
import threading
from datetime import timedelta

import httpx
import pytest

from d2lora.errors import ChecksumMismatch, NotFound, ScratchFull, StorageFull, StorageUnavailable

CONTENT = b"some bytes" * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()
KEY = "t/acme/datasets/ds_1"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_what_was_put_is_what_is_got(storage, file, tmp_path):
    assert storage.put_file(KEY, file, SHA)

    storage.get_file(KEY, tmp_path / "copy", SHA)

    assert (tmp_path / "copy").read_bytes() == CONTENT
    with storage.open(KEY) as stream:
        assert stream.read() == CONTENT


def test_an_object_that_is_not_there_is_not_found(storage, tmp_path):
    with pytest.raises(NotFound):
        storage.get_file(KEY, tmp_path / "copy", SHA)
    with pytest.raises(NotFound):
        storage.open(KEY)
    assert not (tmp_path / "copy").exists()


def test_wrong_bytes_are_not_stored(storage, file):
    with pytest.raises(ChecksumMismatch):
        storage.put_file(KEY, file, "0" * 64)

    with pytest.raises(NotFound):
        storage.open(KEY)


def test_wrong_bytes_are_not_delivered(storage, file, tmp_path):
    storage.put_file(KEY, file, SHA)

    with pytest.raises(ChecksumMismatch):
        storage.get_file(KEY, tmp_path / "copy", "0" * 64)

    assert not (tmp_path / "copy").exists()


def test_an_object_can_be_replaced(storage, file):
    storage.put_file(KEY, file, SHA)
    file.write_bytes(b"new")

    assert storage.put_file(KEY, file, hashlib.sha256(b"new").hexdigest())

    with storage.open(KEY) as stream:
        assert stream.read() == b"new"


def test_only_if_absent_keeps_what_is_there(storage, file):
    storage.put_file(KEY, file, SHA)
    file.write_bytes(b"new")

    assert not storage.put_file(KEY, file, hashlib.sha256(b"new").hexdigest(), only_if_absent=True)

    with storage.open(KEY) as stream:
        assert stream.read() == CONTENT


def test_of_racing_writers_only_one_is_first(storage, tmp_path):
    winners = []

    def write(number):
        path = tmp_path / str(number)
        path.write_bytes(CONTENT + str(number).encode())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if storage.put_file(KEY, path, digest, only_if_absent=True):
            winners.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(winners) == 1
    with storage.open(KEY) as stream:
        assert stream.read() == CONTENT + str(winners[0]).encode()


def test_a_prefix_is_removed_whole_and_alone(storage, file):
    for key in ("t/a/1/x", "t/a/1/y/z", "t/a/2/x"):
        storage.put_file(key, file, SHA)

    storage.delete_prefix("t/a/1/")
    storage.delete_prefix("t/a/nothing/")

    for key in ("t/a/1/x", "t/a/1/y/z"):
        with pytest.raises(NotFound):
            storage.open(key)
    storage.open("t/a/2/x").close()


def test_a_signed_address_is_one_or_none(storage, file):
    storage.put_file(KEY, file, SHA)

    address = storage.sign(KEY, timedelta(minutes=1))

    if address is not None:
        response = httpx.get(address)
        assert response.content == CONTENT
        assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in address
        assert httpx.get(address.replace("ds_1", "ds_2")).status_code == 403


def test_a_storage_that_works_answers(storage):
    storage.ping()


def test_a_full_disk_is_said_to_be_full_and_keeps_no_half(file, tmp_path):
    """On a real file system of 64 KiB, where this machine lets us mount one; else by the limit on a file's size."""
    import resource
    import signal
    import subprocess

    from d2lora.storage import LocalStorage

    root = tmp_path / "small"
    root.mkdir()
    file.write_bytes(b"x" * 200_000)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(root)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.getsignal(signal.SIGXFSZ)
    try:
        if not mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
        with pytest.raises(StorageFull):
            LocalStorage(root).put_file(KEY, file, digest)
        assert [path for path in root.rglob("*") if path.is_file()] == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
        if mounted:
            subprocess.run(["umount", str(root)], check=True)


def test_a_file_too_large_for_one_request_is_stored_in_parts_and_comes_back_whole(storage, tmp_path):
    large, back = tmp_path / "large", tmp_path / "back"
    with large.open("wb") as output:
        for block in range(70):
            output.write(hashlib.sha256(str(block).encode()).digest() * 2**15)  # 1 MiB
    with large.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()

    assert storage.put_file(KEY, large, digest)
    storage.get_file(KEY, back, digest)

    assert back.stat().st_size == 70 * 2**20
    if hasattr(storage, "_client"):
        assert storage._client.head_object(Bucket=storage._bucket, Key=KEY)["ETag"].strip('"').endswith("-2")


def test_a_workers_full_disk_is_not_the_storages(storage, file, tmp_path):
    import resource
    import signal

    file.write_bytes(b"x" * 200_000)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    storage.put_file(KEY, file, digest)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        with pytest.raises(ScratchFull):
            storage.get_file(KEY, tmp_path / "back", digest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("storage", ["s3"], indirect=True)  # its answer to a deletion is 200 whatever it kept
def test_objects_that_the_store_keeps_are_not_said_to_be_removed(storage, file, monkeypatch):
    storage.put_file(KEY, file, SHA)
    kept = {"Errors": [{"Key": KEY, "Code": "AccessDenied"}]}
    monkeypatch.setattr(storage._client, "delete_objects", lambda **_: kept)

    with pytest.raises(StorageUnavailable):
        storage.delete_prefix("t/acme/")


@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_an_upload_that_was_killed_in_the_middle_is_removed_with_its_prefix(storage):
    started = storage._client.create_multipart_upload(Bucket=storage._bucket, Key="t/acme/x/shards/sums")
    part = {"Bucket": storage._bucket, "Key": "t/acme/x/shards/sums", "UploadId": started["UploadId"]}
    storage._client.upload_part(**part, PartNumber=1, Body=b"x" * 1000)

    storage.delete_prefix("t/acme/x/shards/")

    assert not storage._client.list_multipart_uploads(Bucket=storage._bucket).get("Uploads")


@pytest.mark.parametrize("storage", ["local"], indirect=True)
@pytest.mark.parametrize("key", [KEY, "t/acme/x/shards/sums"])
def test_a_file_whose_writer_was_killed_in_the_middle_is_removed_with_its_key(storage, file, key):
    script = f"""
import os
from pathlib import Path
from d2lora.storage import LocalStorage

os.fsync = lambda _: os._exit(9)
LocalStorage(Path({str(storage._root)!r})).put_file({key!r}, Path({str(file)!r}), {SHA!r})
"""
    storage.put_file(f"{KEY}0", file, SHA)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert len(files_below(storage._root)) == 2

    storage.delete_prefix(key)

    assert files_below(storage._root) == [f"{KEY}0"]


def files_below(root):
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
