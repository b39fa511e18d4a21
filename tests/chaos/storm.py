"""Faults of all kinds, drawn at random from a seed, while jobs are submitted without a pause."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos import orders
from tests.chaos.arena import LEASE_SECONDS, Arena, Job
from tests.chaos.orders import PHASES, SHARD_STEPS, STEPS, place
from tests.chaos.verdict import TERMINAL, query

_OUTSTANDING = 10
_MOMENTS = [*(phase for phase in PHASES if phase != "evaluation"), *STEPS, *SHARD_STEPS]


@dataclass
class Storm:
    """Draws one fault after another; those that cost a worker its life no faster than workers can start."""

    arena: Arena
    rng: random.Random
    kill_seconds: float
    """Mean pause between two kills of a worker or its child."""
    calm_seconds: float = 4.0
    """Mean pause between two other faults."""
    kills_only: bool = False
    history: list[str] = field(default_factory=list)

    def blow(self, jobs_wanted: int, seconds: float) -> list[Job]:
        """Submit jobs until there are so many or the time is over; return them once faults have stopped."""
        done = threading.Event()
        threads = [
            threading.Thread(target=self._faults, args=(done,)),
            threading.Thread(target=self._kills, args=(done,)),
        ]
        for thread in threads[1 if self.kills_only else 0 :]:
            thread.start()
        jobs: list[Job] = []
        end = time.monotonic() + seconds
        try:
            while len(jobs) < jobs_wanted and time.monotonic() < end:
                if self._outstanding(jobs) < _OUTSTANDING:
                    kind = "sharded" if len(jobs) % 10 == 9 else "plain"
                    jobs += self.arena.submit(kind, patience=120)
                else:
                    time.sleep(0.2)
            while self._outstanding(jobs) and time.monotonic() < end:
                time.sleep(0.5)
        finally:
            done.set()
            for thread in threads[1 if self.kills_only else 0 :]:
                thread.join()
        return jobs

    def _outstanding(self, jobs: list[Job]) -> int:
        statement = "SELECT count(*) FROM initializations WHERE id = ANY(%s) AND state != ALL(%s)"
        try:
            return int(query(self.arena, statement, [job.id for job in jobs], list(TERMINAL))[0]["count"])
        except Exception:  # the database is being restarted
            return _OUTSTANDING

    def _kills(self, done: threading.Event) -> None:
        shapes: list[Callable[[], str]] = [self._kill_worker, self._kill_child_at, self._kill_worker_at]
        while not done.wait(self.rng.uniform(0.5, 1.5) * self.kill_seconds):
            self._inject(self.rng.choice(shapes))

    def _faults(self, done: threading.Event) -> None:
        faults = [
            self._kill_replica,
            self._kill_broker,
            self._empty_broker,
            self._pause_broker,
            self._cut_broker,
            self._double_wake_ups,
            self._restart_database,
            self._cut_database,
            self._break_a_commit,
            self._hang_database,
            self._refuse_storage,
            self._slow_storage,
            self._break_an_upload,
            self._corrupt_a_download,
            self._freeze_a_worker,
            self._fill_a_disk,
            self._exhaust_memory,
            self._terminate_worker,
        ]
        deck: list[Callable[[], str]] = []
        while not done.wait(self.rng.uniform(0.5, 1.5) * self.calm_seconds):
            if not deck:
                deck = self.rng.sample(faults, len(faults))  # every kind comes before one comes again
            self._inject(deck.pop())

    def _inject(self, fault: Callable[[], str]) -> None:
        kind = fault()
        if kind:
            self.arena.tally.fault(kind)
            self.history.append(kind)

    # Workers

    def _kill_worker(self) -> str:
        alive = [process for process in self.arena.workers if process.alive]
        if not alive:
            return ""
        self.rng.choice(alive).kill()
        return "worker killed at random"

    def _kill_child_at(self) -> str:
        return self._ordered("kill_child", "child killed", self.rng.choice(_MOMENTS))

    def _kill_worker_at(self) -> str:
        return self._ordered("kill_worker", "worker killed", self.rng.choice(_MOMENTS))

    def _freeze_a_worker(self) -> str:
        moment = self.rng.choice(["statistics", "upload", "manifest", "published"])
        order = place(self.arena.orders, "stop_child", moment)
        if not self._taken(order):
            return ""
        time.sleep(1.5 * LEASE_SECONDS)
        self.arena.worker_of(order.taken_by or 0).resume()
        return "lease over under a live worker"

    def _fill_a_disk(self) -> str:
        return self._ordered("fill_disk", "disk full", "statistics", tell_moment=False)

    def _exhaust_memory(self) -> str:
        return self._ordered("exhaust_memory", "out of memory in the child", "statistics", tell_moment=False)

    def _terminate_worker(self) -> str:
        return self._ordered("terminate_worker", "soft shutdown during a batch", "statistics", tell_moment=False)

    def _ordered(self, action: str, kind: str, moment: str, *, tell_moment: bool = True) -> str:
        """Return the kind of fault if a worker reached the moment in time."""
        if not self._taken(place(self.arena.orders, action, moment)):
            return ""
        return f"{kind} at {moment}" if tell_moment else kind

    def _taken(self, order: orders.Order, timeout: float = 15.0) -> bool:
        end = time.monotonic() + timeout
        while order.taken_by is None:
            if time.monotonic() > end:
                order.path.unlink(missing_ok=True)
                return order.taken_by is not None
            time.sleep(0.05)
        return True

    # Service and broker

    def _kill_replica(self) -> str:
        self.rng.choice(self.arena.services).kill()
        return "API replica killed"

    def _kill_broker(self) -> str:
        self.arena.restart(self.arena.servers.broker, down=self.rng.uniform(0, 3))
        return "Redis killed"

    def _empty_broker(self) -> str:
        broker = self.arena.servers.broker
        broker.process.kill()
        broker.discard()
        broker.start()
        return "Redis restarted empty"

    def _pause_broker(self) -> str:
        process = self.arena.servers.broker.process
        process.pause()
        time.sleep(self.rng.uniform(1, 6))
        process.resume()
        return "Redis paused"

    def _cut_broker(self) -> str:
        self.arena.broker.cut()
        return "Redis links reset"

    def _double_wake_ups(self) -> str:
        jobs = self.rng.choices(self.arena.jobs[-40:], k=10)
        self.arena.publish([job.id for job in jobs])
        return "wake-ups doubled or out of order"

    # Database

    def _restart_database(self) -> str:
        self.arena.restart(self.arena.servers.database, down=self.rng.uniform(0, 2))
        return "PostgreSQL killed and restarted"

    def _cut_database(self) -> str:
        for link in (self.arena.database, self.arena.service_database):
            link.cut()
        return "PostgreSQL links reset"

    def _break_a_commit(self) -> str:
        forwarded = self.rng.random() < 0.5
        sprung = self.arena.database.when(b"COMMIT", lambda: None, forwarded=forwarded)
        return "PostgreSQL link reset at a commit" if sprung.wait(15) else ""

    def _hang_database(self) -> str:
        self.arena.database.hanging = True
        time.sleep(self.rng.uniform(0.5, 3))
        self.arena.database.hanging = False
        return "PostgreSQL link hangs"

    # Storage

    def _refuse_storage(self) -> str:
        self.arena.storage.refuse()
        time.sleep(self.rng.uniform(0.5, 3))
        self.arena.storage.accept()
        return "S3 refuses"

    def _slow_storage(self) -> str:
        self.arena.storage.latency = 0.2
        time.sleep(self.rng.uniform(1, 4))
        self.arena.storage.latency = 0.0
        return "S3 slow"

    def _break_an_upload(self) -> str:
        return (
            "S3 link reset half-way through an upload"
            if self.arena.storage.cut_after(3000, upload=True).wait(15)
            else ""
        )

    def _corrupt_a_download(self) -> str:
        return "S3 download corrupted" if self.arena.storage.corrupt_after(1500, upload=False).wait(15) else ""
