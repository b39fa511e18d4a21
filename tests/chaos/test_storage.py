"""S3 away, slow, breaking in the middle of an upload, and giving back other bytes."""

import time

import pytest

from cluster.processes import wait_until
from tests.chaos.orders import place
from tests.chaos.verdict import settle


def at(arena, moment, kind="plain", *, seconds=0.5):
    """Submit a job and return when a worker has reached a moment, where it waits a little."""
    order = place(arena.orders, "sleep", moment, seconds=seconds)
    jobs = arena.submit(kind)
    wait_until(lambda: order.taken_by is not None, f"a worker reaches {moment}", timeout=60)
    return jobs


@pytest.mark.parametrize("moment", ["fetch", pytest.param("upload", marks=pytest.mark.short), "manifest"])
def test_a_storage_that_refuses_for_a_while_costs_time_only(arena, tally, moment):
    jobs = at(arena, moment)
    arena.storage.refuse()
    tally.fault(f"S3 refuses at {moment}")
    time.sleep(4)

    settle(arena, jobs)


def test_a_storage_that_stays_away_fails_jobs_with_a_stated_error(arena, tally):
    jobs = at(arena, "upload")
    arena.storage.refuse()
    tally.fault("S3 refuses for long")
    time.sleep(40)

    settle(arena, jobs, errors={"storage_unavailable"})


def test_a_slow_storage_costs_time_only(arena, tally):
    jobs = arena.submit("plain", 2)
    arena.storage.rate, arena.storage.latency = 30_000, 0.1
    tally.fault("S3 slow")
    time.sleep(10)

    settle(arena, jobs)


@pytest.mark.parametrize(
    ("moment", "kind"),
    [pytest.param("upload", "plain", marks=pytest.mark.short), ("shard_upload", "sharded")],
)
def test_an_upload_that_breaks_half_way_is_made_again(arena, tally, moment, kind):
    jobs = at(arena, moment, kind)
    sprung = arena.storage.cut_after(3000, upload=True)
    assert sprung.wait(60)
    tally.fault(f"S3 link reset half-way through {moment}")

    settle(arena, jobs)


def test_bytes_that_change_on_their_way_up_are_not_published(arena, tally):
    jobs = at(arena, "upload")
    sprung = arena.storage.corrupt_after(3000, upload=True)
    assert sprung.wait(60)
    tally.fault("S3 upload corrupted")

    settle(arena, jobs, errors={"checksum_mismatch", "storage_unavailable"})


@pytest.mark.short
def test_bytes_that_change_on_their_way_down_are_not_used(arena, tally):
    jobs = at(arena, "fetch")
    sprung = arena.storage.corrupt_after(1500, upload=False)
    assert sprung.wait(60)
    tally.fault("S3 download corrupted")

    settle(arena, jobs, errors={"checksum_mismatch"})


def test_a_storage_that_is_killed_and_comes_back_costs_time_only(arena, tally):
    jobs = at(arena, "upload")
    arena.restart(arena.servers.storage, down=1)
    tally.fault("S3 killed")

    settle(arena, jobs)
