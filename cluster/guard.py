"""Kills process groups when its parent is gone, however that died.

Standard input brings one line per change: ``+PID`` to watch a group, ``-PID`` to forget it. It closes when the parent
ends; what is still watched then gets SIGKILL. Run by path, so that it starts in milliseconds.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Watch until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        number = int(line[1:])
        if line.startswith("+"):
            groups.add(number)
        else:
            groups.discard(number)
    for number in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(number, signal.SIGKILL)


if __name__ == "__main__":
    main()
