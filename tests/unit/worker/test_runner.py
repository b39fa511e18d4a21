import errno
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import pytest

from d2lora.errors import (
    ChecksumMismatch,
    NotFound,
    NumericalFailure,
    ScratchFull,
    StorageFull,
    StorageUnavailable,
    StoreUnavailable,
)
from d2lora.initializations import InitializationSpec, Phase, Result, ResultFile, ResultSummary, State
from d2lora.roles import FIELDS, Role, with_dataset_ids
from d2lora.scratch import remove_leftovers, scratch_directory
from d2lora.settings import WorkerSettings
from d2lora.storage import LocalStorage, dataset_key
from tests.unit.worker.conftest import ROWS, add_dataset
from worker.runner import Runner

SETTINGS = WorkerSettings(lease_seconds=5, heartbeat_seconds=0.02, max_attempts=2)


def write_result(directory):
    """An adapter's files, small and complete."""
    contents = {"adapter_model.safetensors": b"weights", "report.json": b"{}"}
    contents["manifest.json"] = json.dumps({"version": 1, "files": []}).encode()
    files = []
    for name, content in contents.items():
        (directory / name).write_bytes(content)
        files.append(ResultFile(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest()))
    summary = ResultSummary(
        start="zero",
        start_reason="r",
        objectives=["sft"],
        objectives_reason="r",
        weights={"sft": 1.0},
        cosines={},
        held_out={},
        rows_used=1,
        rows_truncated=0,
        rows_dropped=0,
        fingerprint="f",
    )
    return Result(files=files, summary=summary)


def good_build(spec, dataset, extras, out, on_progress):
    assert dataset.path.read_bytes() == ROWS
    on_progress(Phase.STATISTICS, 1, 1)
    return write_result(out)


def failing_build(error):
    def build(spec, dataset, extras, out, on_progress):
        raise error

    return build


def waiting_build(ready):
    """Reports progress until it is stopped."""

    def build(spec, dataset, extras, out, on_progress):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            on_progress(Phase.STATISTICS, 1, 100)
            ready.set()
            time.sleep(0.005)
        raise AssertionError("nobody stopped the build")

    return build


def never(*_):
    raise AssertionError("this is not expected to be called")


@dataclass
class FakeWork:
    """Does every kind of unit by a function."""

    initialize: Callable = never
    initialize_jointly: Callable = never
    run_shard: Callable = never
    finish: Callable = never


def run(store, storage, build, *, settings=SETTINGS, stop=None):
    runner = Runner(store.leases, storage, FakeWork(build), settings, worker="w", stop=stop or threading.Event())
    return runner.run_next()


def stored_files(storage):
    return {path.name for path in (storage._root / "t/acme/initializations").rglob("*") if path.is_file()}


def test_a_job_ends_with_its_files_and_its_result(store, storage, job):
    assert run(store, storage, good_build)

    done = store.get("acme", job.id)
    assert done.state is State.SUCCEEDED
    prefix = store.files_prefix("acme", job.id)
    for file in done.result.files:
        with storage.open(prefix + file.name) as stream:
            assert hashlib.sha256(stream.read()).hexdigest() == file.sha256


@pytest.mark.parametrize("role", Role)
def test_the_work_gets_every_other_dataset_as_a_file(store, storage, tmp_path, role):
    add_dataset(store, storage, tmp_path, "ds_1", ROWS)
    add_dataset(store, storage, tmp_path, "ds_2", b'{"text": "another"}\n')
    fields = {"base_model": "m", "dataset_id": "ds_1"}
    if FIELDS[role].startswith("method."):
        fields["method"] = role
    fields = with_dataset_ids(fields, {role: "ds_2"})
    store.create("acme", InitializationSpec.model_validate(fields))
    seen = {}

    def build(spec, dataset, extras, out, on_progress):
        seen.update({role: file.path.read_bytes() for role, file in extras.items()})
        return good_build(spec, dataset, extras, out, on_progress)

    run(store, storage, build)

    assert seen == {role: b'{"text": "another"}\n'}


