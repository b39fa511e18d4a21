"""A real S3-compatible server (SeaweedFS) as a child process."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ACCESS_KEY = "AKIATESTACCESS000001"
SECRET_KEY = "test-secret-of-the-tests"


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@contextlib.contextmanager
def running(directory: Path) -> Iterator[str]:
    """Run the server while the block does; yields its address."""
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3", "admin")
    ports = dict(zip([*names, *(f"{name}.grpc" for name in names)], free_ports(10), strict=True))
    command = [str(Path(sys.executable).parent / "weed"), "-logtostderr=true", "mini", f"-dir={directory}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false", "-admin.ui=false"]
    for name in names:
        command += [f"-{name}.port={ports[name]}", f"-{name}.port.grpc={ports[f'{name}.grpc']}"]
    command += [
        f"-filer.localSocket={directory}/f",
        f"-s3.localSocket={directory}/s",
        f"-s3.config={directory}/s3.json",
    ]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ))
    try:
        end = time.monotonic() + 60
        while not _ready(ports["master"], ports["s3"]):
            assert process.poll() is None, (directory / "log").read_text()[-3000:]
            assert time.monotonic() < end, (directory / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{ports['s3']}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its polite end takes a quarter of a minute
        process.wait()


def _ready(master: int, s3: int) -> bool:
    """Whether the gateway answers and the master has a volume to give out."""
    try:
        healthy = httpx.get(f"http://127.0.0.1:{s3}/healthz", timeout=1).status_code == 200
        return healthy and "fid" in httpx.get(f"http://127.0.0.1:{master}/dir/assign", timeout=2).text
    except httpx.HTTPError:
        return False
