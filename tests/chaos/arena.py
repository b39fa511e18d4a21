"""A real cluster under attack: real servers behind fault proxies, API replicas and workers that are kept running."""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from cluster.processes import Guard, Process, free_ports, stopping, wait_until
from cluster.servers import PostgreSql, SeaweedFs, Valkey
from cluster.stack import Servers, running_servers, service, wait_for_service, wait_for_worker, worker
from d2lora.client import Client
from d2lora.errors import D2LoraError, ServiceUnreachable
from d2lora.initializations import Dpo, InitializationSpec, LoraSpec, Mean, Sft
from d2lora.queue import Publisher
from d2lora.settings import BrokerSettings
from tests.chaos import orders
from tests.chaos.tally import Tally
from tests.support.fault_proxy import FaultProxy

LEASE_SECONDS = 6.0
RECONCILE_SECONDS = 0.5
MAX_ATTEMPTS = 5
MODULE = ("tests.chaos.worker_entry", "run")


@dataclass(frozen=True)
class Job:
    """An accepted job."""

    id: str
    kind: str
    key: str
    """Its idempotency key."""


@dataclass
class Arena:
    """The cluster, its faults, and what was submitted to it."""

    directory: Path
    guard: Guard
    servers: Servers
    database: FaultProxy
    """Of the workers; the services have their own link, so that a fault hits one side at a time."""
    service_database: FaultProxy
    broker: FaultProxy
    storage: FaultProxy
    tally: Tally
    api_key: str
    model: str
    services: list[Process] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)
    datasets: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    """Kind of job -> sha256 of the adapter that every such job must end with."""
    jobs: list[Job] = field(default_factory=list)
    start_seconds: float = 0.0
    """A worker's start, while its neighbours start too."""
    kept: set[str] = field(default_factory=set)
    """Names of the processes that are started again when they end."""

    @property
    def proxies(self) -> list[FaultProxy]:
        return [self.database, self.service_database, self.broker, self.storage]

    @property
    def orders(self) -> Path:
        return self.directory / "orders"

    def environment(self, **more: str) -> dict[str, str]:
        """Return what service and workers are told; every connection of theirs goes through a proxy."""
        return {
            **self.servers.environment(database=self.database.port, broker=self.broker.port, storage=self.storage.port),
            "D2LORA_MODELS_ROOTS": json.dumps([str(self.directory)]),
            "D2LORA_DISPATCH_RECONCILE_SECONDS": str(RECONCILE_SECONDS),
            "D2LORA_DISPATCH_LEADER_SECONDS": "3",
            "D2LORA_DISPATCH_TIDY_SECONDS": "2",
            "D2LORA_WORKER_LEASE_SECONDS": str(LEASE_SECONDS),
            "D2LORA_WORKER_HEARTBEAT_SECONDS": "1",
            "D2LORA_WORKER_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "D2LORA_WORKER_GRACE_SECONDS": "10",
            "D2LORA_WORKER_SHARD_TOKENS": "2500",
            "D2LORA_WORKER_MAX_TOKENS_PER_BATCH": "512",
            "D2LORA_WORKER_MODEL_CACHE_GIB": "0.1",
            orders.VARIABLE: str(self.orders),
            **more,
        }

    def add_service(self, **more: str) -> Process:
        """Start one more replica of the API and wait until it is ready."""
        (port,) = free_ports(1)
        name = f"service-{len(self.services) + 1}"
        environment = self.environment(D2LORA_DATABASE_URL=self.servers.database.url(port=self.service_database.port))
        log = self.directory / f"{name}.log"
        process = service(name, port, self.api_key, {**environment, **more}, log, self.guard)
        self.services.append(process)
        self.ports.append(port)
        process.start()
        wait_for_service(process, self.url(len(self.services) - 1))
        self.kept.add(name)
        return process

    def add_worker(self, name: str | None = None, **more: str) -> Process:
        """Start one more worker, of which `ready` waits."""
        name = name or f"worker-{len(self.workers) + 1}"
        log = self.directory / f"{name}.log"
        process = worker(name, self.environment(**more), log, self.guard, module=MODULE)
        self.workers.append(process)
        process.start()
        self.kept.add(name)
        return process

    def remove_worker(self, process: Process) -> None:
        """Stop a worker and forget it."""
        self.kept.discard(process.name)
        process.stop()
        self.workers.remove(process)

    def url(self, replica: int) -> str:
        return f"http://127.0.0.1:{self.ports[replica]}"

    def ready(self) -> None:
        """Return when all processes run and are ready."""
        for process in [*self.services, *self.workers]:
            wait_until(lambda process=process: process.alive, f"{process.name} runs", timeout=60)
        for replica, process in enumerate(self.services):
            wait_for_service(process, self.url(replica))
        for process in self.workers:
            wait_for_worker(process)

    def heal(self) -> None:
        """End every fault that lasts: links, pauses, servers that are down, orders."""
        orders.withdraw(self.orders)
        for proxy in self.proxies:
            proxy.heal()
        for server in (self.servers.database, self.servers.broker, self.servers.storage):
            server.process.resume()
            if not server.process.alive:
                server.start()
        for process in [*self.services, *self.workers]:
            process.resume()

    def upload(self, kind: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Upload the rows of a kind of job."""
        path = self.directory / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with Client(self.url(0), api_key=self.api_key) as client:
            self.datasets[kind] = client.upload_dataset(path).id

    def submit(self, kind: str, count: int = 1, *, patience: float = 60.0) -> list[Job]:
        """Submit jobs, each until a replica has accepted it."""
        return [self._submit(kind, patience) for _ in range(count)]

    def _submit(self, kind: str, patience: float) -> Job:
        # Two objectives and no optimization over them: a job takes a fraction of a second on an idle core.
        spec = InitializationSpec(
            base_model=self.model,
            dataset_id=self.datasets[kind],
            eval_dataset_id=self.datasets["plain"] if kind == "measured" else None,
            objectives=[Sft(), Dpo()],
            combination=Mean(),
            lora=LoraSpec(r=2),
        )
        key, end = secrets.token_hex(8), time.monotonic() + patience
        tries = len(self.jobs)
        while True:
            tries += 1
            try:
                with Client(self.url(tries % len(self.services)), api_key=self.api_key, timeout=10) as client:
                    job = Job(client.submit(spec, idempotency_key=key).id, kind, key)
            except (ServiceUnreachable, httpx.HTTPError, D2LoraError) as error:
                if time.monotonic() > end:
                    raise RuntimeError(f"no replica accepts a job: {error}") from error
                continue
            self.jobs.append(job)
            self.tally.submitted += 1
            return job

    def worker_of(self, pid: int) -> Process:
        """Return the worker to whose group a process belongs."""
        return next(process for process in self.workers if os.getpgid(pid) in process.groups)

    def restart(self, server: PostgreSql | Valkey | SeaweedFs, *, down: float = 0.0) -> None:
        """Kill a server, and start it again after a while."""
        server.process.kill()
        time.sleep(down)
        server.start()

    def publish(self, initialization_ids: Sequence[str], queue: str = "cpu") -> None:
        """Send wake-ups past the outbox, as a broker that doubles and reorders messages would."""
        with Publisher(BrokerSettings(url=self.servers.broker.url())) as publisher:
            for initialization_id in initialization_ids:
                publisher.publish(queue, initialization_id)


@contextlib.contextmanager
def _keeping(arena: Arena) -> Iterator[None]:
    """Start again whatever ends of the product, as an orchestrator would."""
    done = threading.Event()

    def keep() -> None:
        while not done.wait(0.2):
            for process in [*arena.services, *arena.workers]:
                if process.name in arena.kept and not process.alive:
                    arena.tally.restarts += 1
                    process.start()

    thread = threading.Thread(target=keep, name="keeper", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def running_arena(directory: Path, tally: Tally, *, replicas: int, workers: int) -> Iterator[Arena]:
    """Run a cluster while the block does."""
    from cluster.tiny_model import save_tiny_model

    model = save_tiny_model(directory / "model")
    (directory / "orders").mkdir()
    with contextlib.ExitStack() as stack:
        guard = stack.enter_context(Guard())
        servers = stack.enter_context(running_servers(directory, guard))
        ports = (servers.database.port, servers.database.port, servers.broker.port, servers.storage.port)
        proxies = [stack.enter_context(FaultProxy(port)) for port in ports]
        arena = Arena(directory, guard, servers, *proxies, tally, f"d2l_{secrets.token_urlsafe(32)}", model)
        stack.callback(lambda: _stop(arena))
        for _ in range(replicas):
            arena.add_service()
        began = time.monotonic()
        for _ in range(workers):
            arena.add_worker()
        stack.enter_context(_keeping(arena))
        for process in arena.workers:
            wait_for_worker(process)
        arena.start_seconds = time.monotonic() - began
        arena.upload("plain", _rows(24, length=8))
        arena.datasets["measured"] = arena.datasets["plain"]
        arena.upload("sharded", _rows(96, length=30))
        arena.ready()
        yield arena


def _stop(arena: Arena) -> None:
    arena.kept.clear()
    for proxy in arena.proxies:
        proxy.heal()
    with stopping([*arena.workers, *arena.services]):
        pass


def _rows(count: int, *, length: int) -> list[dict[str, str]]:
    """Return rows of preferences with something to learn."""
    return [
        {"prompt": f"{number} plus {number}?" + " go" * (length // 3), "chosen": str(number + number), "rejected": "no"}
        for number in range(count)
    ]