def test_the_work_gets_all_datasets_of_a_joint_job_in_order(store, storage, tmp_path):
    add_dataset(store, storage, tmp_path, "ds_1", ROWS)
    add_dataset(store, storage, tmp_path, "ds_2", b'{"text": "another"}\n')
    add_dataset(store, storage, tmp_path, "ds_3", b'{"text": "held out"}\n')
    named = [{"dataset_id": "ds_2"}, {"dataset_id": "ds_1", "eval_dataset_id": "ds_3"}]
    job, _ = store.create("acme", InitializationSpec.model_validate({"base_model": "m", "datasets": named}))
    seen, measuring = [], {}

    def build(spec, datasets, evaluations, out, on_progress):
        seen.extend(file.path.read_bytes() for file in datasets)
        measuring.update({index: file.path.read_bytes() for index, file in evaluations.items()})
        return write_result(out)

    work = FakeWork(initialize_jointly=build)
    Runner(store.leases, storage, work, SETTINGS, worker="w", stop=threading.Event()).run_next()

    assert seen == [b'{"text": "another"}\n', ROWS]
    assert measuring == {1: b'{"text": "held out"}\n'}
    assert store.get("acme", job.id).state is State.SUCCEEDED


def test_without_a_job_nothing_is_done(store, storage):
    assert not run(store, storage, good_build)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NumericalFailure("layer x is not finite"), "numerical_failure"),
        (StorageFull("no room"), "storage_full"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("secret path /home/x"), "internal_error"),
    ],
)
def test_an_error_becomes_the_jobs_problem_and_leaves_no_file(store, storage, job, error, code):
    run(store, storage, failing_build(error))

    failed = store.get("acme", job.id)
    assert (failed.state, failed.error.code) == (State.FAILED, code)
    assert "secret" not in failed.error.detail
    assert stored_files(storage) == set()


def test_a_storage_that_is_away_is_tried_again_and_then_given_up(store, storage, job):
    settings = SETTINGS.model_copy(update={"lease_seconds": 0.3, "max_outage_attempts": 2})

    run(store, storage, failing_build(StorageUnavailable("away")), settings=settings)
    assert store.get("acme", job.id).state is State.QUEUED
    time.sleep(0.2)
    run(store, storage, failing_build(StorageUnavailable("away")), settings=settings)

    assert store.get("acme", job.id).error.code == "storage_unavailable"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_database_that_breaks_off_at_the_last_word_loses_no_result(store, storage, job, when, monkeypatch):
    succeed, calls = store.leases.succeed, []

    def flaky(*arguments):
        calls.append(arguments)
        if when == "after" or len(calls) > 1:
            settled = succeed(*arguments)
        if len(calls) == 1:
            raise StoreUnavailable("away")
        return settled

    monkeypatch.setattr(store.leases, "succeed", flaky)

    run(store, storage, good_build)

    done = store.get("acme", job.id)
    assert (done.state, len(calls)) == (State.SUCCEEDED, 2)
    assert stored_files(storage) == {file.name for file in done.result.files}


def test_a_database_that_is_away_during_the_work_fails_no_job(store, storage, job):
    settings = SETTINGS.model_copy(update={"lease_seconds": 0.3})
    run(store, storage, failing_build(StoreUnavailable("away")), settings=settings)
    assert store.get("acme", job.id).state is State.QUEUED
    time.sleep(0.2)

    run(store, storage, good_build)

    assert store.get("acme", job.id).state is State.SUCCEEDED


class FullStorage(LocalStorage):
    """Has room for one file of an adapter and no more."""

    def put_file(self, key, path, sha256, *, only_if_absent=False):
        if key.endswith("report.json"):
            raise StorageFull("no room left")
        return super().put_file(key, path, sha256, only_if_absent=only_if_absent)


def test_a_disk_that_fills_up_while_publishing_leaves_nothing_half_written(store, storage, job):
    run(store, FullStorage(storage._root), good_build)

    assert store.get("acme", job.id).error.code == "storage_full"
    assert stored_files(storage) == set()


