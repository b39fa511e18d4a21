"""How long each phase of an initialization takes, told by its progress."""

import time
from dataclasses import dataclass, field
from itertools import pairwise

from d2lora.initializations import Phase
from worker.units import OnProgress


@dataclass
class Clock:
    """Passes progress on and remembers when it came; ``earlier`` are seconds by phase that another worker spent."""

    on_progress: OnProgress
    earlier: dict[str, float] = field(default_factory=dict)
    marks: list[tuple[Phase, float]] = field(default_factory=list)

    def __call__(self, phase: Phase, done: int, total: int) -> None:
        """Take the time and pass it on; this makes a clock an `OnProgress`."""
        self.marks.append((phase, time.monotonic()))
        self.on_progress(phase, done, total)

    def seconds(self) -> dict[str, float]:
        """Return the seconds between marks, added up by the phase that the earlier mark names."""
        seconds = dict(self.earlier)
        for (phase, start), (_, end) in pairwise(self.marks):
            seconds[phase] = seconds.get(phase, 0.0) + end - start
        return {phase: round(value, 3) for phase, value in seconds.items()}
