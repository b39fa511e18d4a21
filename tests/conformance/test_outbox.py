import time
from datetime import timedelta

import pytest

from d2lora.initializations import State
from tests.conformance.test_shards import finish, split, take
from tests.conformance.test_store import LEASE, OVER, PROBLEM, RESULT, state_of

NOW = timedelta(0)


def drain(store):
    due = store.outbox.due()
    store.outbox.published(due)
    return [wake_up.initialization_id for wake_up in due]


def test_a_new_job_has_a_wake_up_in_the_same_transaction(store, spec, monkeypatch):
    job, _ = store.create("acme", spec, queue="gpu-small")

    (wake_up,) = store.outbox.due()
    assert (wake_up.initialization_id, wake_up.queue) == (job.id, "gpu-small")

    def broken(*_arguments, **_named):
        raise RuntimeError

    monkeypatch.setattr("d2lora.store.wake", broken)
    with pytest.raises(RuntimeError):
        store.create("acme", spec)
    monkeypatch.undo()
    assert len(store.page("acme", limit=10)[0]) == 1


def test_a_repeated_request_wakes_nobody_again(store, spec):
    store.create("acme", spec, idempotency_key="k")
    store.create("acme", spec, idempotency_key="k")

    assert len(store.outbox.due()) == 1


def test_what_is_published_is_gone_and_the_rest_stays(store, spec):
    for _ in range(3):
        store.create("acme", spec)
    due = store.outbox.due()

    store.outbox.published(due[:2])

    assert store.outbox.due() == due[2:]


def test_everything_that_frees_a_unit_wakes_somebody(store, spec):
    job = split(store, spec)
    assert drain(store) == [job.id] * 4  # the job, and three shards
    shards = [take(store) for _ in range(3)]
    store.leases.hand_back(shards[0])
    assert drain(store) == [job.id]
    store.leases.retry(shards[1], PROBLEM, max_attempts=9, pause=NOW)
    assert drain(store) == [job.id]
    finish(store, shards[2])
    assert drain(store) == []
    for _ in range(2):
        finish(store, take(store))
    assert drain(store) == [job.id]  # the build
    store.leases.hand_back(take(store))
    assert drain(store) == [job.id]


def test_a_paused_retry_is_due_only_after_its_pause(store, spec):
    store.create("acme", spec)
    drain(store)

    store.leases.retry(take(store), PROBLEM, max_attempts=9, pause=timedelta(seconds=1))

    assert drain(store) == []
    time.sleep(1.1)
    assert len(drain(store)) == 1


def test_one_replica_leads_until_it_is_silent_or_resigns(store):
    assert store.outbox.lead("a", lease=LEASE)
    assert not store.outbox.lead("b", lease=LEASE)
    assert store.outbox.lead("a", lease=OVER)
    assert store.outbox.lead("b", lease=LEASE)
    assert not store.outbox.lead("a", lease=LEASE)
    store.outbox.resign("a")
    assert not store.outbox.lead("a", lease=LEASE)
    store.outbox.resign("b")
    assert store.outbox.lead("a", lease=LEASE)


def test_a_message_that_was_lost_is_sent_again(store, spec):
    job, _ = store.create("acme", spec)
    drain(store)

    assert store.outbox.forgotten("cpu", waiting=1, silent_for=NOW) == 0  # the broker still has it
    assert store.outbox.forgotten("cpu", waiting=0, silent_for=timedelta(seconds=60)) == 0  # it may be on its way
    assert store.outbox.forgotten("cpu", waiting=0, silent_for=NOW) == 1

    assert drain(store) == [job.id]


def test_a_wake_up_that_is_still_in_the_outbox_is_not_lost(store, spec):
    store.create("acme", spec)

    assert store.outbox.forgotten("cpu", waiting=0, silent_for=NOW) == 0


