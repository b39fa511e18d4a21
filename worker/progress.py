"""How far a phase is, told at least once per batch."""

from collections.abc import Mapping, Sequence

from d2lora.initializations import Phase
from worker.units import OnProgress


class PhaseCounter:
    """Tells how much of a phase is done whenever it is called with an amount."""

    def __init__(self, phase: Phase, total: int, on_progress: OnProgress) -> None:
        self._phase, self._total, self._on_progress = phase, total, on_progress
        self._done = 0
        on_progress(phase, 0, total)

    def __call__(self, amount: int = 1) -> None:
        """Add to what is done."""
        self._done += amount
        self._on_progress(self._phase, min(self._done, self._total), self._total)

    def up_to(self, done: int) -> None:
        """Count what was not needed as done."""
        self(max(0, done - self._done))


def shares(totals: Mapping[Phase, Sequence[int]], on_progress: OnProgress) -> list[OnProgress]:
    """Return what the parts of these phases report to, each with its own totals; their sums are passed on."""
    done = {phase: [0] * len(own) for phase, own in totals.items()}

    def share(index: int) -> OnProgress:
        def report(phase: Phase, own: int, _total: int) -> None:
            done[phase][index] = own
            on_progress(phase, sum(done[phase]), sum(totals[phase]))

        return report

    return [share(index) for index in range(min(map(len, totals.values())))]
