"""Ctrl-C during ``d2lora init``."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

ROWS = '{"prompt": "a", "completion": "b"}\n'

WAITING_WORKER = """
import os, signal, sys, time
from pathlib import Path

interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
sys.stdin.read()
Path("group").write_text(str(os.getpgrp()))
Path("ready").touch()
while not interrupts:
    time.sleep(0.01)
Path("interrupted").touch()
"""

INTERRUPTED_TWICE = """
import os, shutil, signal, sys
import worker.__main__ as entry

class Work:
    def __init__(self, *_, **__):
        pass

    def initialize(self, spec, dataset, extras, workplace, on_progress):
        (workplace / "sums").write_text("x")
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the interrupt comes first")

def remove(*arguments, rmtree=shutil.rmtree, **named):
    os.kill(os.getpid(), signal.SIGINT)
    rmtree(*arguments, **named)

entry.RealWork, shutil.rmtree = Work, remove
sys.exit(entry.init())
"""


@pytest.fixture(autouse=True)
def interruptible():
    """What runs in the background has interrupts ignored, and so would the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_interrupt_from_the_terminal_reaches_the_worker_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "__init__.py").touch()
    (tmp_path / "worker" / "__main__.py").write_text(WAITING_WORKER)
    command = [sys.executable, "-m", "d2lora.cli", "init", "m", "rows.jsonl", "--out", "adapter"]

    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True) as terminal:
        try:
            wait_for(tmp_path / "ready")
            os.killpg(terminal.pid, signal.SIGINT)
            terminal.communicate(timeout=60)
        finally:
            terminal.kill()

    assert terminal.returncode == 130
    assert (tmp_path / "interrupted").exists()
    assert int((tmp_path / "group").read_text()) != terminal.pid  # whose interrupt would be one more


def test_an_interrupt_during_the_removal_leaves_nothing_behind(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS)
    request = {
        "spec": {"base_model": "m", "dataset_id": "local"},
        "dataset": {"path": str(rows), "format": "jsonl"},
        "out": str(tmp_path / "adapter"),
    }

    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_TWICE],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 130, done.stderr
    assert list(tmp_path.iterdir()) == [rows]
