"""What must hold at the end of every scenario, whatever was done to the cluster.

Every accepted job has ended, in one state, with one artifact set or with a stated error; nothing of its other attempts
is left; nothing waits any longer. Everything is read past the proxies: from the database and the bucket themselves.
"""

import hashlib
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import dict_row
from safetensors.torch import load

from cluster.stack import BUCKET
from tests.chaos.arena import MAX_ATTEMPTS, Arena, Job

TERMINAL = ("succeeded", "failed", "cancelled", "expired")


@dataclass(frozen=True)
class Ending:
    """How a job has ended."""

    job: Job
    state: str
    attempts: int
    failures: int
    error: str | None
    events: list[dict[str, Any]]

    def seconds(self, first: str, then: str) -> float:
        """Return the time from the first event of one type to the first later one of another."""
        began = next(event for event in self.events if event["type"] == first)
        ended = next(event for event in self.events if event["type"] == then and event["seq"] > began["seq"])
        return (ended["at"] - began["at"]).total_seconds()


def settle(
    arena: Arena,
    jobs: Sequence[Job],
    *,
    errors: Collection[str] = (),
    states: Collection[str] = ("succeeded",),
    timeout: float = 120.0,
) -> dict[str, Ending]:
    """End the faults, wait for the jobs, check all that must hold, and return how each job ended, by its ID.

    ``errors`` are the codes with which jobs of this scenario may fail.
    """
    arena.heal()
    states = {*states, *(["failed"] if errors else [])}
    stuck = _wait(arena, jobs, timeout)
    arena.tally.stuck += len(stuck)
    endings = _endings(arena, jobs)
    for ending in endings.values():
        arena.tally.states[ending.state] += 1
        if ending.error is not None:
            arena.tally.errors[ending.error] += 1
    faults = [f"{job_id} is still {state}" for job_id, state in stuck.items()]
    if not stuck:
        faults += _faults(arena, jobs, endings)
    faults += [
        f"{ending.job.id} {ending.state} with {ending.error}"
        for ending in endings.values()
        if ending.state in TERMINAL and (ending.state not in states or (ending.error and ending.error not in errors))
    ]
    assert not faults, "\n".join([*faults, *(_logs(arena))])
    return endings


def query(arena: Arena, statement: str, *arguments: Any) -> list[dict[str, Any]]:
    """Return rows of the database of record, read past the proxy."""
    server = arena.servers.database
    where = f"host=127.0.0.1 port={server.port} user=postgres dbname=postgres connect_timeout=5"
    with psycopg.connect(where, row_factory=dict_row, autocommit=True) as connection:
        return connection.execute(statement.encode(), arguments).fetchall()


def _wait(arena: Arena, jobs: Sequence[Job], timeout: float) -> dict[str, str]:
    """Return the jobs that have not ended, or whose storage is not tidy, when the time is over."""
    end = time.monotonic() + timeout
    ids = [job.id for job in jobs]
    while True:
        rows = query(arena, "SELECT id, state, cleaned FROM initializations WHERE id = ANY(%s)", ids)
        left = {row["id"]: row["state"] for row in rows if row["state"] not in TERMINAL or not row["cleaned"]}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


def _endings(arena: Arena, jobs: Sequence[Job]) -> dict[str, Ending]:
    ids = [job.id for job in jobs]
    by_id = {job.id: job for job in jobs}
    rows = query(arena, "SELECT * FROM initializations WHERE id = ANY(%s)", ids)
    events = query(arena, "SELECT * FROM events WHERE initialization_id = ANY(%s) ORDER BY seq", ids)
    return {
        row["id"]: Ending(
            job=by_id[row["id"]],
            state=row["state"],
            attempts=row["attempt"],
            failures=row["failures"],
            error=row["error"] and row["error"]["code"],
            events=[event for event in events if event["initialization_id"] == row["id"]],
        )
        for row in rows
    }


