"""Jobs in shards, from the cut to the build, with work that only moves files."""

import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest

from d2lora.errors import DeviceFailure, FormatMismatch, FormatOutdated, NumericalFailure, StoreUnavailable
from d2lora.initializations import Phase, State
from d2lora.shards import EvaluationTask, StatisticsTask
from d2lora.storage import LocalStorage
from tests.unit.worker.test_runner import SETTINGS, write_result
from worker.runner import Recycle, Runner
from worker.units import ShardOutput, Split

SHARDS = 3


@dataclass
class ShardedWork:
    """Cuts a job in three; a shard's sum is its number, and a part of the build scores ten times its fold."""

    on_shard: object = None
    on_finish: object = None

    def initialize(self, spec, dataset, extras, out, on_progress):
        plan = out / "plan.json"
        plan.write_text("plan")
        shards = []
        for number in range(SHARDS):
            path = out / f"rows-{number}.safetensors"
            path.write_text(str(number))
            shards.append((StatisticsTask(rows=1, tokens=1), path))
        return Split(plan, shards)

    def initialize_jointly(self, spec, datasets, out, on_progress):
        raise AssertionError("such a job is never cut")

    def run_shard(self, spec, task, directory, on_progress):
        on_progress(Phase.STATISTICS, 0, 1)
        if self.on_shard is not None:
            self.on_shard(task, on_progress)
        if isinstance(task, EvaluationTask):
            assert (directory / task.files[0]).read_text() == f"direction {task.fold}"
            return ShardOutput([], {"score": 10 * task.fold + task.eta})
        path = directory / "sums.safetensors"
        path.write_text("sum of " + (directory / "rows.safetensors").read_text())
        return ShardOutput([path], None)

    def finish(self, spec, plan, shards, extras, out, share, on_progress):
        assert plan.read_text() == "plan"
        seen = [(shard.rows.read_text(), shard.sums[0].read_text()) for shard in shards]
        assert seen == [("0", "sum of 0"), ("1", "sum of 1"), ("2", "sum of 2")]
        assert not list(out.glob("shard-*"))  # a large job's sums would fill the disk
        directions = {}
        for fold in range(4):
            directions[f"direction-{fold}"] = out / f"direction-{fold}"
            directions[f"direction-{fold}"].write_text(f"direction {fold}")
        for eta in (0.25, 0.5):
            tasks = [EvaluationTask(eta=eta, fold=fold, files=[f"direction-{fold}"], batches=[0]) for fold in range(4)]
            scores = share(directions, tasks)
            assert [one["score"] for one in scores] == [10 * fold + eta for fold in range(4)]
            if self.on_finish is not None:
                self.on_finish()
        return write_result(out)


@pytest.fixture
def runner(store, storage):
    return Runner(store.leases, storage, ShardedWork(), SETTINGS, worker="w", stop=threading.Event())


def drain(runner):
    count = 0
    while runner.run_next():
        count += 1
    return count


def types_of(store, job):
    return [event.type for event in store.events("acme", job.id)]


def test_a_cut_job_is_gathered_and_built_by_one_worker(store, job, runner):
    assert drain(runner) == 1 + SHARDS + 1

    done = store.get("acme", job.id)
    assert (done.state, done.attempt) == (State.SUCCEEDED, 2)
    assert types_of(store, job) == ["queued", "running", "split", "gathered", "running", "succeeded"]


