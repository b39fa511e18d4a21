"""A real service in processes of its own, on a tiny model that is made for the test."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from d2lora.client import Client
from tests.support.models import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@dataclass
class Up:
    """A running ``d2lora up``."""

    process: subprocess.Popen
    url: str
    key: str
    log: Path
    state: Path

    def client(self) -> Client:
        return Client(self.url, api_key=self.key)

    def children(self, name: str) -> list[int]:
        """Process IDs of the supervisor's children that run this module."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", name], capture_output=True, text=True, check=False
        )
        return [int(line) for line in found.stdout.split()]


@pytest.fixture
def up(tmp_path):
    """A service of the test's own, to kill and to stop."""
    with started(tmp_path) as up:
        yield up


@pytest.fixture(scope="module")
def shared_up(tmp_path_factory):
    """A service for all tests that only use it: to start one takes longer than what they ask of it."""
    with started(tmp_path_factory.mktemp("up")) as up:
        yield up


@contextmanager
def started(directory):
    log, state = directory / "up.log", directory / "state"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("D2LORA")}
    with log.open("w") as output:
        command = [sys.executable, "-m", "d2lora.cli", "up", "--data-dir", str(state), "--port", "0"]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=clean, start_new_session=True)
    try:
        wait_for(lambda: "API key" in log.read_text() or process.poll() is not None, log)
        text = log.read_text()
        assert process.poll() is None, text
        yield Up(process, re.search(r"http://[\d.:]+", text)[0], re.search(r"d2l_\S+", text)[0], log, state)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def wait_for(condition, log=None, *, timeout=180.0):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, log.read_text() if log else "the condition did not come true"
        time.sleep(0.05)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
