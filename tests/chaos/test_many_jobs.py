"""Many jobs, many faults: 200 jobs through 3 workers with kills at random, and a soak as long as asked for."""

import os

import pytest

from tests.chaos.storm import Storm
from tests.chaos.verdict import settle

# With a stated error may end what was hit once too often, or what cannot be repaired.
STATED = {
    "worker_lost",
    "storage_unavailable",
    "store_unavailable",
    "storage_full",
    "scratch_full",
    "out_of_memory",
    "checksum_mismatch",
}


@pytest.fixture
def third_worker(arena):
    process = arena.add_worker()
    arena.ready()
    yield process
    arena.remove_worker(process)


def test_two_hundred_jobs_survive_kills_at_random_intervals(arena, tally, rng, third_worker):
    storm = Storm(arena, rng, kill_seconds=max(3 * arena.start_seconds, 5), kills_only=True)

    jobs = storm.blow(200, seconds=1800)
    endings = settle(arena, jobs, errors={"worker_lost"}, timeout=300)

    assert len(endings) == 200
    tally.figure(f"200 jobs through 3 workers: {len(storm.history)} kills, one every {storm.kill_seconds:.0f} s or so")


@pytest.mark.short
def test_jobs_survive_faults_of_all_kinds(arena, tally, rng):
    """The soak; JOBS and SECONDS bound it, whichever is reached first."""
    count, seconds = int(os.environ.get("JOBS") or 20), float(os.environ.get("SECONDS") or 60)
    storm = Storm(arena, rng, kill_seconds=max(3 * arena.start_seconds, 5))

    jobs = storm.blow(count, seconds)
    settle(arena, jobs, errors=STATED, timeout=300)

    assert jobs
    tally.figure(f"soak: {len(jobs)} jobs, {len(storm.history)} faults; a worker starts in {arena.start_seconds:.1f} s")
