import json
import threading
from datetime import timedelta

import pytest
from sqlalchemy import text

from d2lora.claims import Claim, Outcome, Plan, ShardClaim, Stage, Standing, StoredFile
from d2lora.errors import NumericalFailure
from d2lora.initializations import Phase, Progress, State
from d2lora.shards import EvaluationTask, StatisticsTask
from tests.conformance.conftest import add_dataset
from tests.conformance.test_store import LEASE, OVER, PROBLEM, RESULT, state_of, types_of

PLAN = Plan(name="plan.json", key="k/plan.json", sha256="0" * 64, rows=30)


def file(name):
    return StoredFile(name=name, key=f"k/{name}", sha256="0" * 64)


def take(store, *, lease=LEASE, max_attempts=3, queues=(), initialization_id=None):
    return store.leases.claim(
        "w", lease=lease, max_attempts=max_attempts, queues=queues, initialization_id=initialization_id
    )


def split(store, spec, count=3):
    """A job in shards of 10 rows each."""
    job, _ = store.create("acme", spec)
    held = take(store)
    shards = [(StatisticsTask(rows=10, tokens=100), file(f"rows-{number}")) for number in range(count)]
    assert store.leases.split(held, PLAN, shards)
    return job


def finish(store, shard):
    return store.leases.finish_shard(shard, Outcome(files=[file(f"sums-{shard.number}-{shard.attempt}")]))


def pending(store):
    return len(store.outbox.due())


def test_a_split_job_is_done_shard_by_shard_and_then_built(store, spec):
    job = split(store, spec)

    shards = [take(store) for _ in range(3)]
    assert all(isinstance(shard, ShardClaim) for shard in shards)
    assert [(shard.number, shard.inputs) for shard in shards] == [(n, [file(f"rows-{n}")]) for n in range(3)]
    assert take(store) is None
    for shard in reversed(shards):
        assert finish(store, shard)

    build = take(store)
    assert isinstance(build, Claim)
    assert build.plan == PLAN
    assert [done.outcome.files for done in build.shards] == [[file(f"sums-{n}-1")] for n in range(3)]
    assert store.leases.succeed(build, RESULT, "prefix/")
    assert types_of(store, job) == ["queued", "running", "split", "gathered", "running", "succeeded"]


def test_waiting_for_shards_is_no_failure_of_the_job(store, spec):
    split(store, spec, count=1)
    finish(store, take(store, max_attempts=1))

    assert isinstance(take(store, max_attempts=1), Claim)


def test_the_worker_that_split_a_job_holds_it_no_longer(store, spec):
    store.create("acme", spec)
    held = take(store)
    store.leases.split(held, PLAN, [(StatisticsTask(rows=1, tokens=1), file("rows"))])

    assert store.leases.renew(held, lease=LEASE) is Standing.LOST
    assert not store.leases.succeed(held, RESULT, "prefix/")
    assert not store.leases.split(held, PLAN.model_copy(update={"key": "k/other/plan.json"}), [])


def test_a_shard_whose_worker_died_is_taken_again_and_the_late_one_changes_nothing(store, spec):
    job = split(store, spec, count=1)
    late = take(store, lease=OVER)
    again = take(store)

    assert (again.number, again.attempt) == (late.number, 2)
    assert store.leases.standing(late) is Standing.LOST
    assert not finish(store, late)
    assert finish(store, again)
    build = take(store)
    assert build.shards[0].outcome.files == [file("sums-0-2")]
    assert state_of(store, job) is State.RUNNING


def test_a_shard_that_kills_its_workers_fails_the_job_with_a_reason(store, spec):
    job = split(store, spec)
    for _ in range(2):
        assert take(store, lease=OVER, max_attempts=2).number == 0
        # Only the first shard is free again; the others are not touched, so that it is always the next.

    assert take(store, max_attempts=2) is None

    ended = store.get("acme", job.id)
    assert (ended.state, ended.error.code) == (State.FAILED, "worker_lost")


