"""The processes of a cluster and what they are told through their environment."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from cluster.processes import Guard, Process, lives, wait_until
from cluster.servers import PostgreSql, SeaweedFs, Valkey, postgresql, seaweedfs, valkey

BUCKET = "d2lora"
_ROOT = Path(__file__).resolve().parent.parent
_READY = re.compile(r"worker_ready name=\S+:(\d+)")


@dataclass
class Servers:
    """What the product stands on."""

    database: PostgreSql
    broker: Valkey
    storage: SeaweedFs

    @property
    def processes(self) -> list[Process]:
        """Return the three processes."""
        return [self.database.process, self.broker.process, self.storage.process]

    def environment(
        self, *, database: int | None = None, broker: int | None = None, storage: int | None = None
    ) -> dict[str, str]:
        """Return what service and workers need to know; the ports are those of proxies in front, if there are any."""
        return {
            "D2LORA_DATABASE_URL": self.database.url(port=database),
            "D2LORA_BROKER_URL": self.broker.url(port=broker),
            "D2LORA_STORAGE_BUCKET": BUCKET,
            "D2LORA_STORAGE_ENDPOINT_URL": self.storage.url(port=storage),
            "D2LORA_STORAGE_PUBLIC_ENDPOINT_URL": self.storage.url(),
            **self.storage.credentials,
        }


@contextlib.contextmanager
def running_servers(directory: Path, guard: Guard) -> Iterator[Servers]:
    """Start the three servers, at the same time, and stop them at the end of the block."""
    servers = Servers(
        postgresql(directory / "postgresql", guard),
        valkey(directory / "valkey", guard),
        seaweedfs(directory / "seaweedfs", guard),
    )
    try:
        with ThreadPoolExecutor() as pool:
            started = [pool.submit(server.start) for server in (servers.database, servers.broker, servers.storage)]
            for start in started:
                start.result()
        servers.storage.client().create_bucket(Bucket=BUCKET)
        yield servers
    finally:
        for server in (servers.database, servers.broker, servers.storage):
            server.process.stop()
            server.discard()


def service(name: str, port: int, key: str, environment: Mapping[str, str], log: Path, guard: Guard) -> Process:
    """Return a replica of the API; it is not started yet."""
    own = {
        "D2LORA_SERVICE_HOST": "127.0.0.1",
        "D2LORA_SERVICE_PORT": str(port),
        "D2LORA_SERVICE_API_KEYS": json.dumps({"local": key}),
    }
    command = [sys.executable, "-m", "service"]
    return Process(name, command, log, guard, environment={"PYTHONPATH": str(_ROOT), **environment, **own})


def worker(
    name: str, environment: Mapping[str, str], log: Path, guard: Guard, *, module: tuple[str, ...] = ("worker", "run")
) -> Process:
    """Return a worker, started by ``python -m`` and these words; it is not started yet."""
    # Workers on one machine share its cores; one thread each also makes sums the same from run to run.
    own = {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return Process(name, [sys.executable, "-m", *module], log, guard, environment={**own, **environment})


def wait_for_service(process: Process, url: str, *, timeout: float = 120.0) -> None:
    """Return when a replica can serve."""

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz", timeout=2).is_success
        except httpx.TransportError:
            return False

    wait_until(ready, f"{process.name} is ready", timeout=timeout, process=process)


def wait_for_worker(process: Process, *, timeout: float = 120.0) -> None:
    """Return when a worker's child, the last of this start if it had several, is ready and still lives."""

    def ready() -> bool:
        written = process.log.read_text(encoding="utf-8", errors="replace")
        children = _READY.findall(written.rpartition(f"started {process.name}\n")[2])
        return bool(children) and lives(int(children[-1]))

    wait_until(ready, f"{process.name} is ready", timeout=timeout, process=process)
