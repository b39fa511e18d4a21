"""Running the service and a worker as child processes, and keeping the worker alive.

Each child gets a pipe as standard input and stops when it closes, so none outlives its supervisor, however that dies.
"""

import contextlib
import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

_GRACE_SECONDS = 25.0
_LONGEST_PAUSE_SECONDS = 30.0


@dataclass
class Child:
    """A process that is started again when it ends, after a pause that grows while it keeps ending soon."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 0.0
    restarts: int = field(default=0)

    def start(self) -> None:
        """Start the process in a process group of its own, so that a Ctrl-C reaches only the supervisor."""
        self.process = subprocess.Popen(  # noqa: S603  # our own module, by the running interpreter
            self.command,
            env={**os.environ, **self.environment, "D2LORA_SUPERVISED": "1"},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.started = time.monotonic()

    def restart_if_dead(self) -> bool:
        """Start the process again if it has ended and its pause is over; True if it was started."""
        assert self.process is not None
        if self.process.poll() is None:
            return False
        lived = time.monotonic() - self.started
        self.pause = 0.5 if lived > _LONGEST_PAUSE_SECONDS else min(_LONGEST_PAUSE_SECONDS, max(0.5, 2 * self.pause))
        sys.stderr.write(f"{self.name} ended with {self.process.returncode}; starting it again in {self.pause:g} s\n")
        time.sleep(self.pause)
        self.restarts += 1
        self.start()
        return True

    def stop(self) -> None:
        """End the process: politely, and after a grace period for good."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


@contextlib.contextmanager
def running(children: Sequence[Child]) -> Iterator[None]:
    """Start the children, and stop them all at the end of the block."""
    try:
        for child in children:
            child.start()
        yield
    finally:
        for child in children:
            child.stop()


def supervise(service: Child, worker: Child) -> int:
    """Keep the worker running until the service ends; return the service's exit code."""
    assert service.process is not None
    while (code := service.process.poll()) is None:
        worker.restart_if_dead()
        time.sleep(0.2)
    return code


def api_key_file(data_dir: Path) -> str:
    """Return the API key of a data directory, which is made when it is asked for first."""
    path = data_dir / "api_key"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"d2l_{secrets.token_urlsafe(32)}\n")
    return path.read_text(encoding="utf-8").strip()


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_taken(host: str, port: int) -> bool:
    """Whether another process listens there: what answers would be taken for ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the service does
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def wait_until_ready(url: str, process: subprocess.Popen[bytes], *, timeout: float = 60.0) -> None:
    """Return when the service answers that it is ready.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with {process.returncode} before it was ready")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=2).is_success:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the service was not ready after {timeout:g} seconds")
