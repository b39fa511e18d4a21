"""The directory of a unit that is being worked on, and the removal of those whose worker was killed.

They hold data rows. A directory belongs to whoever holds the lock on a file in it. A lock ends with its process, and
unlike a process ID it means the same in every container that shares the directory.
"""

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "d2lora-job-"
_OWNER = ".owner"
_YOUNG_SECONDS = 60.0


@contextmanager
def workplace() -> Iterator[Path]:
    """Make a directory for the block, below the system's directory for temporary files."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, (Path(name) / _OWNER).open("wb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield Path(name)


def remove_leftovers() -> None:
    """Remove the directories that nobody owns any longer."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not _is_owned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_owned(path: Path) -> bool:
    try:
        with (path / _OWNER).open("rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:  # it has just been made, or is just being removed
        return path.exists() and time.time() - path.stat().st_mtime < _YOUNG_SECONDS
    except OSError:  # somebody else's
        return True
    return False