def _faults(arena: Arena, jobs: Sequence[Job], endings: dict[str, Ending]) -> list[str]:
    """Return what is wrong with jobs that have all ended."""
    found = [f"{job.id} was accepted and is not there" for job in jobs if job.id not in endings]
    arena.tally.lost += len(found)
    client = arena.servers.storage.client()
    prefixes = {row["id"]: row["prefix"] for row in query(arena, "SELECT id, prefix FROM initializations")}
    for ending in endings.values():
        ends = [event["type"] for event in ending.events if event["type"] in TERMINAL]
        if len(ends) != 1:
            arena.tally.duplicated += 1
            found.append(f"{ending.job.id} has ended {len(ends)} times: {ends}")
        if ending.failures > MAX_ATTEMPTS:
            found.append(f"{ending.job.id} was tried after {ending.failures} failures")
        keys = _keys(client, f"t/local/initializations/{ending.job.id}/")
        manifests = [key for key in keys if key.endswith("/manifest.json")]
        if ending.state != "succeeded":
            if keys:
                found.append(f"{ending.job.id} {ending.state} and left {keys}")
            continue
        if len(manifests) > 1:
            arena.tally.duplicated += 1
        wrong = _wrong_files(client, keys, prefixes[ending.job.id], arena.adapters.get(ending.job.kind))
        if wrong:
            arena.tally.lost += 1
            found += [f"{ending.job.id}: {fault}" for fault in wrong]
    found += _waiting(arena, jobs)
    return found


def _wrong_files(client: Any, keys: list[str], prefix: str, adapter: str | None) -> list[str]:
    """Return what is wrong with a succeeded job's files."""
    if prefix + "manifest.json" not in keys:
        return [f"no manifest below {prefix}, only {keys}"]
    manifest = json.loads(_read(client, prefix + "manifest.json"))
    names = {entry["name"] for entry in manifest["files"]} | {"manifest.json"}
    found = []
    if {prefix + name for name in names} != set(keys):
        found.append(f"the manifest lists {sorted(names)}, the bucket holds {keys}")
    for entry in manifest["files"]:
        content = _read(client, prefix + entry["name"])
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry["sha256"] or len(content) != entry["size"]:
            found.append(f"{entry['name']} is not what the manifest says")
        if entry["name"] == "adapter_model.safetensors":
            if not load(content):
                found.append("the adapter has no tensors")
            if adapter is not None and digest != adapter:
                found.append(f"the adapter is {digest[:12]}, undisturbed jobs give {adapter[:12]}")
    return found


def _waiting(arena: Arena, jobs: Sequence[Job]) -> list[str]:
    """Return what still waits for something, or is held by somebody, although every job has ended."""
    ids = [job.id for job in jobs]
    found = []
    old = "SELECT count(*) FROM outbox WHERE due_at < clock_timestamp() - interval '5 seconds'"
    if count := query(arena, old)[0]["count"]:
        found.append(f"{count} wake-ups are still in the outbox")
    held = "SELECT id FROM initializations WHERE id = ANY(%s) AND (worker IS NOT NULL OR lease_until IS NOT NULL)"
    found += [f"{row['id']} is still held" for row in query(arena, held, ids)]
    if count := query(arena, "SELECT count(*) FROM shards WHERE initialization_id = ANY(%s)", ids)[0]["count"]:
        found.append(f"{count} shards are left")
    keys = [job.key for job in jobs]
    again = "SELECT key FROM idempotency_keys WHERE key = ANY(%s) GROUP BY key HAVING count(*) > 1"
    found += [f"{row['key']} made two jobs" for row in query(arena, again, keys)]
    strangers = query(arena, "SELECT id FROM initializations")
    known = {job.id for job in arena.jobs}
    more = [row["id"] for row in strangers if row["id"] not in known]
    arena.tally.duplicated += len(more)
    return found + [f"{job_id} was made without having been accepted" for job_id in more]


def _keys(client: Any, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def _read(client: Any, key: str) -> bytes:
    return bytes(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())


def _logs(arena: Arena) -> list[str]:
    return [f"--- {process.name}\n{process.tail()}" for process in [*arena.services, *arena.workers]]
