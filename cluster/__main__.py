"""``python -m cluster``: the whole stack on this machine, on free ports, until Ctrl-C.

With ``--check`` it submits a job on a tiny model, pulls the adapter, stops, and exits with 0 only if all of it worked.
"""

import argparse
import contextlib
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.processes import Guard, Process, free_ports, stopping
from cluster.stack import Servers, running_servers, service, wait_for_service, wait_for_worker, worker
from d2lora.client import Client
from d2lora.errors import D2LoraError
from d2lora.initializations import InitializationSpec, LoraSpec

_WORKERS = 2

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Cluster:
    """The running stack."""

    url: str
    key: str
    directory: Path
    servers: Servers
    service: Process
    workers: list[Process]

    @property
    def own(self) -> list[Process]:
        """Return the product's processes."""
        return [self.service, *self.workers]


def main() -> int:
    """Return 0 if the cluster did what it should."""
    parser = argparse.ArgumentParser(prog="make cluster", description=__doc__)
    parser.add_argument("--check", action="store_true", help="run one job, then stop")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="d2lora-cluster-") as name, Guard() as guard:
        try:
            with running(Path(name), guard) as cluster:
                ready = time.monotonic() - began
                describe(cluster)
                if not arguments.check:
                    console.print(
                        f"ready after {ready:.1f} s; Ctrl-C stops everything and removes the data", style="bold"
                    )
                    return keep_running(cluster, stop)
                seconds, files = run_job(cluster)
                count = len(cluster.servers.processes) + len(cluster.own)
        except (RuntimeError, TimeoutError, D2LoraError) as error:
            console.print(f"cluster: failed: {type(error).__name__}: {error}", markup=False)
            return 1
    console.print(
        f"cluster: {count} processes ready in {ready:.1f} s, 1 of 1 job succeeded in {seconds:.1f} s, "
        f"{files} files pulled and verified, all stopped"
    )
    return 0


@contextlib.contextmanager
def running(directory: Path, guard: Guard) -> Iterator[Cluster]:
    """Start everything, and stop everything at the end of the block."""
    console.print("starting PostgreSQL, Valkey and SeaweedFS")
    with running_servers(directory, guard) as servers:
        key = f"d2l_{secrets.token_urlsafe(32)}"
        (port,) = free_ports(1)
        environment = {
            **servers.environment(),
            # Only this machine gets in, and its user may name any model.
            "D2LORA_MODELS_ALLOWED": '["*"]',
            "D2LORA_MODELS_ROOTS": '["/"]',
            "D2LORA_WORKER_LEASE_SECONDS": "15",
            "D2LORA_WORKER_HEARTBEAT_SECONDS": "1",
        }
        api = service("service", port, key, environment, directory / "service.log", guard)
        workers = [
            worker(f"worker-{number}", environment, directory / f"worker-{number}.log", guard)
            for number in range(1, _WORKERS + 1)
        ]
        cluster = Cluster(f"http://127.0.0.1:{port}", key, directory, servers, api, workers)
        with stopping(cluster.own):
            console.print(f"starting the API and {_WORKERS} workers")
            api.start()
            wait_for_service(api, cluster.url)  # it migrates the database, and the workers find it done
            for process in workers:
                process.start()
            for process in workers:
                wait_for_worker(process)
            yield cluster


def describe(cluster: Cluster) -> None:
    """Print where everything is and how to use it."""
    table = Table(show_header=False, box=None)
    table.add_row("API", cluster.url)
    table.add_row("API key", cluster.key)
    table.add_row("PostgreSQL", cluster.servers.database.url())
    table.add_row("Valkey", cluster.servers.broker.url())
    table.add_row("S3", cluster.servers.storage.url())
    table.add_row("S3 keys", f"{cluster.servers.storage.access_key} {cluster.servers.storage.secret_key}")
    for process in [*cluster.own, *cluster.servers.processes]:
        table.add_row(process.name, f"pid {process.pid}, {process.log}")
    console.print(table)
    console.print("submit a job:", style="bold")
    console.print(f"  export D2LORA_URL={cluster.url} D2LORA_API_KEY={cluster.key}")
    console.print("  d2lora submit MODEL rows.jsonl --wait --out adapter")


def keep_running(cluster: Cluster, stop: threading.Event) -> int:
    """Start again what ends of the product, until told to stop; 1 if a server ends."""
    while not stop.wait(1.0):
        for process in cluster.own:
            if not process.alive:
                console.print(f"{process.name} ended; starting it again. Its log: {process.log}")
                process.start()
        for process in cluster.servers.processes:
            if not process.alive:
                console.print(f"{process.name} ended:\n{process.tail()}", markup=False)
                return 1
    console.print("stopping")
    return 0


def run_job(cluster: Cluster) -> tuple[float, int]:
    """Submit a job on a tiny model and pull its adapter; return its seconds and how many files came."""
    os.environ["TQDM_DISABLE"] = "1"  # no library's progress bar belongs between our lines
    from cluster.tiny_model import save_tiny_model  # noqa: PLC0415  # seconds of imports

    model = save_tiny_model(cluster.directory / "model")
    rows = cluster.directory / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "{n} plus {n}?", "chosen": "{n + n}", "rejected": "no"}}\n' for n in range(24)),
        encoding="utf-8",
    )
    with Client(cluster.url, api_key=cluster.key) as client:
        dataset = client.upload_dataset(rows)
        began = time.monotonic()
        spec = InitializationSpec(base_model=model, dataset_id=dataset.id, lora=LoraSpec(r=2))
        job = client.wait(client.submit(spec).id, poll=0.1, timeout=300)
        seconds = time.monotonic() - began
        if job.error is not None:
            raise RuntimeError(f"the job failed with {job.error.code}: {job.error.detail}")
        return seconds, len(client.pull(job.id, cluster.directory / "adapter"))


if __name__ == "__main__":
    sys.exit(main())