def test_an_error_in_a_shard_ends_the_job_and_takes_the_other_shards_away(store, spec):
    job = split(store, spec)
    first, second = take(store), take(store)

    assert store.leases.fail(first, PROBLEM)

    assert state_of(store, job) is State.FAILED
    assert store.leases.renew(second, lease=LEASE) is Standing.LOST
    assert not finish(store, second)
    assert take(store) is None


def test_a_retried_shard_waits_and_gives_up_in_the_end(store, spec):
    job = split(store, spec, count=1)

    assert store.leases.retry(take(store), PROBLEM, max_attempts=2, pause=timedelta(seconds=60))
    assert take(store) is None
    assert state_of(store, job) is State.RUNNING

    other = split(store, spec, count=1)
    assert store.leases.retry(take(store), PROBLEM, max_attempts=1, pause=timedelta(0))
    assert state_of(store, other) is State.FAILED


def test_an_outage_is_no_death_of_a_worker(store, spec):
    split(store, spec, count=1)
    for _ in range(3):
        store.leases.retry(take(store, max_attempts=1), PROBLEM, max_attempts=9, pause=timedelta(0))

    assert take(store, max_attempts=1).attempt == 4


def test_a_shard_that_is_handed_back_is_free_at_once_and_wakes_somebody(store, spec):
    split(store, spec, count=1)
    shard = take(store)
    before = pending(store)

    assert store.leases.hand_back(shard)

    assert pending(store) == before + 1
    assert take(store).attempt == 2


def test_cancelling_a_job_in_shards_ends_it_at_once(store, spec):
    job = split(store, spec)
    shard = take(store)

    assert store.cancel("acme", job.id).state is State.CANCELLED

    assert store.leases.renew(shard, lease=LEASE) is Standing.LOST
    assert take(store) is None
    assert types_of(store, job)[-2:] == ["cancelling", "cancelled"]


def test_progress_of_a_job_in_shards_is_that_of_its_shards(store, spec):
    job = split(store, spec)
    first, second = take(store), take(store)
    finish(store, first)
    store.leases.renew(second, lease=LEASE, progress=Progress(phase=Phase.STATISTICS, done=4, total=10))

    progress = store.get("acme", job.id).progress

    assert (progress.phase, progress.done, progress.total) == (Phase.STATISTICS, 14, 30)


def test_parts_of_a_build_are_taken_by_anybody_until_the_builder_is_another(store, spec):
    split(store, spec, count=1)
    finish(store, take(store))
    build = take(store, lease=OVER)
    task = EvaluationTask(eta=0.25, fold=0, files=["f"], batches=[0])
    numbers = store.leases.share(build, [(task, [file("f")])] * 2)
    helper = store.leases.claim_shard("h", lease=LEASE, max_attempts=3)
    assert helper.task == task
    assert store.leases.finish_shard(helper, Outcome(scores={"logps": [0.1 + 0.2]}))
    assert store.leases.outcomes(build, numbers) == [Outcome(scores={"logps": [0.1 + 0.2]}), None]

    rest = store.leases.claim_shard("h", lease=OVER, max_attempts=3)
    assert isinstance(take(store), ShardClaim)  # the abandoned part, as long as its build is the newest
    second = store.leases._claim_job("w", LEASE, 3, (), None)

    assert second.attempt == build.attempt + 1
    assert take(store) is None
    assert store.leases.standing(rest) is Standing.LOST
    assert store.leases.share(build, [(task, [file("f")])]) is None


def test_files_of_an_older_version_let_the_job_begin_anew(store, spec):
    job = split(store, spec)
    shard = take(store)

    assert store.leases.restart(shard)

    assert state_of(store, job) is State.QUEUED
    again = take(store)
    assert isinstance(again, Claim)
    assert again.plan is None


def test_a_worker_takes_only_what_is_in_its_queues(store, spec):
    store.create("acme", spec, queue="gpu-large")

    assert take(store, queues=["cpu", "gpu-small"]) is None
    assert take(store, queues=["gpu-large"]) is not None