def test_a_running_job_is_cancelled_at_its_next_sign_of_progress(store, storage, job):
    ready = threading.Event()
    thread = threading.Thread(target=run, args=(store, storage, waiting_build(ready)))
    thread.start()
    ready.wait(5)

    store.cancel("acme", job.id)
    thread.join(5)

    assert not thread.is_alive()
    assert store.get("acme", job.id).state is State.CANCELLED
    assert stored_files(storage) == set()


def test_progress_is_stored_while_the_job_runs(store, storage, job):
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=run, args=(store, storage, waiting_build(ready)), kwargs={"stop": stop})
    thread.start()
    ready.wait(5)
    time.sleep(0.2)

    progress = store.get("acme", job.id).progress
    stop.set()
    thread.join(5)

    assert (progress.phase, progress.done, progress.total) == (Phase.STATISTICS, 1, 100)
    assert progress.seconds_left > 0


def test_a_worker_that_is_stopped_hands_its_job_back(store, storage, job):
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=run, args=(store, storage, waiting_build(ready)), kwargs={"stop": stop})
    thread.start()
    ready.wait(5)

    stop.set()
    thread.join(5)

    assert store.get("acme", job.id).state is State.QUEUED
    assert run(store, storage, good_build)
    assert store.get("acme", job.id).state is State.SUCCEEDED


def test_a_worker_whose_lease_was_lost_publishes_nothing(store, storage, job):
    """The lease ends under a build that does not look up; another worker finishes the job first."""

    def slow_build(spec, dataset, extras, out, on_progress):
        # Another worker's claim, as the database would allow it once the lease is over.
        with store._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE initializations SET lease_until = '2000-01-01 00:00:00.000000'")
        other = store.leases.claim("other", lease=timedelta(seconds=60), max_attempts=9)
        publish_as(other)
        return write_result(out)

    def publish_as(claim):
        assert store.leases.succeed(
            claim, Result(files=[], summary=write_summary()), f"t/acme/initializations/{claim.id}/2/"
        )

    def write_summary():
        return ResultSummary(
            start="zero",
            start_reason="the other worker's",
            objectives=["sft"],
            objectives_reason="r",
            weights={},
            cosines={},
            held_out={},
            rows_used=1,
            rows_truncated=0,
            rows_dropped=0,
            fingerprint="f",
        )

    run(store, storage, slow_build, settings=SETTINGS.model_copy(update={"heartbeat_seconds": 60.0}))

    done = store.get("acme", job.id)
    assert (done.state, done.result.summary.start_reason) == (State.SUCCEEDED, "the other worker's")
    assert stored_files(storage) == set()


def test_a_dataset_whose_bytes_were_changed_is_not_used(store, storage, job):
    (storage._root / dataset_key("acme", "ds_1")).write_bytes(b'{"text": "other"}\n')

    run(store, storage, good_build)

    assert store.get("acme", job.id).error.code == "checksum_mismatch"


def test_a_dataset_whose_bytes_are_gone_is_said_to_be(store, storage, job):
    storage.delete_prefix(dataset_key("acme", "ds_1"))

    run(store, storage, good_build)

    assert store.get("acme", job.id).error.code == NotFound.code


def test_a_stop_hands_a_unit_back_that_gives_no_sign_of_progress(store, storage, job):
    """A model that loads for minutes, say: another worker takes the job at once, and this one's late result is none."""
    loading, stop, loaded = threading.Event(), threading.Event(), threading.Event()

    def slow_build(spec, dataset, extras, out, on_progress):
        loading.set()
        assert loaded.wait(20)
        return write_result(out)

    thread = threading.Thread(target=run, args=(store, storage, slow_build), kwargs={"stop": stop})
    thread.start()
    loading.wait(5)
    stop.set()
    end = time.monotonic() + 10
    while store.get("acme", job.id).state is not State.QUEUED and time.monotonic() < end:
        time.sleep(0.02)

    assert run(store, storage, good_build)
    loaded.set()
    thread.join(10)

    done = store.get("acme", job.id)
    assert (done.state, done.attempt) == (State.SUCCEEDED, 2)
    assert store.files_prefix("acme", job.id).endswith("/2/")
    assert stored_files(storage) == {file.name for file in done.result.files}


