"""The disk for what lasts no longer than a process: directories of its own, and what it means that the disk is full.

They hold data rows. A directory belongs to whoever holds the lock on a file in it. A lock ends with its process, and
unlike a process ID it means the same in every container that shares the directory.
"""

import errno
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from d2lora.errors import ScratchFull

Purpose = Literal["job", "upload"]

_OWNER = ".owner"
_YOUNG_SECONDS = 60.0


@contextmanager
def scratch_directory(purpose: Purpose) -> Iterator[Path]:
    """Make a directory for the block, below the system's directory for temporary files."""
    with tempfile.TemporaryDirectory(prefix=_prefix(purpose)) as name, (Path(name) / _OWNER).open("wb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield Path(name)


def remove_leftovers(purpose: Purpose) -> None:
    """Remove the directories that nobody owns any longer, since their process was killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_prefix(purpose)}*"):
        if not _is_owned(path):
            shutil.rmtree(path, ignore_errors=True)


def is_full(error: BaseException) -> bool:
    """Whether the operating system says that a disk is full."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Turn a full disk into our error, which another try may not meet."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise ScratchFull(f"no room left for {what}; free space") from error
        raise


def _prefix(purpose: Purpose) -> str:
    return f"d2lora-{purpose}-"


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
