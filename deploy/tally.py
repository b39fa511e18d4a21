"""Counting what was checked, so that a run can end with one line of figures."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """How many checks held, and what each of the others said."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self, holds: object, what: str) -> None:
        """Count one check; ``what`` says what ought to be so, and where."""
        if holds:
            self.passed += 1
        else:
            self.failures.append(what)
            sys.stdout.write(f"FAILED: {what}\n")

    def equal(self, found: object, wanted: object, what: str) -> None:
        """Count one check of equality, and show both sides when it fails."""
        self.check(found == wanted, f"{what}: found {found!r}, wanted {wanted!r}")

    def none(self, found: Iterable[object], what: str) -> None:
        """Count one check that nothing was found."""
        rest = sorted(map(str, found))
        self.check(not rest, f"{what}: {', '.join(rest)}")

    def __str__(self) -> str:
        return f"{self.passed} checks passed, {len(self.failures)} failed"
