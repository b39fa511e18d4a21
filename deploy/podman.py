"""A container engine in a directory of its own: podman with its service, on a machine without Docker or a registry.

Images that cannot be pulled are made here under the names that the shipped files use: the Python base from Debian's
packages, and stand-ins for PostgreSQL, Redis and SeaweedFS from ``deploy/standins``.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.tools import ROOT

PACKAGES = (
    "aardvark-dns", "buildah", "catatonit", "iptables", "mmdebstrap", "netavark", "podman", "runc",
)  # fmt: skip
"""Debian packages that are needed. catatonit is the init of `init: true`; netavark calls iptables."""

BASE = "docker.io/library/python:3.11-slim-bookworm"
STANDINS = {
    "docker.io/library/postgres:17-bookworm": "postgres.Dockerfile",
    "docker.io/library/redis:7.4-bookworm": "redis.Dockerfile",
    "docker.io/chrislusf/seaweedfs:4.48": "seaweedfs.Dockerfile",
}
_CONTAINERS = """\
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_INDEX_VARIABLES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_TRUSTED_HOST")


def missing_packages() -> list[str]:
    """Return which of the Debian packages are not installed."""
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}"]
    found = {
        name: subprocess.run([*query, name], capture_output=True, text=True, check=False).stdout for name in PACKAGES
    }
    return [name for name, status in found.items() if status != "installed"]


@dataclass(frozen=True)
class Podman:
    """podman and buildah with everything they keep below one directory."""

    directory: Path

    @property
    def socket(self) -> str:
        """Where compose finds the engine."""
        return f"unix://{self.directory}/podman.sock"

    def environment(self) -> dict[str, str]:
        """Return the environment that makes podman and buildah use this directory."""
        return {
            **os.environ,
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
        }

    def prepare(self) -> None:
        """Write the configuration."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "containers.conf").write_text(_CONTAINERS)
        storage = {
            "driver": "overlay",
            "graphroot": str(self.directory / "graph"),
            "runroot": str(self.directory / "run"),
        }
        lines = [f'{name} = "{value}"' for name, value in storage.items()]
        (self.directory / "storage.conf").write_text("\n".join(["[storage]", *lines]) + "\n")

    def run(self, *command: str, cwd: Path = ROOT) -> str:
        """Return what a command says.

        Raises:
            RuntimeError: it failed; with the end of what it said.
        """
        done = subprocess.run(command, cwd=cwd, env=self.environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
            )
        return done.stdout

    def has(self, image: str) -> bool:
        """Return whether an image is there."""
        command = ["podman", "image", "exists", image]
        return subprocess.run(command, env=self.environment(), check=False).returncode == 0

    def make_base(self) -> None:
        """Make the image that the Dockerfiles begin with: Debian's Python under the official image's name."""
        archive = self.directory / "base.tar"
        hooks = (
            'mkdir -p "$1/usr/local/bin"; ln -s /usr/bin/python3 "$1/usr/local/bin/python"',
            f'cp {_CERTIFICATES} "$1{_CERTIFICATES}"',  # also those that this machine was given
        )
        options = ["--variant=minbase", "--include=python3,python3-venv,ca-certificates"]
        self.run(
            "mmdebstrap", "--quiet", *options, *(f"--customize-hook={hook}" for hook in hooks), "bookworm", str(archive)
        )
        # Where this machine is told to find packages, the builds look too.
        given = {"PIP_CERT": _CERTIFICATES} | {
            name: os.environ[name] for name in _INDEX_VARIABLES if name in os.environ
        }
        changes = [part for name, value in given.items() for part in ("--change", f"ENV {name}={value}")]
        self.run("podman", "import", "--quiet", *changes, str(archive), BASE)
        archive.unlink()

    def build(self, dockerfile: Path, image: str, context: Path) -> None:
        """Build an image from a Dockerfile, without asking any registry."""
        links = Path(os.environ.get("PIP_FIND_LINKS", ""))
        volumes = ["--volume", f"{links}:{links}:ro"] if links.is_absolute() and links.is_dir() else []
        options = ["--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker", "--layers"]
        self.run("buildah", "bud", *options, *volumes, "--file", str(dockerfile), "--tag", image, str(context))

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Answer compose while the block runs, and run the health checks, for which podman would need systemd."""
        stop = threading.Event()
        checks = threading.Thread(target=self._check_health, args=(stop,))
        with (self.directory / "service.log").open("wb") as log:
            process = subprocess.Popen(
                ["podman", "system", "service", "--time", "0", self.socket],
                env=self.environment(), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            while not Path(self.socket.removeprefix("unix://")).exists():
                assert process.poll() is None, (self.directory / "service.log").read_text()
                time.sleep(0.05)
            checks.start()
            yield
        finally:
            stop.set()
            if checks.is_alive():
                checks.join()
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
            Path(self.socket.removeprefix("unix://")).unlink(missing_ok=True)

    def _check_health(self, stop: threading.Event) -> None:
        while not stop.wait(3):
            with contextlib.suppress(RuntimeError):
                for container in self.run("podman", "ps", "--quiet").split():
                    # An unhealthy container says so by its exit code.
                    command = ["podman", "healthcheck", "run", container]
                    subprocess.run(command, env=self.environment(), capture_output=True, check=False)

    def clear(self) -> None:
        """Remove every image and the directory."""
        with contextlib.suppress(RuntimeError):
            self.run("podman", "system", "reset", "--force")
        shutil.rmtree(self.directory, ignore_errors=True)
