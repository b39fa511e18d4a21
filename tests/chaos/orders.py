"""Orders that workers obey at exact moments: files in a directory, of which each is taken by one process, once.

``place`` is for the scenario, ``reach`` for the wrapped worker (`tests.chaos.worker_entry`). A moment is a phase that
the build reports, or a step around the queue of record or the storage.
"""

import json
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "CHAOS_ORDERS"
PHASES = ("loading", "reading", "statistics", "factors", "calibration", "evaluation")
STEPS = ("claim", "claimed", "fetch", "upload", "manifest", "published", "succeeded")
"""Before the claim; after it; before reading the dataset; before the first file; before and after the manifest; after
the end was settled."""
SHARD_STEPS = ("split_upload", "split", "shard", "shard_upload", "shard_finish", "gathered", "build_upload")
_ROOM = 64 * 2**20


@dataclass(frozen=True)
class Order:
    """One placed order."""

    path: Path

    @property
    def taken_by(self) -> int | None:
        """Return the process that obeyed, if one did."""
        taken = self.path.with_suffix(".taken")
        return int(taken.read_text()) if taken.exists() and taken.read_text() else None


def place(directory: Path, action: str, moment: str, **arguments: float) -> Order:
    """Let the next worker that reaches a moment do something there."""
    path = directory / f"{time.monotonic_ns()}.{action}@{moment}.order"
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(arguments))
    draft.rename(path)
    return Order(path)


def withdraw(directory: Path) -> None:
    """Remove what nobody has obeyed."""
    for path in directory.glob("*.order"):
        path.unlink(missing_ok=True)


def reach(moment: str) -> None:
    """Obey an order for this moment, if there is one."""
    directory = os.environ.get(VARIABLE)
    if directory is None:
        return
    for path in sorted(Path(directory).glob(f"*@{moment}.order")):
        arguments = json.loads(path.read_text())
        taken = path.with_suffix(".taken")
        try:
            path.rename(taken)
        except FileNotFoundError:  # another worker was faster
            continue
        taken.write_text(str(os.getpid()))
        action = path.name.partition(".")[2].partition("@")[0]
        _ACTIONS[action](**arguments)
        return


def lift_limits() -> None:
    """Let a process that was short of memory or disk have both again."""
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))


def _kill_child() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_worker() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _stop_child() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _terminate_worker() -> None:
    os.kill(os.getpgid(0), signal.SIGTERM)  # the leader of the group is the worker that was started


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _exhaust_memory() -> None:
    """Ask the operating system for more than this process may have."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    bytearray(16 * _ROOM)


def _exhaust_tensors() -> None:
    """The same through torch, which has an allocator and an error of its own."""
    import torch

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    torch.zeros(16 * _ROOM)


def _break_device() -> None:
    """Raise what torch raises when the accelerator's context is beyond repair."""
    import torch

    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def _fill_disk(room: float = 4096) -> None:
    """Let no file grow beyond a few bytes, as on a full disk, until the limits are lifted."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


_ACTIONS = {
    "kill_child": _kill_child,
    "kill_worker": _kill_worker,
    "stop_child": _stop_child,
    "terminate_worker": _terminate_worker,
    "sleep": _sleep,
    "exhaust_memory": _exhaust_memory,
    "exhaust_tensors": _exhaust_tensors,
    "break_device": _break_device,
    "fill_disk": _fill_disk,
}