def test_a_named_job_is_taken_and_no_other(store, spec):
    store.create("acme", spec)
    job, _ = store.create("acme", spec)

    assert take(store, initialization_id=job.id).id == job.id
    assert take(store, initialization_id=job.id) is None


def test_racing_workers_share_the_shards_without_doubles_and_one_builds(store, spec):
    split(store, spec, count=12)
    taken, builds = [], []
    start = threading.Barrier(6)

    def work():
        start.wait()
        while (unit := take(store)) is not None:
            if isinstance(unit, Claim):
                builds.append(unit)
                return
            taken.append(unit.number)
            assert finish(store, unit)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(taken) == list(range(12))
    assert len(builds) == 1
    assert len(builds[0].shards) == 12


def test_a_problem_of_a_claim_that_is_lost_is_not_written(store, spec):
    job = split(store, spec, count=1)
    late = take(store, lease=OVER)
    take(store)

    assert not store.leases.fail(late, NumericalFailure("x").problem())

    assert state_of(store, job) is State.RUNNING
    assert Stage.SHARDS == "shards"


def test_a_claim_of_a_shard_does_not_outlive_its_cut(store, spec):
    """Numbers and attempts begin anew when a job is cut anew; an old claim must not settle a new shard."""
    split(store, spec)
    old = take(store)
    store.leases.restart(take(store))
    held = take(store)
    shards = [(StatisticsTask(rows=10, tokens=100), file(f"other-{number}")) for number in range(3)]
    store.leases.split(held, PLAN, shards)
    new = take(store)
    assert (new.number, new.attempt) == (old.number, old.attempt)

    assert store.leases.standing(old) is Standing.LOST
    assert store.leases.renew(old, lease=LEASE) is Standing.LOST
    assert not finish(store, old)
    assert finish(store, new)


def test_handing_a_shard_back_is_no_outage(store, spec):
    split(store, spec, count=1)
    for _ in range(5):
        store.leases.hand_back(take(store))

    assert store.leases.retry(take(store), PROBLEM, max_attempts=2, pause=timedelta(0))

    assert take(store) is not None


def test_dead_workers_of_shards_are_counted(store, spec):
    split(store, spec)
    take(store, lease=OVER)
    take(store)

    assert store.outbox.census().deaths == 1


def test_a_request_of_a_newer_version_is_left_to_a_newer_worker_and_blocks_nobody(store, spec):
    newer, _ = store.create("acme", spec)
    job, _ = store.create("acme", spec)
    with store._engine.begin() as connection:
        stored = spec.model_dump_json()[:-1] + ', "field_of_the_future": 1}'
        connection.execute(
            text("UPDATE initializations SET spec = :spec WHERE id = :id"), {"spec": stored, "id": newer.id}
        )

    assert take(store).id == job.id
    assert take(store) is None
    assert store.get("acme", newer.id).state is State.QUEUED
    assert len(store.page("acme", limit=10)[0]) == 2


@pytest.mark.parametrize(
    ("table", "column"), [("datasets", "resource"), ("initializations", "plan"), ("shards", "task")]
)
def test_what_a_newer_version_has_stored_of_a_job_is_left_to_it_and_blocks_nobody(store, spec, table, column):
    newer = store.create("acme", spec)[0] if table == "datasets" else split(store, spec)
    if column == "plan":
        for shard in [take(store) for _ in range(3)]:
            finish(store, shard)
    with store._engine.begin() as connection:
        before = json.loads(connection.exec_driver_sql(f"SELECT CAST({column} AS TEXT) FROM {table}").scalars().first())
        stored = {"stored": json.dumps(before | {"field_of_the_future": 1})}
        connection.execute(text(f"UPDATE {table} SET {column} = :stored"), stored)
    add_dataset(store, dataset_id="ds_2")
    job, _ = store.create("acme", spec.model_copy(update={"dataset_id": "ds_2"}))

    assert take(store).id == job.id
    assert take(store) is None
    assert store.get("acme", newer.id).attempt == (0 if table == "datasets" else 1)
