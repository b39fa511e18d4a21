"""What a run of the chaos suite did and what came out, over all of its scenarios."""

import threading
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Tally:
    """Counts; every scenario adds to the same ones."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    submitted: int = 0
    lost: int = 0
    duplicated: int = 0
    stuck: int = 0
    restarts: int = 0
    figures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, kind: str, count: int = 1) -> None:
        """Count an injected fault."""
        with self._lock:
            self.faults[kind] += count

    def figure(self, text: str) -> None:
        """Remember something measured, to be printed at the end."""
        self.figures.append(text)

    @property
    def is_clean(self) -> bool:
        """Whether no job was lost, doubled or stuck."""
        return not (self.lost or self.duplicated or self.stuck)

    def show(self, console: Console) -> None:
        """Print the table."""
        table = Table(title=f"chaos, seed {self.seed}", title_justify="left")
        table.add_column("what")
        table.add_column("count", justify="right")
        for kind, count in sorted(self.faults.items()):
            table.add_row(f"fault: {kind}", str(count))
        table.add_section()
        table.add_row("processes started again", str(self.restarts))
        table.add_row("jobs submitted", str(self.submitted))
        for state, count in sorted(self.states.items()):
            table.add_row(f"ended {state}", str(count))
        for code, count in sorted(self.errors.items()):
            table.add_row(f"  with {code}", str(count))
        table.add_section()
        for name in ("lost", "duplicated", "stuck"):
            table.add_row(f"jobs {name}", str(getattr(self, name)))
        console.print(table)
        for figure in self.figures:
            console.print(figure, markup=False)

    def line(self) -> str:
        """Return the result in one line."""
        failed = f", {self.states['failed']} with a stated error" if self.states["failed"] else ""
        return (
            f"chaos: {self.submitted} jobs, {self.faults.total()} faults of {len(self.faults)} kinds: "
            f"{self.states['succeeded']} succeeded{failed}; {self.lost} lost, {self.duplicated} duplicated, "
            f"{self.stuck} stuck (SEED={self.seed})"
        )
