"""The choice of learning rate and step; it sees validation losses only."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.quality.cell import Record
from bench.quality.grid import Cell

Key = tuple[str, str, int, str]
"""Model, task, rows, initializer."""


@dataclass(frozen=True)
class Choice:
    """What is run again for the test split."""

    learning_rate: float
    step: int
    validation_loss: float
    """Mean over seeds."""
    at_edge: str | None
    """``lowest`` or ``highest`` where the grid ends at the chosen rate; the best may lie outside."""
    cells: tuple[Cell, ...]
    """The chosen rate's tune cells, one per seed."""

    def test_cells(self, seeds: Sequence[int]) -> list[Cell]:
        """Return the cells that report the choice."""
        shared = {"phase": "test", "chosen_step": self.step}
        return [self.cells[0].model_copy(update={**shared, "seed": seed}) for seed in seeds]


def choose(records: Iterable[Record]) -> dict[Key, Choice]:
    """Return per initializer the learning rate and the step with the lowest validation loss averaged over seeds.

    A run that diverged counts as infinitely bad. An initializer that could not start anywhere has no choice.

    Raises:
        ValueError: a record of the test split is among them, or a learning rate has other seeds than the rest.
    """
    found: dict[Key, dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        cell = Cell.model_validate(record["cell"])
        if cell.phase != "tune":
            raise ValueError("the test split takes no part in choosing")
        found[(*cell.group, cell.initializer)][cell.learning_rate].append(record)
    choices = {key: _best(by_rate) for key, by_rate in found.items()}
    return {key: choice for key, choice in choices.items() if choice is not None}


def _best(by_rate: dict[float, list[Record]]) -> Choice | None:
    seeds = {tuple(sorted(record["cell"]["seed"] for record in records)) for records in by_rate.values()}
    if len(seeds) != 1:
        raise ValueError("every learning rate needs the same seeds")
    candidates = []
    for rate, records in by_rate.items():
        if any(record.get("failed") for record in records):
            continue
        for step, losses in _by_step(records).items():
            candidates.append((sum(losses) / len(losses), rate, step))
    if not candidates:
        return None
    loss, rate, step = min(candidates)
    edge = None
    if len(by_rate) > 1 and rate in {min(by_rate), max(by_rate)}:
        edge = "lowest" if rate == min(by_rate) else "highest"
    return Choice(rate, step, loss, edge, tuple(Cell.model_validate(record["cell"]) for record in by_rate[rate]))


def _by_step(records: list[Record]) -> dict[int, list[float]]:
    losses: dict[int, list[float]] = defaultdict(list)
    for record in records:
        for point in record["curve"]:
            losses[point["step"]].append(math.inf if point["loss"] is None else point["loss"])
    return losses