def test_several_workers_share_the_shards_and_the_calibration(store, job, runner):
    seen, lock = [], threading.Lock()

    def note(task, _):
        with lock:
            seen.append((threading.current_thread().name, task.type))
        time.sleep(0.05)

    runner = replace(runner, work=ShardedWork(on_shard=note))
    runner.run_next()
    stop = threading.Event()

    def serve():
        while not stop.is_set():
            if not runner.run_next():
                time.sleep(0.01)

    threads = [threading.Thread(target=serve, name=f"worker-{number}") for number in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while not store.get("acme", job.id).state.is_terminal and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join(60)

    assert store.get("acme", job.id).state is State.SUCCEEDED
    assert sum(kind == "statistics" for _, kind in seen) == SHARDS
    assert sum(kind == "evaluation" for _, kind in seen) == 8
    assert len({name for name, kind in seen if kind == "evaluation"}) > 1


def test_an_error_in_a_shard_is_the_jobs(store, job, runner):
    def fail(task, _):
        raise NumericalFailure("layer x is not finite")

    drain(replace(runner, work=ShardedWork(on_shard=fail)))

    ended = store.get("acme", job.id)
    assert (ended.state, ended.error.code) == (State.FAILED, "numerical_failure")


def test_a_shard_stops_when_its_job_is_cancelled(store, job, runner):
    def wait(task, on_progress):
        store.cancel("acme", job.id)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            on_progress(Phase.STATISTICS, 0, 1)
            time.sleep(0.01)
        raise AssertionError("nobody stopped the shard")

    runner = replace(runner, work=ShardedWork(on_shard=wait))
    runner.run_next()
    runner.run_next()

    assert store.get("acme", job.id).state is State.CANCELLED
    assert drain(runner) == 0


def test_a_worker_that_is_stopped_hands_its_shard_back(store, job, runner):
    stop = threading.Event()

    def wait(task, on_progress):
        stop.set()
        on_progress(Phase.STATISTICS, 0, 1)

    runner.run_next()
    replace(runner, work=ShardedWork(on_shard=wait), stop=stop).run_next()

    free = store.leases.claim_shard("other", lease=timedelta(seconds=5), max_attempts=2)
    assert (free.number, free.attempt) == (0, 2)


def test_a_builder_that_dies_is_followed_by_one_that_calibrates_anew(store, job, runner):
    class Killed(BaseException):
        pass

    def die():
        raise Killed

    for _ in range(1 + SHARDS):
        runner.run_next()
    with pytest.raises(Killed):
        replace(
            runner,
            work=ShardedWork(on_finish=die),
            settings=SETTINGS.model_copy(update={"lease_seconds": 0.3}),
        ).run_next()
    time.sleep(0.5)

    drain(runner)

    done = store.get("acme", job.id)
    assert (done.state, done.attempt) == (State.SUCCEEDED, 3)


def test_an_older_worker_leaves_a_newer_ones_shard_to_it(store, job, runner):
    def refuse(task, _):
        raise FormatMismatch("format 9")

    settings = SETTINGS.model_copy(update={"lease_seconds": 0.3})
    runner.run_next()
    replace(runner, work=ShardedWork(on_shard=refuse), settings=settings).run_next()
    assert store.get("acme", job.id).state is State.RUNNING
    time.sleep(0.15)

    drain(runner)

    assert store.get("acme", job.id).state is State.SUCCEEDED


def test_a_newer_worker_begins_an_older_ones_job_anew(store, job, runner):
    def refuse(task, _):
        raise FormatOutdated("format 0")

    runner.run_next()
    replace(runner, work=ShardedWork(on_shard=refuse)).run_next()
    assert store.get("acme", job.id).state is State.QUEUED

    drain(runner)

    assert types_of(store, job).count("split") == 2
    assert store.get("acme", job.id).state is State.SUCCEEDED


def test_after_an_accelerators_failure_the_unit_is_free_and_the_process_should_end(store, job, runner):
    def fail(task, _):
        raise DeviceFailure("an illegal memory access")

    settings = SETTINGS.model_copy(update={"lease_seconds": 0.3})
    runner.run_next()
    with pytest.raises(Recycle):
        replace(runner, work=ShardedWork(on_shard=fail), settings=settings).run_next()
    time.sleep(0.15)

    drain(runner)

    assert store.get("acme", job.id).state is State.SUCCEEDED


def test_a_worker_that_was_stopped_claims_nothing(store, job, runner):
    runner.stop.set()

    assert not runner.run_next()
    assert store.get("acme", job.id).state is State.QUEUED


def test_shards_whose_bytes_were_changed_are_not_used(store, storage, job, runner):
    runner.run_next()
    (path,) = (storage._root / "t/acme/initializations" / job.id / "shards").rglob("rows-0.safetensors")
    path.write_text("other")

    runner.run_next()

    assert store.get("acme", job.id).error.code == "checksum_mismatch"


def test_after_a_rollback_an_older_worker_begins_the_job_anew_in_the_end(store, job, runner):
    def refuse(task, _):
        raise FormatMismatch("format 9")

    settings = SETTINGS.model_copy(update={"lease_seconds": 0.03, "max_outage_attempts": 1})
    runner.run_next()
    refusing = replace(runner, work=ShardedWork(on_shard=refuse), settings=settings)
    end = time.monotonic() + 20
    while store.get("acme", job.id).state is State.RUNNING and time.monotonic() < end:
        refusing.run_next()

    assert store.get("acme", job.id).state is State.QUEUED
    drain(runner)
    assert store.get("acme", job.id).state is State.SUCCEEDED


def test_a_shard_whose_files_are_gone_lets_the_job_begin_anew(store, storage, job, runner):
    runner.run_next()
    storage.delete_prefix(f"t/acme/initializations/{job.id}/shards/")

    drain(runner)

    assert types_of(store, job).count("split") == 2
    assert store.get("acme", job.id).state is State.SUCCEEDED


def test_what_a_lost_shard_stores_late_does_not_stay(store, storage, job, runner):
    def cancel(task, _):
        store.cancel("acme", job.id)

    runner.run_next()
    before = {path for path in storage._root.rglob("*") if path.is_file()}
    replace(runner, work=ShardedWork(on_shard=cancel)).run_next()

    assert {path for path in storage._root.rglob("*") if path.is_file()} == before


def test_a_storage_that_loses_every_cut_fails_the_job_in_the_end(store, storage, job, runner):
    settings = SETTINGS.model_copy(update={"max_outage_attempts": 3})
    runner = replace(runner, settings=settings)

    units = 0
    while runner.run_next() and units < 50:
        units += 1
        storage.delete_prefix(f"t/acme/initializations/{job.id}/shards/")

    done = store.get("acme", job.id)
    assert (done.state, done.attempt) == (State.FAILED, 3)
    assert done.error.code == "shard_gone"


@pytest.mark.parametrize("verb", ["split", "finish_shard"])
def test_a_database_that_breaks_off_a_commit_that_happened_loses_no_shard(store, job, runner, verb, monkeypatch):
    settle, calls = getattr(store.leases, verb), []

    def flaky(*arguments):
        calls.append(arguments)
        settled = settle(*arguments)
        if len(calls) == 1:
            raise StoreUnavailable("away")
        return settled

    monkeypatch.setattr(store.leases, verb, flaky)

    assert drain(runner) == 1 + SHARDS + 1
    assert types_of(store, job) == ["queued", "running", "split", "gathered", "running", "succeeded"]


def test_what_a_lost_build_shares_late_does_not_stay(store, storage, job, runner):
    class Slow(LocalStorage):
        def put_file(self, key, *arguments, **options):
            stored = super().put_file(key, *arguments, **options)
            if "/build-" in key:  # others have given the builder up, ended the job and tidied up
                with store._engine.begin() as connection:
                    connection.exec_driver_sql("UPDATE initializations SET state = 'failed', worker = NULL")
            return stored

    for _ in range(1 + SHARDS):
        runner.run_next()
    before = {path for path in storage._root.rglob("*") if path.is_file()}
    replace(runner, storage=Slow(storage._root)).run_next()

    assert store.get("acme", job.id).state is State.FAILED
    assert {path for path in storage._root.rglob("*") if path.is_file()} == before