def test_what_a_dead_worker_held_is_woken_for_another(store, spec):
    job, _ = store.create("acme", spec)
    drain(store)
    take(store, lease=OVER)

    assert store.outbox.forgotten("cpu", waiting=0, silent_for=NOW) == 1
    assert drain(store) == [job.id]


def test_every_free_shard_gets_a_message_of_its_own(store, spec):
    job = split(store, spec, count=3)
    drain(store)
    take(store)

    assert store.outbox.forgotten("cpu", waiting=0, silent_for=NOW) == 2
    assert drain(store) == [job.id] * 2


def test_what_somebody_holds_is_left_alone(store, spec):
    store.create("acme", spec)
    take(store)
    drain(store)

    assert store.outbox.forgotten("cpu", waiting=0, silent_for=NOW) == 0


def test_a_job_that_should_stop_and_that_nobody_holds_ends(store, spec):
    job, _ = store.create("acme", spec)
    take(store, lease=OVER)
    store.cancel("acme", job.id)

    assert store.outbox.end_cancelling() == 1

    assert state_of(store, job) is State.CANCELLED


def test_results_expire_and_their_files_are_leftovers(store, spec):
    job, _ = store.create("acme", spec)
    store.leases.succeed(take(store), RESULT, "kept/")
    assert store.outbox.expire(retention=LEASE) == 0

    assert store.outbox.expire(retention=OVER) == 1

    assert state_of(store, job) is State.EXPIRED
    (leftover,) = store.outbox.leftovers(settled_for=LEASE)
    assert (leftover.id, leftover.kept) == (job.id, None)
    store.outbox.cleaned(leftover)
    assert store.outbox.leftovers(settled_for=LEASE) == []


def test_leftovers_are_removed_only_some_time_after_the_end(store, spec):
    job = split(store, spec, count=1)
    finish(store, take(store))
    store.leases.succeed(take(store), RESULT, "kept/")

    assert store.outbox.leftovers(settled_for=LEASE) == []
    (leftover,) = store.outbox.leftovers(settled_for=OVER)
    assert (leftover.id, leftover.attempts, leftover.kept) == (job.id, 2, "kept/")


def test_a_result_that_expired_while_it_was_tidied_is_tidied_again(store, spec):
    store.create("acme", spec)
    store.leases.succeed(take(store), RESULT, "kept/")
    (leftover,) = store.outbox.leftovers(settled_for=OVER)
    store.outbox.expire(retention=OVER)

    store.outbox.cleaned(leftover)

    assert [one.kept for one in store.outbox.leftovers(settled_for=OVER)] == [None]


def test_the_census_counts_units_waits_and_failures(store, spec):
    split(store, spec)
    store.create("acme", spec, queue="gpu-large")
    job, _ = store.create("acme", spec)
    store.leases.fail(take(store, initialization_id=job.id), PROBLEM)

    census = store.outbox.census()

    assert census.units == {("cpu", "running"): 1, ("cpu", "shards"): 3, ("gpu-large", "queued"): 1}
    assert set(census.oldest_free_seconds) == {"cpu", "gpu-large"}
    assert all(0 <= seconds < 60 for seconds in census.oldest_free_seconds.values())
    assert census.failed == {"numerical_failure": 1}
    assert census.pending == 6


def test_a_paused_job_hides_no_lost_message(store, spec):
    store.create("acme", spec)
    drain(store)
    store.leases.retry(take(store), PROBLEM, max_attempts=9, pause=timedelta(seconds=60))
    lost, _ = store.create("acme", spec)
    drain(store)
    assert store.outbox.census().pending == 0

    assert store.outbox.forgotten("cpu", waiting=0, silent_for=NOW) == 1

    assert drain(store) == [lost.id]


def test_no_more_is_woken_than_is_missing(store, spec):
    for _ in range(5):
        store.create("acme", spec)
    drain(store)

    assert store.outbox.forgotten("cpu", waiting=3, silent_for=NOW) == 2