def test_after_an_outage_longer_than_the_lease_the_claim_is_kept_by_who_still_works_on_it(
    store, storage, job, monkeypatch
):
    renew, away = store.leases.renew, threading.Event()
    settings = SETTINGS.model_copy(update={"lease_seconds": 0.3})
    away.set()

    def flaky(*arguments, **named):
        if away.is_set():
            raise StoreUnavailable("away")
        return renew(*arguments, **named)

    monkeypatch.setattr(store.leases, "renew", flaky)

    def build(spec, dataset, extras, out, on_progress):
        time.sleep(0.6)
        away.clear()
        time.sleep(0.3)
        assert store.leases.claim("other", lease=timedelta(seconds=5), max_attempts=9) is None
        on_progress(Phase.STATISTICS, 1, 1)
        return write_result(out)

    run(store, storage, build, settings=settings)

    done = store.get("acme", job.id)
    assert (done.state, done.attempt) == (State.SUCCEEDED, 1)


def test_a_unit_that_hangs_ends_its_process(store, storage, job):
    ended = threading.Event()

    def hanging_build(spec, dataset, extras, out, on_progress):
        assert ended.wait(20)
        return write_result(out)

    settings = SETTINGS.model_copy(update={"job_hours": 0.1 / 3600})
    runner = Runner(
        store.leases,
        storage,
        FakeWork(hanging_build),
        settings,
        worker="w",
        stop=threading.Event(),
        on_hang=ended.set,
    )
    runner.run_next()

    assert ended.is_set()


def test_a_read_that_was_damaged_on_the_way_is_made_again(store, storage, job):
    class Noisy(LocalStorage):
        reads = 0

        def get_file(self, key, path, sha256):
            Noisy.reads += 1
            if Noisy.reads == 1:
                raise ChecksumMismatch("damaged")
            super().get_file(key, path, sha256)

    run(store, Noisy(storage._root), good_build)

    assert store.get("acme", job.id).state is State.SUCCEEDED


def test_a_worker_whose_disk_is_full_fails_no_job_and_pauses(store, storage, job):
    settings = SETTINGS.model_copy(update={"lease_seconds": 0.6})
    started = time.monotonic()

    run(store, storage, failing_build(ScratchFull("no room")), settings=settings)

    assert time.monotonic() - started > 0.2
    assert store.get("acme", job.id).state is State.QUEUED


def test_a_disk_without_room_for_the_jobs_directory_fails_no_job_either(store, storage, job, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("d2lora.scratch.tempfile.TemporaryDirectory", full)
    settings = SETTINGS.model_copy(update={"lease_seconds": 0.6})
    started = time.monotonic()

    run(store, storage, never, settings=settings)

    assert time.monotonic() - started > 0.2
    assert store.get("acme", job.id).state is State.QUEUED


def test_a_file_of_a_job_that_has_no_room_fails_no_job(store, storage, job):
    settings = SETTINGS.model_copy(update={"lease_seconds": 0.6})
    started = time.monotonic()

    run(store, storage, failing_build(OSError(errno.ENOSPC, "No space left on device")), settings=settings)

    assert time.monotonic() - started > 0.2
    assert store.get("acme", job.id).state is State.QUEUED


def test_what_a_killed_worker_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path, monkeypatch):
    import os
    import subprocess
    import sys

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = """
import time
from d2lora.scratch import scratch_directory
with scratch_directory("job") as path:
    print(path, flush=True)
    time.sleep(60)
"""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    killed, living = (tmp_path / worker.stdout.readline().strip() for worker in workers)
    (tmp_path / "something-else").mkdir()
    workers[0].kill()
    workers[0].wait()
    with scratch_directory("job") as own:
        remove_leftovers("job")

        assert {path.name for path in tmp_path.iterdir()} == {living.name, own.name, "something-else"}
    assert killed.name.startswith("d2lora-job-")
    workers[1].kill()
    workers[1].communicate()
    workers[0].communicate()
