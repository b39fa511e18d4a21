"""A runner hands kept statistics from one job to the next."""

import json
import time

import pytest

from d2lora.errors import StatisticsTooNew
from d2lora.initializations import InitializationSpec
from d2lora.states import State
from tests.unit.worker.test_runner import SETTINGS, failing_build, run, write_result
from worker.units import BASE, KEPT, KEPT_INDEX

FILES = {"fold-0.safetensors": b"sums", KEPT_INDEX: b""}


def keeping_build(spec, dataset, extras, out, on_progress):
    (out / KEPT).mkdir()
    index = {"format": 1, "files": sorted(FILES), "r": 4, "rows": 7, "something": "else"}
    for name, content in FILES.items():
        (out / KEPT / name).write_bytes(content or json.dumps(index).encode())
    return write_result(out)


def seen(files):
    """A build that remembers the statistics which its request is based on."""

    def build(spec, dataset, extras, out, on_progress):
        directory = out / BASE
        files.append({path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else None)
        return write_result(out)

    return build


@pytest.fixture
def earlier(store, storage, job):
    """A job that has kept its statistics."""
    store.cancel("acme", job.id)
    spec = InitializationSpec(base_model="m", dataset_id="ds_1", keep_statistics=True)
    kept, _ = store.create("acme", spec)
    assert run(store, storage, keeping_build)
    assert store.get("acme", kept.id).state is State.SUCCEEDED
    return store.get("acme", kept.id)


def stored(storage):
    return {path.name: path for path in (storage._root / "t/acme/initializations").rglob("*") if path.is_file()}


def follow(store, earlier):
    return store.create("acme", InitializationSpec(base_model="m", dataset_id="ds_1", based_on=earlier.id))[0]


def test_what_a_job_keeps_is_stored_beside_its_result_and_is_no_part_of_it(storage, earlier):
    assert (earlier.statistics.r, earlier.statistics.rows) == (4, 7)
    assert earlier.statistics.size == sum(stored(storage)[name].stat().st_size for name in FILES)
    assert not set(FILES) & {file.name for file in earlier.result.files}


def test_the_next_job_finds_it_in_its_directory(store, storage, earlier):
    follow(store, earlier)
    files = []

    assert run(store, storage, seen(files))

    assert files[0]["fold-0.safetensors"] == b"sums"
    assert files[0].keys() == FILES.keys()


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_statistics_that_are_gone_or_damaged_are_not_there(store, storage, earlier, fault):
    path = stored(storage)["fold-0.safetensors"]
    path.unlink() if fault == "gone" else path.write_bytes(b"other")
    follow(store, earlier)
    files = []

    run(store, storage, seen(files))

    assert files == [None]


def test_a_job_that_is_not_to_keep_statistics_stores_none(store, storage, job):
    assert run(store, storage, keeping_build)

    assert not FILES.keys() & stored(storage).keys()
    assert store.get("acme", job.id).statistics is None


def test_a_job_without_a_base_finds_none(store, storage, job):
    files = []

    run(store, storage, seen(files))

    assert files == [None]


def test_a_job_based_on_a_newer_versions_statistics_is_retried_and_ends(store, storage, earlier):
    waiting = follow(store, earlier)
    settings = SETTINGS.model_copy(update={"max_outage_attempts": 3, "lease_seconds": 0.1})
    error = StatisticsTooNew("based_on: newer")
    deadline = time.monotonic() + 20

    while not store.get("acme", waiting.id).state.is_terminal and time.monotonic() < deadline:
        run(store, storage, failing_build(error), settings=settings)
        time.sleep(0.02)

    done = store.get("acme", waiting.id)
    assert (done.state, done.error.code, done.attempt) == (State.FAILED, "statistics_too_new", 3)
