"""``python -m tests.chaos``: run the suite, print what was injected and what came out, end with one line.

Without options every scenario runs; ``--short`` runs those of CI; ``--seconds`` or ``--jobs`` run the soak alone.
"""

import argparse
import os
import sys

import pytest
from rich.console import Console

_SOAK = "tests/chaos/test_many_jobs.py::test_jobs_survive_faults_of_all_kinds"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    soak = arguments.seconds is not None or arguments.jobs is not None
    if soak:
        os.environ["SECONDS"] = str(arguments.seconds or 24 * 3600)
        os.environ["JOBS"] = str(arguments.jobs or 10**6)
    if arguments.seed is not None:
        os.environ["SEED"] = str(arguments.seed)
    from tests.chaos.conftest import TALLY  # now that the seed is known; pytest takes the same module

    print(f"SEED={TALLY.seed}", flush=True)
    which = _SOAK if soak else "tests/chaos"
    marks = "chaos and short" if arguments.short else "chaos"
    failed = bool(pytest.main(["-m", marks, "--timeout", "0" if soak else "2400", which]))
    TALLY.show(Console(highlight=False, soft_wrap=True))
    few = arguments.jobs is not None and arguments.seconds is None and TALLY.submitted < arguments.jobs
    fell_short = failed or few or not TALLY.is_clean
    print(TALLY.line() + ("; FELL SHORT" if fell_short else ""))
    return int(fell_short)


if __name__ == "__main__":
    sys.exit(main())
