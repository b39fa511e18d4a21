import hashlib

import pytest

from d2lora.errors import Conflict
from d2lora.storage import LocalStorage
from tests.unit.worker.test_runner import write_result
from worker.publishing import publish

PREFIX = "t/acme/initializations/init_1/1/"


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path


class Forgetful(LocalStorage):
    """Stores the manifest, loses the answer, and is asked again, as a client of S3 does on its own."""

    def put_file(self, key, path, sha256, *, only_if_absent=False):
        if only_if_absent:
            super().put_file(key, path, sha256, only_if_absent=True)
        return super().put_file(key, path, sha256, only_if_absent=only_if_absent)


def test_a_manifest_whose_answer_was_lost_is_our_own(tmp_path, directory):
    storage = Forgetful(tmp_path / "objects")

    publish(write_result(directory), directory, storage, PREFIX)

    assert (storage._root / PREFIX / "manifest.json").exists()


def test_files_of_a_history_that_a_restore_undid_give_way(tmp_path, directory):
    storage = LocalStorage(tmp_path / "objects")
    for name in ("manifest.json", "report.json"):
        path = tmp_path / name
        path.write_bytes(b"of another history")
        storage.put_file(PREFIX + name, path, hashlib.sha256(path.read_bytes()).hexdigest())
    result = write_result(directory)

    publish(result, directory, storage, PREFIX)

    for file in result.files:
        assert hashlib.sha256((storage._root / PREFIX / file.name).read_bytes()).hexdigest() == file.sha256


def test_a_manifest_that_comes_again_and_again_is_a_conflict_and_leaves_nothing(tmp_path, directory):
    class Contested(LocalStorage):
        def put_file(self, key, path, sha256, *, only_if_absent=False):
            if only_if_absent:
                other = tmp_path / "other"
                other.write_bytes(b"another")
                super().put_file(key, other, hashlib.sha256(b"another").hexdigest())
            return super().put_file(key, path, sha256, only_if_absent=only_if_absent)

    storage = Contested(tmp_path / "objects")
    with pytest.raises(Conflict):
        publish(write_result(directory), directory, storage, PREFIX)

    assert not [path for path in storage._root.rglob("*") if path.is_file()]
