"""kill -9 of the child, the worker and the API, at every moment that a job passes."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cluster.processes import wait_until
from tests.chaos.arena import LEASE_SECONDS, RECONCILE_SECONDS
from tests.chaos.orders import PHASES, SHARD_STEPS, STEPS, place
from tests.chaos.verdict import TERMINAL, query, settle

MOMENTS = [*PHASES, *STEPS]
IN_CI = {("child", "statistics"), ("worker", "manifest"), ("child", "published")}


def cases():
    for victim in ("child", "worker"):
        for moment in MOMENTS:
            marks = [pytest.mark.short] if (victim, moment) in IN_CI else []
            yield pytest.param(victim, moment, marks=marks)


@pytest.mark.parametrize(("victim", "moment"), list(cases()))
def test_a_worker_killed_at_any_moment_costs_an_attempt_and_no_job(arena, tally, victim, moment):
    order = place(arena.orders, f"kill_{victim}", moment)
    jobs = arena.submit("measured" if moment == "evaluation" else "plain")
    wait_until(lambda: order.taken_by is not None, f"a worker reaches {moment}", timeout=60)
    tally.fault(f"{victim} killed at {moment}")

    (ending,) = settle(arena, jobs).values()

    assert ending.failures == (0 if moment in {"claim", "succeeded"} else 1)
    assert ending.attempts == ending.failures + 1


@pytest.mark.short
def test_a_killed_workers_job_is_resumed_within_its_lease(arena, tally):
    order = place(arena.orders, "kill_worker", "statistics")
    jobs = arena.submit("plain")
    wait_until(lambda: order.taken_by is not None, "a worker reaches statistics", timeout=60)
    tally.fault("worker killed at statistics")

    (ending,) = settle(arena, jobs).values()

    first, second = [event["at"] for event in ending.events if event["type"] == "running"]
    seconds = (second - first).total_seconds()
    tally.figure(f"resumed {seconds:.1f} s after a killed worker's claim; lease {LEASE_SECONDS:g} s")
    assert seconds < LEASE_SECONDS + 4 * RECONCILE_SECONDS + 2


@pytest.mark.short
def test_an_idle_worker_claims_within_a_second(arena, tally):
    waits = []
    for _ in range(5):
        jobs = arena.submit("plain")
        (ending,) = settle(arena, jobs).values()
        waits.append(ending.seconds("queued", "running"))

    tally.figure(f"submit to first claim with idle workers: {min(waits):.2f} to {max(waits):.2f} s in 5 jobs")
    assert max(waits) < 1.0


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=[pytest.mark.short] if moment == "shard" else []) for moment in SHARD_STEPS]
)
def test_a_worker_killed_on_a_shard_costs_that_shard_alone(arena, tally, moment):
    order = place(arena.orders, "kill_worker", moment)
    jobs = arena.submit("sharded")
    attempts = _watch_shards(arena, jobs[0].id)
    assert order.taken_by is not None
    tally.fault(f"worker killed at {moment}")

    (ending,) = settle(arena, jobs).values()

    again = [number for number, attempt in attempts.items() if attempt > 1]
    assert len(attempts) >= 4
    if moment.startswith("shard"):
        assert len(again) == 1
        assert ending.failures == 0
    else:
        assert again == []
        assert ending.failures == 1


def _watch_shards(arena, job_id):
    """Return the attempts of every statistics shard, as they were last seen before the job's end."""
    seen = {}
    end = time.monotonic() + 120
    while query(arena, "SELECT state FROM initializations WHERE id = %s", job_id)[0]["state"] not in TERMINAL:
        assert time.monotonic() < end
        statement = "SELECT number, attempt FROM shards WHERE initialization_id = %s AND kind = 'statistics'"
        seen |= {row["number"]: row["attempt"] for row in query(arena, statement, job_id)}
        time.sleep(0.1)
    return seen


def test_an_orphaned_child_ends_and_its_job_is_done_once(arena, tally):
    order = place(arena.orders, "sleep", "statistics", seconds=2)
    jobs = arena.submit("plain", 3)
    wait_until(lambda: order.taken_by is not None, "a worker reaches statistics", timeout=60)
    child = order.taken_by
    os.kill(arena.worker_of(child).pid, signal.SIGKILL)
    tally.fault("worker killed without its child")

    settle(arena, jobs)

    wait_until(lambda: not Path(f"/proc/{child}").exists(), "the orphan ends", timeout=60)


@pytest.mark.short
def test_killing_the_leading_replica_loses_no_job(arena, tally):
    before = arena.submit("plain", 2)
    wait_until(lambda: _leader(arena) is not None, "a replica leads", timeout=20)
    leader = _leader(arena)
    leader.kill()
    tally.fault("leading API replica killed")
    began = time.monotonic()

    after = arena.submit("plain", 2)
    settle(arena, [*before, *after])

    wait_until(lambda: _leader(arena) is not None, "a replica leads again", timeout=20)
    tally.figure(f"jobs submitted to the other replica ended {time.monotonic() - began:.1f} s after the leader's kill")


def _leader(arena):
    rows = query(arena, "SELECT holder FROM leaders WHERE lease_until > clock_timestamp()")
    pids = [int(row["holder"].split(":")[1]) for row in rows]
    return next((process for process in arena.services if process.pid in pids), None)


def test_replicas_killed_while_jobs_are_submitted_make_none_twice(arena, tally, rng):
    done = threading.Event()

    def kill_at_random():
        while not done.wait(rng.uniform(1, 3)):
            rng.choice(arena.services).kill()
            tally.fault("API replica killed")

    thread = threading.Thread(target=kill_at_random)
    thread.start()
    try:
        jobs = arena.submit("plain", 12)
    finally:
        done.set()
        thread.join()

    settle(arena, jobs)
