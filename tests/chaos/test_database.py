"""PostgreSQL restarted in the middle of a claim, of a commit, and at any time."""

import time

import pytest

from cluster.processes import wait_until
from tests.chaos.orders import place
from tests.chaos.verdict import settle


def at_the_commit_after(arena, moment, action, *, forwarded):
    """Act when a worker commits what it does after a moment; the commit has reached the server, or never will."""
    order = place(arena.orders, "sleep", moment, seconds=0.3)
    jobs = arena.submit("plain")
    wait_until(lambda: order.taken_by is not None, f"a worker reaches {moment}", timeout=60)
    sprung = arena.database.when(b"COMMIT", action, forwarded=forwarded)
    assert sprung.wait(60)
    return jobs


@pytest.mark.parametrize("forwarded", [False, True])
@pytest.mark.parametrize("moment", ["claim", pytest.param("published", marks=pytest.mark.short)])
def test_a_restart_in_the_middle_of_a_commit_loses_and_doubles_nothing(arena, tally, moment, forwarded):
    jobs = at_the_commit_after(arena, moment, lambda: arena.restart(arena.servers.database), forwarded=forwarded)
    tally.fault(f"PostgreSQL restarted at the commit after {moment}")

    settle(arena, jobs)


@pytest.mark.parametrize("forwarded", [False, True])
@pytest.mark.parametrize("moment", ["claim", "published"])
def test_a_link_that_breaks_in_the_middle_of_a_commit_loses_and_doubles_nothing(arena, tally, moment, forwarded):
    jobs = at_the_commit_after(arena, moment, lambda: None, forwarded=forwarded)
    tally.fault(f"PostgreSQL link reset at the commit after {moment}")

    settle(arena, jobs)


def test_restarts_while_jobs_run_and_are_submitted_lose_nothing(arena, tally, rng):
    jobs = []
    for _ in range(3):
        jobs += arena.submit("plain", 2)
        time.sleep(rng.uniform(0, 1))
        arena.restart(arena.servers.database, down=rng.uniform(0, 2))
        tally.fault("PostgreSQL killed and restarted")

    settle(arena, jobs)


def test_a_database_that_hangs_costs_time_only(arena, tally):
    jobs = arena.submit("plain", 3)
    arena.database.hanging = True
    tally.fault("PostgreSQL link hangs")
    time.sleep(4)
    arena.database.hanging = False

    settle(arena, jobs)
