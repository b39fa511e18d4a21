"""Processes that can be started, killed, paused and started again, and that never outlive who started them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

_GUARD = Path(__file__).with_name("guard.py")


class Guard:
    """Tells the guard process which groups die with this one; close it, or use it as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(_GUARD)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the guard end; it kills what is still watched."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def watch(self, group: int) -> None:
        """Have a process group killed if this process ends."""
        self._say(f"+{group}\n")

    def forget(self, group: int) -> None:
        """Leave a group alone; it has ended."""
        self._say(f"-{group}\n")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


@dataclass
class Process:
    """A process in a group of its own, with its output in a log file."""

    name: str
    command: Sequence[str]
    log: Path
    guard: Guard
    environment: Mapping[str, str] = field(default_factory=dict)
    """What is added to this process's environment, without its own ``D2LORA_`` variables."""
    user: str | None = None
    polite: signal.Signals = signal.SIGTERM
    """Makes it end in good order."""
    running: subprocess.Popen[bytes] | None = None
    starts: int = 0
    groups: list[int] = field(default_factory=list)
    """Of all its starts: when only its leader dies, the rest of a group may live on."""

    @property
    def pid(self) -> int:
        """Return the process ID."""
        assert self.running is not None, f"{self.name} was not started"
        return self.running.pid

    @property
    def alive(self) -> bool:
        """Whether it runs, be it paused."""
        return self.running is not None and self.running.poll() is None

    def start(self) -> None:
        """Start it; its output goes to the end of its log."""
        assert not self.alive, f"{self.name} runs already"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("D2LORA_")}
        with self.log.open("ab") as log:
            log.write(f"started {self.name}\n".encode())
            log.flush()
            self.running = subprocess.Popen(
                self.command,
                env={**inherited, **self.environment},
                user=self.user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.starts += 1
        self.groups.append(self.pid)
        self.guard.watch(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone; to one that has ended, nothing happens."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, with all of its group."""
        while self.groups:
            group = self.groups.pop()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            self.guard.forget(group)
        if self.running is not None:
            self.running.wait()

    def stop(self, *, grace: float = 30.0) -> bool:
        """End it politely, and after ``grace`` seconds for good; returns whether the polite way was enough."""
        polite = True
        if self.alive and self.running is not None:
            self.send(self.polite)
            self.send(signal.SIGCONT)  # a paused process hears nothing else
            try:
                self.running.wait(grace)
            except subprocess.TimeoutExpired:
                polite = False
        self.kill()  # also what is left of its group
        return polite

    def pause(self) -> None:
        """Stop its whole group from running, until `resume`."""
        self._send_group(signal.SIGSTOP)

    def resume(self) -> None:
        """Let its group go on."""
        self._send_group(signal.SIGCONT)

    def tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:] if self.log.exists() else ""

    def _send_group(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def lives(pid: int) -> bool:
    """Whether there is a process with this ID."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def stopping(processes: Sequence[Process]) -> Iterator[None]:
    """Stop the processes at the end of the block, the last one first and all of them in any case."""
    try:
        yield
    finally:
        for process in reversed(processes):
            process.stop()


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float, process: Process | None = None) -> float:
    """Return the seconds until the condition held.

    Raises:
        RuntimeError: the time was over, or the process ended first; with the end of its log.
    """
    began = time.monotonic()
    while not condition():
        if process is not None and not process.alive:
            raise RuntimeError(f"{process.name} ended before {what}:\n{process.tail()}")
        if time.monotonic() - began > timeout:
            log = f":\n{process.tail()}" if process is not None else ""
            raise RuntimeError(f"after {timeout:g} seconds not yet: {what}{log}")
        time.sleep(0.05)
    return time.monotonic() - began


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on just now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
