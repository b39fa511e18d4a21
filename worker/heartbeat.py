"""A file that a living worker touches, and the probe that looks at its age.

It tells nothing of broker or database: their outage is no reason to restart a worker.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SECONDS = 5.0


@contextmanager
def heartbeat_file(path: Path | None) -> Iterator[None]:
    """Touch the file every few seconds while the block runs; without a path, do nothing."""
    if path is None:
        yield
        return
    done = threading.Event()

    def beat() -> None:
        while True:
            path.touch()
            if done.wait(_SECONDS):
                return

    thread = threading.Thread(target=beat, name="heartbeat-file", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)


def is_fresh(path: Path) -> bool:
    """Whether a worker has touched the file lately."""
    return path.exists() and time.time() - path.stat().st_mtime < 6 * _SECONDS
