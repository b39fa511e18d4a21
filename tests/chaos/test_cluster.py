"""``make cluster``: a job goes through it, and nothing of it outlives its starter."""

import subprocess
import sys
from pathlib import Path

import psutil

from cluster.processes import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent


def start(log, *options):
    with log.open("w") as output:
        command = [sys.executable, "-m", "cluster", *options]
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)


def test_a_job_goes_through_the_cluster_and_it_stops(tmp_path, tally):
    log = tmp_path / "log"

    assert start(log, "--check").wait(300) == 0, log.read_text()

    last = log.read_text().splitlines()[-1]
    assert "1 of 1 job succeeded" in last
    tally.figure(last)


def test_nothing_outlives_a_cluster_whose_starter_is_killed(tmp_path, tally):
    log = tmp_path / "log"
    process = start(log)
    wait_until(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, "the cluster runs", timeout=300)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) > 8, log.read_text()

    process.kill()
    process.wait()
    tally.fault("make cluster killed")

    _, alive = psutil.wait_procs(started, timeout=20)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
