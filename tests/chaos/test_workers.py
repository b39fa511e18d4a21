"""Workers that freeze, whose clocks are wrong, that run out of disk or memory, or are told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.processes import lives, wait_until
from tests.chaos.arena import LEASE_SECONDS
from tests.chaos.orders import place
from tests.chaos.verdict import query, settle


def state_of(arena, job):
    return query(arena, "SELECT state, attempt FROM initializations WHERE id = %s", job.id)[0]


@pytest.mark.parametrize("moment", ["statistics", pytest.param("manifest", marks=pytest.mark.short), "published"])
def test_a_worker_that_freezes_beyond_its_lease_publishes_nothing(arena, tally, moment):
    order = place(arena.orders, "stop_child", moment)
    (job,) = arena.submit("plain")
    wait_until(lambda: order.taken_by is not None, f"a worker reaches {moment}", timeout=60)
    tally.fault(f"lease over under a live worker at {moment}")
    wait_until(lambda: state_of(arena, job)["state"] == "succeeded", "another worker has done it", timeout=60)
    os.kill(order.taken_by, signal.SIGCONT)
    log = arena.worker_of(order.taken_by).log
    wait_until(lambda: _said(log, ("lost", "superseded"), job), "the frozen one notices", timeout=60)

    (ending,) = settle(arena, [job]).values()

    assert ending.attempts == 2


def _said(log, words, job):
    return any(f"{word} id={job.id} attempt=1" in log.read_text() for word in words)


def test_clocks_that_are_ten_minutes_off_change_nothing(arena, tally, tmp_path):
    library = tmp_path / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source)], check=True)
    for process in list(arena.workers):
        arena.remove_worker(process)
    skewed = [
        arena.add_worker(f"skewed-{shift}", LD_PRELOAD=str(library), CLOCK_SHIFT=str(shift)) for shift in (600, -600)
    ]
    try:
        arena.ready()
        assert _clock(library, 600) - time.time() == pytest.approx(600, abs=5)
        tally.fault("worker's clock off by 10 minutes", 2)
        order = place(arena.orders, "kill_child", "statistics")
        jobs = [*arena.submit("plain", 4), *arena.submit("sharded")]
        wait_until(lambda: order.taken_by is not None, "a worker reaches statistics", timeout=60)
        endings = settle(arena, jobs)

        assert sum(ending.failures for ending in endings.values()) <= 1
    finally:
        for process in skewed:
            arena.remove_worker(process)
        for number in (1, 2):
            arena.add_worker(f"worker-{number}")


def _clock(library, shift):
    """Return what a process with this clock thinks the time is."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_SHIFT": str(shift)}
    command = [sys.executable, "-c", "import time; print(time.time())"]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("moment", ["loading", "statistics", "factors"])
def test_a_full_disk_is_a_stated_error(arena, tally, moment):
    order = place(arena.orders, "fill_disk", moment)
    jobs = arena.submit("plain", 3)
    wait_until(lambda: order.taken_by is not None, f"a worker reaches {moment}", timeout=60)
    tally.fault(f"disk full at {moment}")

    endings = settle(arena, jobs, errors={"storage_full", "scratch_full"})

    assert any(ending.error or ending.attempts > 1 for ending in endings.values())
    assert [ending.state for ending in endings.values()].count("succeeded") >= 2  # the worker lives on


@pytest.mark.parametrize("action", [pytest.param("exhaust_memory", marks=pytest.mark.short), "exhaust_tensors"])
def test_memory_that_runs_out_is_a_stated_error(arena, tally, action):
    order = place(arena.orders, action, "statistics")
    jobs = arena.submit("plain", 3)
    wait_until(lambda: order.taken_by is not None, "a worker reaches statistics", timeout=60)
    tally.fault("out of memory in the child")

    endings = settle(arena, jobs, errors={"out_of_memory"})

    assert [ending.error for ending in endings.values()].count("out_of_memory") == 1
    assert [ending.state for ending in endings.values()].count("succeeded") == 2


@pytest.mark.short
def test_a_broken_accelerator_costs_its_process_and_no_job(arena, tally):
    order = place(arena.orders, "break_device", "statistics")
    jobs = arena.submit("plain", 2)
    wait_until(lambda: order.taken_by is not None, "a worker reaches statistics", timeout=60)
    tally.fault("accelerator broken in the child")

    endings = settle(arena, jobs)

    assert sorted(ending.attempts for ending in endings.values()) == [1, 2]
    assert all(ending.failures == 0 for ending in endings.values())  # an outage is no dead worker
    assert not lives(order.taken_by)


def test_a_job_whose_workers_always_die_is_given_up(arena, tally):
    from tests.chaos.arena import MAX_ATTEMPTS

    for _ in range(MAX_ATTEMPTS):
        place(arena.orders, "kill_child", "statistics")
    (job,) = arena.submit("plain")
    tally.fault("child killed at every attempt", MAX_ATTEMPTS)
    wait_until(lambda: state_of(arena, job)["state"] == "failed", "the job is given up", timeout=240)

    (ending,) = settle(arena, [job], errors={"worker_lost"}).values()

    assert ending.attempts == MAX_ATTEMPTS


@pytest.mark.short
def test_a_worker_that_is_told_to_stop_hands_its_work_back_at_once(arena, tally):
    order = place(arena.orders, "terminate_worker", "statistics")
    (job,) = arena.submit("plain")
    wait_until(lambda: order.taken_by is not None, "a worker reaches statistics", timeout=60)
    began = time.monotonic()
    tally.fault("soft shutdown during a batch")
    wait_until(lambda: state_of(arena, job)["attempt"] == 2, "another worker has it", timeout=60)
    seconds = time.monotonic() - began

    (ending,) = settle(arena, [job]).values()

    tally.figure(f"soft shutdown: taken over {seconds:.1f} s after SIGTERM; lease {LEASE_SECONDS:g} s")
    assert ending.failures == 0
    assert seconds < LEASE_SECONDS / 2
