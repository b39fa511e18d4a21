"""Redis away, empty, silent; and wake-ups that come twice or late."""

import time

import pytest

from cluster.processes import wait_until
from tests.chaos.orders import place
from tests.chaos.verdict import query, settle


def busy(arena, count=4):
    """Submit jobs and return once a worker works on one, for two seconds at least."""
    order = place(arena.orders, "sleep", "statistics", seconds=2)
    jobs = arena.submit("plain", count)
    wait_until(lambda: order.taken_by is not None, "a worker reaches statistics", timeout=60)
    return jobs


def test_a_broker_that_is_killed_and_comes_back_costs_time_only(arena, tally):
    jobs = busy(arena)
    arena.restart(arena.servers.broker, down=1)
    tally.fault("Redis killed")

    endings = settle(arena, jobs)

    assert all(ending.failures == 0 for ending in endings.values())


@pytest.mark.short
def test_a_broker_that_comes_back_empty_costs_time_only(arena, tally):
    jobs = busy(arena)
    arena.servers.broker.process.kill()
    arena.servers.broker.discard()
    arena.servers.broker.start()
    tally.fault("Redis restarted empty")

    endings = settle(arena, jobs)

    assert all(ending.failures == 0 for ending in endings.values())


@pytest.mark.parametrize("seconds", [3, 20])
def test_a_broker_that_is_paused_costs_time_only(arena, tally, seconds):
    jobs = busy(arena)
    arena.servers.broker.process.pause()
    tally.fault("Redis paused")
    jobs += arena.submit("plain", 2)  # is accepted meanwhile
    time.sleep(seconds)
    arena.servers.broker.process.resume()

    settle(arena, jobs)


@pytest.mark.short
def test_a_job_is_accepted_without_a_broker_and_runs_when_it_is_back(arena, tally):
    arena.servers.broker.process.kill()
    tally.fault("Redis unreachable at submit")
    began = time.monotonic()
    jobs = arena.submit("plain", 2)
    tally.figure(f"2 jobs accepted in {time.monotonic() - began:.2f} s while Redis was down")
    time.sleep(2)
    (states,) = {row["state"] for row in query(arena, "SELECT state FROM initializations WHERE id = %s", jobs[0].id)}
    assert states == "queued"
    arena.servers.broker.start()

    settle(arena, jobs)


@pytest.mark.short
def test_wake_ups_that_come_many_times_and_in_any_order_run_a_job_once(arena, tally, rng):
    ended = arena.submit("plain")
    settle(arena, ended)
    jobs = arena.submit("plain", 4)
    messages = [job.id for job in [*jobs, *ended]] * 5
    rng.shuffle(messages)
    arena.publish(messages)
    tally.fault("wake-up doubled or out of order", len(messages))

    endings = settle(arena, [*jobs])

    assert all(ending.attempts == 1 for ending in endings.values())


def test_links_to_the_broker_that_break_cost_time_only(arena, tally, rng):
    jobs = busy(arena, 8)
    for _ in range(5):
        arena.broker.cut()
        tally.fault("Redis links reset")
        time.sleep(rng.uniform(0.2, 1))

    settle(arena, jobs)
